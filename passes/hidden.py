"""The hidden states that an attention is computed from: the nearest common ancestor of its queries, keys and values."""

import heapq
from collections.abc import Iterator

import torch
from torch import fx

from nsa_compile.passes.metadata import dtype_of, is_parameter, recorded_shape, same_shape, same_size, shape_of
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.sites import AttentionSite, Operand, Reason, Rejection, Shape, Step

# Queries, keys and values, as bits.
_ALL = 0b111


class HiddenStates:
    """Finds hidden states; remembers what it learns of each graph."""

    def __init__(self) -> None:
        self._graphs: dict[fx.GraphModule, tuple[Writes, frozenset[fx.Node]]] = {}

    def find(self, site: AttentionSite, channels: int | None = None) -> Operand | Rejection:
        """Finds the input of an attention layer.

        It is the last tensor of the shape `[B, T, C]` (or `[T, B, C]`, or `[T, C]` for one sequence) from which
        queries, keys and values are all projected: what comes between it and them is the layer's own.

        Args:
            site: the attention.
            channels: C, where it is known.

        Returns:
            The tensor and the steps that make it `[B, T, C]`.
        """
        graph_module = site.scope.graph_module
        if graph_module not in self._graphs:
            self._graphs[graph_module] = Writes(graph_module.graph), _weights(graph_module.graph)
        writes, weights = self._graphs[graph_module]
        for node in _common_ancestors(site, writes, weights):
            steps = _steps(shape_of(node), site, channels)
            if steps is None:
                continue
            written = next(writes.between(node, writes.position(node), writes.position(site.node)), None)
            if written is not None:
                sentence = f"{written[0]} writes the layer's input {node} in place before the attention."
                return Rejection(Reason.NO_HIDDEN_STATES, sentence, written)
            return Operand(node, (site.batch, site.query_length, recorded_shape(node)[-1]), steps)
        sizes = "[B, T, C]" if channels is None else f"[B, T, {channels}]"
        sentence = f"No tensor {sizes} was found from which queries, keys and values are projected."
        if same_size(site.batch, site.query_length):
            sentence += f"  Batch and length are both {site.batch}, which does not tell them apart."
        return Rejection(Reason.NO_HIDDEN_STATES, sentence, (site.query.node, site.key.node, site.value.node))


def _common_ancestors(site: AttentionSite, writes: Writes, weights: frozenset[fx.Node]) -> Iterator[fx.Node]:
    """Yields the nodes from which queries, keys and values are projected, the last one in the program first."""
    reached: dict[fx.Node, int] = {}
    # Reached through a projection: a fused projection's output is an ancestor of all three, and no input of a layer.
    projected: dict[fx.Node, int] = {}
    pending: list[tuple[int, fx.Node]] = []

    def reach(node: fx.Node, bits: int, projected_bits: int) -> None:
        if node not in reached:
            heapq.heappush(pending, (-writes.position(node), node))
        reached[node] = reached.get(node, 0) | bits
        projected[node] = projected.get(node, 0) | projected_bits

    for number, operand in enumerate((site.query, site.key, site.value)):
        bit = 1 << number
        reach(operand.node, bit, bit if any(map(_projects, operand.steps)) else 0)
    while pending:
        _, node = heapq.heappop(pending)
        if reached[node] == projected[node] == _ALL:
            dtype = dtype_of(node)
            if dtype is not None and dtype.is_floating_point and node not in weights:
                yield node
        inputs = node.all_input_nodes
        is_projection = any(read in weights and len(shape_of(read) or ()) >= 2 for read in inputs)
        for read in inputs:
            if read not in weights:
                reach(read, reached[node], reached[node] if is_projection else projected[node])


def _projects(step: Step) -> bool:
    return step.target is torch.ops.aten.linear.default


def _weights(graph: fx.Graph) -> frozenset[fx.Node]:
    """The parameters, and what is computed from nothing else: casts, weights that are normed or sums of several."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if is_parameter(node) or (inputs and node.op != "output" and all(read in found for read in inputs)):
            found.add(node)
    return frozenset(found)


def _steps(shape: Shape | None, site: AttentionSite, channels: int | None) -> tuple[Step, ...] | None:
    """The views that make a tensor of some shape `[B, T, C]`; None where it is not the sequence."""
    if shape is None or not shape or (channels is not None and not same_size(shape[-1], channels)):
        return None
    batch, length = site.batch, site.query_length
    if same_shape(shape[:-1], (batch, length)):
        # Two equal sizes do not tell which is which, unless both are 1.
        return None if same_size(batch, length) and not same_size(batch, 1) else ()
    if same_shape(shape[:-1], (length, batch)):
        return (Step(torch.ops.aten.transpose.int, (0, 1)),)
    if same_shape(shape[:-1], (length,)) and same_size(batch, 1):
        return (Step(torch.ops.aten.unsqueeze.default, (0,)),)
    return None
