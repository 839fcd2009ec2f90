"""The only step that changes a graph: the sites of a plan become `torch.ops.nsa.attention`, its markers go."""

from collections.abc import Hashable

from torch import fx

from nsa_compile.passes.bodies import bring_in, take_out
from nsa_compile.passes.emission import Emitter, erase_dead
from nsa_compile.passes.learned_emission import emit_learned
from nsa_compile.passes.metadata import device_of, is_permuted
from nsa_compile.passes.plan import Replacement, RewritePlan
from nsa_compile.passes.predicate.emission import EmittedInterval
from nsa_compile.passes.scopes import is_extensible, outward
from nsa_compile.passes.sites import Scope


def apply_plan(graph_module: fx.GraphModule, plan: RewritePlan) -> fx.GraphModule:
    """Rewrites the plan's sites in place; every other node stays as it is, and in its order.

    A site's operator stands where the site stood, so it reads what the site read, written buffers included.  What
    a mask lets queries see is computed once for all sites that share it.

    Args:
        graph_module: the graph that the plan was made for, unchanged since.
        plan: what becomes of each site.

    Returns:
        `graph_module`.
    """
    if plan.replacements or plan.markers:
        _Rewrite(graph_module, plan).apply()
    return graph_module


class _Rewrite:
    def __init__(self, graph_module: fx.GraphModule, plan: RewritePlan) -> None:
        self._plan = plan
        self._scopes: dict[fx.GraphModule, Scope] = {}
        self._orphans: dict[fx.GraphModule, list[fx.Node]] = {}
        self._intervals: dict[Hashable, EmittedInterval] = {}
        # Interval node and body -> the placeholder that brings it in.
        self._brought: dict[tuple[fx.Node, fx.GraphModule], fx.Node] = {}
        # A site's operand may be another site's output.
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._note_scope(Scope(graph_module))

    def apply(self) -> None:
        for scope in self._plan.scopes:
            self._note_scope(scope)
        # All intervals first: rewriting erases nodes that a later interval may still want to read.
        for key, anchor, replacement in self._first_users():
            device, module = device_of(replacement.site.query.node), replacement.site.place.module
            attention = f"the attention in {module}" if module else "an attention"
            self._intervals[key] = self._plan.prover.emit(replacement.visible, anchor, device, attention)
        for replacement in self._plan.replacements:
            self._rewrite_site(replacement)
        self._erase_markers()
        self._erase_orphans()
        for graph_module in self._scopes:
            graph_module.graph.lint()
            graph_module.recompile()

    def _note_scope(self, scope: Scope) -> None:
        if scope.parent is not None:
            self._note_scope(scope.parent)
        self._scopes.setdefault(scope.graph_module, scope)

    def _first_users(self) -> list[tuple[Hashable, fx.Node, Replacement]]:
        """For each interval that has to be computed: where, and for which site first."""
        position: dict[fx.Node, int] = {}
        for graph_module in self._scopes:
            position.update({node: i for i, node in enumerate(graph_module.graph.nodes)})
        first: dict[Hashable, tuple[fx.Node, Replacement]] = {}
        for replacement in self._plan.replacements:
            if replacement.visible.is_trivial:
                continue
            anchor = _ancestor(replacement)
            key = _interval_key(replacement)
            if key not in first or position[anchor] < position[first[key][0]]:
                first[key] = (anchor, replacement)
        return [(key, anchor, replacement) for key, (anchor, replacement) in first.items()]

    def _rewrite_site(self, replacement: Replacement) -> None:
        site = replacement.site
        graph_module = site.scope.graph_module
        emitter = Emitter(graph_module, site.node, self._replaced)
        tensors = [emitter.operand(operand) for operand in (site.query, site.key, site.value)]
        for factor in site.factors:
            tensors[0] = emitter.scaled(tensors[0], factor)
        attributes = {
            **self._visible_keys(replacement),
            "scale": replacement.scale,
            **replacement.config.operator_arguments(),
        }
        if replacement.learned is not None:
            attributes |= emit_learned(emitter, site, replacement.learned, tensors[1], tensors[2])
        result = emitter.attention(tensors, attributes, (*site.query.shape[:3], site.value.shape[3]), site.dtype)
        if replacement.config.combine == "gated" and (site.output or not is_permuted(site.node)):
            # Large outputs of gated attention may lie in another order than that which views may depend on.
            result = emitter.contiguous(result)
        for step in site.output:
            result = emitter.step(result, step)
        result = emitter.like(result, site.node)
        orphans = self._orphans.setdefault(graph_module, [])
        orphans += [*site.node.all_input_nodes, *(mask.node for mask in site.masks)]
        name, is_output = site.node.name, any(user.op == "output" for user in site.node.users)
        self._replaced[site.node] = result
        site.node.replace_all_uses_with(result)
        graph_module.graph.erase_node(site.node)
        if is_output:
            # An exported program knows its outputs by name.
            result.name = name

    def _visible_keys(self, replacement: Replacement) -> dict[str, object]:
        visible = replacement.visible
        if visible.is_trivial:
            return {"is_causal": visible.is_causal}
        interval = self._intervals[_interval_key(replacement)]
        nodes = {
            name: self._brought_in(node, visible.scope, replacement.site.scope)
            for name in ("first_key", "last_key", "key_valid")
            if (node := getattr(interval, name)) is not None
        }
        return {**nodes, "is_causal": interval.is_causal}

    def _brought_in(self, node: fx.Node, origin: Scope, scope: Scope) -> fx.Node:
        key = (node, scope.graph_module)
        if key not in self._brought:
            self._brought[key] = bring_in(node, origin, scope)
        return self._brought[key]

    def _erase_markers(self) -> None:
        for marker in self._plan.markers:
            # A parameter that only the marker read goes with it, where it is a body's input.
            orphans = self._orphans.setdefault(marker.scope.graph_module, [])
            orphans += marker.node.all_input_nodes
            marker.scope.graph_module.graph.erase_node(marker.node)

    def _erase_orphans(self) -> None:
        """Erases what only the sites used, innermost bodies first: they hand a dead mask back to their callers."""
        for graph_module, scope in reversed(self._scopes.items()):
            unused = erase_dead(graph_module, self._orphans.get(graph_module, ()))
            if is_extensible(scope) and scope.parent is not None:
                handed_in = take_out(unused, scope)
                self._orphans.setdefault(scope.parent.graph_module, []).extend(handed_in)


def _interval_key(replacement: Replacement) -> Hashable:
    return replacement.visible.key(), device_of(replacement.site.query.node)


def _ancestor(replacement: Replacement) -> fx.Node:
    """The site, or the first call on the way to it, in the graph that computes what its queries see."""
    node = replacement.site.node
    for scope in outward(replacement.site.scope, replacement.visible.scope):
        node = scope.calls[0]
    return node
