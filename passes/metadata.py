"""What a graph records about its values: shapes, dtypes, devices, the module that owns a node."""

import contextlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from nsa_compile.passes.sites import Place, Scope, Shape, Size

# Where tracers record a node's value: Dynamo under the first name, export and the propagation passes under the second.
VALUE_KEYS = ("example_value", "val")
# Names that tracers give to parameters and buffers: Dynamo's, and torch.export's prefixes.
_PARAMETER_NAME = re.compile(r"_(parameters|buffers)_|^(p|b|c)_")
# Tensors of more dimensions are no attention's output.
_MOST_DIMENSIONS = 5
# Where `record_constants` puts the values of an exported program's constants.
_CONSTANT_KEY = "nsa_constant"


def recorded_value(node: Any) -> Any:
    """Returns what the tracer recorded for a node (a fake tensor, a SymInt, …), the thing itself if it is no node."""
    if not isinstance(node, fx.Node):
        return node
    for key in VALUE_KEYS:
        if node.meta.get(key) is not None:
            return node.meta[key]
    return None


def record_constants(program: torch.export.ExportedProgram) -> None:
    """Records the values of the tensors that an exported program's code made from numbers.

    They are inputs of its graph, and no part of its state that anybody could set: buffers are not recorded.
    """
    names = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        constant = program.constants.get(names.get(node.name, ""))
        if isinstance(constant, torch.Tensor):
            node.meta[_CONSTANT_KEY] = constant


def recorded_constant(node: fx.Node) -> torch.Tensor | None:
    """Returns the values that `record_constants` has recorded for an input."""
    return node.meta.get(_CONSTANT_KEY)


def value_key(node: fx.Node) -> str | None:
    """Returns the name under which the node's value is recorded; None where it is not."""
    return next((key for key in VALUE_KEYS if node.meta.get(key) is not None), None)


def tensor_of(node: Any) -> torch.Tensor | None:
    """Returns the recorded tensor of a node; None for anything else."""
    value = recorded_value(node)
    return value if isinstance(node, fx.Node) and isinstance(value, torch.Tensor) else None


def shape_of(node: Any) -> Shape | None:
    """Returns the symbolic shape of a node's tensor; None where the graph does not say."""
    tensor = tensor_of(node)
    return None if tensor is None else tuple(tensor.shape)


def dtype_of(node: Any) -> torch.dtype | None:
    """Returns the dtype of a node's tensor; None where the graph does not say."""
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def recorded_tensor(node: fx.Node) -> torch.Tensor:
    """Returns the recorded tensor of a node that was read before, and therefore has one.

    Raises:
        LookupError: it has none.
    """
    tensor = tensor_of(node)
    if tensor is None:
        raise LookupError(f"the graph records no tensor for {node}")
    return tensor


def recorded_shape(node: fx.Node) -> Shape:
    """Returns the symbolic shape of a node that was read before; raises as `recorded_tensor` does."""
    return tuple(recorded_tensor(node).shape)


def recorded_dtype(node: fx.Node) -> torch.dtype:
    """Returns the dtype of a node that was read before; raises as `recorded_tensor` does."""
    return recorded_tensor(node).dtype


def device_of(node: fx.Node) -> torch.device:
    """Returns the device of a node that was read before; raises as `recorded_tensor` does."""
    return recorded_tensor(node).device


def number_of(value: Any) -> "float | int | bool | None":
    """Returns the number that a constant, or a node whose recorded value is fixed, stands for; None otherwise.

    Reads only: a symbolic value is a number here only if the shape environment has already fixed it.
    """
    value = recorded_value(value)
    if isinstance(value, int | float | bool):
        return value
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        expression = value.node.expr
        if not expression.free_symbols:
            return value.node.pytype(expression)
    return None


def fixed_number_of(value: Any) -> "float | int | bool | None":
    """Returns what `number_of` does, and for a symbolic number, while Dynamo compiles, its value at hand.

    The value is guarded: with another one the graph is compiled anew.
    """
    number, recorded = number_of(value), recorded_value(value)
    if number is None and isinstance(recorded, torch.SymFloat | torch.SymInt) and TracingContext.try_get():
        with contextlib.suppress(GuardOnDataDependentSymNode):
            return float(recorded)
    return number


