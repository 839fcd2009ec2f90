"""Formulas: their normal form means what was written, over all small integers."""

import itertools

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_compile.passes.predicate import facts
from nsa_compile.passes.predicate.cases import cases_of, combine, formula_of, make_cases
from nsa_compile.passes.predicate.formula import (
    assume,
    compare,
    conjunction,
    disjunction,
    if_else,
    negation,
    substitute,
)
from nsa_compile.passes.predicate.terms import FALSE, TRUE, And, Atom, Cast, Not, Relation, UnknownError

X, Y = sympy.symbols("x y", integer=True, nonnegative=True)
DATA = sympy.Function("data", extended_real=True)
PLACES = list(itertools.product(range(5), range(5)))


def holds(formula, x, y):
    """The formula's truth, by its definition."""
    if isinstance(formula, Atom):
        value = int(formula.expression.xreplace({X: sympy.Integer(x), Y: sympy.Integer(y)}))
        return {"≤": value <= 0, "<": value < 0, "=": value == 0}[formula.relation.value]
    if isinstance(formula, Not):
        return not holds(formula.operand, x, y)
    parts = [holds(operand, x, y) for operand in formula.operands]
    return all(parts) if isinstance(formula, And) else any(parts)


SYMBOLS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def linear():
    return st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.integers(-4, 4))


def trees():
    atoms = st.tuples(st.sampled_from(sorted(SYMBOLS)), linear(), linear())
    return st.recursive(
        atoms,
        lambda inner: (
            st.tuples(st.sampled_from(["and", "or"]), inner, inner)
            | st.tuples(st.just("not"), inner)
            | st.tuples(st.just("if"), inner, inner, inner)
        ),
        max_leaves=7,
    )


def built(tree):
    """The formula of a tree, and a function that says what it means."""
    name = tree[0]
    if name in SYMBOLS:
        left, right = ((lambda x, y, c=c: c[0] * x + c[1] * y + c[2]) for c in tree[1:])
        return compare(name, left(X, Y), right(X, Y)), lambda x, y: SYMBOLS[name](left(x, y), right(x, y))
    parts = [built(part) for part in tree[1:]]
    formulas, meanings = [p[0] for p in parts], [p[1] for p in parts]
    if name == "not":
        return negation(formulas[0]), lambda x, y: not meanings[0](x, y)
    if name == "and":
        return conjunction(*formulas), lambda x, y: meanings[0](x, y) and meanings[1](x, y)
    if name == "or":
        return disjunction(*formulas), lambda x, y: meanings[0](x, y) or meanings[1](x, y)
    return if_else(*formulas), lambda x, y: meanings[1](x, y) if meanings[0](x, y) else meanings[2](x, y)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(trees())
def test_the_normal_form_means_the_same(tree):
    formula, meaning = built(tree)
    for x, y in PLACES:
        assert holds(formula, x, y) == meaning(x, y), (formula, x, y)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(trees(), trees(), linear(), linear())
def test_numbers_by_cases_mean_the_same(first, second, left, right):
    (one, is_one), (two, is_two) = built(first), built(second)
    number, other = (c[0] * X + c[1] * Y + c[2] for c in (left, right))
    chosen = make_cases([(conjunction(one, two), number), (negation(conjunction(one, two)), other)])
    total = combine(lambda a, b: a + b, chosen, cases_of(one))
    formula = formula_of(total)
    for x, y in PLACES:
        both = is_one(x, y) and is_two(x, y)
        value = int((number if both else other).subs({X: x, Y: y})) + int(is_one(x, y))
        assert holds(formula, x, y) == (value != 0)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(trees(), linear())
def test_substitution_means_the_same(tree, replacement):
    formula, meaning = built(tree)
    changed = substitute(formula, {X: replacement[0] * Y + replacement[1] + 10})
    for y in range(5):
        assert holds(changed, 0, y) == meaning(replacement[0] * y + replacement[1] + 10, y)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(trees(), trees())
def test_assumptions_mean_the_same_where_they_hold(tree, known):
    formula, _ = built(tree)
    assumed, meaning = built(known)
    if not isinstance(assumed, Atom):
        return
    for truth in (True, False):
        changed = assume(formula, {assumed: truth})
        for x, y in PLACES:
            if meaning(x, y) is truth:
                assert holds(changed, x, y) == holds(formula, x, y)


