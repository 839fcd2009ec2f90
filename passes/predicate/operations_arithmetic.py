"""Operations that compute numbers element by element."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from typing import Any

import sympy
import torch

from nsa_compile.passes.predicate.conversion import (
    check_exact,
    is_single_step,
    representable,
)
from nsa_compile.passes.predicate.formula import conjunction, disjunction
from nsa_compile.passes.predicate.operations import Call, as_tensor, logic, operation
from nsa_compile.passes.predicate.tensor import (
    AbstractTensor,
    aligned,
    elementwise,
    make_tensor,
)
from nsa_compile.passes.predicate.terms import UnknownError
from nsa_compile.passes.predicate.writes import target_name


def arithmetic(call: Call, function: Any, *operands: Any) -> AbstractTensor:
    """Exact arithmetic, where it is exact."""

    def apply(*values: sympy.Expr) -> sympy.Expr:
        result = sympy.expand(function(*values))
        if result is sympy.nan or result.has(sympy.nan, sympy.zoo):
            raise UnknownError("its value is not a number")
        constants = all(value.is_number for value in values)
        if not constants and not (len(values) == 2 and is_single_step(values, result)):
            check_exact(call.dtype, *values)
        return representable(call.dtype, result)

    return elementwise(call.shape, call.dtype, apply, *map(as_tensor, operands))


@operation("add")
def _add(call: Call, input: Any, other: Any, alpha: Any = 1) -> AbstractTensor:
    if call.dtype == torch.bool:
        return logic(call, disjunction, input, other)
    if alpha != 1:
        return arithmetic(call, lambda x, y, a: x + a * y, input, other, alpha)
    return arithmetic(call, lambda x, y: x + y, input, other)


@operation("sub", "subtract")
def _sub(call: Call, input: Any, other: Any, alpha: Any = 1) -> AbstractTensor:
    if alpha != 1:
        return arithmetic(call, lambda x, y, a: x - a * y, input, other, alpha)
    return arithmetic(call, lambda x, y: x - y, input, other)


@operation("rsub")
def _rsub(call: Call, input: Any, other: Any, alpha: Any = 1) -> AbstractTensor:
    return _sub(call, other, input, alpha)


@operation("mul", "multiply")
def _mul(call: Call, input: Any, other: Any) -> AbstractTensor:
    if call.dtype == torch.bool:
        return logic(call, conjunction, input, other)
    return arithmetic(call, lambda x, y: x * y, input, other)


@operation("neg", "negative")
def _neg(call: Call, input: Any) -> AbstractTensor:
    return arithmetic(call, lambda x: -x, input)


@operation("abs", "absolute")
def _abs(call: Call, input: Any) -> AbstractTensor:
    return arithmetic(call, sympy.Abs, input)


@operation("log")
def _log(call: Call, input: Any) -> AbstractTensor:
    def logarithm(x: sympy.Expr) -> sympy.Expr:
        if x not in (0, 1):
            raise UnknownError("the logarithm may be rounded")
        return -sympy.oo if x == 0 else sympy.Integer(0)

    return elementwise(call.shape, call.dtype, logarithm, as_tensor(input))


@operation("floor_divide")
def _floor_divide(call: Call, input: Any, other: Any) -> AbstractTensor:
    def divide(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if not (x.is_integer and y.is_positive and y.is_integer):
            raise UnknownError("it divides by something that is not known to be a positive integer")
        return sympy.floor(x / y)

    return arithmetic(call, divide, input, other)


@operation("div", "divide", "true_divide")
def _div(call: Call, input: Any, other: Any, rounding_mode: str | None = None) -> AbstractTensor:
    if rounding_mode == "floor":
        return _floor_divide(call, input, other)

    def divide(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        quotient = x / y
        if rounding_mode is None and y.is_number and not y.is_zero and (x.is_number or quotient.is_integer):
            return quotient
        raise UnknownError("the quotient may be rounded")

    return arithmetic(call, divide, input, other)


@operation("remainder", "fmod")
def _remainder(call: Call, input: Any, other: Any) -> AbstractTensor:
    def remainder(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if not (x.is_integer and y.is_positive and y.is_integer):
            raise UnknownError("it divides by something that is not known to be a positive integer")
        if target_name(call.node) in ("fmod", "fmod_") and not x.is_nonnegative:
            raise UnknownError("the sign of the dividend is not known")
        return sympy.Mod(x, y)

    return arithmetic(call, remainder, input, other)


@operation("maximum", "max")
def _maximum(call: Call, input: Any, other: Any) -> AbstractTensor:
    return arithmetic(call, sympy.Max, input, other)


@operation("minimum", "min")
def _minimum(call: Call, input: Any, other: Any) -> AbstractTensor:
    return arithmetic(call, sympy.Min, input, other)


@operation("clamp", "clip")
def _clamp(call: Call, input: Any, min: Any = None, max: Any = None) -> AbstractTensor:
    result = as_tensor(input)
    if min is not None:
        result = arithmetic(call, sympy.Max, result, min)
    if max is not None:
        result = arithmetic(call, sympy.Min, result, max)
    return make_tensor(call.shape, call.dtype, aligned(result, len(call.shape)))


@operation("relu")
def _relu(call: Call, input: Any, inplace: Any = False) -> AbstractTensor:
    del inplace
    return _clamp(call, input, 0)


@operation("clamp_min")
def _clamp_min(call: Call, input: Any, min: Any) -> AbstractTensor:
    return _clamp(call, input, min)


@operation("clamp_max")
def _clamp_max(call: Call, input: Any, max: Any) -> AbstractTensor:
    return _clamp(call, input, None, max)
