"""Reads a mask's formula as one interval of keys per query, less invalid keys, or says why it is none.

The formula is a conjunction over batch b, head h, query i and key j.  Each conjunct is one of
    a limit            `j ≤ g(b, i)` or `j ≥ g(b, i)`: an end of the interval, whatever `g` is
    a sorted limit     `v(b, j) ≤ g(b, i)`, `≥` or `=` for a `v` that never decreases in j: an end that is looked up
    a key condition    without i: which keys are valid (padding)
    a query condition  without j: which queries see anything
and everything else is refused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import sympy
from sympy.core.function import AppliedUndef

from nsa_compile.passes.predicate.facts import Ranges, is_nonnegative, is_positive, never_decreases
from nsa_compile.passes.predicate.formula import map_expressions
from nsa_compile.passes.predicate.tensor import B_INDEX, H_INDEX, KEY, QUERY, Leaf, axis
from nsa_compile.passes.predicate.terms import (
    FALSE,
    And,
    Atom,
    Formula,
    Or,
    Relation,
    coefficient_of,
    expressions,
    free_symbols,
    replaced,
)
from nsa_compile.passes.predicate.words import describe, text
from nsa_compile.passes.sites import Reason


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The attention's sizes as expressions: batch, query heads, queries, keys."""

    batch: sympy.Expr
    heads: sympy.Expr
    queries: sympy.Expr
    keys: sympy.Expr

    @property
    def ranges(self) -> Ranges:
        """The largest value of each index."""
        sizes = (self.batch, self.heads, self.queries, self.keys)
        return {symbol: size - 1 for symbol, size in zip((B_INDEX, H_INDEX, QUERY, KEY), sizes, strict=True)}


@dataclasses.dataclass(frozen=True)
class Limit:
    """An end of the interval: a key position, in terms of b and i."""

    position: sympy.Expr


@dataclasses.dataclass(frozen=True)
class SortedLimit:
    """An end of the interval: the first (or last) key j with `values(b, j) ≥ target(b, i)` (or `≤`).

    Attributes:
        values: in terms of b and j; never decreases in j.
        target: in terms of b and i.
    """

    values: sympy.Expr
    target: sympy.Expr


Bound = Limit | SortedLimit