@pytest.mark.parametrize(
    ("formula", "simple"),
    [
        (conjunction(compare("<=", Y, X), compare("<=", Y, X + 2)), compare("<=", Y, X)),
        (disjunction(compare("<=", Y, X), compare("<=", Y, X + 2)), compare("<=", Y, X + 2)),
        (conjunction(compare("<=", Y, X), compare("!=", Y, X)), compare("<", Y, X)),
        (disjunction(compare("<", Y, X), compare("==", Y, X)), compare("<=", Y, X)),
        (conjunction(compare("<=", Y, X), compare(">", Y, X)), FALSE),
        (disjunction(compare("<=", Y, X), compare(">", Y, X)), TRUE),
        (compare(">=", X, sympy.Integer(0)), TRUE),
        (compare("<", X + Y, sympy.Integer(0)), FALSE),
        (
            compare("<=", sympy.Abs(X - Y), sympy.Integer(2)),
            conjunction(compare("<=", X, Y + 2), compare("<=", Y, X + 2)),
        ),
        (compare("<=", 2 * Y, 2 * X), compare("<=", Y, X)),
    ],
)
def test_formulas_are_simplified(formula, simple):
    assert formula == simple


@pytest.mark.parametrize("symbol", sorted(SYMBOLS))
def test_comparisons_of_floating_point_data_are_not_rewritten(symbol):
    """Data may be NaN: a comparison and its opposite may both fail."""
    formula = compare(symbol, DATA(X), sympy.Rational(1, 2))
    opposite = negation(formula)
    assert negation(opposite) == formula
    assert isinstance(formula, Not) or isinstance(opposite, Not)
    assert compare("<", DATA(X), sympy.Integer(1)) != negation(compare(">=", DATA(X), sympy.Integer(1)))


def test_limits_of_floating_point_data_do_not_move_by_one():
    at_most = compare("<=", DATA(X), sympy.Integer(1))
    formula = conjunction(at_most, compare("!=", DATA(X), sympy.Integer(1)))
    assert formula == And((at_most, Not(Atom(Relation.EQUAL, DATA(X) - 1))))


@pytest.mark.parametrize("other", [DATA(Y), DATA(X), X, sympy.oo, 2 * DATA(X)], ids=str)
def test_other_comparisons_of_floating_point_data_are_unknown(other):
    with pytest.raises(UnknownError):
        compare("<=", DATA(X), other)


def test_only_the_sign_of_a_rounded_sum_is_known():
    assert compare("<=", DATA(X) + 1, sympy.Integer(0)) == compare("<=", DATA(X), sympy.Integer(-1))
    with pytest.raises(UnknownError):
        compare("<=", DATA(X) + 1, sympy.Integer(1))


def test_converted_data_counts_as_what_it_is_converted_to():
    whole = sympy.Function("whole", integer=True)(X)
    assert Cast(whole, sympy.core.symbol.Str("int8")).is_integer
    assert not Cast(whole, sympy.core.symbol.Str("float16")).is_integer


S = sympy.Symbol("s", integer=True, positive=True)
RANGES = {X: S - 1, Y: sympy.Integer(6)}


@pytest.mark.parametrize(
    ("expression", "proved"),
    [
        (S - 1 - X, True),
        (S - X, True),
        (S - 2 - X, False),
        (X - Y, False),
        (6 - Y, True),
        (3 * X + 6 - Y, True),
        (X * Y - 1, False),
    ],
)
def test_signs_are_proved_for_all_sizes(expression, proved):
    assert facts.is_nonnegative(expression, RANGES) is proved


GROWS = sympy.Function("grows", integer=True)


@pytest.mark.parametrize(
    ("expression", "proved"),
    [
        (X, True),
        (-X, False),
        (S - X, False),
        (sympy.floor((X - S) / 3), True),
        (3 * X + GROWS(Y, X), True),
        (GROWS(X, Y), False),
        (GROWS(Y, -X), False),
        (GROWS(Y, X // 2), True),
        (-GROWS(Y, X), False),
        (sympy.Mod(X, 3), False),
        (S * X, True),
        (sympy.Max(X, 2 * X - S), True),
        (X**2, False),
    ],
    ids=str,
)
def test_sequences_that_never_decrease(expression, proved):
    assert facts.never_decreases(expression, X, lambda _: 1) is proved


@pytest.mark.parametrize("number", [4, 7])
def test_quotients_and_remainders_in_range_are_resolved(number):
    ranges = {X: sympy.Integer(6)}
    quotient, remainder = sympy.floor(X / number), sympy.Mod(X, number)
    simplified = [facts.simplify(each, ranges) for each in (quotient, remainder)]
    assert (simplified == [0, X]) is (number == 7)
    values = torch.arange(7)
    assert [int(simplified[0].subs(X, int(v))) for v in values] == (values // number).tolist()
