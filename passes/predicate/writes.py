"""Which nodes write tensors in place, and whose value a reader of a tensor therefore sees.

Dynamo's graphs are not functional: `mask[:, 0] = True`, `mask |= other` and `position.add_(1)` are nodes, and
later nodes may read the old name.  A tensor's value at a place in the program is the one that its last writer
before that place has left.
"""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from nsa_compile.passes.metadata import tensor_of
from nsa_compile.passes.predicate.tensor import size_expression

_INPLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "ilshift", "irshift", "iand"}
    | {"ixor", "ior", "setitem", "delitem"}
)
# End in an underscore but change nothing that a reader could see.
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_", "and_", "or_", "not_", "is_", "_set_grad_enabled"})

# What an exported graph calls, by name, to index a tensor inside flex_attention's modifications.
_INDEXING = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"
# NumPy's functions and methods, as Dynamo names them, that write none of their arguments.  Any other may: `fill`, say.
_NUMPY = "wrapped_"
_NUMPY_READERS = frozenset(
    f"{_NUMPY}{name}"
    for name in ("tril", "triu", "astype", "getitem", "reshape", "eq", "ne", "lt", "le", "gt", "ge", "invert")
)
# Operations that keep a number, but for its precision.
_CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "_to_copy", "detach"})
_RESHAPING = frozenset(
    {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "as_strided_"}
)


def target_name(node: fx.Node) -> str:
    """The bare name of what a node calls: `add` for operator.add, Tensor.add and aten.add.Tensor alike."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    if isinstance(target, str):
        return target
    return str(getattr(target, "__name__", target))


def written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The argument nodes whose tensors the node writes in place."""
    if node.op == "call_method":
        name = str(node.target)
        dunder = name.startswith("__")
        writes = (name[2:-2] in _INPLACE_OPERATORS) if dunder else name.endswith("_") and name not in _HARMLESS
        return _nodes(node.args[:1]) if writes else ()
    if node.op != "call_function":
        return ()
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return () if is_captured_read(node) else _written_by_bodies(node)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _written_by_schema(node)
    name = target_name(node)
    written = _nodes([node.kwargs.get("out")])
    if name.startswith(_NUMPY):
        return written if name in _NUMPY_READERS else tuple(node.all_input_nodes)
    module = getattr(target, "__module__", "")
    if module in ("_operator", "operator"):
        return _nodes(node.args[:1]) if name in _INPLACE_OPERATORS else written
    if name.endswith("_") and not name.startswith("__") and name not in _HARMLESS:
        return written + _nodes(node.args[:1])
    if "inplace" in node.kwargs or "nn.functional" in str(module):
        return written + (_nodes(node.args[:1] or list(node.kwargs.values())[:1]) if _is_inplace(node) else ())
    return written


def is_captured_read(node: fx.Node) -> bool:
    """Whether a node reads a tensor that a modification of flex_attention captures, as exported graphs write it."""
    return target_name(node) == "flat_apply" and _INDEXING in node.args


def _is_inplace(node: fx.Node) -> bool:
    """Whether a function such as F.relu(x, inplace=True) is told to work in place."""
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        bound = node.kwargs
    return bool(bound.get("inplace", False))


def _written_by_schema(node: fx.Node) -> tuple[fx.Node, ...]:
    target: Any = node.target
    if target_name(node) in _HARMLESS:
        return ()
    overloads = (
        [target] if isinstance(target, torch._ops.OpOverload) else [getattr(target, o) for o in target.overloads()]
    )
    written: list[Any] = []
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if argument.name in node.kwargs:
                written.append(node.kwargs[argument.name])
            elif position < len(node.args) and not argument.kwarg_only:
                written.append(node.args[position])
    return _nodes(written)


