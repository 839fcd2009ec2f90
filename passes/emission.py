"""New nodes: placed before a given one, with everything recorded that a tracer would have recorded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import (
    VALUE_KEYS,
    dtype_of,
    fake_mode_of,
    has_strides_of,
    memory_order,
    recorded_value,
    tensor_of,
    value_key,
)
from nsa_compile.passes.predicate.writes import Writes, written_by
from nsa_compile.passes.sites import Branch, Factor, Operand, Shape, Step

# What is recorded of one node's value, and is another's for a new node.
_OWN_META = (*VALUE_KEYS, "tensor_meta", "unbacked_bindings", "torch_fn", "source_fn_stack", "original_aten")
# Checks of what is erased go with it.
_CHECKS = ("_assert_tensor_metadata",)
# Without users these do nothing: an item that nobody takes, a write that nobody reads.
_SILENT = ("getitem", "setitem", *_CHECKS)
_LONGEST_UNUSED = 4


class Emitter:
    """Adds nodes to a graph before one of its nodes.

    Args:
        graph_module: owner of the graph.
        origin: the node that the new ones stand before, and whose module and source lines they inherit.
        replaced: nodes that are gone -> what stands in their place.
    """

    def __init__(
        self, graph_module: fx.GraphModule, origin: fx.Node, replaced: Mapping[fx.Node, fx.Node] | None = None
    ) -> None:
        self._replaced = replaced or {}
        self._graph = graph_module.graph
        self._origin = origin
        self._key = value_key(origin)
        self._mode = fake_mode_of(self._graph)

    def operand(self, operand: Operand) -> fx.Node:
        """Emits the views that bring an operand into the operator's layout; its last dimension becomes contiguous."""
        node = self._value(operand)
        tensor = tensor_of(node)
        if tensor is not None and not isinstance(tensor.stride(-1), torch.SymInt) and tensor.stride(-1) != 1:
            node = self.contiguous(node)
        return node

    def contiguous(self, node: fx.Node) -> fx.Node:
        """Emits a copy of a tensor that is not contiguous; of one that is, nothing comes of it."""
        return self.step(node, Step(torch.ops.aten.contiguous.default))

    def scaled(self, query: fx.Node, factor: Factor) -> fx.Node:
        """Emits the multiplication of queries by a factor; they keep their dtype."""
        target = torch.ops.aten.div.Tensor if factor.is_divisor else torch.ops.aten.mul.Tensor
        scaled = self.step(query, Step(target, (factor.operand,)))
        dtype = dtype_of(query)
        return scaled if dtype_of(scaled) == dtype else self.step(scaled, Step(torch.ops.aten.to.dtype, (dtype,)))

    def step(self, node: fx.Node, step: Step) -> fx.Node:
        """Emits one step, after the operands among its arguments."""
        args = tuple(self._argument(arg, node) for arg in step.args)
        value = None
        if self._mode is not None and tensor_of(node) is not None:
            with self._mode, torch.no_grad():
                value = step.target(recorded_value(node), *map(recorded_value, args))
        return self.call(step.target, (node, *args), {}, value)

    def _argument(self, argument: Any, node: fx.Node) -> Any:
        if isinstance(argument, Branch):
            return self._value(Operand(node, (), argument.steps))
        return self._value(argument) if isinstance(argument, Operand) else argument

    def _value(self, operand: Operand) -> fx.Node:
        node = self._replaced.get(operand.node, operand.node)
        for step in operand.steps:
            node = self.step(node, step)
        return node

    def like(self, node: fx.Node, recorded: fx.Node) -> fx.Node:
        """Gives a tensor the order in memory that another one has, on which views of it may depend."""
        wanted, tensor = tensor_of(recorded), tensor_of(node)
        order = None if wanted is None or tensor is None or has_strides_of(tensor, wanted) else memory_order(wanted)
        if order is None:
            return node
        inverse = [order.index(dim) for dim in range(len(order))]
        for step in (
            Step(torch.ops.aten.permute.default, (order,)),
            Step(torch.ops.aten.contiguous.default),
            Step(torch.ops.aten.permute.default, (inverse,)),
        ):
            node = self.step(node, step)
        return node

    def attention(
        self, tensors: Sequence[fx.Node], attributes: Mapping[str, Any], shape: Shape, dtype: torch.dtype
    ) -> fx.Node:
        """Emits the operator.

        Args:
            tensors: query, key and value in the operator's layout.
            attributes: its other arguments.
            shape: `[B, H, T, D_v]`, the output's shape; it is contiguous.
            dtype: the output's.
        """
        return self.operator(torch.ops.nsa.attention.default, tensors, attributes, shape, dtype)

    def operator(
        self,
        target: Any,
        tensors: Sequence[fx.Node],
        attributes: Mapping[str, Any],
        shape: Shape,
        dtype: torch.dtype | None = None,
    ) -> fx.Node:
        """Emits an operator whose result is new.

        Args:
            target: the operator.
            tensors: its tensors, by position.
            attributes: its other arguments, by name.
            shape: the result's shape; it is contiguous.
            dtype: the result's dtype; None for that of the first tensor.
        """
        like = tensor_of(tensors[0])
        value = None
        if self._mode is not None and like is not None:
            with self._mode, torch.no_grad():
                value = like.new_empty(shape, dtype=dtype)
        return self.call(target, tuple(tensors), dict(attributes), value)

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
        """Emits a call whose result is recorded as `value`."""
        with self._graph.inserting_before(self._origin):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {name: entry for name, entry in self._origin.meta.items() if name not in _OWN_META}
        if self._key is not None and value is not None:
            node.meta[self._key] = value
            if "tensor_meta" in self._origin.meta and isinstance(value, torch.Tensor):
                node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        return node


