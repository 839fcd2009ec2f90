"""Abstract tensors: a shape, and one formula or number that gives every element in terms of its index."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from nsa_compile.passes.predicate.cases import (
    Cases,
    Value,
    cases_of,
    combine,
    formula_of,
    substitute_value,
    value_symbols,
)
from nsa_compile.passes.predicate.terms import TRUE, Formula, UnknownError, truth
from nsa_compile.passes.sites import Scope


@functools.lru_cache(maxsize=64)
def axis(number: int) -> sympy.Symbol:
    """The index along dimension `number`: `0 ≤ index < size`."""
    return sympy.Symbol(f"axis{number}", integer=True, nonnegative=True)


# The index of a batch, a head, a query and a key; each at least 0 and below B, H, T and S.
B_INDEX, H_INDEX, QUERY, KEY = (sympy.Symbol(letter, integer=True, nonnegative=True) for letter in "bhij")
ZERO = sympy.Integer(0)
ONE = sympy.Integer(1)


def size_expression(size: "int | torch.SymInt") -> sympy.Expr:
    """A size as sympy sees it: a number, or an expression over the graph's size symbols."""
    if isinstance(size, torch.SymInt):
        return sympy.sympify(size.node.expr)
    return sympy.Integer(size)


def number_expression(value: bool | float) -> sympy.Expr:
    """A Python number, exactly: floats are the binary fractions that they are.

    Raises:
        UnknownError: NaN.
    """
    if isinstance(value, float):
        if value != value:
            raise UnknownError("it uses the value NaN")
        if value in (float("inf"), float("-inf")):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Rational(*value.as_integer_ratio())
    return sympy.Integer(int(value))


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays true between two positions of equal running sum: `data` grows by `slope` with each position.

    Attributes:
        data: a leaf's function at an index, in terms of the running sum's axes.
        slope: its growth from one position to the next.
    """

    data: sympy.Expr
    slope: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor whose values are data; in formulas it is a function of its index.

    Attributes:
        name: of the function, unique in the whole graph.
        node: the tensor.
        written_by: the node after which `node` holds the values that are meant: itself, or an in-place writer.
        scope: the graph that holds the node.
        dtype: its dtype.
        shape: its shape.
        cause: why it is data: an input, or what the prover does not know about the operation.
        sorted_axis: number of the dimension along which values never decrease; None where none is known.
        run: set for running sums that mark where documents begin.
        summand: for running sums of truths, when 1 is added, in terms of the sum's axes.
        stale: the tensor is overwritten in a way that leaves the value unknown; it must not be used.
        mapped: indices that the values depend on beside the tensor's own: it is inside torch.vmap or a predicate, where
            one element stands for all; it can be reasoned about, but not read from the graph.
        computed_of: names of the data that it is the sum or product of, where the arithmetic may round.
    """

    name: str
    node: fx.Node
    written_by: fx.Node
    scope: Scope
    dtype: torch.dtype
    shape: tuple[sympy.Expr, ...]
    cause: str
    sorted_axis: int | None = None
    run: Run | None = None
    summand: Formula | None = None
    stale: bool = False
    mapped: tuple[sympy.Symbol, ...] = ()
    computed_of: tuple[str, ...] = ()

    @property
    def function(self) -> Any:
        """The uninterpreted function of the leaf's index."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return sympy.Function(self.name, extended_real=True)
        # Running sums are sorted because what they add up is not negative: then they are not negative either.
        return sympy.Function(self.name, integer=True, nonnegative=True if self.summand is not None else None)


@dataclasses.dataclass(frozen=True)
class AbstractTensor:
    """What is known of a tensor.

    Attributes:
        shape: sizes; 1 only where the size is always 1.
        dtype: the dtype; `value` is a formula exactly for bool.
        value: an element, in terms of `axis(0)`, `axis(1)`, …; never of the axis of a dimension of size 1.
    """

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    value: Value

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def formula(self) -> Formula:
        """Whether the element is true (not 0)."""
        return formula_of(self.value)

    def number(self) -> sympy.Expr:
        """The element as one expression.

        Raises:
            UnknownError: it depends on a condition.
        """
        cases = cases_of(self.value)
        if len(cases) != 1:
            raise UnknownError("it needs a number that depends on a condition")
        return cases[0][1]


def make_tensor(shape: Sequence[sympy.Expr], dtype: torch.dtype, value: Value) -> AbstractTensor:
    """An abstract tensor: formulas count 1 and 0 as numbers, and the index along a dimension of size 1 is 0."""
    unit = {axis(number): ZERO for number, size in enumerate(shape) if size == 1}
    if unit and not unit.keys().isdisjoint(value_symbols(value)):
        value = substitute_value(value, unit)
    if dtype == torch.bool:
        value = formula_of(value)
    elif not isinstance(value, tuple):
        value = cases_of(value)
    return AbstractTensor(tuple(shape), dtype, value)


def scalar(value: "bool | int | float | sympy.Expr") -> AbstractTensor:
    """A Python number or a size as a tensor of rank 0."""
    if isinstance(value, bool):
        return AbstractTensor((), torch.bool, truth(value))
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    return AbstractTensor((), dtype, number(value if isinstance(value, sympy.Expr) else number_expression(value)))


def number(expression: sympy.Expr) -> Cases:
    """An unconditional number."""
    return ((TRUE, expression),)


def rearrange(
    tensor: AbstractTensor, shape: Sequence[sympy.Expr], index: Sequence[sympy.Expr], dtype: torch.dtype | None = None
) -> AbstractTensor:
    """A view or gather: the result's element is `tensor[index]`, `index` in terms of the result's axes."""
    moved = {axis(number): expression for number, expression in enumerate(index) if expression != axis(number)}
    return make_tensor(shape, dtype or tensor.dtype, substitute_value(tensor.value, moved) if moved else tensor.value)


def aligned(tensor: AbstractTensor, rank: int) -> Value:
    """The value in terms of the axes of a result of rank `rank` that the tensor is broadcast to, right-aligned."""
    shift = rank - tensor.rank
    if not shift:
        return tensor.value
    return substitute_value(tensor.value, {axis(number): axis(number + shift) for number in range(tensor.rank)})


def elementwise(
    shape: Sequence[sympy.Expr],
    dtype: torch.dtype,
    function: Callable[..., sympy.Expr],
    *operands: AbstractTensor,
) -> AbstractTensor:
    """Applies `function` to the operands' elements, broadcast to `shape`."""
    return make_tensor(shape, dtype, combine(function, *(aligned(operand, len(shape)) for operand in operands)))


def leaf_tensor(leaf: Leaf) -> AbstractTensor:
    """The tensor of a leaf: its function at the index, for bool whether it is not 0."""
    index = [ZERO if size == 1 else axis(number) for number, size in enumerate(leaf.shape)]
    return make_tensor(leaf.shape, leaf.dtype, number(leaf.function(*index, *leaf.mapped)))


def binary_tensor(leaf: Leaf) -> AbstractTensor:
    """The tensor of a leaf that holds 0 and 1 alone: 1 where it is not 0."""
    return make_tensor(leaf.shape, leaf.dtype, formula_of(leaf_tensor(leaf).value))
