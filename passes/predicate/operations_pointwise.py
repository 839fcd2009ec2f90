"""Operations that work element by element: arithmetic, comparison, logic, selection, conversion of dtypes."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from typing import Any

import sympy
import torch

from nsa_compile.passes.predicate.formula import (
    Cast,
    UnknownError,
    Value,
    cases_of,
    combine,
    compare,
    conjunction,
    disjunction,
    formula_of,
    if_else,
    is_exact,
    make_cases,
    negation,
)
from nsa_compile.passes.predicate.operations import Call, as_tensor, operation
from nsa_compile.passes.predicate.tensor import (
    AbstractTensor,
    aligned,
    elementwise,
    make_tensor,
)
from nsa_compile.passes.predicate.writes import target_name

_WIDE_INTEGERS = (torch.int32, torch.int64)
# A float32 holds every integer up to here; positions are below it.
_EXACT_FLOATS = (torch.float32, torch.float64)


def _is_data(expression: sympy.Expr) -> bool:
    return bool(expression.atoms(sympy.core.function.AppliedUndef, Cast))


def _checked(dtype: torch.dtype, *expressions: sympy.Expr) -> None:
    """Refuses arithmetic whose rounding or overflow the exact expressions would hide.

    Raises:
        UnknownError: data is computed with in a narrow integer or a floating-point dtype.
    """
    if dtype in _WIDE_INTEGERS or dtype == torch.bool:
        return
    if any(_is_data(expression) for expression in expressions):
        raise UnknownError(f"it computes with data in {dtype}, where the result may be rounded or overflow")


def _arithmetic(call: Call, function: Any, *operands: Any) -> AbstractTensor:
    """Exact arithmetic, where it is exact."""

    def apply(*values: sympy.Expr) -> sympy.Expr:
        result = sympy.expand(function(*values))
        if result is sympy.nan or result.has(sympy.nan, sympy.zoo):
            raise UnknownError("its value is not a number")
        constants = all(value.is_number for value in values)
        if not constants and not (len(values) == 2 and _single_step(values, result)):
            _checked(call.dtype, *values)
        return _representable(call.dtype, result)

    return elementwise(call.shape, call.dtype, apply, *map(as_tensor, operands))


def _single_step(values: tuple[sympy.Expr, ...], result: sympy.Expr) -> bool:
    """Whether `result` is one addition of a constant to bare data, or a product with 0, 1 or −1.

    Its comparison with 0 is then right in floating point too, whatever the rounding.
    """
    left, right = values
    data, constant = (left, right) if right.is_number else (right, left)
    if not constant.is_number or not constant.is_finite or isinstance(data, (sympy.Add, sympy.Mul)):
        return False
    return result in (data + constant, data - constant, constant - data, data, -data)


def _representable(dtype: torch.dtype, value: sympy.Expr) -> sympy.Expr:
    """`value` as the dtype holds it.

    Raises:
        UnknownError: the dtype may round it, and what it becomes is not known.
    """
    if dtype == torch.bool or value.is_infinite:
        return value
    if dtype.is_floating_point:
        if value.is_number:
            return _rounded(dtype, value)
        if _is_data(value) or (dtype in _EXACT_FLOATS and value.is_integer):
            return value
        raise UnknownError(f"{value} may be rounded in {dtype}")
    if value.is_number:
        information = torch.iinfo(dtype)
        if not (value.is_integer and information.min <= int(value) <= information.max):
            raise UnknownError(f"{value} does not fit {dtype}")
        return value
    if dtype in _WIDE_INTEGERS or _is_data(value):
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


@operation("add")
def _add(call: Call, input: Any, other: Any, alpha: Any = 1) -> AbstractTensor:
    if call.dtype == torch.bool:
        return _logic(call, disjunction, input, other)
    if alpha != 1:
        return _arithmetic(call, lambda x, y, a: x + a * y, input, other, alpha)
    return _arithmetic(call, lambda x, y: x + y, input, other)


@operation("sub", "subtract")
def _sub(call: Call, input: Any, other: Any, alpha: Any = 1) -> AbstractTensor:
    if alpha != 1:
        return _arithmetic(call, lambda x, y, a: x - a * y, input, other, alpha)
    return _arithmetic(call, lambda x, y: x - y, input, other)


@operation("rsub")
def _rsub(call: Call, input: Any, other: Any, alpha: Any = 1) -> AbstractTensor:
    return _sub(call, other, input, alpha)


@operation("mul", "multiply")
def _mul(call: Call, input: Any, other: Any) -> AbstractTensor:
    if call.dtype == torch.bool:
        return _logic(call, conjunction, input, other)
    return _arithmetic(call, lambda x, y: x * y, input, other)


@operation("neg", "negative")
def _neg(call: Call, input: Any) -> AbstractTensor:
    return _arithmetic(call, lambda x: -x, input)


@operation("abs", "absolute")
def _abs(call: Call, input: Any) -> AbstractTensor:
    return _arithmetic(call, sympy.Abs, input)


@operation("floor_divide")
def _floor_divide(call: Call, input: Any, other: Any) -> AbstractTensor:
    def divide(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if not (x.is_integer and y.is_positive and y.is_integer):
            raise UnknownError("it divides by something that is not known to be a positive integer")
        return sympy.floor(x / y)

    return _arithmetic(call, divide, input, other)


@operation("div", "divide", "true_divide")
def _div(call: Call, input: Any, other: Any, rounding_mode: str | None = None) -> AbstractTensor:
    if rounding_mode == "floor":
        return _floor_divide(call, input, other)

    def divide(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        quotient = x / y
        if rounding_mode is None and y.is_number and not y.is_zero and (x.is_number or quotient.is_integer):
            return quotient
        raise UnknownError("the quotient may be rounded")

    return _arithmetic(call, divide, input, other)


@operation("remainder", "fmod")
def _remainder(call: Call, input: Any, other: Any) -> AbstractTensor:
    def remainder(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if not (x.is_integer and y.is_positive and y.is_integer):
            raise UnknownError("it divides by something that is not known to be a positive integer")
        if target_name(call.node) in ("fmod", "fmod_") and not x.is_nonnegative:
            raise UnknownError("the sign of the dividend is not known")
        return sympy.Mod(x, y)

    return _arithmetic(call, remainder, input, other)


@operation("maximum", "max")
def _maximum(call: Call, input: Any, other: Any) -> AbstractTensor:
    return _arithmetic(call, sympy.Max, input, other)


@operation("minimum", "min")
def _minimum(call: Call, input: Any, other: Any) -> AbstractTensor:
    return _arithmetic(call, sympy.Min, input, other)


@operation("clamp", "clip")
def _clamp(call: Call, input: Any, min: Any = None, max: Any = None) -> AbstractTensor:
    result = as_tensor(input)
    if min is not None:
        result = _arithmetic(call, sympy.Max, result, min)
    if max is not None:
        result = _arithmetic(call, sympy.Min, result, max)
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


def _comparison(symbol: str, *names: str) -> None:
    def handler(call: Call, input: Any, other: Any) -> AbstractTensor:
        left, right = (cases_of(aligned(as_tensor(operand), len(call.shape))) for operand in (input, other))
        formula = disjunction(
            *(
                conjunction(condition, other_condition, compare(symbol, x, y))
                for condition, x in left
                for other_condition, y in right
            )
        )
        return make_tensor(call.shape, torch.bool, formula)

    operation(*names)(handler)


_comparison("<", "lt", "less")
_comparison("<=", "le", "less_equal")
_comparison(">", "gt", "greater")
_comparison(">=", "ge", "greater_equal")
_comparison("==", "eq")
_comparison("!=", "ne", "not_equal")


def _logic(call: Call, connect: Any, *operands: Any) -> AbstractTensor:
    rank = len(call.shape)
    formulas = [formula_of(aligned(as_tensor(operand), rank)) for operand in operands]
    return make_tensor(call.shape, torch.bool, connect(*formulas))


@operation("logical_and")
def _logical_and(call: Call, input: Any, other: Any) -> AbstractTensor:
    return _logic(call, conjunction, input, other)


@operation("logical_or")
def _logical_or(call: Call, input: Any, other: Any) -> AbstractTensor:
    return _logic(call, disjunction, input, other)


@operation("logical_not")
def _logical_not(call: Call, input: Any) -> AbstractTensor:
    return _logic(call, negation, input)


@operation("logical_xor")
def _logical_xor(call: Call, input: Any, other: Any) -> AbstractTensor:
    return _logic(call, lambda x, y: if_else(x, negation(y), y), input, other)


@operation("bitwise_and")
def _bitwise_and(call: Call, input: Any, other: Any) -> AbstractTensor:
    _boolean(call)
    return _logic(call, conjunction, input, other)


@operation("bitwise_or")
def _bitwise_or(call: Call, input: Any, other: Any) -> AbstractTensor:
    _boolean(call)
    return _logic(call, disjunction, input, other)


@operation("bitwise_xor")
def _bitwise_xor(call: Call, input: Any, other: Any) -> AbstractTensor:
    _boolean(call)
    return _logical_xor(call, input, other)


@operation("bitwise_not")
def _bitwise_not(call: Call, input: Any) -> AbstractTensor:
    if call.dtype == torch.bool:
        return _logic(call, negation, input)
    return _arithmetic(call, lambda x: -x - 1, input)


def _boolean(call: Call) -> None:
    if call.dtype != torch.bool:
        raise UnknownError(f"it combines the bits of {call.dtype}")


@operation("where")
def _where(call: Call, condition: Any, input: Any, other: Any) -> AbstractTensor:
    rank = len(call.shape)
    holds = formula_of(aligned(as_tensor(condition), rank))
    then, otherwise = (aligned(converted(as_tensor(x), call.dtype), rank) for x in (input, other))
    if call.dtype == torch.bool:
        return make_tensor(call.shape, call.dtype, if_else(holds, formula_of(then), formula_of(otherwise)))
    pairs = [(conjunction(holds, c), e) for c, e in cases_of(then)]
    pairs += [(conjunction(negation(holds), c), e) for c, e in cases_of(otherwise)]
    return make_tensor(call.shape, call.dtype, make_cases(pairs))


@operation("masked_fill")
def _masked_fill(call: Call, input: Any, mask: Any, value: Any) -> AbstractTensor:
    return _where(call, mask, value, input)


@operation("fill", "copy")
def _fill(call: Call, input: Any, value: Any, non_blocking: Any = None) -> AbstractTensor:
    del input, non_blocking
    return make_tensor(call.shape, call.dtype, aligned(converted(as_tensor(value), call.dtype), len(call.shape)))


@operation("zero", reads=False)
def _zero(call: Call) -> AbstractTensor:
    return make_tensor(call.shape, call.dtype, cases_of(((conjunction(), sympy.Integer(0)),)))


@operation(
    *("to", "_to_copy", "type", "type_as", "bool", "float", "double", "half", "bfloat16", "int", "long", "contiguous"),
    *("clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "cpu", "cuda", "requires_grad", "pos", "positive"),
    *("short", "char", "byte", "lift"),
)
def _convert(call: Call, input: Any, *_: Any, **__: Any) -> AbstractTensor:
    return converted(as_tensor(input), call.dtype)


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
            return _representable(dtype, sympy.Integer(int(expression)))
        same_integer = is_exact(expression) and expression.is_integer and dtype in _WIDE_INTEGERS
        if _is_data(expression) and not same_integer and not (source == torch.float32 and dtype == torch.float64):
            if isinstance(expression, (sympy.Add, sympy.Mul)) and not is_exact(expression):
                raise UnknownError(f"it converts a sum of data to {dtype}")
            return Cast(expression, sympy.core.symbol.Str(str(dtype).removeprefix("torch.")))
        return _representable(dtype, expression)

    return combine(convert, value)