def erase_dead(graph_module: fx.GraphModule, orphans: Iterable[fx.Node]) -> list[fx.Node]:
    """Erases nodes that lost their last user, and what only they used.

    `Graph.eliminate_dead_code` would also take calls of in-place methods, which nothing marks as impure.  Here such
    a call goes only if nobody reads the memory that it writes.

    Args:
        graph_module: owner of the graph.
        orphans: nodes that may be without users.

    Returns:
        Placeholders that are without users now; they stay.
    """
    sharing: dict[int, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        storage = Writes.storage(node)
        if storage is not None:
            sharing.setdefault(storage, []).append(node)
    unused: dict[fx.Node, None] = {}
    pending = list(orphans)
    while pending:
        node = pending.pop()
        _erase_unused(node, sharing)
        if node.users or node.graph is not graph_module.graph or node._erased:
            continue
        if node.op == "placeholder":
            unused[node] = None
        elif _is_removable(node, sharing):
            inputs = node.all_input_nodes
            graph_module.graph.erase_node(node)
            pending.extend(inputs)
    return list(unused)


def _erase_unused(node: fx.Node, sharing: Mapping[int, Sequence[fx.Node]], depth: int = 0) -> None:
    """Erases users of a node that nothing comes of, and chains of them."""
    for user in list(node.users):
        # Impure are assertions, which somebody wants although nobody reads them.
        is_functional = isinstance(user.target, torch._ops.OpOverload) and not user.is_impure()
        if is_functional and depth < _LONGEST_UNUSED:
            _erase_unused(user, sharing, depth + 1)
        if user.users or not (is_functional or operation(user) in _SILENT):
            continue
        if operation(user) in _CHECKS or _is_removable(user, sharing):
            user.graph.erase_node(user)


def _is_removable(node: fx.Node, sharing: Mapping[int, Sequence[fx.Node]]) -> bool:
    if node.op == "get_attr":
        return True
    written = written_by(node)
    if not written:
        return not node.is_impure()
    for each in written:
        aliases = [alias for alias in sharing.get(Writes.storage(each) or 0, (each,)) if not alias._erased]
        for alias in aliases:
            is_outside = alias.op in ("placeholder", "get_attr")
            # What only the write itself reads does not count.
            readers = (user for user in alias.users if user is not node and set(user.users) != {node})
            if is_outside or any(reader not in aliases for reader in readers):
                return False
    return True
