"""True/false formulas in normal form: how they are built, compared, negated and changed."""

import functools
from collections.abc import Callable, Iterable, Mapping

import sympy
from sympy.core.function import AppliedUndef

from nsa_compile.passes.predicate.absorption import (
    is_contradiction,
    is_implied,
    is_tautology,
    strongest,
    weakest,
    without_implied,
)
from nsa_compile.passes.predicate.signs import always_positive, never_negative
from nsa_compile.passes.predicate.terms import (
    And,
    Atom,
    Cast,
    Formula,
    Not,
    Or,
    Relation,
    RoundedError,
    Substitution,
    UnknownError,
    is_exact,
    replaced,
    truth,
)


@functools.lru_cache(maxsize=4096)
def negation(formula: Formula) -> Formula:
    """Not `formula`, pushed down to the atoms."""
    if isinstance(formula, And):
        return disjunction(*(negation(operand) for operand in formula.operands))
    if isinstance(formula, Or):
        return conjunction(*(negation(operand) for operand in formula.operands))
    if isinstance(formula, Not):
        return formula.operand
    if formula.relation is Relation.AT_MOST and formula.expression.is_integer:
        return atom(Relation.AT_MOST, 1 - formula.expression)
    return Not(formula)


def conjunction(*formulas: Formula) -> Formula:
    """All of `formulas`, flat; complementary or implied parts are dropped."""
    return _connect(formulas, And, Or)


def disjunction(*formulas: Formula) -> Formula:
    """Any of `formulas`, flat; complementary or implied parts are dropped."""
    return _connect(formulas, Or, And)


def _connect(formulas: Iterable[Formula], same: type[And | Or], dual: type[And | Or]) -> Formula:
    """Builds And (or Or), absorbing: `a ∧ (a ∨ b)` is `a`, `a ∧ (¬a ∨ b)` is `a ∧ b`, `a ∧ ¬a` is false."""
    flat: dict[Formula, None] = {}
    for formula in formulas:
        for part in formula.operands if isinstance(formula, same) else (formula,):
            flat[part] = None
    if dual() in flat:
        return dual()
    if len(flat) > 1:
        flat = without_implied(strongest(flat) if same is And else weakest(flat), same is And)
        if is_contradiction(flat) if same is And else is_tautology(flat):
            return dual()
    literals = [part for part in flat if isinstance(part, (Atom, Not))]
    if len(flat) > 1:
        opposite = {negation(literal) for literal in literals}
        if any(part in opposite for part in literals):
            return dual()
        kept: dict[Formula, None] = {}
        for part in flat:
            if isinstance(part, dual):
                if any(operand in flat for operand in part.operands) or is_implied(part.operands, flat, same is And):
                    continue
                remaining = tuple(operand for operand in part.operands if operand not in opposite)
                if len(remaining) != len(part.operands):
                    rebuilt = _connect(remaining, dual, same)
                    return _connect([*(p for p in flat if p is not part), rebuilt], same, dual)
            kept[part] = None
        flat = kept
    if same is Or and len(flat) > 1:
        # (a ∧ b) ∨ (a ∧ c) is a ∧ (b ∨ c): what all disjuncts say stays a conjunct.
        parts = [part.operands if isinstance(part, And) else (part,) for part in flat]
        common = [operand for operand in parts[0] if all(operand in other for other in parts[1:])]
        if common:
            rest = (conjunction(*(operand for operand in part if operand not in common)) for part in parts)
            return conjunction(*common, disjunction(*rest))
    return next(iter(flat)) if len(flat) == 1 else same(tuple(flat))


def if_else(condition: Formula, then: Formula, otherwise: Formula) -> Formula:
    """`then` where `condition` holds, `otherwise` elsewhere."""
    if then == otherwise:
        return then
    return disjunction(conjunction(condition, then), conjunction(negation(condition), otherwise))


def atom(relation: Relation, expression: sympy.Expr) -> Formula:
    """`expression relation 0`, decided where signs decide it, else in normal form."""
    expression = sympy.expand(expression)
    if expression is sympy.nan:
        raise UnknownError("it compares a value that is not a number")
    decided = _decide(relation, expression)
    if decided is not None:
        return truth(decided)
    if not is_exact(expression):
        return Atom(relation, expression)
    coefficients = map(sympy.sympify, expression.as_coefficients_dict().values())
    scale = sympy.ilcm(*(c.q for c in coefficients if isinstance(c, sympy.Rational)), 1)
    if scale != 1:
        expression = sympy.expand(expression * scale)
    if not expression.is_integer:
        raise UnknownError(f"it compares {expression}, which is not known to be an integer, with 0")
    if relation is Relation.EQUAL:
        if expression.could_extract_minus_sign():
            expression = -expression
        size, magnitude = expression.as_coeff_Mul()
        if isinstance(magnitude, sympy.Abs) and size:
            return atom(relation, magnitude.args[0])
        factors = expression.args if isinstance(expression, sympy.Mul) else ()
        if len([f for f in factors if not f.is_number]) > 1:
            return disjunction(*(atom(relation, factor) for factor in factors if not factor.is_number))
        return Atom(relation, expression)
    if relation is Relation.BELOW:
        expression = expression + 1
    expression = expression.primitive()[1]
    for term in sympy.Add.make_args(expression):
        inner = _all_below(term)
        if inner is not None:
            rest = expression - term
            return conjunction(*(atom(Relation.AT_MOST, rest + part) for part in inner))
    return Atom(Relation.AT_MOST, expression)


