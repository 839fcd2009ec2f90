"""Graph in, graph out: finds attentions, proves their masks, and puts NSA operators in their place.

The steps, in order; each is a module that can be read by itself:
    find     every attention of a graph -> AttentionSite | Rejection
    plan     what each becomes, and why: masks proved, policy applied -> RewritePlan
    rewrite  the only step that changes the graph
"""

from nsa_compile.passes.find import find_sites
from nsa_compile.passes.plan import Decision, RewritePlan, plan_rewrite
from nsa_compile.passes.rewrite import apply_plan
from nsa_compile.passes.sites import AttentionSite, Place, Reason, Rejection

__all__ = [
    "AttentionSite",
    "Decision",
    "Place",
    "Reason",
    "Rejection",
    "RewritePlan",
    "apply_plan",
    "find_sites",
    "plan_rewrite",
]
