"""Reads a mask that is added to the scores: 0 where a key is visible, hugely negative where it is hidden."""

import sympy

from nsa_compile.passes.predicate.cases import Cases
from nsa_compile.passes.predicate.formula import disjunction
from nsa_compile.passes.predicate.terms import FALSE, Formula

# A bias of this or less hides a key: models write -inf, the dtype's minimum, -1e9 or -10000.  In the softmax such a
# key weighs less than e**-9000 of one without bias whose score is within a thousand of it.
MASKED_BELOW = -10_000


def unbiased(cases: Cases) -> tuple[Formula, sympy.Expr | None]:
    """Where an additive mask leaves the score as it is.

    Returns:
        The formula of the visible keys, and the first bias that is neither 0 nor hides a key (None: there is none).
    """
    allowed = FALSE
    for condition, bias in cases:
        if bias == 0:
            allowed = disjunction(allowed, condition)
        elif not (bias.is_number and bias.is_extended_real and bias <= MASKED_BELOW):
            return FALSE, bias
    return allowed, None
