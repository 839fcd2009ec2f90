"""Where queries and keys come from: one sequence, or two."""

import enum

import networkx as nx
import torch
from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import dtype_of, is_cache, is_parameter, recorded_shape
from nsa_compile.passes.predicate.writes import Writes, written_by
from nsa_compile.passes.sites import AttentionSite
from nsa_compile.passes.views import is_view

# What may come between a softmax and the product with the values, beside views.
_PASSED_ON = ("dropout", "to", "masked_fill", "nan_to_num")


class Relation(enum.Enum):
    """How a site's keys relate to its queries."""

    SAME_SEQUENCE = "same sequence"
    DIFFERENT_SEQUENCES = "different sequences"
    UNKNOWN = "unknown"


class ActivationFlow:
    """How activations flow through one graph, except through attentions.

    Parameters, positions and masks are no activations, and the output of an attention does not count as coming
    from its inputs: an encoder and a decoder share the former, and an earlier cross-attention would join the latter.
    Caches are followed to what is written into them.

    Args:
        graph_module: owner of the graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._flow: nx.DiGraph[fx.Node] = nx.DiGraph()
        # Parameters, and what is computed of nothing else.
        self._weights: set[fx.Node] = set()
        probabilities: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            is_passed_on = is_view(node) or operation(node) in _PASSED_ON
            if operation(node) == "softmax" or (is_passed_on and not probabilities.isdisjoint(node.all_input_nodes)):
                probabilities.add(node)
            elif probabilities.isdisjoint(node.all_input_nodes) and "attention" not in operation(node):
                self._add(node)
        self._follow_writes(graph_module.graph)

    def relate(self, site: AttentionSite) -> Relation:
        """Tells whether a site's keys are computed from the sequence that its queries are computed from."""
        queries, keys = self._origins(site.query.node), self._origins(site.key.node)
        if queries & keys:
            return Relation.SAME_SEQUENCE
        steps = (*site.query.steps, *site.key.steps)
        is_projected = any(step.target is torch.ops.aten.linear.default for step in steps)
        if not is_projected and not any(map(self._is_weighted, queries | keys)):
            # The graph starts behind the projections.
            return Relation.UNKNOWN
        return Relation.DIFFERENT_SEQUENCES

    def _follow_writes(self, graph: fx.Graph) -> None:
        """Lets what is written in place flow into every view of the memory it is written to."""
        views: dict[int, list[fx.Node]] = {}
        for node in self._flow.nodes:
            storage = Writes.storage(node)
            if storage is not None:
                views.setdefault(storage, []).append(node)
        for writer in graph.nodes:
            for written in written_by(writer):
                reached = views.get(Writes.storage(written) or 0, ())
                read = [each for each in writer.all_input_nodes if each in self._flow and each is not written]
                self._flow.add_edges_from((source, view) for source in read for view in reached)

    def _origins(self, node: fx.Node) -> set[fx.Node]:
        return nx.ancestors(self._flow, node) | {node} if node in self._flow else set()

    def _add(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if (is_parameter(node) and not is_cache(node)) or (inputs and self._weights.issuperset(inputs)):
            self._weights.add(node)
            return
        if node.op == "placeholder":
            is_activation = _is_floating(node)
        else:
            flowing = [read for read in inputs if read in self._flow]
            self._flow.add_edges_from((read, node) for read in flowing)
            is_activation = bool(flowing) or self._is_weighted(node)
        if is_activation:
            self._flow.add_node(node)

    def _is_weighted(self, node: fx.Node) -> bool:
        """Whether a node reads a parameter of two dimensions or more: an embedding, a projection."""
        weights = [read for read in node.all_input_nodes if read in self._weights and _is_floating(read)]
        return any(len(recorded_shape(weight)) >= 2 for weight in weights)


def _is_floating(node: fx.Node) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point
