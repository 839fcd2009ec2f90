"""Attention weights, followed forwards from the softmax to their product with the values.

Weights may come without being divided by their sum, as from `exp`; then the division is found on the way, before or
after the product.  Masks may multiply them until then.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.axes import Dimensions, leaves, unify_dimensions
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.constants import constant_of
from nsa_compile.passes.contractions import Contraction, contracted, is_contraction, is_weight, read_contraction
from nsa_compile.passes.handmade import Softmax
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import dtype_of, number_of, recorded_dtype
from nsa_compile.passes.normalization import WeightSum, limit_of_division, normalizes, read_division, read_sum
from nsa_compile.passes.parts import MaskPart, Problem
from nsa_compile.passes.predicate.writes import Writes, written_by
from nsa_compile.passes.sameness import hold_same
from nsa_compile.passes.scores import Scores, is_inactive_dropout
from nsa_compile.passes.sites import MaskKind, Reason
from nsa_compile.passes.views import broadcast_dimensions, forth_through

# What these make of a tensor depends on its shape, not on its values.
_SHAPE_READERS = frozenset(
    (
        "full_like",
        "zeros_like",
        "ones_like",
        "empty_like",
        "new_full",
        "new_zeros",
        "new_ones",
        "new_empty",
        "rand_like",
        "randn_like",
        "_assert_tensor_metadata",
        "size",
        "dim",
    )
)
# A chain of nodes whose outcome nobody takes is not longer.
_MOST_UNUSED = 12
# A random mask is made within this many steps of a draw.
_NEAR = 5
_DRAWS = frozenset(("rand", "rand_like", "bernoulli", "bernoulli_", "randn_like", "dropout"))


@dataclasses.dataclass(frozen=True)
class Weighting:
    """What becomes of the weights.

    Attributes:
        product: their product with the values.
        value: the values.
        output: the attention's result: the product, or what it is after the division by the sum.
        masks: of the keys that are left out before the division, so that they are hidden altogether.
        refills: conditions under which weights are set to 0 after the division.
    """

    product: Contraction
    value: LabelledTensor
    output: LabelledTensor
    masks: tuple[MaskPart, ...] = ()
    refills: tuple[tuple[fx.Node, MaskKind], ...] = ()


def follow_probabilities(softmax: Softmax, writes: Writes) -> Weighting | Problem:
    """Follows the weights to the one product that they are for.

    Args:
        softmax: what makes them.
        writes: the in-place writes of the graph.
    """
    follower = _Follower(softmax, writes)
    result = follower.follow(softmax.node, softmax.dims)
    if isinstance(result, Weighting) and not follower.is_normalized:
        sentence = f"The weights {softmax.node} are not divided by their sum."
        return Problem(Reason.UNKNOWN_SPELLING, sentence, (softmax.node,))
    return result


class _Follower:
    def __init__(self, softmax: Softmax, writes: Writes) -> None:
        self.is_normalized = softmax.is_normalized
        self._keys = softmax.keys
        self._writes = writes
        self._is_stabilized = softmax.is_stabilized
        self._total: WeightSum | None = None
        self._masks: list[MaskPart] = []
        # What was masked since the sum was taken.
        self._refills: list[tuple[fx.Node, MaskKind, MaskPart]] = []

    def follow(self, node: fx.Node, dims: Dimensions) -> Weighting | Problem:
        place = self._writes.position
        since = place(node)
        while True:
            users, later = self._users(node, since)
            users = self._without_sum(users, dims)
            if len(users) != 1 or users[0].op == "output":
                names = ", ".join(user.name for user in users)
                return Problem(Reason.ATTENTION_WEIGHTS_USED, f"{node} is used by {names or 'nothing'}.", tuple(users))
            user = users[0]
            if any(writer is not user for writer, _ in self._writes.between(node, since, place(user) + 1)):
                return Problem(Reason.PROBABILITIES_CHANGED, f"{node} is written in place.", (node,))
            if is_contraction(user):
                return self._product(user, node, dims)
            carried = forth_through(user, node, dims)
            if carried is None:
                problem = self._step(user, node, dims)
                if problem is not None:
                    return problem
            dims, since = dims if carried is None else carried, place(user)
            if not later:
                node = user
            elif any(map(_reads_values, user.users)):
                return Problem(Reason.ATTENTION_WEIGHTS_USED, f"{user} is used under two names.", (user, node))

    def _users(self, node: fx.Node, since: int) -> tuple[list[fx.Node], bool]:
        """The readers of a node after a place, up to the first that writes it, and whether others read that after it.

        Those read what the write leaves, under the old name.
        """
        place = self._writes.position
        users = [user for user in node.users if place(user) > since and _reads_values(user)]
        written = [place(user) for user in users if node in written_by(user)]
        until = [user for user in users if not written or place(user) <= min(written)]
        return until, len(until) < len(users)

    def _without_sum(self, users: list[fx.Node], dims: Dimensions) -> list[fx.Node]:
        """Notes the sum over the keys among the users, and takes it out."""
        for user in users:
            read = read_sum(user, dims, self._keys)
            if read is not None and len(users) == 2 and self._total is None and len(user.users) == 1:
                self._hide_refilled()
                is_at_least_one = self._is_stabilized and not self._masks
                self._total = WeightSum(user, read[0], is_at_least_one)
                return [other for other in users if other is not user]
        return users

    def _hide_refilled(self) -> None:
        self._masks += [mask for _, _, mask in self._refills]
        self._refills = []

    def _step(self, user: fx.Node, node: fx.Node, dims: Dimensions) -> Problem | None:
        """Takes in an operation on the weights, or says why that cannot be done."""
        if self._total is not None:
            divided = normalizes(user, node, dims, self._total, self._writes)
            if isinstance(divided, Problem):
                return divided
            if divided:
                self.is_normalized, self._total, self._is_stabilized = True, None, False
                return None
        if read_division(user, dims, self._keys) is not None and self._total is None:
            self._hide_refilled()
            problem = limit_of_division(user, (self._is_stabilized or self.is_normalized) and not self._masks)
            self.is_normalized, self._is_stabilized = True, False
            return problem
        bound = arguments(user) or {}
        name = operation(user)
        if name == "dropout" and not is_inactive_dropout(bound):
            return Problem(Reason.DROPOUT, f"{user} drops probabilities out.", (user,))
        refill = _refill(user, bound, node, self._writes)
        if refill is not None:
            mask, kind = refill
            if _is_random(mask):
                return Problem(Reason.DROPOUT, f"{mask}, drawn at random, drops probabilities out.", (mask,))
            mask_dims = broadcast_dimensions(mask, dims)
            if mask_dims is not None:
                self._refills.append((mask, kind, MaskPart(LabelledTensor(mask, mask_dims), kind)))
                return None
        elif _is_unchanged(user, bound, node):
            return None
        return Problem(Reason.PROBABILITIES_CHANGED, f"{name} ({user}) changes {node}.", (user,))

    def _product(self, user: fx.Node, node: fx.Node, dims: Dimensions) -> Weighting | Problem:
        unread = Problem(Reason.UNKNOWN_SPELLING, f"The product {user} has a form that is not known.", (user,))
        product = read_contraction(user)
        if product is None or product.added is not None or product.alpha != 1:
            return unread
        sides = [(product.left, product.right), (product.right, product.left)]
        for weights, value in sides:
            if weights.node is node and value.node is not node and unify_dimensions(weights.dims, dims):
                summed, keys = set(leaves(contracted(product))), set(leaves(self._keys))
                if summed.isdisjoint(keys) and is_weight(value.node):
                    sentence = f"{user} mixes {node} along other axes than the keys."
                    return Problem(Reason.PROBABILITIES_CHANGED, sentence, (user,))
                if summed != keys:
                    return unread
                output = self._output(user, product.dims)
                if isinstance(output, Problem):
                    return output
                refills = tuple((mask, kind) for mask, kind, _ in self._refills)
                return Weighting(product, value, output, tuple(self._masks), refills)
        return unread

    def _output(self, node: fx.Node, dims: Dimensions) -> LabelledTensor | Problem:
        """The product itself or, where the division by the sum is still to come, its outcome."""
        while self._total is not None:
            users = [user for user in node.users if _reads_values(user)]
            carried = forth_through(users[0], node, dims) if len(users) == 1 else None
            if carried is not None:
                node, dims = users[0], carried
                continue
            divided = len(users) == 1 and normalizes(users[0], node, dims, self._total, self._writes)
            if isinstance(divided, Problem):
                return divided
            if not divided:
                sentence = f"{node} is not divided by the sum of the weights, {self._total.node}."
                return Problem(Reason.ATTENTION_WEIGHTS_USED, sentence, (self._total.node,))
            node, self._total, self.is_normalized = users[0], None, True
        return LabelledTensor(node, dims)


def _reads_values(user: fx.Node) -> bool:
    """Whether what a node reads reaches anything: not if it reads a shape, or nobody takes what is made of it."""
    pending, seen = [user], {user}
    while pending and len(seen) < _MOST_UNUSED:
        node = pending.pop()
        if operation(node) in _SHAPE_READERS:
            continue
        if node.op == "output" or node.is_impure() or written_by(node) or len(node.users) > 1:
            return True
        pending += [each for each in node.users if each not in seen]
        seen |= set(node.users)
    return bool(pending)


def _is_unchanged(user: fx.Node, bound: Mapping[str, Any], node: fx.Node) -> bool:
    """Whether an operation leaves the probabilities as they are, where any key is visible."""
    name = operation(user)
    if bound.get("input") is not node:
        return False
    if name == "to":
        return recorded_dtype(user).is_floating_point
    # NaN comes from rows that see nothing.
    return name == "dropout" or (name == "nan_to_num" and number_of(bound.get("nan") or 0) == 0)


def _refill(user: fx.Node, bound: Mapping[str, Any], node: fx.Node, writes: Writes) -> tuple[fx.Node, MaskKind] | None:
    """Reads an operation that sets some weights to 0."""

    def is_zero(name: str) -> bool:
        return constant_of(bound[name], user, writes) == 0

    if operation(user) == "masked_fill" and bound.get("input") is node and is_zero("value"):
        return bound["mask"], MaskKind.BLOCKED
    if operation(user) == "where" and bound.get("input") is node and is_zero("other"):
        return bound["condition"], MaskKind.ALLOWED
    if operation(user) == "where" and bound.get("other") is node and is_zero("input"):
        return bound["condition"], MaskKind.BLOCKED
    if operation(user) == "mul":
        other = bound.get("other") if bound.get("input") is node else bound.get("input")
        if isinstance(other, fx.Node) and other is not node and isinstance(dtype_of(other), torch.dtype):
            return other, MaskKind.WEIGHT
    return None


def _is_random(mask: fx.Node) -> bool:
    """Whether a mask is drawn at random, a few steps away."""
    level = {mask}
    for _ in range(_NEAR):
        if any(operation(node) in _DRAWS for node in level):
            return True
        level = {read for node in level for read in node.all_input_nodes}
    return False


def is_redundant(refill: tuple[fx.Node, MaskKind], scores: Scores, softmax: Softmax, writes: Writes) -> bool:
    """Tells whether a refill changes only probabilities that are 0 already, or rows that see nothing.

    It does if it repeats a mask of the scores, or asks for rows in which every score is minus infinity, as torch's
    own decomposition of `scaled_dot_product_attention` does.
    """
    condition, kind = refill
    is_truth = dtype_of(condition) is torch.bool
    kind = MaskKind.ALLOWED if kind is MaskKind.WEIGHT and is_truth else kind
    reader = max((condition, softmax.node), key=writes.position)
    if any(mask.kind is kind and hold_same(mask.tensor.node, condition, reader, writes) for mask in scores.masks):
        return True
    names: list[str] = []
    node: Any = condition
    while isinstance(node, fx.Node) and operation(node) in ("logical_not", "bitwise_not", "any", "all", "eq"):
        names.append(operation(node).replace("bitwise", "logical"))
        if names[-1] == "eq":
            compared, *values = node.args
            is_asked_of_scores = compared is softmax.scores and [number_of(value) for value in values] == [-math.inf]
            asks_all = names in (["logical_not", "any", "logical_not", "eq"], ["all", "eq"])
            return kind is MaskKind.BLOCKED and is_asked_of_scores and asks_all
        node = node.args[0]
    return False
