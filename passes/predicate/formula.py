"""True/false formulas over integer expressions, and numbers that depend on a formula.

A mask is a formula over positions.  Formulas are kept in a normal form: conjunctions and disjunctions
(flat, without repetitions) of atoms `e ≤ 0`, `e < 0`, `e = 0` and their negations, `e` a sympy expression.
Over integers `e < 0` is written `e + 1 ≤ 0` and the negation of `e ≤ 0` is `1 − e ≤ 0`, so negations remain
only around `=`.  Floating-point data may be NaN: there negations stay, and nothing is rewritten.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Mapping

import sympy
from sympy.core.function import AppliedUndef

Substitution = Mapping[sympy.Expr, sympy.Expr]


class UnknownError(Exception):
    """An abstract operation cannot say what its result is; the message says why.

    Not a user's error: the interpreter catches it and treats the result as opaque data.
    """


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


def _connect(formulas: Iterable[Formula], same: type, dual: type) -> Formula:
    """Builds And (or Or), absorbing: `a ∧ (a ∨ b)` is `a`, `a ∧ (¬a ∨ b)` is `a ∧ b`, `a ∧ ¬a` is false."""
    flat: dict[Formula, None] = {}
    for formula in formulas:
        for part in formula.operands if isinstance(formula, same) else (formula,):
            flat[part] = None
    if dual() in flat:
        return dual()
    if len(flat) > 1:
        flat = _strongest(flat) if same is And else _weakest(flat)
    literals = [part for part in flat if isinstance(part, (Atom, Not))]
    if len(flat) > 1:
        opposite = {negation(literal) for literal in literals}
        if any(part in opposite for part in literals):
            return dual()
        kept: dict[Formula, None] = {}
        for part in flat:
            if isinstance(part, dual):
                if any(operand in flat for operand in part.operands):
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


def _limits(parts: Iterable[Formula]) -> dict[sympy.Expr, list[tuple[sympy.Expr, Atom]]]:
    """The integer atoms `r + c ≤ 0` among the parts, by their `r`, with their numbers `c`."""
    found: dict[sympy.Expr, list[tuple[sympy.Expr, Atom]]] = {}
    for part in parts:
        if isinstance(part, Atom) and part.relation is Relation.AT_MOST and part.expression.is_integer:
            constant, rest = part.expression.as_coeff_Add()
            found.setdefault(rest, []).append((constant, part))
    return found


def _strongest(parts: dict[Formula, None]) -> dict[Formula, None]:
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


def _weakest(parts: dict[Formula, None]) -> dict[Formula, None]:
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


def _implies(zero: sympy.Expr, limited: sympy.Expr) -> bool:
    """Whether `zero = 0` is known to imply `limited ≤ 0`."""
    for symbol in zero.free_symbols & limited.free_symbols:
        coefficient = zero.coeff(symbol)
        rest = sympy.expand(zero - coefficient * symbol)
        if coefficient in (1, -1) and not rest.has(symbol):
            return bool(sympy.expand(limited.xreplace({symbol: -coefficient * rest})).is_nonpositive)
    return False


def if_else(condition: Formula, then: Formula, otherwise: Formula) -> Formula:
    """`then` where `condition` holds, `otherwise` elsewhere."""
    if then == otherwise:
        return then
    return disjunction(conjunction(condition, then), conjunction(negation(condition), otherwise))


def atom(relation: Relation, expression: sympy.Expr) -> Formula:
    """`expression relation 0`, decided where sympy's assumptions decide it, else in normal form."""
    expression = sympy.expand(expression)
    if expression is sympy.nan:
        raise UnknownError("it compares a value that is not a number")
    decided = _decide(relation, expression)
    if decided is not None:
        return truth(decided)
    if not is_exact(expression):
        return Atom(relation, expression)
    scale = sympy.ilcm(*(c.q for c in expression.as_coefficients_dict().values() if c.is_Rational), 1)
    if scale != 1:
        expression = sympy.expand(expression * scale)
    if not expression.is_integer:
        raise UnknownError(f"it compares {expression}, which is not known to be an integer, with 0")
    if relation is Relation.EQUAL:
        if expression.could_extract_minus_sign():
            expression = -expression
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
    if relation is Relation.AT_MOST:
        holds, fails = expression.is_extended_nonpositive, expression.is_extended_positive
    elif relation is Relation.BELOW:
        holds, fails = expression.is_extended_negative, expression.is_extended_nonnegative
    else:
        holds, fails = expression.is_zero, expression.is_zero is False
    return True if holds else False if fails else None


def is_exact(expression: sympy.Expr) -> bool:
    """Whether no floating-point data takes part: integers (and constants) only."""
    return all(application.is_integer for application in expression.atoms(AppliedUndef, Cast))


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
        raise UnknownError("it compares floating-point data, after arithmetic that may round it")


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
    return map_expressions(formula, lambda expression: expression.xreplace(substitution))


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


# A number that depends on a formula: (condition, expression) pairs; exactly one condition holds.
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
    return make_cases((substitute(c, substitution), e.xreplace(substitution)) for c, e in value)


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
