"""Reads a tensor of known values, such as a causal mask in a buffer, as a formula; every element is compared."""

import sympy
import torch

from nsa_compile.passes.predicate.cases import Cases, make_cases
from nsa_compile.passes.predicate.formula import compare, conjunction, negation
from nsa_compile.passes.predicate.tensor import AbstractTensor, axis, make_tensor, number, number_expression
from nsa_compile.passes.predicate.terms import TRUE


def abstract_constant(tensor: torch.Tensor) -> AbstractTensor | None:
    """The tensor as a constant, an arithmetic progression, or a band along the diagonal with two values.

    A tensor whose elements are `u` where `low ≤ column − row ≤ high` and `v` elsewhere is a band: triangles
    (causal masks, boolean or additive) are bands.  The whole tensor is compared, so slices of it follow.

    Returns:
        The abstract tensor, or None where the values are none of these.
    """
    values = tensor.detach().cpu()
    if not values.numel() or values.is_complex() or bool((values != values).any()):
        return None
    shape = tuple(sympy.Integer(size) for size in values.shape)
    extended = [dim for dim, size in enumerate(values.shape) if size > 1]
    flat = values.reshape([values.shape[dim] for dim in extended])
    cases = _constant(flat)
    if cases is None and len(extended) == 1:
        cases = _progression(flat, axis(extended[0]))
    if cases is None and len(extended) == 2:
        cases = _band(flat, axis(extended[0]), axis(extended[1]))
    return None if cases is None else make_tensor(shape, tensor.dtype, cases)


def _constant(values: torch.Tensor) -> Cases | None:
    first = values.flatten()[0]
    return number(number_expression(first.item())) if bool((values == first).all()) else None


def _progression(values: torch.Tensor, position: sympy.Symbol) -> Cases | None:
    if values.dtype == torch.bool:
        return None
    first, second = number_expression(values[0].item()), number_expression(values[1].item())
    step = second - first
    if not (first.is_integer and step.is_integer):
        return None
    expected = int(first) + int(step) * torch.arange(len(values))
    return number(first + step * position) if torch.equal(values.to(torch.float64), expected.double()) else None


def _band(values: torch.Tensor, row: sympy.Symbol, column: sympy.Symbol) -> Cases | None:
    corner = values[-1, 0]
    other = values[values != corner][0]
    if not bool(((values == corner) | (values == other)).all()):
        return None
    if not torch.equal(values[1:, 1:], values[:-1, :-1]):
        return None
    # One element of each diagonal, from the lower left corner to the upper right one.
    diagonals = torch.cat([values[:, 0].flip(0), values[0, 1:]])
    lowest = 1 - len(values)
    for inside, outside in ((corner, other), (other, corner)):
        places = torch.nonzero(diagonals == inside).flatten()
        low, high = int(places[0]), int(places[-1])
        if high - low + 1 != len(places):
            continue
        condition = TRUE
        if low > 0:
            condition = conjunction(condition, compare(">=", column - row, sympy.Integer(lowest + low)))
        if high < len(diagonals) - 1:
            condition = conjunction(condition, compare("<=", column - row, sympy.Integer(lowest + high)))
        pairs = [(condition, number_expression(inside.item()))]
        return make_cases([*pairs, (negation(condition), number_expression(outside.item()))])
    return None
