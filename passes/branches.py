"""Keys and values of a branch of its own: the graph's path to them, copied with the branch's parameters in place."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import shape_of
from nsa_compile.passes.predicate.writes import Writes, written_by
from nsa_compile.passes.sites import AttentionSite, Operand, Reason, Rejection, Step

# The selected branch uses the model's own keys and values: no parameter of the model goes without a gradient.
BRANCHES = ("compressed", "window")
# Operations that put a piece into a longer tensor: other tokens' keys, of which a branch has none of its own.
_JOINING = frozenset({"cat", "stack", "hstack", "vstack"})
_FILLING = frozenset(
    {"index_copy", "index_put", "scatter", "slice_scatter", "select_scatter", "masked_scatter", "index_fill"}
)


@dataclasses.dataclass(frozen=True)
class BranchOperands:
    """Keys and values of a branch, before they are copied.

    Attributes:
        copies: the model's own parameter -> the branch's.
        key_path: the nodes to copy for the keys, in order.
        value_path: likewise for the values.
    """

    copies: Mapping[fx.Node, fx.Node]
    key_path: tuple[fx.Node, ...]
    value_path: tuple[fx.Node, ...]

    @property
    def path(self) -> tuple[fx.Node, ...]:
        """All nodes to copy, each once; those of the keys first."""
        return tuple(dict.fromkeys((*self.key_path, *self.value_path)))


class BranchReader:
    """Finds what has to be copied; remembers what it learns of each graph."""

    def __init__(self) -> None:
        self._writes: dict[fx.GraphModule, Writes] = {}

    def read(
        self, site: AttentionSite, copies: Mapping[fx.Node, fx.Node], hidden_states: fx.Node
    ) -> BranchOperands | Rejection:
        """Finds the nodes between a branch's parameters and an attention's keys and values.

        Args:
            site: the attention.
            copies: the model's own parameter -> the branch's.
            hidden_states: the layer's input.

        Returns:
            The paths; a rejection where a copy would not be what a branch of its own is.
        """
        graph_module = site.scope.graph_module
        if graph_module not in self._writes:
            self._writes[graph_module] = Writes(graph_module.graph)
        writes = self._writes[graph_module]
        paths = []
        for name, operand in (("Keys", site.key), ("Values", site.value)):
            path = path_from(operand.node, copies, hidden_states, writes)
            if not path and not _read_by_steps(operand.steps, copies):
                sentence = f"{name} ({operand.node}) are not computed from the projection that branches have copies of."
                return Rejection(Reason.BRANCH_NOT_COPIED, sentence, (operand.node,))
            fault = self._fault(path, copies, writes, site)
            if fault is not None:
                return fault
            paths.append(path)
        return BranchOperands(copies, *paths)

    def _fault(
        self, path: tuple[fx.Node, ...], copies: Mapping[fx.Node, fx.Node], writes: Writes, site: AttentionSite
    ) -> Rejection | None:
        inside = {*path, *copies}
        end = writes.position(site.node)
        for node in path:
            writer = next(iter(writes.between(node, writes.position(node), end)), None)
            if written_by(node) or writer is not None or node.is_impure():
                sentence = f"{writer[0] if writer else node} works in place on the way to the keys and values."
                return Rejection(Reason.BRANCH_NOT_COPIED, sentence, (node,))
            name = operation(node)
            others = [read for read in node.all_input_nodes if read not in inside]
            if name in _FILLING or (name in _JOINING and not all(map(_is_empty, others))):
                sentence = f"{node} joins the layer's keys with others (a cache), of which the branches have none."
                return Rejection(Reason.BRANCH_NOT_COPIED, sentence, (node,))
        return None


def ancestors(node: fx.Node, hidden_states: fx.Node) -> set[fx.Node]:
    """Returns what a node is computed from, itself included, as far as a layer's input, which is left out.

    Layers may share parameters: beyond its input begins another layer.
    """
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each not in seen and each is not hidden_states:
            seen.add(each)
            pending.extend(each.all_input_nodes)
    return seen


def path_from(
    node: fx.Node, origins: Mapping[fx.Node, Any], hidden_states: fx.Node, writes: Writes
) -> tuple[fx.Node, ...]:
    """Returns the nodes of a layer that depend on one of `origins`, and that `node` depends on, in order."""
    seen = ancestors(node, hidden_states)
    path: dict[fx.Node, None] = {}
    for each in sorted(seen, key=writes.position):
        if any(read in path or read in origins for read in each.all_input_nodes):
            path[each] = None
    return tuple(path)


def copy_path(operands: BranchOperands) -> dict[fx.Node, fx.Node]:
    """Copies the nodes of a branch's paths, each behind its original, so that it runs under the same modes.

    Returns:
        The node -> its copy; parameters included.
    """
    copied = dict(operands.copies)
    for node in operands.path:
        graph = node.graph
        with graph.inserting_after(node):
            copied[node] = graph.node_copy(node, lambda read: copied.get(read, read))
    return copied


def with_parameters(operand: Operand, copied: Mapping[fx.Node, fx.Node]) -> Operand:
    """Returns an operand that starts from copies, its steps' parameters included."""
    steps = tuple(Step(step.target, tuple(_replaced(arg, copied) for arg in step.args)) for step in operand.steps)
    return Operand(copied.get(operand.node, operand.node), operand.shape, steps)


def _replaced(argument: Any, copied: Mapping[fx.Node, fx.Node]) -> Any:
    return with_parameters(argument, copied) if isinstance(argument, Operand) else argument


def _read_by_steps(steps: tuple[Step, ...], parameters: Mapping[fx.Node, Any]) -> bool:
    operands = [arg for step in steps for arg in step.args if isinstance(arg, Operand)]
    return any(each.node in parameters for each in operands)


def _is_empty(node: fx.Node) -> bool:
    shape = shape_of(node)
    return shape is None or any(size == 0 for size in shape if isinstance(size, int))
