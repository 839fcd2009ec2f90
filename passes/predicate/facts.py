"""What is known of sizes and positions: signs and ranges, and sequences that never decrease.

Every function answers "proved" or "not proved"; none guesses.
"""

from collections.abc import Callable, Mapping
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from nsa_compile.passes.predicate.formula import atom
from nsa_compile.passes.predicate.signs import never_negative
from nsa_compile.passes.predicate.terms import (
    FALSE,
    TRUE,
    Atom,
    Formula,
    Relation,
    arguments_of,
    coefficient_of,
    replaced,
    symbols_of,
)

# Symbol -> its largest value; the smallest is 0.
Ranges = Mapping[sympy.Symbol, sympy.Expr]


def smallest(expression: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    """A lower bound, free of the ranged symbols, that is reached; None where the expression is not affine in them."""
    expression = sympy.expand(expression)
    for symbol in sorted(symbols_of(expression) & set(ranges), key=str):
        coefficient = coefficient_of(symbol, expression)
        rest = expression - coefficient * symbol
        if rest.has(symbol) or not coefficient.is_number:
            return None
        chosen = sympy.Integer(0) if coefficient.is_positive else ranges[symbol]
        expression = sympy.expand(rest + coefficient * chosen)
    return expression


def is_nonnegative(expression: sympy.Expr, ranges: Ranges) -> bool:
    """Whether the expression is proved ≥ 0 for all positions in their ranges and all sizes ≥ 1."""
    if never_negative(expression):
        return True
    bound = smallest(expression, ranges)
    return bound is not None and never_negative(bound)


def is_positive(expression: sympy.Expr, ranges: Ranges) -> bool:
    """Whether the integer expression is proved > 0 for all positions in their ranges and all sizes ≥ 1."""
    return is_nonnegative(expression - 1, ranges)


def simplify(expression: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """The expression with quotients and remainders of indices resolved where their range decides them."""
    changes: dict[Any, Any] = {}
    for part in expression.atoms(sympy.floor, sympy.Mod):
        quotient: Any = part.args if isinstance(part, sympy.Mod) else sympy.fraction(sympy.together(part.args[0]))
        numerator, denominator = quotient
        if is_nonnegative(numerator, ranges) and is_positive(denominator - numerator, ranges):
            changes[part] = numerator if isinstance(part, sympy.Mod) else sympy.Integer(0)
    return replaced(expression, changes)


def decide(part: Atom, ranges: Ranges) -> Formula:
    """The atom, with quotients and remainders resolved, or its truth where the ranges of the positions decide it."""
    expression = simplify(part.expression, ranges)
    if part.relation is Relation.AT_MOST and expression.is_integer:
        if is_nonnegative(-expression, ranges):
            return TRUE
        if is_positive(expression, ranges):
            return FALSE
    return part if expression == part.expression else atom(part.relation, expression)


def never_decreases(
    expression: sympy.Expr, symbol: sympy.Symbol, sorted_axis: Callable[[str], int | None], sign: int = 1
) -> bool:
    """Whether `sign · expression` is proved not to decrease while the integer `symbol` grows.

    Args:
        expression: integer-valued.
        symbol: the position.
        sorted_axis: name of a data function -> the number of its argument in which it never decreases, or None.
        sign: 1, or −1 to ask whether the expression never increases.
    """
    if symbol not in expression.free_symbols:
        return True
    if expression == symbol:
        return sign > 0
    if isinstance(expression, sympy.Add):
        return all(never_decreases(term, symbol, sorted_axis, sign) for term in expression.args)
    if isinstance(expression, sympy.Mul):
        coefficient, rest = expression.as_coeff_Mul()
        constant = [factor for factor in sympy.Mul.make_args(rest) if symbol not in factor.free_symbols]
        varying = [factor for factor in sympy.Mul.make_args(rest) if symbol in factor.free_symbols]
        if len(varying) != 1 or not all(factor.is_nonnegative for factor in constant):
            return False
        return never_decreases(varying[0], symbol, sorted_axis, sign if coefficient.is_positive else -sign)
    if isinstance(expression, (sympy.floor, sympy.ceiling, sympy.Max, sympy.Min)):
        return all(never_decreases(argument, symbol, sorted_axis, sign) for argument in arguments_of(expression))
    if isinstance(expression, AppliedUndef):
        along = sorted_axis(expression.func.__name__)
        if along is None or sign < 0:
            return False
        index = arguments_of(expression)
        others = [argument for place, argument in enumerate(index) if place != along]
        if any(symbol in argument.free_symbols for argument in others):
            return False
        return never_decreases(index[along], symbol, sorted_axis)
    return False
