"""Formulas in words, for proofs and refusals."""

import sympy

from nsa_compile.passes.predicate.tensor import KEY
from nsa_compile.passes.predicate.terms import And, Atom, Formula, Or, coefficient_of


def text(expression: sympy.Expr) -> str:
    """The expression as people write it."""
    return str(expression).replace("()", "")


def describe(formula: Formula) -> str:
    """The formula as people write it."""
    if isinstance(formula, Atom):
        coefficient = coefficient_of(KEY, formula.expression)
        if coefficient in (1, -1) and not (rest := formula.expression - coefficient * KEY).has(KEY):
            sign = (
                formula.relation.value if coefficient == 1 else {"≤": "≥", "<": ">", "=": "="}[formula.relation.value]
            )
            return f"j {sign} {text(-coefficient * rest)}"
        return _describe_atom(formula.expression, formula.relation.value)
    if isinstance(formula, (And, Or)):
        if not formula.operands:
            return "nothing" if isinstance(formula, Or) else "always"
        word = " and " if isinstance(formula, And) else " or "
        return "(" + word.join(describe(operand) for operand in formula.operands[:6]) + ")"
    return _describe_atom(
        formula.operand.expression, {"=": "≠", "≤": "not ≤", "<": "not <"}[formula.operand.relation.value]
    )


def _describe_atom(expression: sympy.Expr, relation: str) -> str:
    negative = [term for term in sympy.Add.make_args(expression) if term.could_extract_minus_sign()]
    right = -sympy.Add(*negative)
    return f"{text(sympy.expand(expression + right))} {relation} {text(right)}"
