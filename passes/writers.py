"""Who writes in place: a graph from Dynamo is not functional, so a value read later may be another one."""

import bisect
from collections.abc import Iterator

import torch
from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.scopes import attribute_of, body_references

# Operations whose result may share memory with their first argument.
_ALIASING = frozenset(  # noqa: SIM905
    "view reshape flatten unflatten _unsafe_view view_as reshape_as unsqueeze squeeze transpose swapaxes swapdims t mT "
    "adjoint getattr permute movedim expand expand_as broadcast_to getitem slice select narrow diagonal unfold split "
    "split_with_sizes chunk tensor_split unbind contiguous detach alias to type type_as float half bfloat16 double "
    "long int bool cpu cuda real imag view_as_real view_as_complex as_strided".split()
)
# Operators that write although their names do not say so.
_WRITING_FUNCTIONS = frozenset(
    "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul".split()
)


class Writers:
    """The in-place writes of one graph.

    Args:
        graph_module: owner of the graph; the answers hold until the graph changes.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._positions = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self._bases: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        self._writers: list[tuple[fx.Node, fx.Node]] = []
        for node, position in self._positions.items():
            for written in _written(graph_module, node):
                self._writes.setdefault(self.base(written), []).append(position)
                self._writers.append((node, self.base(written)))

    def writes(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yields each node that writes in place, with the owner of the memory it writes."""
        yield from self._writers

    def position(self, node: fx.Node) -> int:
        """Returns a node's place in the order of execution."""
        return self._positions[node]

    def is_written_between(self, node: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Tells whether a node's memory may be written after `start` and before `end` run."""
        writes = self._writes.get(self.base(node), ())
        first = bisect.bisect_right(writes, self._positions[start])
        return first < len(writes) and writes[first] < self._positions[end]

    def base(self, node: fx.Node) -> fx.Node:
        """Returns the node that owns the memory that a node's tensor may share."""
        chain = []
        while node not in self._bases:
            chain.append(node)
            source = _aliased(node)
            if source is None:
                self._bases[node] = node
                break
            node = source
        base = self._bases[node]
        self._bases.update(dict.fromkeys(chain, base))
        return base


def writes_memory(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Tells whether a node writes in place, so that it matters although nothing uses its result."""
    return any(True for _ in _written(graph_module, node))


def _aliased(node: fx.Node) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        is_alias = bool(returns) and returns[0].alias_info is not None
    else:
        is_alias = operation(node) in _ALIASING or _writes_first_argument(node)
    return node.args[0] if is_alias else None


def _writes_first_argument(node: fx.Node) -> bool:
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False
    name = operation(node)
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return name in _WRITING_FUNCTIONS
    return name.endswith("_") and not name.endswith("__")


def _written(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    if node.op not in ("call_function", "call_method"):
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        bodies = [attribute_of(graph_module, str(body.target)) for body in body_references(graph_module, node)]
        is_mutating = "mutation" in node.target.name() or "auto_functionalized" in node.target.name()
        if is_mutating or any(writes_memory(body, inner) for body in bodies for inner in body.graph.nodes):
            yield from node.all_input_nodes
    elif isinstance(node.target, torch._ops.OpOverload):
        yield from _written_by_schema(node, node.target._schema)
    elif isinstance(node.target, torch._ops.OpOverloadPacket):
        for overload in node.target.overloads():
            yield from _written_by_schema(node, getattr(node.target, overload)._schema)
    elif node.args and isinstance(node.args[0], fx.Node) and _writes_first_argument(node):
        yield node.args[0]
    if isinstance(node.kwargs.get("out"), fx.Node):
        yield node.kwargs["out"]


def _written_by_schema(node: fx.Node, schema: torch.FunctionSchema) -> Iterator[fx.Node]:
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else (value,)
            yield from (each for each in values if isinstance(each, fx.Node))
