"""The only step that changes a graph: the sites of a plan become `torch.ops.nsa.attention`."""

from torch import fx

from nsa_compile.config import NSAConfig
from nsa_compile.passes.emission import Emitter, erase_dead
from nsa_compile.passes.plan import Decision, RewritePlan


def apply_plan(graph_module: fx.GraphModule, plan: RewritePlan) -> fx.GraphModule:
    """Rewrites the plan's sites in place; every other node stays as it is.

    Args:
        graph_module: the graph that the plan was made for, unchanged since.
        plan: what becomes of each site.

    Returns:
        `graph_module`.
    """
    changed: dict[fx.GraphModule, None] = {}
    for decision in plan.rewrites:
        _rewrite_site(decision, plan.config)
        changed[decision.place.scope.graph_module] = None
    for each in changed:
        each.graph.lint()
        each.recompile()
    return graph_module


def _rewrite_site(decision: Decision, config: NSAConfig) -> None:
    site = decision.site
    graph_module = site.scope.graph_module
    emitter = Emitter(graph_module, site.node)
    query, key, value = (emitter.operand(operand) for operand in (site.query, site.key, site.value))
    shape = (*site.query.shape[:3], site.value.shape[3])
    result = emitter.attention(
        (query, key, value),
        {"is_causal": site.is_causal, "scale": decision.scale, **config.operator_arguments()},
        shape,
    )
    for step in site.output:
        result = emitter.step(result, step)
    orphans = list(site.node.all_input_nodes)
    old_name = site.node.name
    is_output = any(user.op == "output" for user in site.node.users)
    site.node.replace_all_uses_with(result)
    graph_module.graph.erase_node(site.node)
    if is_output:
        # torch.export's signature knows outputs by name.
        result.name = old_name
    erase_dead(graph_module, orphans)
