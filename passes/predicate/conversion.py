"""What becomes of numbers in a dtype: where arithmetic and conversion are exact, and where they are not followed."""

import sympy
import torch

from nsa_compile.passes.predicate.cases import Value, combine, formula_of
from nsa_compile.passes.predicate.tensor import (
    AbstractTensor,
    make_tensor,
)
from nsa_compile.passes.predicate.terms import Cast, RoundedError, UnknownError, cast_to, is_exact

# Integers of these dtypes are taken not to overflow.
WIDE_INTEGERS = (torch.int32, torch.int64)
# A float32 holds every integer up to 2**24; positions are taken to be below it.
_EXACT_FLOATS = (torch.float32, torch.float64)


def is_data(expression: sympy.Expr) -> bool:
    """Whether the expression depends on data."""
    return bool(expression.atoms(sympy.core.function.AppliedUndef, Cast))


def check_exact(dtype: torch.dtype, *expressions: sympy.Expr) -> None:
    """Refuses arithmetic whose rounding or overflow the exact expressions would hide.

    Raises:
        RoundedError: data is computed with in a narrow integer or a floating-point dtype.
    """
    if dtype in WIDE_INTEGERS or dtype == torch.bool:
        return
    if any(is_data(expression) for expression in expressions):
        raise RoundedError(f"it computes with data in {dtype}, where the result may be rounded or overflow")


def is_single_step(values: tuple[sympy.Expr, ...], result: sympy.Expr) -> bool:
    """Whether `result` is one addition of a constant to bare data, or a product with 0, 1 or −1.

    Its comparison with 0 is then right in floating point too, whatever the rounding.
    """
    left, right = values
    data, constant = (left, right) if right.is_number else (right, left)
    if not constant.is_number or not constant.is_finite or isinstance(data, (sympy.Add, sympy.Mul)):
        return False
    return result in (data + constant, data - constant, constant - data, data, -data)


def representable(dtype: torch.dtype, value: sympy.Expr) -> sympy.Expr:
    """`value` as the dtype holds it.

    Raises:
        UnknownError: the dtype may round it, and what it becomes is not known.
    """
    if dtype == torch.bool or value.is_infinite:
        return value
    if dtype.is_floating_point:
        if value.is_number:
            return _rounded(dtype, value)
        if is_data(value) or (dtype in _EXACT_FLOATS and value.is_integer):
            return value
        raise UnknownError(f"{value} may be rounded in {dtype}")
    if value.is_number:
        information = torch.iinfo(dtype)
        if not (value.is_integer and information.min <= int(value) <= information.max):
            raise UnknownError(f"{value} does not fit {dtype}")
        return value
    if dtype in WIDE_INTEGERS or is_data(value):
        return value
    raise UnknownError(f"{value} may not fit {dtype}")


def _rounded(dtype: torch.dtype, value: sympy.Expr) -> sympy.Expr:
    try:
        exact = torch.tensor(float(value), dtype=torch.float64).to(dtype).item()
    except OverflowError:
        return sympy.oo if value.is_positive else -sympy.oo
    if exact in (float("inf"), float("-inf")):
        return sympy.oo if exact > 0 else -sympy.oo
    return sympy.Rational(*exact.as_integer_ratio())


def converted(tensor: AbstractTensor, dtype: torch.dtype) -> AbstractTensor:
    """The tensor in another dtype."""
    if tensor.dtype == dtype:
        return tensor
    return make_tensor(tensor.shape, dtype, _converted_value(tensor.value, tensor.dtype, dtype))


def _converted_value(value: Value, source: torch.dtype, dtype: torch.dtype) -> Value:
    if dtype == torch.bool:
        return formula_of(value)

    def convert(expression: sympy.Expr) -> sympy.Expr:
        if expression.is_infinite and not dtype.is_floating_point:
            raise UnknownError(f"infinity has no value in {dtype}")
        if expression.is_number and not dtype.is_floating_point:
            return representable(dtype, sympy.Integer(int(expression)))
        same_integer = is_exact(expression) and expression.is_integer and dtype in WIDE_INTEGERS
        if is_data(expression) and not same_integer and not (source == torch.float32 and dtype == torch.float64):
            if isinstance(expression, (sympy.Add, sympy.Mul)) and not is_exact(expression):
                raise RoundedError(f"it converts a sum of data to {dtype}")
            return cast_to(expression, str(dtype).removeprefix("torch."))
        return representable(dtype, expression)

    return combine(convert, value)
