"""What conjuncts say of each other, and disjuncts: the tightest of several limits, the loosest, limits that touch."""

from collections.abc import Iterable

import sympy

from nsa_compile.passes.predicate.signs import never_negative
from nsa_compile.passes.predicate.terms import Atom, Formula, Not, Relation, coefficient_of, replaced, symbols_of

# Limits are compared in pairs.
_MOST_COMPARED = 6


def strongest(parts: dict[Formula, None]) -> dict[Formula, None]:
    """Of conjuncts that limit the same expression, the tightest; `e ≤ 0` and `e ≠ 0` is `e < 0`."""
    for limits in _limits(parts).values():
        tightest = max(limits, key=lambda limit: limit[0])[1]
        parts = {part: None for part in parts if part is tightest or not any(part is atom for _, atom in limits)}
        for part in list(parts):
            if not isinstance(part, Not) or part.operand.relation is not Relation.EQUAL:
                continue
            excluded = part.operand.expression
            if tightest.expression in (excluded, -excluded):
                parts = {other: None for other in parts if other is not part and other is not tightest}
                parts[Atom(Relation.AT_MOST, tightest.expression + 1)] = None
                break
            if _implies(excluded, 1 - tightest.expression):
                # What is excluded lies outside the limit anyway.
                parts = {other: None for other in parts if other is not part}
    return parts


def without_implied(parts: dict[Formula, None], all_hold: bool) -> dict[Formula, None]:
    """Of limits of different expressions, those that no other one makes superfluous: `j ≤ 6` is in `j ≤ i + 7`."""
    limits = [part for part in parts if isinstance(part, Atom) and part.relation is Relation.AT_MOST]
    if not 1 < len(limits) <= _MOST_COMPARED:
        return parts
    dropped: set[Formula] = set()
    for strong in limits:
        for weak in limits:
            if strong is weak or dropped & {strong, weak} or not strong.expression.is_integer:
                continue
            if never_negative(sympy.expand(strong.expression - weak.expression)):
                dropped.add(weak if all_hold else strong)
    return {part: None for part in parts if part not in dropped}


def is_implied(operands: Iterable[Formula], parts: dict[Formula, None], all_hold: bool) -> bool:
    """Whether a disjunction is weaker than a conjunct beside it, or a conjunction stronger than a disjunct."""
    limits = _limits(parts)
    for rest, limited in _limits(operands).items():
        for constant, _ in limited:
            if any(other >= constant if all_hold else other <= constant for other, _ in limits.get(rest, ())):
                return True
    return False


def is_contradiction(parts: dict[Formula, None]) -> bool:
    """Whether conjuncts limit an expression from above and from below so that nothing is left."""
    limits = {rest: max(constant for constant, _ in limited) for rest, limited in _limits(parts).items()}
    return any(-rest in limits and limits[rest] + limits[-rest] > 0 for rest in limits)


def is_tautology(parts: dict[Formula, None]) -> bool:
    """Whether disjuncts limit an expression from above and from below so that every integer is in one of them."""
    limits = {rest: min(constant for constant, _ in limited) for rest, limited in _limits(parts).items()}
    return any(-rest in limits and limits[rest] + limits[-rest] <= 1 for rest in limits)


def weakest(parts: dict[Formula, None]) -> dict[Formula, None]:
    """Of disjuncts that limit the same expression, the loosest; `e < 0` or `e = 0` is `e ≤ 0`."""
    for limits in _limits(parts).values():
        loosest = min(limits, key=lambda limit: limit[0])[1]
        parts = {part: None for part in parts if part is loosest or not any(part is atom for _, atom in limits)}
        for part in list(parts):
            if not isinstance(part, Atom) or part.relation is not Relation.EQUAL:
                continue
            if loosest.expression - 1 in (part.expression, -part.expression):
                parts = {other: None for other in parts if other is not part and other is not loosest}
                parts[Atom(Relation.AT_MOST, loosest.expression - 1)] = None
                break
            if _implies(part.expression, loosest.expression):
                parts = {other: None for other in parts if other is not part}
    return parts


def _limits(parts: Iterable[Formula]) -> dict[sympy.Expr, list[tuple[sympy.Expr, Atom]]]:
    """The integer atoms `r + c ≤ 0` among the parts, by their `r`, with their numbers `c`."""
    found: dict[sympy.Expr, list[tuple[sympy.Expr, Atom]]] = {}
    for part in parts:
        if isinstance(part, Atom) and part.relation is Relation.AT_MOST and part.expression.is_integer:
            constant, rest = part.expression.as_coeff_Add()
            found.setdefault(rest, []).append((constant, part))
    return found


def _implies(zero: sympy.Expr, limited: sympy.Expr) -> bool:
    """Whether `zero = 0` is known to imply `limited ≤ 0`."""
    for symbol in symbols_of(zero) & symbols_of(limited):
        coefficient = coefficient_of(symbol, zero)
        rest = sympy.expand(zero - coefficient * symbol)
        if coefficient in (1, -1) and not rest.has(symbol):
            return never_negative(sympy.expand(-replaced(limited, {symbol: -coefficient * rest})))
    return False
