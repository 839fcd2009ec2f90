"""Finds every attention in a graph, however it is spelled."""

from torch import fx

from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.scopes import walk_scopes
from nsa_compile.passes.sdpa import is_sdpa_call, read_sdpa_call
from nsa_compile.passes.sites import AttentionSite, Rejection


def find_sites(graph_module: fx.GraphModule) -> list[AttentionSite | Rejection]:
    """Finds the attentions of a graph and of the bodies of its higher-order operators.

    Args:
        graph_module: from Dynamo, `torch.export` or `symbolic_trace`, with shapes recorded; it is only read.

    Returns:
        For each attention, in the order of the graphs: a site, its masks yet unproved, or why it cannot be one.
    """
    found: list[AttentionSite | Rejection] = []
    for scope in walk_scopes(graph_module):
        writes = Writes(scope.graph_module.graph)
        nodes = scope.graph_module.graph.nodes
        found += [read_sdpa_call(node, scope, writes) for node in nodes if is_sdpa_call(node)]
    return found
