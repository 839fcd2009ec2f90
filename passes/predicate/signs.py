"""Lower bounds of expressions over sizes and positions, term by term (sympy takes much longer to answer)."""

import sympy


def least(expression: sympy.Expr) -> sympy.Expr | None:
    """A number that the expanded expression never falls below; None where no bound is known.

    Positions are at least 0 and sizes at least 1: that is how their symbols are declared.
    """
    bound = sympy.Integer(0)
    for term in sympy.Add.make_args(expression):
        if term.is_number:
            bound += term
            continue
        coefficient, rest = term.as_coeff_Mul()
        if coefficient.is_positive and rest.is_nonnegative:
            bound += coefficient if rest.is_integer and rest.is_positive else 0
        elif not (coefficient.is_negative and rest.is_nonpositive):
            return None
    return bound if bound.is_extended_real else None


def never_negative(expression: sympy.Expr) -> bool:
    """Whether the expanded expression is known to be at least 0."""
    bound = least(expression)
    return bound is not None and bool(bound >= 0)


def always_positive(expression: sympy.Expr) -> bool:
    """Whether the expanded expression is known to be above 0."""
    bound = least(expression)
    return bound is not None and bool(bound > 0)
