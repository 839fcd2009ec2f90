"""Softmaxes, as calls and made by hand: exp(x − max x) divided by its sum, exp(x − logsumexp x), exp(log_softmax x)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from nsa_compile.passes.axes import Dimension, Dimensions, dimensions, resolved
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.metadata import same_shape, shape_of
from nsa_compile.passes.normalization import read_division, read_sum
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.sites import Shape
from nsa_compile.passes.views import forth_through

# Operation -> logarithm of the number whose powers it takes.
_BASES: Mapping[str, float] = {"exp": 1.0, "exp2": math.log(2)}
# Operations between the powers and their sum: casts, masks.
_PASSED = ("to", "mul", "masked_fill", "where", "nan_to_num")
_REACH = 6
# Operations between a reduction and its subtraction.
_UNREDUCED = ("unsqueeze", "to", "getitem", "detach")


@dataclasses.dataclass(frozen=True)
class Softmax:
    """What makes attention weights of scores.

    Attributes:
        node: the weights.
        scores: what they are made of.
        reader: the node that reads the scores.
        dims: dimensions of both.
        dim: the one that the softmax is over.
        scale: what the scores are multiplied by.
        is_normalized: the weights sum to 1.
        is_stabilized: if not, the largest is 1.
    """

    node: fx.Node
    scores: fx.Node
    reader: fx.Node
    dims: Dimensions
    dim: int
    scale: float = 1.0
    is_normalized: bool = True
    is_stabilized: bool = False

    @property
    def keys(self) -> Dimension:
        """The axes of the keys."""
        return self.dims[self.dim]


def is_exponential(node: fx.Node) -> bool:
    """Tells whether a node takes powers of e or of 2, as a softmax that is made by hand does."""
    return operation(node) in _BASES


def read_handmade(node: fx.Node, writes: Writes) -> Softmax | None:
    """Reads powers as a softmax; None where they are not divided by a sum of themselves.

    Args:
        node: a node for which `is_exponential` holds.
        writes: the in-place writes of its graph.
    """
    source = (arguments(node) or {}).get("input")
    shape = shape_of(source)
    if not isinstance(source, fx.Node) or shape is None or _is_written(source, node, writes):
        return None
    dims = dimensions(shape)
    bound = arguments(source) or {}
    scores, other = bound.get("input"), bound.get("other")
    if operation(source) == "log_softmax" and operation(node) == "exp" and isinstance(scores, fx.Node):
        return Softmax(node, scores, source, dims, bound["dim"] % len(dims))
    is_difference = operation(source) == "sub" and bound.get("alpha", 1) == 1
    subtracted = _reduced_over(other, scores, shape) if is_difference else None
    if subtracted is not None and isinstance(scores, fx.Node):
        name, dim = subtracted
        if name == "logsumexp" and operation(node) == "exp":
            return Softmax(node, scores, source, dims, dim)
    summed = _summed_over(node, dims)
    if summed is None:
        return None
    is_stabilized = subtracted is not None and subtracted[1] == summed
    scale = _BASES[operation(node)]
    return Softmax(node, source, node, dims, summed, scale, is_normalized=False, is_stabilized=is_stabilized)


def _is_written(source: fx.Node, reader: fx.Node, writes: Writes) -> bool:
    return any(True for _ in writes.between(source, writes.position(source), writes.position(reader)))


def _reduced_over(broadcast: Any, scores: Any, shape: Shape) -> tuple[str, int] | None:
    """The maximum or logsumexp that a node is of the scores, and the dimension it is taken over."""
    reduced, passed = broadcast, set[str]()
    while isinstance(reduced, fx.Node) and operation(reduced) in _UNREDUCED and reduced.args:
        if operation(reduced) == "getitem" and reduced.args[1] != 0:
            return None
        passed.add(operation(reduced))
        reduced = reduced.args[0]
    bound = (arguments(reduced) if isinstance(reduced, fx.Node) else None) or {}
    name = operation(reduced) if isinstance(reduced, fx.Node) else ""
    dim = bound.get("dim", bound.get("other") if name == "max" else None)
    if isinstance(dim, list | tuple) and len(dim) == 1:
        dim = dim[0]
    if bound.get("input") is not scores or not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        return None
    # Of any other shape it would be broadcast otherwise than along the dimension that it is taken over.
    wanted = [1 if number == dim % len(shape) else size for number, size in enumerate(shape)]
    if not same_shape(shape_of(broadcast) or (), wanted):
        return None
    if name in ("amax", "max") or (name == "logsumexp" and passed <= {"unsqueeze"}):
        return name, dim % len(shape)
    return None


def _summed_over(node: fx.Node, dims: Dimensions) -> int | None:
    """The dimension over which powers, cast and masked perhaps, are summed beside another use."""
    full = dims
    for _ in range(_REACH):
        following = None
        for user in node.users:
            read = read_sum(user, dims) if len(node.users) > 1 else None
            summed = read_division(user, dims) if read is None else read[1]
            if summed is not None:
                whole = [dim for dim, axes in enumerate(resolved(full)) if axes == summed]
                return whole[0] if len(whole) == 1 else None
            carried = forth_through(user, node, dims)
            if carried is not None or operation(user) in _PASSED:
                following = (user, dims if carried is None else carried)
        if following is None:
            return None
        node, dims = following
    return None