@dataclasses.dataclass(frozen=True)
class Interval:
    """Keys j with `first ≤ j ≤ last` for all bounds, where `keys` hold; nothing where `queries` do not hold."""

    first: tuple[Bound, ...] = ()
    last: tuple[Bound, ...] = ()
    keys: tuple[Formula, ...] = ()
    queries: tuple[Formula, ...] = ()
    proof: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a formula is no interval; `leaves` are the data at fault."""

    reason: Reason
    sentence: str
    leaves: tuple[Leaf, ...] = ()


def read_interval(formula: Formula, sizes: Sizes, leaf: Callable[[str], Leaf]) -> Interval | Refusal:
    """Reads the formula of the visible keys.

    Args:
        formula: over b, h, i and j.
        sizes: of the attention.
        leaf: finds the data behind a function by its name.

    Returns:
        The interval, proved for all sizes and all data, or the refusal of the first conjunct that is none.
    """
    return _Reader(sizes, leaf).read(formula)


class _Reader:
    """Sorts the conjuncts of one formula."""

    def __init__(self, sizes: Sizes, leaf: Callable[[str], Leaf]) -> None:
        self.sizes = sizes
        self.leaf = leaf
        self.first: list[Bound] = []
        self.last: list[Bound] = []
        self.keys: list[Formula] = []
        self.queries: list[Formula] = []
        self.proof: list[str] = []
        self.unions: list[Formula] = []

    def read(self, formula: Formula) -> Interval | Refusal:
        conjuncts = formula.operands if isinstance(formula, And) else (formula,)
        # Limits first: whether a union lets a query see the future depends on them.
        for conjunct in sorted(self._within_runs(conjuncts), key=lambda conjunct: isinstance(conjunct, Or)):
            if conjunct == FALSE:
                return Refusal(Reason.MASK_NOT_INTERVAL, "the mask hides every key from every query")
            refusal = self._sort(conjunct)
            if refusal is not None:
                return refusal
        return self._whole()

    def _within_runs(self, conjuncts: tuple[Formula, ...]) -> list[Formula]:
        """Uses what is known inside a document: there, positions grow by a fixed step from key to key.

        `total(b, i) = total(b, j)`, where `total` counts the places at which `p(x) − p(x−1) ≠ k`, means that
        `p(b, j) = p(b, i) + k·(j − i)`, so `p(b, j) ≤ p(b, i)` is `j ≤ i` for positive k.
        """
        replacement: dict[sympy.Expr, sympy.Expr] = {}
        for conjunct in conjuncts:
            if not isinstance(conjunct, Atom) or conjunct.relation is not Relation.EQUAL:
                continue
            totals = sorted(conjunct.expression.atoms(AppliedUndef), key=lambda total: total.has(KEY))
            if (
                len(totals) != 2
                or totals[0].func != totals[1].func
                or conjunct.expression
                not in (
                    totals[0] - totals[1],
                    totals[1] - totals[0],
                )
            ):
                continue
            run = self.leaf(totals[0].func.__name__).run
            position = self.leaf(totals[0].func.__name__).sorted_axis
            if run is None or position is None:
                continue
            places: list[Any] = [total.args[position] for total in totals]
            at_query, at_key = places
            if any(x != y for k, (x, y) in enumerate(zip(*(t.args for t in totals), strict=True)) if k != position):
                continue
            data = [replaced(run.data, {axis(k): a for k, a in enumerate(total.args)}) for total in totals]
            replacement[data[1]] = data[0] + run.slope * (at_key - at_query)
        if not replacement:
            return list(conjuncts)
        changed = (map_expressions(c, lambda e: replaced(e, replacement)) for c in conjuncts)
        return [part for c in changed for part in (c.operands if isinstance(c, And) else (c,))]

    def _sort(self, conjunct: Formula) -> Refusal | None:
        """Takes one conjunct in."""
        symbols = free_symbols(conjunct)
        stale = [leaf for leaf in self._leaves(conjunct) if leaf.stale]
        if stale:
            return Refusal(
                Reason.MUTATED_MASK, f"{stale[0].name} is written in place before the mask reads it", tuple(stale)
            )
        mapped = [leaf for leaf in self._leaves(conjunct) if leaf.mapped]
        if mapped:
            sentence = f"{mapped[0].name} is computed for each position by itself, and {mapped[0].cause}"
            return Refusal(Reason.MASK_NOT_PROVED, sentence, tuple(mapped))
        if H_INDEX in symbols:
            sentence = f"{describe(conjunct)} is not the same for all heads"
            return Refusal(Reason.MASK_DEPENDS_ON_HEAD, sentence, self._leaves(conjunct))
        if self._is_always(conjunct):
            return None
        limits = self._limits(conjunct)
        if limits is not None:
            kept = False
            for bound, is_last in limits:
                if not self._is_vacuous(bound, is_last):
                    (self.last if is_last else self.first).append(bound)
                    kept = True
            if kept:
                self.proof.append(describe(conjunct))
            return None
        if QUERY not in symbols:
            self.keys.append(conjunct)
            self.proof.append(f"key j is valid where {describe(conjunct)}")
            return None
        if KEY not in symbols:
            self.queries.append(conjunct)
            self.proof.append(f"query i sees something where {describe(conjunct)}")
            return None
        return self._refuse(conjunct)

    def _limits(self, conjunct: Formula) -> list[tuple[Bound, bool]] | None:
        """The ends of the interval that the conjunct says, with whether each is the last; None if it is no limit."""
        if not isinstance(conjunct, Atom) or not conjunct.expression.is_integer:
            return None
        expression = conjunct.expression
        if KEY not in expression.free_symbols:
            return None
        coefficient = coefficient_of(KEY, expression)
        rest = expression - coefficient * KEY
        if isinstance(coefficient, sympy.Integer) and coefficient != 0 and not rest.has(KEY):
            return _plain_limits(conjunct.relation, coefficient, rest)
        if QUERY not in expression.free_symbols:
            return None
        with_key = [term for term in sympy.Add.make_args(expression) if term.has(KEY)]
        values = sympy.Add(*with_key)
        target = values - expression
        if values.has(QUERY):
            return None
        for sign in (1, -1):
            if never_decreases(values, KEY, lambda name: self.leaf(name).sorted_axis, sign):
                bound = SortedLimit(sympy.expand(sign * values), sympy.expand(sign * target))
                if conjunct.relation is Relation.EQUAL:
                    return [(bound, False), (bound, True)]
                return [(bound, sign == 1)]
        return None

    def _is_always(self, conjunct: Formula) -> bool:
        """Whether the conjunct holds for every position that exists."""
        if not isinstance(conjunct, Atom) or conjunct.relation is not Relation.AT_MOST:
            return False
        return conjunct.expression.is_integer is True and is_nonnegative(-conjunct.expression, self.sizes.ranges)

    def _is_vacuous(self, bound: Bound, is_last: bool) -> bool:
        """Whether the bound excludes no key that exists."""
        if isinstance(bound, SortedLimit):
            return False
        slack = bound.position - (self.sizes.keys - 1) if is_last else -bound.position
        return is_nonnegative(slack, self.sizes.ranges)

    def _whole(self) -> Interval | Refusal:
        """The interval, once every conjunct is in: causal unless there is one query."""
        refusal = self._future() if self.sizes.queries != 1 else None
        if refusal is not None:
            return refusal
        last = tuple(bound for bound in self.last if not self._is_implied(bound))
        return Interval(
            tuple(dict.fromkeys(self.first)),
            tuple(dict.fromkeys(last)),
            tuple(self.keys),
            tuple(self.queries),
            tuple(self.proof),
        )

    def _future(self) -> Refusal | None:
        """Refuses masks in which a query is not kept from keys after itself.

        The last query stands at key S − 1 at the latest, so query i at key i + S − T at the latest.
        """
        ahead = QUERY + self.sizes.keys - self.sizes.queries
        at_ends = ({QUERY: sympy.Integer(0)}, {QUERY: self.sizes.queries - 1})
        causal = [bound for bound in self.last if _is_causal(bound)]
        if not causal:
            return Refusal(Reason.BIDIRECTIONAL, "nothing in the mask keeps a query from the keys after itself")
        for ends in at_ends:
            if all(is_positive(replaced(bound.position - ahead, ends), self.sizes.ranges) for bound in causal):
                mask = f"j ≤ {text(causal[0].position)}"
                if is_positive(self.sizes.queries - self.sizes.keys, self.sizes.ranges):
                    # Which key stands where among the queries, no mask tells.
                    sentence = f"there are fewer keys than queries, which have none of their own: {mask}"
                    return Refusal(Reason.CROSS_ATTENTION, sentence)
                return Refusal(Reason.BIDIRECTIONAL, f"queries see keys after themselves: {mask}")
        return None

    def _is_implied(self, bound: Bound) -> bool:
        """Whether a last key is never before another one of the list, so that the other alone suffices."""
        for other in self.last:
            if other is bound or not isinstance(other, Limit):
                continue
            if isinstance(bound, SortedLimit):
                # The run of keys with the query's own value holds the key `other`, so it does not end before it.
                own = replaced(bound.values, {KEY: other.position})
                if sympy.expand(own - bound.target) == 0:
                    return True
                continue
            difference = bound.position - other.position
            if is_nonnegative(difference, self.sizes.ranges) and difference != 0:
                return True
        return False

    def _leaves(self, conjunct: Formula) -> tuple[Leaf, ...]:
        names = {a.func.__name__ for e in expressions(conjunct) for a in e.atoms(AppliedUndef)}
        return tuple(self.leaf(name) for name in sorted(names))

    def _refuse(self, conjunct: Formula) -> Refusal:
        """Why a conjunct that mixes query and key is no limit."""
        leaves = self._leaves(conjunct)
        mixed = [
            self.leaf(application.func.__name__)
            for expression in expressions(conjunct)
            for application in sorted(expression.atoms(AppliedUndef), key=str)
            if application.has(QUERY) and application.has(KEY)
        ]
        if mixed:
            culprit = mixed[0]
            outside = culprit.written_by.op in ("placeholder", "get_attr")
            reason = Reason.MASK_IS_INPUT if outside else Reason.MASK_NOT_PROVED
            return Refusal(reason, f"{culprit.name} depends on query and key, and {culprit.cause}", tuple(mixed))
        if isinstance(conjunct, Or) and any(self._has_causal_limit(part) for part in conjunct.operands):
            sentence = f"a union lets queries see keys after themselves: {describe(conjunct)}"
            if not any(_is_causal(bound) for bound in self.last):
                return Refusal(Reason.BIDIRECTIONAL, sentence, leaves)
        equal = isinstance(conjunct, Atom) and conjunct.relation is Relation.EQUAL
        if equal and leaves and not any(e.atoms(sympy.Mod) for e in expressions(conjunct)):
            sentence = f"{describe(conjunct)} compares ids that are not proved to be in order"
            return Refusal(Reason.UNSORTED_DOCUMENTS, sentence, leaves)
        return Refusal(Reason.MASK_NOT_INTERVAL, f"{describe(conjunct)} is no interval of keys", leaves)

    def _has_causal_limit(self, part: Formula) -> bool:
        parts = part.operands if isinstance(part, And) else (part,)
        limits = (limit for conjunct in parts for limit in self._limits(conjunct) or ())
        return any(is_last and _is_causal(bound) for bound, is_last in limits)


def _is_causal(bound: Bound) -> TypeGuard[Limit]:
    """Whether the bound moves with the query (a maximum with something else may let it see the future)."""
    return isinstance(bound, Limit) and QUERY in bound.position.free_symbols and not bound.position.has(sympy.Max)


def _plain_limits(relation: Relation, coefficient: sympy.Integer, rest: sympy.Expr) -> list[tuple[Bound, bool]]:
    """Ends of the interval from `coefficient·j + rest ≤ 0` (or = 0)."""
    size = abs(coefficient)
    numerator = -rest if coefficient > 0 else rest
    down = numerator if size == 1 else sympy.floor(numerator / size)
    up = numerator if size == 1 else -sympy.floor(-numerator / size)
    if relation is Relation.EQUAL:
        return [(Limit(up), False), (Limit(down), True)]
    return [(Limit(down), True)] if coefficient > 0 else [(Limit(up), False)]
