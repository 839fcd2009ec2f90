"""Data that is put together from two parts and still never decreases, such as a running sum moved by one place."""

from collections.abc import Callable

import sympy
from sympy.core.function import AppliedUndef

from nsa_compile.passes.predicate.cases import Cases
from nsa_compile.passes.predicate.facts import never_decreases
from nsa_compile.passes.predicate.formula import negation
from nsa_compile.passes.predicate.signs import never_negative
from nsa_compile.passes.predicate.tensor import Leaf, axis
from nsa_compile.passes.predicate.terms import Atom, Formula, Relation


def sorted_axis(cases: Cases, rank: int, leaf: Callable[[str], Leaf]) -> int | None:
    """The dimension along which a number of two cases, one of them sorted data, never decreases; None if unknown.

    Args:
        cases: the number, in terms of its axes.
        rank: how many axes there are.
        leaf: finds a leaf by its function's name.
    """
    if len(cases) != 2:
        return None
    data = {application for _, expression in cases for application in expression.atoms(AppliedUndef)}
    if not any(leaf(application.func.__name__).sorted_axis is not None for application in data):
        return None
    for (condition, one), (other, two) in (cases, cases[::-1]):
        if other != negation(condition):
            continue
        along = _less_its_summand(condition, one, two, leaf)
        if along is not None:
            return along
        for number in range(rank):
            if _is_start(condition, axis(number)) and _joins(one, two, axis(number), leaf):
                return number
    return None


def _is_start(condition: Formula, position: sympy.Symbol) -> bool:
    """Whether the condition holds up to a place, and not after it."""
    if not isinstance(condition, Atom):
        return False
    rest = sympy.expand(condition.expression - position)
    if rest.atoms(AppliedUndef) or any(str(symbol).startswith("axis") for symbol in rest.free_symbols):
        return False
    return condition.relation is Relation.AT_MOST or (condition.relation is Relation.EQUAL and rest == 0)


def _joins(before: sympy.Expr, after: sympy.Expr, position: sympy.Symbol, leaf: Callable[[str], Leaf]) -> bool:
    """Whether `before` is a constant that `after`, which never decreases, never falls below."""
    grows = never_decreases(after, position, lambda name: leaf(name).sorted_axis)
    return grows and position not in before.free_symbols and never_negative(sympy.expand(after - before))


def _less_its_summand(condition: Formula, one: sympy.Expr, two: sympy.Expr, leaf: Callable[[str], Leaf]) -> int | None:
    """A running sum less what was added last is the sum up to the place before: it never decreases either."""
    if not isinstance(two, AppliedUndef) or sympy.expand(two - one) != 1:
        return None
    total = leaf(two.func.__name__)
    same_place = all(place == axis(number) or place == 0 for number, place in enumerate(two.args))
    return total.sorted_axis if same_place and total.summand == condition else None