def _all_below(term: sympy.Expr) -> tuple[sympy.Expr, ...] | None:
    """The parts that must all stay below a limit for `term` (an Abs, Max or −Min) to stay below it."""
    coefficient, rest = term.as_coeff_Mul()
    if isinstance(rest, sympy.Abs) and coefficient.is_positive:
        return coefficient * rest.args[0], -coefficient * rest.args[0]
    if (isinstance(rest, sympy.Max) and coefficient.is_positive) or (
        isinstance(rest, sympy.Min) and coefficient.is_negative
    ):
        return tuple(coefficient * argument for argument in rest.args)
    return None


def _decide(relation: Relation, expression: sympy.Expr) -> bool | None:
    if not is_exact(expression):
        # Data may be NaN, which no assumption of sympy's covers.
        return None
    opposite = sympy.expand(-expression)
    if relation is Relation.AT_MOST:
        holds, fails = never_negative(opposite), always_positive(expression)
    elif relation is Relation.BELOW:
        holds, fails = always_positive(opposite), never_negative(expression)
    else:
        holds, fails = expression.is_zero, always_positive(expression) or always_positive(opposite)
    return True if holds else False if fails else None


def compare(symbol: str, left: sympy.Expr, right: sympy.Expr) -> Formula:
    """`left symbol right`, `symbol` one of <, <=, >, >=, ==, !=.

    Raises:
        UnknownError: floating-point data is compared with something that is not a constant.
    """
    if symbol in (">", ">="):
        left, right, symbol = right, left, {">": "<", ">=": "<="}[symbol]
    if left.is_infinite and left == right:
        return truth(symbol in ("<=", "=="))
    difference = sympy.expand(left - right)
    if not (is_exact(left) and is_exact(right)):
        _check_floating_point(left, right)
    if symbol == "<":
        return atom(Relation.BELOW, difference)
    if symbol == "<=":
        return atom(Relation.AT_MOST, difference)
    equal = atom(Relation.EQUAL, difference)
    return equal if symbol == "==" else negation(equal)


def _check_floating_point(left: sympy.Expr, right: sympy.Expr) -> None:
    """Refuses comparisons of floating-point data that exact arithmetic does not describe.

    Data against a number is understood, and the sign of `data + c`: rounding never changes the sign of a sum.
    Not so anything else: NaN and infinity do not obey arithmetic, and `data + c ≤ d` is not `data ≤ d − c`.
    """
    computed, limit = (left, right) if right.is_number else (right, left)
    shift, data = computed.as_coeff_Add()
    single = computed.atoms(AppliedUndef, Cast)
    if not limit.is_number or (data not in single and -data not in single):
        raise UnknownError("it compares floating-point data with something that is not a constant")
    if limit.is_infinite or (shift != 0 and limit != 0):
        raise RoundedError("it compares floating-point data, after arithmetic that may round it")


def map_atoms(formula: Formula, change: Callable[[Atom], Formula]) -> Formula:
    """The formula with each atom replaced."""
    if isinstance(formula, Atom):
        return change(formula)
    if isinstance(formula, Not):
        return negation(change(formula.operand))
    connect = conjunction if isinstance(formula, And) else disjunction
    return connect(*(map_atoms(operand, change) for operand in formula.operands))


def map_expressions(formula: Formula, change: Callable[[sympy.Expr], sympy.Expr]) -> Formula:
    """The formula with `change` applied to each atom's expression, in normal form again."""

    def changed_atom(old: Atom) -> Formula:
        changed = change(old.expression)
        return old if changed == old.expression else atom(old.relation, changed)

    return map_atoms(formula, changed_atom)


def substitute(formula: Formula, substitution: Substitution) -> Formula:
    """The formula with symbols or applications replaced, simultaneously."""
    return map_expressions(formula, lambda expression: replaced(expression, substitution))


def assume(formula: Formula, known: Mapping[Formula, bool]) -> Formula:
    """The formula where some atoms are known to hold or not."""
    if formula in known:
        return truth(known[formula])
    if isinstance(formula, Not):
        return negation(assume(formula.operand, known))
    if isinstance(formula, Atom):
        return formula
    connect = conjunction if isinstance(formula, And) else disjunction
    return connect(*(assume(operand, known) for operand in formula.operands))
