"""Finds every attention in a graph, however it is spelled."""

from collections.abc import Callable

from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.flex import is_flex_call, read_flex_call
from nsa_compile.passes.fused import is_fused_attention, read_fused_attention
from nsa_compile.passes.handmade import is_exponential
from nsa_compile.passes.multihead import (
    is_encoder_layer,
    is_multihead_call,
    read_encoder_layer,
    read_multihead_call,
)
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.scopes import operator_name, walk_scopes
from nsa_compile.passes.sdpa import is_sdpa_call, read_sdpa_call
from nsa_compile.passes.sites import AttentionSite, Reason, Rejection, Scope
from nsa_compile.passes.softmax import is_softmax, read_exponential, read_softmax

_NumberReader = Callable[[fx.Node, Scope], "float | None"]

# What an attention is recognised by, and what reads it.
_READERS = (
    (is_sdpa_call, read_sdpa_call),
    (is_softmax, read_softmax),
    (is_exponential, read_exponential),
    (is_flex_call, read_flex_call),
    (is_multihead_call, read_multihead_call),
    (is_encoder_layer, read_encoder_layer),
    (is_fused_attention, read_fused_attention),
)


def find_sites(
    graph_module: fx.GraphModule, read_number: _NumberReader | None = None
) -> list[AttentionSite | Rejection]:
    """Finds the attentions of a graph and of the bodies of its higher-order operators.

    Args:
        graph_module: from Dynamo, `torch.export` or `symbolic_trace`, with shapes recorded; it is only read.
            While Dynamo compiles, symbolic numbers that scale scores are fixed by guards.
        read_number: given a placeholder or get_attr node and its scope, the number in a tensor of one element if
            nothing can change it unnoticed, else None: what masks fill in.

    Returns:
        For each attention, in the order of the graphs: a site, its masks yet unproved, or why it cannot be one.
    """
    found: list[AttentionSite | Rejection] = []
    transformed: dict[fx.Graph, set[fx.Node]] = {}
    for scope in walk_scopes(graph_module):
        writes = Writes(scope.graph_module.graph, _in_scope(read_number, scope))
        for node in scope.graph_module.graph.nodes:
            for is_kind, read in _READERS:
                if is_kind(node) and (attention := read(node, scope, writes)) is not None:
                    found.append(_declined_by_scope(attention, scope, transformed) or attention)
    return found


def _in_scope(read_number: _NumberReader | None, scope: Scope) -> Callable[[fx.Node], "float | None"] | None:
    return None if read_number is None else lambda node: read_number(node, scope)


def _declined_by_scope(
    attention: AttentionSite | Rejection, scope: Scope, transformed: dict[fx.Graph, set[fx.Node]]
) -> Rejection | None:
    """Declines what is in a `torch.autograd.Function`: its backward would still be that of dense attention.

    So is what is in a function transform, which the operator does not support.
    """
    place = attention.place
    if place is None:
        return None
    node = place.node
    while True:
        if node.graph not in transformed:
            transformed[node.graph] = _transformed(node.graph)
        if node in transformed[node.graph]:
            sentence = f"{node} is inside of torch.vmap, or of another transform of functions."
            return Rejection(Reason.FUNCTION_TRANSFORM, sentence, (node,), place)
        if scope.parent is None:
            return None
        call = scope.calls[0]
        if operator_name(call) == "autograd_function_apply" and isinstance(attention, AttentionSite):
            sentence = f"The attention is in {scope.path}, of the torch.autograd.Function that {call} applies."
            return Rejection(Reason.CUSTOM_GRADIENT, sentence, (call,), attention.place)
        node, scope = call, scope.parent


def _transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes between the entry to a function transform and the exit from it."""
    depth, found = 0, set()
    for node in graph.nodes:
        name = operation(node)
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth > 0:
            found.add(node)
    return found