def _written_by_bodies(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a higher-order operator writes: the operands that its bodies write; every operand where that is unclear."""
    owner = node.graph.owning_module
    attributes = {a: getattr(owner, str(a.target), None) for a in node.all_input_nodes if a.op == "get_attr"}
    bodies = [body for body in attributes.values() if isinstance(body, fx.GraphModule)]
    # Keyword arguments configure the operator.
    leaves = pytree.arg_tree_leaves(*node.args)
    operands = [a for a in leaves if not (isinstance(a, fx.Node) and attributes.get(a) in bodies)]
    tensors = tuple(operand for operand in node.all_input_nodes if tensor_of(operand) is not None)
    if not bodies:
        return tensors
    written: list[fx.Node] = []
    for body in bodies:
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        writes = Writes(body.graph)
        touched = [any(True for _ in writes.between(p, -1, len(body.graph.nodes))) for p in placeholders]
        if any(touched) and len(placeholders) > len(operands):
            return tensors
        # The last operands are the body's: before them come a predicate or an identifier.
        pairs = zip(operands[-len(touched) :], touched, strict=False)
        written += [operand for operand, is_written in pairs if is_written and isinstance(operand, fx.Node)]
    return tuple(dict.fromkeys(written))


def _nodes(arguments: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return tuple(found)


class Writes:
    """The in-place writers of one graph.

    Args:
        graph: the graph.
        read_number: given a placeholder or get_attr node, the number in its tensor if nothing can change it unnoticed.
    """

    def __init__(self, graph: fx.Graph, read_number: Callable[[fx.Node], "float | None"] | None = None) -> None:
        self._read_number = read_number
        self._position: dict[fx.Node, int] = {}
        # Storage -> nodes that write it, with the node they write through, in program order.
        self._writers: dict[int, list[tuple[fx.Node, fx.Node]]] = collections.defaultdict(list)
        # Storages whose tensors change their shape in place: the shapes that the graph records are the last ones.
        self._reshaped: set[int | None] = set()
        for number, node in enumerate(graph.nodes):
            self._position[node] = number
            for written in written_by(node):
                storage = self.storage(written)
                if target_name(node) in _RESHAPING:
                    self._reshaped.add(storage)
                if storage is not None:
                    self._writers[storage].append((node, written))

    def number_from_outside(self, value: Any, reader: fx.Node) -> float | None:
        """Returns the number in a tensor from outside, as `reader` sees it; None if it may change unnoticed."""
        while self._read_number is not None and isinstance(value, fx.Node):
            tensor = tensor_of(value)
            # A cast may be a copy or the tensor itself: neither may have been written before it is read.
            is_written = any(True for _ in self.between(value, -1, self.position(reader)))
            if is_written or tensor is None or not tensor.is_floating_point():
                return None
            if value.op in ("placeholder", "get_attr"):
                return self._read_number(value)
            if target_name(value) not in _CASTS:
                return None
            value = value.args[0]
        return None

    @staticmethod
    def storage(node: fx.Node) -> int | None:
        """Identity of the memory behind a node's tensor: views share it, in fake tensors too."""
        tensor = tensor_of(node)
        if tensor is None or tensor.layout != torch.strided:
            return None
        try:
            return StorageWeakRef(tensor.untyped_storage()).cdata
        except (NotImplementedError, RuntimeError):
            # A tensor inside torch.vmap has no memory of its own.
            return None

    def position(self, node: fx.Node) -> int:
        """Place of the node in the program."""
        return self._position[node]

    def between(self, node: fx.Node, start: int, end: int) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Writers of the node's memory that run after place `start` and before place `end`.

        Yields:
            The writer, and the node that it writes through.
        """
        for writer, through in self.after(node, start):
            if self._position[writer] < end:
                yield writer, through

    def after(self, node: fx.Node, start: int) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Writers of the node's memory that run after place `start`, and the node that each writes through."""
        storage = self.storage(node)
        for writer, through in self._writers.get(storage, ()) if storage is not None else ():
            if self._position[writer] > start:
                yield writer, through

    def last_write(self, node: fx.Node, place: int) -> "Write | None":
        """The last write to the node's memory between the node and `place`; None where there is none."""
        found = None
        for writer, through in self.between(node, self._position[node], place):
            found = (writer, through)
        if self.storage(node) in self._reshaped:
            return Write(node, node, whole=False, views=None)
        if found is None:
            return None
        writer, through = found
        describes = _leaves_result(writer, through)
        if geometry(through) == geometry(node) and describes:
            return Write(writer, through, whole=True)
        return Write(writer, through, whole=False, views=_views_between(through, node) if describes else None)


@dataclasses.dataclass(frozen=True)
class Write:
    """A write in place, as a reader of the memory sees it.

    Attributes:
        writer: the node that writes; what it computes is what it leaves in the tensor it writes through.
        through: the node that it writes through.
        whole: whether that is the reader's tensor, in the same geometry.
        views: otherwise, the views that lead from the reader's tensor to the written one, outermost last; None where
            that is not known.
    """

    writer: fx.Node
    through: fx.Node
    whole: bool
    views: tuple[fx.Node, ...] | None = None


def _views_between(view: fx.Node, base: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes that make `view` from `base` (or from another name of it), first argument by first argument."""
    views: list[fx.Node] = []
    while geometry(view) != geometry(base):
        parent = view.args[0] if view.args else None
        if not isinstance(parent, fx.Node) or Writes.storage(parent) != Writes.storage(base):
            return None
        views.insert(0, view)
        view = parent
    return tuple(views)


def _leaves_result(writer: fx.Node, through: fx.Node) -> bool:
    """Whether what the writer leaves in the tensor is what it computes (and not a side effect of something else)."""
    if target_name(writer) in ("setitem", "__setitem__"):
        return True
    return Writes.storage(writer) == Writes.storage(through) and geometry(writer) == geometry(through)


def geometry(node: fx.Node) -> tuple[Any, ...]:
    """Dtype, sizes, strides and offset: nodes of the same memory and geometry are the same tensor."""
    tensor = tensor_of(node)
    if tensor is None:
        return (node,)
    numbers = [*tensor.shape, *tensor.stride(), tensor.storage_offset()]
    return (tensor.dtype, *(size_expression(number) for number in numbers))
