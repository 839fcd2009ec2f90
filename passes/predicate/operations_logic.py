"""Operations that compare, combine and choose element by element, and conversions of dtypes."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from typing import Any

import sympy
import torch

from nsa_compile.passes.predicate.cases import cases_of, formula_of, make_cases, size_of
from nsa_compile.passes.predicate.conversion import (
    converted,
)
from nsa_compile.passes.predicate.formula import compare, conjunction, disjunction, if_else, negation
from nsa_compile.passes.predicate.operations import Call, as_tensor, logic, operation
from nsa_compile.passes.predicate.operations_arithmetic import arithmetic
from nsa_compile.passes.predicate.tensor import (
    AbstractTensor,
    aligned,
    make_tensor,
)
from nsa_compile.passes.predicate.terms import UnknownError


def _comparison(symbol: str, *names: str) -> None:
    def handler(call: Call, input: Any, other: Any) -> AbstractTensor:
        left, right = (cases_of(aligned(as_tensor(operand), len(call.shape))) for operand in (input, other))
        pairs = [
            (conjunction(condition, other_condition), compare(symbol, x, y))
            for condition, x in left
            for other_condition, y in right
        ]
        holds = disjunction(*(conjunction(*pair) for pair in pairs))
        fails = disjunction(*(conjunction(condition, negation(relation)) for condition, relation in pairs))
        # A product of masks is 0 where one is, or the other, or both: shorter said, not where both are 1.
        return make_tensor(call.shape, torch.bool, negation(fails) if size_of(fails) < size_of(holds) else holds)

    operation(*names)(handler)


_comparison("<", "lt", "less")
_comparison("<=", "le", "less_equal")
_comparison(">", "gt", "greater")
_comparison(">=", "ge", "greater_equal")
_comparison("==", "eq")
_comparison("!=", "ne", "not_equal")


@operation("logical_and")
def _logical_and(call: Call, input: Any, other: Any) -> AbstractTensor:
    return logic(call, conjunction, input, other)


@operation("logical_or")
def _logical_or(call: Call, input: Any, other: Any) -> AbstractTensor:
    return logic(call, disjunction, input, other)


@operation("logical_not")
def _logical_not(call: Call, input: Any) -> AbstractTensor:
    return logic(call, negation, input)


@operation("logical_xor")
def _logical_xor(call: Call, input: Any, other: Any) -> AbstractTensor:
    return logic(call, lambda x, y: if_else(x, negation(y), y), input, other)


@operation("bitwise_and")
def _bitwise_and(call: Call, input: Any, other: Any) -> AbstractTensor:
    _boolean(call)
    return logic(call, conjunction, input, other)


@operation("bitwise_or")
def _bitwise_or(call: Call, input: Any, other: Any) -> AbstractTensor:
    _boolean(call)
    return logic(call, disjunction, input, other)


@operation("bitwise_xor")
def _bitwise_xor(call: Call, input: Any, other: Any) -> AbstractTensor:
    _boolean(call)
    return _logical_xor(call, input, other)


@operation("bitwise_not")
def _bitwise_not(call: Call, input: Any) -> AbstractTensor:
    if call.dtype == torch.bool:
        return logic(call, negation, input)
    return arithmetic(call, lambda x: -x - 1, input)


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
    *("short", "char", "byte", "lift", "wrapped_astype"),
)
def _convert(call: Call, input: Any, *_: Any, **__: Any) -> AbstractTensor:
    return converted(as_tensor(input), call.dtype)
