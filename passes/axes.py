"""Axes of tensors as products of factors, so that views can be followed in both directions.

A tensor's dimensions are tuples of axes, outermost first: `[B, H, T, D]` is `((b,), (h,), (t,), (d,))`, and its
view as `[B·H, T, D]` is `((b, h), (t,), (d,))`.  A dimension of size 1 holds no axis.  Unifying the dimensions of
two tensors finds out which of their axes are one and the same, and splits axes where one tensor sees two factors
and the other their product.  A key head axis that was repeated for the query heads so becomes (kv, group), of
which the key before its repetition holds only kv.
"""

import math
from collections.abc import Iterable

import sympy
import torch

from nsa_compile.passes.metadata import number_of, same_size
from nsa_compile.passes.sites import Size


class Axis:
    """One factor of a dimension.

    Attributes:
        size: number of positions along it.
    """

    def __init__(self, size: Size) -> None:
        fixed = number_of(size)
        self.size = size if fixed is None else int(fixed)
        self._same_as: Axis | None = None
        self._parts: tuple[Axis, ...] = ()

    def leaves(self) -> "tuple[Axis, ...]":
        """Returns the axes that this one has been found to be the product of; itself if it is not split."""
        representative = self._representative()
        if not representative._parts:
            return (representative,)
        return tuple(leaf for part in representative._parts for leaf in part.leaves())

    def split(self, outer: Size, inner: Size) -> "tuple[Axis, Axis]":
        """Splits an unsplit axis into two factors."""
        parts = Axis(outer), Axis(inner)
        self._representative()._parts = parts
        return parts

    def identify(self, other: "Axis") -> None:
        """Records that two unsplit axes of equal size are one."""
        mine, theirs = self._representative(), other._representative()
        if mine is not theirs:
            theirs._same_as = mine

    def _representative(self) -> "Axis":
        axis = self
        while axis._same_as is not None:
            axis = axis._same_as
        return axis


Dimension = tuple[Axis, ...]
Dimensions = tuple[Dimension, ...]


def dimension(size: Size) -> Dimension:
    """Returns a dimension of one fresh axis; of none for a size that is certainly 1."""
    return () if same_size(size, 1) else (Axis(size),)


def dimensions(shape: Iterable[Size]) -> Dimensions:
    """Returns fresh dimensions for a shape."""
    return tuple(dimension(size) for size in shape)


def leaves(axes: Iterable[Axis]) -> Dimension:
    """Returns the unsplit factors of axes, in order."""
    return tuple(leaf for axis in axes for leaf in axis.leaves())


def resolved(dims: Dimensions) -> Dimensions:
    """Returns dimensions in terms of unsplit axes."""
    return tuple(leaves(dim) for dim in dims)


def flat(dims: Dimensions) -> Dimension:
    """Returns the unsplit axes of all dimensions, outermost first."""
    return leaves(axis for dim in dims for axis in dim)


def size_of(axes: Iterable[Axis]) -> Size:
    """Returns the number of positions of a product of axes."""
    return math.prod(axis.size for axis in axes)


def unify(left: Iterable[Axis], right: Iterable[Axis]) -> bool:
    """Identifies two products of axes factor by factor, splitting where needed.

    Returns:
        Whether they could be identified.  Where not, some factors may have been split, which is harmless, or
        identified, which is why the caller must give the attempt up altogether.
    """
    mine, theirs = list(reversed(leaves(left))), list(reversed(leaves(right)))
    while mine and theirs:
        one, other = mine.pop(), theirs.pop()
        if one is other:
            continue
        if same_size(one.size, other.size):
            one.identify(other)
        elif (rest := _quotient(one.size, other.size)) is not None:
            outer, inner = one.split(other.size, rest)
            outer.identify(other)
            mine.append(inner)
        elif (rest := _quotient(other.size, one.size)) is not None:
            outer, inner = other.split(one.size, rest)
            outer.identify(one)
            theirs.append(inner)
        else:
            return False
    return not mine and not theirs


def unify_as_required(left: Dimension, right: Dimension) -> bool:
    """Identifies two dimensions that the operation which reads them requires to be equal.

    Sizes that are written in different symbols need not be known to be equal: Dynamo gives the lengths of keys and
    values symbols of their own.  Only sizes that are certainly different fail.
    """
    if unify(left, right):
        return True
    sizes = size_of(leaves(left)), size_of(leaves(right))
    if all(isinstance(size, int) for size in sizes) or not len(leaves(left)) == len(leaves(right)) == 1:
        return False
    leaves(left)[0].identify(leaves(right)[0])
    return True


def unify_dimensions(left: Dimensions, right: Dimensions) -> bool:
    """Identifies the axes of two tensors of equal rank, dimension by dimension."""
    return len(left) == len(right) and all(unify(one, other) for one, other in zip(left, right, strict=True))


def _quotient(whole: Size, part: Size) -> "Size | None":
    """Returns whole / part where that is certainly an integer, without adding a guard."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    ratio = sympy.cancel(_expression(whole) / _expression(part))
    if sympy.denom(ratio) != 1:
        return None
    return whole // part


def _expression(size: Size) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
