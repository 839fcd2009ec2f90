"""Changes to the inputs of bodies: what a site needs from outside comes in, a mask that nothing needs goes out."""

from collections.abc import Iterable

from torch import fx

from nsa_compile.passes.metadata import recorded_value, value_key
from nsa_compile.passes.sites import Scope


def bring_in(node: fx.Node, origin: Scope, scope: Scope) -> fx.Node:
    """Hands a node's value down to a scope, as further inputs of the bodies in between.

    Args:
        node: a node of `origin`'s graph, before the calls that lead to `scope`.
        origin: the scope that holds the node.
        scope: `origin` itself, or a scope below it that can be extended.

    Returns:
        The node itself, or the placeholder that stands for it in `scope`'s graph.
    """
    if scope.graph_module is origin.graph_module or scope.parent is None:
        return node
    passed = bring_in(node, origin, scope.parent)
    placeholders = _placeholders(scope.graph_module)
    graph = scope.graph_module.graph
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before(next(iter(graph.nodes))):
        placeholder = graph.placeholder(node.name)
    key = value_key(passed)
    if key is not None:
        placeholder.meta[key] = recorded_value(passed)
    for call in scope.calls:
        call.args = (*call.args, passed)
    return placeholder


def take_out(unused: Iterable[fx.Node], scope: Scope) -> list[fx.Node]:
    """Removes placeholders that have lost their users from a body and from its calls.

    Returns:
        The nodes of the parent's graph that were handed in, which may be without users now.
    """
    handed_in: list[fx.Node] = []
    for placeholder in unused:
        placeholders = _placeholders(scope.graph_module)
        from_the_end = len(placeholders) - placeholders.index(placeholder)
        for call in scope.calls:
            position = len(call.args) - from_the_end
            removed = call.args[position]
            call.args = (*call.args[:position], *call.args[position + 1 :])
            if isinstance(removed, fx.Node):
                handed_in.append(removed)
        scope.graph_module.graph.erase_node(placeholder)
    return handed_in


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]
