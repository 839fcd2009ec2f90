"""Attention probabilities, followed forwards from the softmax to their product with the values."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from nsa_compile.passes.axes import Dimension, Dimensions, leaves, unify_dimensions
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.constants import constant_of
from nsa_compile.passes.contractions import Contraction, contracted, is_contraction, read_contraction
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import number_of
from nsa_compile.passes.parts import Problem
from nsa_compile.passes.predicate.writes import Writes, written_by
from nsa_compile.passes.scores import Scores, is_inactive_dropout
from nsa_compile.passes.sites import MaskKind, Reason
from nsa_compile.passes.views import forth_through

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
        "size",
        "dim",
    )
)


@dataclasses.dataclass(frozen=True)
class Weighting:
    """What becomes of the probabilities.

    Attributes:
        product: their product with the values.
        value: the values.
        refills: conditions under which probabilities are set to 0 after the softmax.
    """

    product: Contraction
    value: LabelledTensor
    refills: tuple[tuple[fx.Node, MaskKind], ...] = ()


def follow_probabilities(softmax: fx.Node, dims: Dimensions, keys: Dimension, writes: Writes) -> Weighting | Problem:
    """Follows the probabilities to the one product that they are for.

    Args:
        softmax: the node that makes them.
        dims: its dimensions.
        keys: the axes over which they sum to 1.
        writes: the in-place writes of the graph.
    """
    node, refills = softmax, []
    while True:
        users = [user for user in node.users if _reads_values(user)]
        if len(users) != 1 or users[0].op == "output":
            names = ", ".join(user.name for user in users)
            return Problem(Reason.ATTENTION_WEIGHTS_USED, f"{node} is used by {names or 'nothing'}.", tuple(users))
        user = users[0]
        place = writes.position
        if any(writer is not user for writer, _ in writes.between(node, place(node), place(user) + 1)):
            return Problem(Reason.PROBABILITIES_CHANGED, f"{node} is written in place.", (node,))
        if is_contraction(user):
            return _product(user, node, dims, keys, tuple(refills))
        carried = forth_through(user, node, dims)
        if carried is not None:
            node, dims = user, carried
            continue
        bound = arguments(user) or {}
        name = operation(user)
        if name == "dropout" and not is_inactive_dropout(bound):
            return Problem(Reason.DROPOUT, f"{user} drops probabilities out.", (user,))
        refill = _refill(user, bound, node, writes)
        if refill is not None:
            refills.append(refill)
        elif not _is_unchanged(name, bound, node):
            return Problem(Reason.PROBABILITIES_CHANGED, f"{name} ({user}) changes {node}.", (user,))
        node = user


def _product(
    user: fx.Node,
    node: fx.Node,
    dims: Dimensions,
    keys: Dimension,
    refills: tuple[tuple[fx.Node, MaskKind], ...],
) -> Weighting | Problem:
    unread = Problem(Reason.UNKNOWN_SPELLING, f"The product {user} has a form that is not known.", (user,))
    product = read_contraction(user)
    if product is None or product.added is not None or product.alpha != 1:
        return unread
    sides = [(product.left, product.right), (product.right, product.left)]
    for weights, value in sides:
        if weights.node is node and value.node is not node and unify_dimensions(weights.dims, dims):
            if set(leaves(contracted(product))) != set(leaves(keys)):
                return unread
            return Weighting(product, value, refills)
    return unread


def _reads_values(user: fx.Node) -> bool:
    if user.op == "output" or user.is_impure() or written_by(user):
        return True
    return bool(user.users) and operation(user) not in _SHAPE_READERS


def _is_unchanged(name: str, bound: Mapping[str, Any], node: fx.Node) -> bool:
    """Whether an operation leaves the probabilities as they are, where any key is visible."""
    if bound.get("input") is not node:
        return False
    # NaN comes from rows that see nothing.
    return name in ("to", "dropout") or (name == "nan_to_num" and number_of(bound.get("nan") or 0) == 0)


def _refill(user: fx.Node, bound: Mapping[str, Any], node: fx.Node, writes: Writes) -> tuple[fx.Node, MaskKind] | None:
    """Reads an operation that sets some probabilities to 0."""

    def is_zero(name: str) -> bool:
        return constant_of(bound[name], user, writes) == 0

    if operation(user) == "masked_fill" and bound.get("input") is node and is_zero("value"):
        return bound["mask"], MaskKind.BLOCKED
    if operation(user) == "where" and bound.get("input") is node and is_zero("other"):
        return bound["condition"], MaskKind.ALLOWED
    if operation(user) == "where" and bound.get("other") is node and is_zero("input"):
        return bound["condition"], MaskKind.BLOCKED
    return None


def is_redundant(refill: tuple[fx.Node, MaskKind], scores: Scores, softmax_input: fx.Node) -> bool:
    """Tells whether a refill changes only probabilities that are 0 already, or rows that see nothing.

    It does if it repeats a mask of the scores, or asks for rows in which every score is minus infinity, as torch's
    own decomposition of `scaled_dot_product_attention` does.
    """
    condition, kind = refill
    if any(mask.tensor.node is condition and mask.kind is kind for mask in scores.masks):
        return True
    names: list[str] = []
    node: Any = condition
    while isinstance(node, fx.Node) and operation(node) in ("logical_not", "bitwise_not", "any", "all", "eq"):
        names.append(operation(node).replace("bitwise", "logical"))
        if names[-1] == "eq":
            compared, *values = node.args
            is_asked_of_scores = compared is softmax_input and [number_of(value) for value in values] == [-math.inf]
            asks_all = names in (["logical_not", "any", "logical_not", "eq"], ["all", "eq"])
            return kind is MaskKind.BLOCKED and is_asked_of_scores and asks_all
        node = node.args[0]
    return False
