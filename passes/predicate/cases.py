"""Numbers that depend on a formula: what `torch.where` makes, and what a bool is as a number."""

from collections.abc import Callable, Iterable

import sympy

from nsa_compile.passes.predicate.formula import compare, conjunction, disjunction, negation, substitute
from nsa_compile.passes.predicate.terms import (
    FALSE,
    TRUE,
    And,
    Atom,
    Formula,
    Not,
    Relation,
    Substitution,
    UnknownError,
    free_symbols,
    replaced,
)

# (condition, expression) pairs; exactly one condition holds.
Cases = tuple[tuple[Formula, sympy.Expr], ...]
Value = Formula | Cases
_MOST_CASES = 12


def cases_of(value: Value) -> Cases:
    """A number; true counts 1 and false 0."""
    if isinstance(value, tuple):
        return value
    return make_cases([(value, sympy.Integer(1)), (negation(value), sympy.Integer(0))])


def make_cases(pairs: Iterable[tuple[Formula, sympy.Expr]]) -> Cases:
    """Cases with impossible ones dropped and equal ones merged; the conditions must be exclusive and exhaustive.

    Raises:
        UnknownError: there are too many cases to reason about.
    """
    merged: dict[sympy.Expr, Formula] = {}
    for condition, given in pairs:
        if condition != FALSE:
            expression = given if given.is_number else _under(condition, given)
            merged[expression] = disjunction(merged[expression], condition) if expression in merged else condition
    if len(merged) > _MOST_CASES:
        raise UnknownError("its value depends on too many conditions")
    if len(merged) == 1:
        return ((TRUE, next(iter(merged))),)
    return tuple((condition, expression) for expression, condition in merged.items())


def _under(condition: Formula, expression: sympy.Expr) -> sympy.Expr:
    """The expression where the condition holds: with `e = 0` known, `e + c` is `c`."""
    for part in condition.operands if isinstance(condition, And) else (condition,):
        if isinstance(part, Atom) and part.relation is Relation.EQUAL:
            for sign in (1, -1):
                rest = sympy.expand(expression + sign * part.expression)
                if rest.is_number:
                    return rest
    return expression


def formula_of(value: Value) -> Formula:
    """Whether the value is true: for a number, whether it is not 0."""
    if not isinstance(value, tuple):
        return value
    return disjunction(*(conjunction(c, compare("!=", e, sympy.Integer(0))) for c, e in value))


def combine(function: Callable[..., sympy.Expr], *values: Value) -> Cases:
    """`function` applied to numbers case by case."""
    pairs: list[tuple[Formula, tuple[sympy.Expr, ...]]] = [(TRUE, ())]
    for value in values:
        pairs = [
            (both, (*given, expression))
            for condition, given in pairs
            for other, expression in cases_of(value)
            if (both := conjunction(condition, other)) != FALSE
        ]
        if len(pairs) > _MOST_CASES**2:
            raise UnknownError("its value depends on too many conditions")
    return make_cases((condition, function(*given)) for condition, given in pairs)


def substitute_value(value: Value, substitution: Substitution) -> Value:
    """The formula or number with symbols replaced."""
    if not isinstance(value, tuple):
        return substitute(value, substitution)
    return make_cases((substitute(c, substitution), replaced(e, substitution)) for c, e in value)


def value_symbols(value: Value) -> set[sympy.Basic]:
    """The symbols that a formula or number depends on."""
    if not isinstance(value, tuple):
        return free_symbols(value)
    return set().union(*(free_symbols(condition) | expression.free_symbols for condition, expression in value))


def size_of(value: Value) -> int:
    """The number of atoms and of arithmetic operations between numbers, counted with repetition."""
    if isinstance(value, tuple):
        return sum(size_of(condition) + int(sympy.count_ops(expression)) for condition, expression in value)
    if isinstance(value, (Atom, Not)):
        return 1
    return sum(size_of(operand) for operand in value.operands)
