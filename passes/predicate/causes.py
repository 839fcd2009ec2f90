"""Names what is behind a refusal: a learned bias, ALiBi, an indexer, a mask from outside."""

import collections
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from nsa_compile.passes.metadata import recorded_value
from nsa_compile.passes.predicate.tensor import H_INDEX, KEY, QUERY, Leaf
from nsa_compile.passes.predicate.writes import target_name
from nsa_compile.passes.sites import Reason, Scope

# Operations that pick keys by score, and those that draw numbers.
_SELECTIONS = frozenset({"topk", "kthvalue", "sort", "argsort", "msort"})
_NOISES = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli"}
    | {f"{name}_" for name in ("uniform", "normal", "log_normal", "exponential", "cauchy", "geometric", "bernoulli")}
)
# The cause is near the mask: further back lies the whole model.
_FARTHEST = 300


def cause_of_bias(leaves: tuple[Leaf, ...], indices: AbstractSet[object]) -> Reason:
    """The kind of bias that the scores get.

    Args:
        leaves: the data in the bias.
        indices: the index symbols that the bias depends on.
    """
    outside_position = is_made_here = False
    for leaf in leaves:
        if leaf.written_by.op == "placeholder" and not is_learned(leaf.written_by):
            return Reason.MASK_IS_INPUT if leaf.dtype.is_floating_point else Reason.ADDITIVE_BIAS
        for node in _nearest_first(leaf.written_by, leaf.scope):
            if target_name(node) in _SELECTIONS:
                return Reason.ALREADY_SPARSE
            if target_name(node) in _NOISES:
                return Reason.ADDITIVE_BIAS
            if is_learned(node):
                return Reason.LEARNED_BIAS
            is_outside = node.op in ("placeholder", "get_attr") and _is_tensor(node)
            outside_position |= is_outside
            # A padding vector alone may be repeated for the heads; slopes come from elsewhere.
            is_made_here |= node.op == "get_attr" or not (is_outside or any(map(_is_tensor, node.all_input_nodes)))
    is_bias = is_made_here or not leaves or {QUERY, KEY} <= indices
    by_head_and_place = is_bias and H_INDEX in indices and bool({QUERY, KEY} & indices)
    by_place_alone = not outside_position and bool({QUERY, KEY} & indices)
    return Reason.ALIBI if by_head_and_place or by_place_alone else Reason.ADDITIVE_BIAS


def is_selection(leaves: tuple[Leaf, ...]) -> bool:
    """Whether the data is the outcome of picking keys by score."""
    return any(
        target_name(node) in _SELECTIONS for leaf in leaves for node in _nearest_first(leaf.written_by, leaf.scope)
    )


def cause_of_weights(node: fx.Node, scope: Scope) -> Reason | None:
    """The kind of bias that is computed of a model's parameters; None where a tensor is computed of none."""
    for each in _nearest_first(node, scope):
        if target_name(each) in _SELECTIONS:
            return Reason.ALREADY_SPARSE
        if is_learned(each):
            return Reason.LEARNED_BIAS
    return None


def _nearest_first(made: fx.Node, scope: Scope) -> Iterator[fx.Node]:
    """The nodes that a tensor is made of, those next to it first."""
    pending: collections.deque[tuple[fx.Node, Scope]] = collections.deque([(made, scope)])
    seen = {made}
    while pending and len(seen) < _FARTHEST:
        node, scope = scope_of(*pending.popleft())
        if node is None:
            continue
        yield node
        for argument in node.all_input_nodes:
            if argument not in seen:
                seen.add(argument)
                pending.append((argument, scope))


def scope_of(node: fx.Node, scope: Scope) -> tuple[fx.Node | None, Scope]:
    """A placeholder of a body followed out to what it stands for; None for a constant."""
    resolved, outer = scope.resolve(node)
    return (resolved if isinstance(resolved, fx.Node) else None), outer


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(recorded_value(node), torch.Tensor)


def is_learned(node: fx.Node) -> bool:
    """Whether a node is a learned parameter."""
    if isinstance(recorded_value(node), torch.nn.Parameter):
        return True
    return node.op == "placeholder" and ("_parameters_" in node.name or node.name.startswith("p_"))
