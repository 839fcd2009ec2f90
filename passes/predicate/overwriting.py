"""What a tensor holds after part of it was written through a view, as in `mask[:, 0].fill_(True)`."""

from collections.abc import Callable, Sequence

import sympy
import torch

from nsa_compile.passes.predicate.cases import cases_of, make_cases, substitute_value
from nsa_compile.passes.predicate.formula import compare, conjunction, negation
from nsa_compile.passes.predicate.tensor import ZERO, AbstractTensor, axis, make_tensor, number
from nsa_compile.passes.predicate.terms import TRUE, Formula, UnknownError

View = Callable[[AbstractTensor], AbstractTensor]


def overwrite(before: AbstractTensor, written: AbstractTensor, views: Sequence[View]) -> AbstractTensor:
    """The tensor with the elements that a view selects replaced.

    Args:
        before: the tensor before the write.
        written: what the view holds after it.
        views: lead from the tensor to the view.

    Raises:
        UnknownError: it is not known which elements the view selects.
    """
    inside, index = _selected(before, written, views)
    moved = substitute_value(written.value, index)
    pairs = [(conjunction(inside, condition), expression) for condition, expression in cases_of(moved)]
    pairs += [(conjunction(negation(inside), condition), e) for condition, e in cases_of(before.value)]
    return make_tensor(before.shape, before.dtype, make_cases(pairs))


def _selected(
    base: AbstractTensor, view: AbstractTensor, views: Sequence[View]
) -> tuple[Formula, dict[sympy.Expr, sympy.Expr]]:
    """Which elements of the base the view holds, and the view's index in terms of the base's."""
    inside: Formula = TRUE
    index: dict[sympy.Expr, sympy.Expr] = {}
    for dim, size in enumerate(base.shape):
        place = _coordinate(base, dim, views)
        here = ZERO if size == 1 else axis(dim)
        used = [k for k in range(view.rank) if axis(k) in place.free_symbols]
        if not used:
            inside = conjunction(inside, compare("==", here, place))
            continue
        offset = sympy.expand(place - axis(used[0]))
        if len(used) > 1 or offset.has(axis(used[0])) or axis(used[0]) in index:
            raise UnknownError("it selects elements with a step")
        index[axis(used[0])] = here - offset
        inside = conjunction(inside, compare(">=", here, offset), compare("<", here, offset + view.shape[used[0]]))
    if any(axis(k) not in index for k, size in enumerate(view.shape) if size != 1):
        raise UnknownError("it selects an element more than once")
    return inside, index


def _coordinate(base: AbstractTensor, dim: int, views: Sequence[View]) -> sympy.Expr:
    """The base's index along one dimension, in terms of the view's index."""
    coordinate = AbstractTensor(base.shape, torch.int64, number(ZERO if base.shape[dim] == 1 else axis(dim)))
    for view in views:
        coordinate = view(coordinate)
    return coordinate.number()
