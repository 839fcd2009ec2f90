"""Operations that look along a dimension: differences, running sums, sorted look-ups."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from nsa_compile.passes.predicate.cases import cases_of, combine, make_cases, substitute_value, value_symbols
from nsa_compile.passes.predicate.facts import never_decreases
from nsa_compile.passes.predicate.formula import assume, compare, conjunction, negation
from nsa_compile.passes.predicate.operations import Call, as_size, as_tensor, dimension, operation
from nsa_compile.passes.predicate.tensor import ONE, ZERO, AbstractTensor, Run, axis, make_tensor, rearrange
from nsa_compile.passes.predicate.terms import And, Atom, Relation, UnknownError, coefficient_of, replaced


@operation("diff")
def _diff(call: Call, input: Any, n: Any = 1, dim: Any = -1, prepend: Any = None, append: Any = None) -> AbstractTensor:
    tensor = as_tensor(input)
    if n != 1 or append is not None or call.dtype not in (torch.int32, torch.int64):
        raise UnknownError("the prover follows first differences of 32- and 64-bit integers only")
    along = dimension(dim, tensor.rank)
    here = axis(along)
    if prepend is None:
        return make_tensor(call.shape, call.dtype, _difference(tensor.value, {here: here + 1}, tensor.value, {}))
    before = as_tensor(prepend)
    if before.shape[along] != 1:
        raise UnknownError("it prepends more than one value")
    first = _difference(tensor.value, {here: ZERO}, before.value, {})
    later = _difference(tensor.value, {}, tensor.value, {here: here - 1})
    at_start = compare("==", here, ZERO)
    pairs = [(conjunction(at_start, condition), e) for condition, e in first]
    pairs += [(conjunction(negation(at_start), condition), e) for condition, e in later]
    return make_tensor(call.shape, call.dtype, make_cases(pairs))


def _difference(left: Any, left_index: dict, right: Any, right_index: dict) -> Any:
    return combine(
        lambda x, y: sympy.expand(x - y), substitute_value(left, left_index), substitute_value(right, right_index)
    )


@operation("cumsum")
def _cumsum(call: Call, input: Any, dim: Any, dtype: Any = None) -> AbstractTensor:
    del dtype
    tensor = as_tensor(input)
    along = dimension(dim, tensor.rank)
    here = axis(along)
    if call.dtype not in (torch.int32, torch.int64):
        return call.data(f"it adds up {call.dtype}")
    cases = cases_of(tensor.value)
    if here not in value_symbols(cases):
        return make_tensor(call.shape, call.dtype, combine(lambda x: sympy.expand(x * (here + 1)), cases))
    grows = all(expression.is_nonnegative for _, expression in cases)
    same_as = ("cumsum", tensor.shape, tensor.value, along, call.dtype)
    truths = all(expression in (ZERO, ONE) for _, expression in cases)
    return call.data(
        "it adds up data",
        same_as,
        sorted_axis=along if grows else None,
        run=_run(tensor, along) if truths else None,
        summand=tensor.formula if truths else None,
    )


def _run(tensor: AbstractTensor, along: int) -> Run | None:
    """What a document mark says of the data inside a document.

    While the running sum of `data(x) − data(x−1) ≠ slope` stays the same, the data grows by `slope` a position.
    """
    here = axis(along)
    # Inside a document, positions after its first are not 0.
    inside = assume(negation(tensor.formula), {compare("==", here, ZERO): False})
    for step in inside.operands if isinstance(inside, And) else (inside,):
        if not isinstance(step, Atom) or step.relation is not Relation.EQUAL:
            continue
        for now in step.expression.atoms(AppliedUndef):
            sign = coefficient_of(now, step.expression)
            slope = sympy.expand(now - replaced(now, {here: here - 1}) - sign * step.expression)
            if here in now.args and sign in (1, -1) and slope.is_Integer:
                return Run(now, slope)
    return None


@operation("searchsorted")
def _searchsorted(call: Call, sorted_sequence: Any, input: Any, **options: Any) -> AbstractTensor:
    return _looked_up(call, as_tensor(sorted_sequence), as_tensor(input), options)


@operation("bucketize")
def _bucketize(call: Call, input: Any, boundaries: Any, **options: Any) -> AbstractTensor:
    return _looked_up(call, as_tensor(boundaries), as_tensor(input), options)


def _looked_up(
    call: Call, boundaries: AbstractTensor, values: AbstractTensor, options: dict[str, Any]
) -> AbstractTensor:
    """A binary search never gives a smaller place for a larger value, whatever the boundaries are."""
    along = len(call.shape) - 1
    cases = cases_of(values.value)
    if along < 0 or boundaries.rank > 1 or len(cases) != 1 or values.rank != len(call.shape):
        raise UnknownError("the prover does not follow this look-up")
    grows = never_decreases(cases[0][1], axis(along), lambda name: call.leaf(name).sorted_axis)
    same_as = ("look-up", boundaries.shape, boundaries.value, values.shape, values.value, tuple(options.items()))
    return call.data("it looks up data", same_as, sorted_axis=along if grows else None)


@operation("repeat_interleave")
def _repeat_interleave(
    call: Call, input: Any, repeats: Any, dim: Any = None, output_size: Any = None
) -> AbstractTensor:
    del output_size
    tensor = as_tensor(input)
    if dim is None and tensor.rank != 1:
        raise UnknownError("it repeats the elements of a flattened tensor")
    along = dimension(0 if dim is None else dim, tensor.rank)
    if not isinstance(repeats, AbstractTensor):
        index = [axis(k) if k != along else sympy.floor(axis(k) / as_size(repeats)) for k in range(tensor.rank)]
        return rearrange(tensor, call.shape, index)
    grows = never_decreases(tensor.number(), axis(along), lambda name: call.leaf(name).sorted_axis)
    return call.data("it repeats elements as data says", sorted_axis=along if grows else None)
