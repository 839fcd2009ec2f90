"""What formulas are made of: atoms over sympy expressions, negations, conjunctions and disjunctions.

Formulas are kept in a normal form: conjunctions and disjunctions (flat, without repetitions) of atoms `e ≤ 0`, `e < 0`,
`e = 0` and their negations.  Over integers `e < 0` is written `e + 1 ≤ 0` and the negation of `e ≤ 0` is `1 − e ≤ 0`,
so negations remain only around `=`.  Floating-point data may be NaN: there negations stay, and nothing is rewritten.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, cast

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.symbol import Str

# Symbol or application -> what stands in its place.
Substitution = Mapping[Any, Any]


def arguments_of(expression: sympy.Basic) -> tuple[sympy.Expr, ...]:
    """An expression's arguments; sympy declares them as less than the expressions that they are."""
    return cast("tuple[sympy.Expr, ...]", expression.args)


def symbols_of(expression: sympy.Basic) -> set[sympy.Symbol]:
    """An expression's free symbols; sympy declares them as less than the symbols that they are."""
    return cast("set[sympy.Symbol]", expression.free_symbols)


class UnknownError(Exception):
    """An abstract operation cannot say what its result is; the message says why.

    Not a user's error: the interpreter catches it and treats the result as opaque data.
    """


class RoundedError(UnknownError):
    """The result of adding and multiplying data may be rounded or overflow."""


class Relation(enum.Enum):
    """How an atom's expression is compared with 0."""

    AT_MOST = "≤"
    BELOW = "<"
    EQUAL = "="


@dataclasses.dataclass(frozen=True)
class Atom:
    """`expression relation 0`."""

    relation: Relation
    expression: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Not:
    """The negation of an atom."""

    operand: Atom


@dataclasses.dataclass(frozen=True)
class And:
    """All operands hold; with none it is true."""

    operands: "tuple[Formula, ...]" = ()


@dataclasses.dataclass(frozen=True)
class Or:
    """Some operand holds; with none it is false."""

    operands: "tuple[Formula, ...]" = ()


Formula = Atom | Not | And | Or
TRUE = And()
FALSE = Or()


def truth(value: bool) -> Formula:
    """TRUE or FALSE."""
    return TRUE if value else FALSE


class Cast(sympy.Function):
    """`Cast(x, dtype name)`: data converted to a dtype that may change its value."""

    @classmethod
    def eval(cls, *_: sympy.Basic) -> None:
        """Stays unevaluated."""
        return

    def _eval_is_integer(self) -> bool | None:
        return True if "int" in str(self.args[1]) else None

    def _eval_is_extended_real(self) -> bool:
        return True


def cast_to(expression: sympy.Expr, dtype: str) -> sympy.Expr:
    """Data converted to a dtype, such as "float16"."""
    converted: Any = Cast(expression, Str(dtype))
    return converted


def is_exact(expression: sympy.Expr) -> bool:
    """Whether no floating-point data takes part: integers (and constants) only."""
    return all(application.is_integer for application in expression.atoms(AppliedUndef, Cast))


def expressions(formula: Formula) -> set[sympy.Expr]:
    """The expressions that the formula's atoms compare with 0."""
    found: set[sympy.Expr] = set()
    pending = [formula]
    while pending:
        part = pending.pop()
        if isinstance(part, Atom):
            found.add(part.expression)
        elif isinstance(part, Not):
            found.add(part.operand.expression)
        else:
            pending.extend(part.operands)
    return found


def free_symbols(formula: Formula) -> set[sympy.Basic]:
    """The symbols that the formula depends on."""
    return set().union(*(expression.free_symbols for expression in expressions(formula)))


def replaced(expression: sympy.Expr, substitution: Substitution) -> sympy.Expr:
    """The expression with symbols or applications replaced, simultaneously."""
    result: Any = expression.xreplace(substitution)
    return result


def coefficient_of(symbol: sympy.Expr, expression: sympy.Expr) -> sympy.Expr:
    """What an expanded expression multiplies a symbol (or an application) by; 0 where it is no term of it."""
    found: Any = expression.coeff(symbol)
    return found
