"""Sums that attention weights are divided by: before their product with the values, or after it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.axes import Dimension, Dimensions, leaves, resolved
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.constants import constant_of
from nsa_compile.passes.contractions import read_einsum_sum
from nsa_compile.passes.metadata import number_of, recorded_dtype
from nsa_compile.passes.parts import Problem
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.sites import Reason
from nsa_compile.passes.views import back_through, broadcast_dimensions

# A number from here on that is added to a sum of weights is meant as the weight of a key more.
_LEAST_SINK = 0.1
# How a sum over one dimension is spelled; a norm is one where its order is 1.
_SUMS = frozenset(("sum", "einsum", "norm", "linalg_vector_norm"))


@dataclasses.dataclass(frozen=True)
class WeightSum:
    """A sum of weights over the keys.

    Attributes:
        node: the sum.
        dims: its dimensions; that of the keys is gone or empty.
        is_at_least_one: the largest weight is 1.
    """

    node: fx.Node
    dims: Dimensions
    is_at_least_one: bool


def read_sum(node: fx.Node, dims: Dimensions, keys: Dimension | None = None) -> tuple[Dimensions, Dimension] | None:
    """Reads a sum of a tensor over one dimension.

    Args:
        node: any node.
        dims: dimensions of what it reads.
        keys: the axes that have to be summed over; None where that is open.

    Returns:
        Dimensions of the sum, and the axes summed over; None where it is no such sum.
    """
    bound = (arguments(node) if operation(node) in _SUMS else None) or {}
    dim = read_einsum_sum(node) if operation(node) == "einsum" else _only(bound.get("dim"))
    summed = _axes_of(dim, dims, keys)
    # Weights are not negative: the sum of absolute values is their sum.
    if dim is None or summed is None or bound.get("ord", 1 if operation(node) in ("sum", "einsum") else 2) != 1:
        return None
    at = dim % len(dims)
    kept = ((),) if bound.get("keepdim") else ()
    return (*dims[:at], *kept, *dims[at + 1 :]), summed


def read_division(node: fx.Node, dims: Dimensions, keys: Dimension | None = None) -> Dimension | None:
    """Reads a division of a tensor by its own sum, `F.normalize(p=1)`; arguments and result as those of `read_sum`."""
    bound = (arguments(node) if operation(node) == "normalize" else None) or {}
    return _axes_of(_only(bound.get("dim", 1)), dims, keys) if bound.get("ord") == 1 else None


def limit_of_division(node: fx.Node, is_at_least_one: bool) -> Problem | None:
    """Why the lower limit that `F.normalize` sets to the sum changes it; None where it does not.

    Args:
        node: a node that `read_division` reads.
        is_at_least_one: whether the sum is.
    """
    if is_at_least_one and 0 <= (number_of((arguments(node) or {}).get("eps", 1e-12)) or 0) <= 1:
        return None
    sentence = f"{node} limits the sum that the weights are divided by."
    return Problem(Reason.PROBABILITIES_CHANGED, sentence, (node,))


def _only(dim: Any) -> int | None:
    """The dimension, given by itself or as the only one of a list."""
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return dim if isinstance(dim, int) else None


def _axes_of(dim: int | None, dims: Dimensions, keys: Dimension | None) -> Dimension | None:
    """The axes of a dimension, where they are those of the keys."""
    if dim is None or not -len(dims) <= dim < len(dims):
        return None
    axes = leaves(dims[dim])
    return axes if keys is None or axes == leaves(keys) else None


def divided_by(user: fx.Node, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Yields what a node divides another one by, or multiplies it by, with whether it multiplies."""
    bound = arguments(user) or {}
    if operation(user) == "div" and bound.get("rounding_mode") is None and bound.get("input") is node:
        if isinstance(bound.get("other"), fx.Node):
            yield bound["other"], False
    elif operation(user) == "mul":
        for other in (bound.get("other"), bound.get("input")):
            if isinstance(other, fx.Node) and other is not node:
                yield other, True


def normalizes(user: fx.Node, node: fx.Node, dims: Dimensions, total: WeightSum, writes: Writes) -> "bool | Problem":
    """Tells whether a node divides weights, or their product with the values, by the sum of the weights.

    Args:
        user: reads `node`.
        node: the weights or the product.
        dims: its dimensions.
        total: the sum.
        writes: the in-place writes of the graph.

    Returns:
        Whether it does; a problem where it divides by almost that.
    """
    for other, is_inverse in divided_by(user, node):
        found = _back_to_sum(other, dims, total, writes, user, is_inverse)
        if found is not False:
            return found
    return False


def _back_to_sum(
    node: fx.Node, full: Dimensions, total: WeightSum, writes: Writes, reader: fx.Node, is_inverse: bool
) -> "bool | Problem":
    dims = broadcast_dimensions(node, full)
    changed: Problem | None = None
    while dims is not None:
        if any(True for _ in writes.between(node, writes.position(node), writes.position(reader))):
            return False
        if node is total.node:
            wanted = [dim for dim in resolved(total.dims) if dim]
            if is_inverse or [dim for dim in resolved(dims) if dim] != wanted:
                return False
            return changed or True
        carried = back_through(node, dims)
        if carried is not None:
            reader, (node, dims) = node, carried
            continue
        name, bound = operation(node), arguments(node) or {}
        source = bound.get("input")
        if is_inverse and name in ("reciprocal", "div"):
            is_inverse = False
            is_of_one = name == "div" and source == 1 and bound.get("rounding_mode") is None
            source = source if name == "reciprocal" else bound.get("other") if is_of_one else None
        elif is_inverse and name != "to":
            return False
        elif name in ("add", "clamp", "maximum", "max"):
            changed = changed or _changed(node, bound, total, writes)
        elif name != "to":
            return False
        if not isinstance(source, fx.Node):
            return False
        reader, node = node, source
    return False


def _changed(node: fx.Node, bound: Any, total: WeightSum, writes: Writes) -> Problem | None:
    """Why a sum is not what it was after a number is added, or a lower limit set; None where that changes nothing.

    A sum of weights of which the largest is 1 is at least 1: nothing below that limits it, and what is far below the
    precision of 1 is lost when it is added.
    """
    values = [bound[name] for name in ("other", "min") if bound.get(name) is not None]
    number = constant_of(values[0], node, writes) if len(values) == 1 and bound.get("max") is None else None
    is_sum = operation(node) == "add"
    harmless = torch.finfo(recorded_dtype(total.node)).eps / 4 if is_sum else 1
    is_plain = total.is_at_least_one and bound.get("alpha", 1) == 1
    if is_plain and number is not None and 0 <= number <= harmless:
        return None
    if is_sum and (number is None or number >= _LEAST_SINK):
        sentence = f"{node} adds to the sum that the weights are divided by, as a further key would."
        return Problem(Reason.ATTENTION_SINKS, sentence, (node,))
    sentence = f"{node} changes the sum that the weights are divided by."
    return Problem(Reason.PROBABILITIES_CHANGED, sentence, (node,))