def same_size(left: Size, right: Size) -> bool:
    """Tells whether two sizes are equal for every input, without adding a guard."""
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt) and left.node.expr == right.node.expr:
        return True
    return bool(statically_known_true(left == right))


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Tells whether two shapes are equal for every input, without adding a guard."""
    return len(left) == len(right) and all(map(same_size, left, right))


def has_strides_of(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether two tensors of one shape have the same strides, but for dimensions of size 1."""
    sizes = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(same_size(size, 1) or same_size(mine, theirs) for size, mine, theirs in sizes)


def memory_order(tensor: torch.Tensor) -> "list[int] | None":
    """Returns the order of dimensions in which a tensor is contiguous; None where it is in none."""
    rank = tensor.dim()
    if rank > _MOST_DIMENSIONS:
        return None
    for order in itertools.permutations(range(rank)):
        expected: Size = 1
        for dim in reversed(order):
            if not same_size(tensor.shape[dim], 1):
                if not same_size(tensor.stride(dim), expected):
                    break
                expected = expected * tensor.shape[dim]
        else:
            return list(order)
    return None


def is_permuted(node: fx.Node) -> bool:
    """Tells whether a node's tensor is known to be contiguous in another order of its dimensions than their own."""
    tensor = tensor_of(node)
    order = None if tensor is None else memory_order(tensor)
    return order is not None and order != sorted(order)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """Returns the mode that the graph's own fake tensors belong to.

    Dynamo hands a backend another, fresh mode with its example inputs: the two do not mix.
    """
    for node in graph.nodes:
        value = recorded_value(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def propagate_shapes(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Records the values that a `symbolic_trace` graph lacks, by running it on fake copies of example inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(graph_module, mode).propagate(*example_inputs)


def is_parameter(node: fx.Node) -> bool:
    """Tells whether a node is a parameter or a buffer of the model."""
    if node.op == "get_attr" or isinstance(recorded_value(node), torch.nn.Parameter):
        return True
    return node.op == "placeholder" and _PARAMETER_NAME.search(node.name) is not None


def is_cache(node: fx.Node) -> bool:
    """Tells whether a node is a buffer of more than two dimensions: no weight, but keys or values of the past."""
    is_buffer = "buffers_" in node.name or node.name.startswith("b_")
    return is_parameter(node) and is_buffer and len(shape_of(node) or ()) > 2


def place_of(node: fx.Node, scope: Scope, spelling: str, shapes: "dict[str, Shape] | None" = None) -> Place:
    """Describes where a node is: its module, its class and the user's lines that made it."""
    module, module_class = owner_of(node)
    return Place(
        node=node,
        scope=scope,
        spelling=spelling,
        module=module,
        module_class=module_class,
        stack_trace=node.meta.get("stack_trace") or "",
        shapes=shapes or {},
    )


def owner_of(node: fx.Node) -> tuple[str, str]:
    """Returns the dotted name and the class name of the module that a node was traced in.

    The name is relative to what was compiled: "model.layers.0.self_attn".  Nodes of the compiled root itself have
    no record, nor have those of a frame that Dynamo resumed; both give "".
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, owner = list(stack.values())[-1]
    class_name = owner if isinstance(owner, str) else owner.__qualname__
    return dotted_name(path), class_name.rsplit(".", 1)[-1]


def scope_path(node: fx.Node) -> tuple[str, ...]:
    """Returns the dotted names of the modules that a node was traced in, outermost first."""
    return tuple(dotted_name(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def dotted_name(path: str) -> str:
    """Turns a tracer's path, "L['self'].model.layers.0" or "L['self'].layers[0]", into "model.layers.0"."""
    root = re.match(r"[A-Z]\['[^']*'\]\.?", path)
    path = path[root.end() :] if root else path
    path = re.sub(r"(?:__dict__\['_modules'\]|_modules)\['([^']*)'\]", r"\1", path)
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).strip(".")
