"""Operations that make tensors from sizes and numbers."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from typing import Any

import sympy
import torch

from nsa_compile.passes.predicate.cases import cases_of, make_cases, substitute_value
from nsa_compile.passes.predicate.conversion import converted
from nsa_compile.passes.predicate.formula import compare, conjunction, negation
from nsa_compile.passes.predicate.operations import Call, as_size, as_tensor, dimension, operation
from nsa_compile.passes.predicate.operations_indexing import slice_start, wrapped_index
from nsa_compile.passes.predicate.operations_views import insert_axis
from nsa_compile.passes.predicate.tensor import (
    ONE,
    ZERO,
    AbstractTensor,
    aligned,
    axis,
    make_tensor,
    number,
    number_expression,
)
from nsa_compile.passes.predicate.terms import TRUE, Formula, UnknownError


@operation("ones", "new_ones", "ones_like", "wrapped_ones", reads=False)
def _ones(call: Call) -> AbstractTensor:
    return make_tensor(call.shape, call.dtype, number(ONE))


@operation("zeros", "new_zeros", "zeros_like", reads=False)
def _zeros(call: Call) -> AbstractTensor:
    return make_tensor(call.shape, call.dtype, number(ZERO))


@operation("full")
def _full(call: Call, size: Any, fill_value: Any, names: Any = None, dtype: Any = None) -> AbstractTensor:
    del size, names, dtype
    filled = converted(as_tensor(fill_value), call.dtype)
    return make_tensor(call.shape, call.dtype, aligned(filled, len(call.shape)))


@operation("new_full")
def _new_full(call: Call, input: Any, size: Any, fill_value: Any, dtype: Any = None) -> AbstractTensor:
    del input
    return _full(call, size, fill_value, dtype)


@operation("full_like")
def _full_like(call: Call, input: Any, fill_value: Any, dtype: Any = None) -> AbstractTensor:
    del input
    return _full(call, None, fill_value, dtype)


@operation("scalar_tensor", "tensor", "as_tensor", "new_tensor", "_safe_as_tensor")
def _tensor(call: Call, data: Any, dtype: Any = None) -> AbstractTensor:
    del dtype
    if isinstance(data, list):
        return _from_list(call, data)
    return make_tensor(call.shape, call.dtype, aligned(converted(as_tensor(data), call.dtype), len(call.shape)))


def _from_list(call: Call, data: list[Any]) -> AbstractTensor:
    if len(call.shape) != 1 or not data or not all(isinstance(item, (bool, int, float)) for item in data):
        raise UnknownError("it makes a tensor from nested values")
    position = axis(0)
    pairs = [
        (compare("==", position, sympy.Integer(place)), number_expression(item)) for place, item in enumerate(data)
    ]
    # The index is below the length: the last value needs no condition but that no other holds.
    pairs[-1] = (conjunction(*(negation(condition) for condition, _ in pairs[:-1])), pairs[-1][1])
    return make_tensor(call.shape, call.dtype, make_cases(pairs))


@operation("arange", "range")
def _arange(call: Call, start: Any, end: Any = None, step: Any = 1, dtype: Any = None) -> AbstractTensor:
    del dtype
    first = ZERO if end is None else as_tensor(start).number()
    stride = as_tensor(step).number()
    if not (first.is_integer and stride.is_integer):
        raise UnknownError("it counts in steps that are not integers")
    if call.dtype not in (torch.int32, torch.int64, torch.float32, torch.float64):
        last = first + stride * (call.shape[0] - 1)
        if not (last.is_number and abs(int(last)) <= _largest_exact(call.dtype)):
            raise UnknownError(f"{call.dtype} may not hold every position")
    return make_tensor(call.shape, call.dtype, number(first + stride * axis(0)))


def _largest_exact(dtype: torch.dtype) -> int:
    """Up to here the dtype holds every integer."""
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).max
    return round(2 / torch.finfo(dtype).eps)


@operation("tril")
def _tril(call: Call, input: Any, diagonal: Any = 0) -> AbstractTensor:
    return _triangle(call, input, "<=", diagonal)


@operation("triu")
def _triu(call: Call, input: Any, diagonal: Any = 0) -> AbstractTensor:
    return _triangle(call, input, ">=", diagonal)


@operation("wrapped_tril")
def _numpy_tril(call: Call, m: Any, k: Any = 0) -> AbstractTensor:
    return _tril(call, m, k)


@operation("wrapped_triu")
def _numpy_triu(call: Call, m: Any, k: Any = 0) -> AbstractTensor:
    return _triu(call, m, k)


def _triangle(call: Call, input: Any, symbol: str, diagonal: Any) -> AbstractTensor:
    row, column = axis(len(call.shape) - 2), axis(len(call.shape) - 1)
    kept = compare(symbol, column - row, as_size(diagonal))
    pairs = [(conjunction(kept, condition), expression) for condition, expression in cases_of(as_tensor(input).value)]
    return make_tensor(call.shape, call.dtype, make_cases([*pairs, (negation(kept), ZERO)]))


@operation("eye")
def _eye(call: Call, n: Any, m: Any = None, dtype: Any = None) -> AbstractTensor:
    del n, m, dtype
    diagonal = compare("==", axis(0), axis(1))
    return make_tensor(call.shape, call.dtype, make_cases([(diagonal, ONE), (negation(diagonal), ZERO)]))


@operation("cat", "concat", "concatenate")
def _cat(call: Call, tensors: Any, dim: Any = 0) -> AbstractTensor:
    along = dimension(dim, len(call.shape))
    return _concatenated(call, [as_tensor(tensor) for tensor in tensors], along)


@operation("hstack")
def _hstack(call: Call, tensors: Any) -> AbstractTensor:
    return _concatenated(call, [as_tensor(tensor) for tensor in tensors], 0 if len(call.shape) == 1 else 1)


def _concatenated(call: Call, tensors: list[AbstractTensor], along: int) -> AbstractTensor:
    tensors = [tensor for tensor in tensors if not (tensor.rank == 1 and tensor.shape[0] == 0)]
    if any(tensor.rank != len(call.shape) for tensor in tensors):
        raise UnknownError("it joins tensors of different ranks")
    offset, before, pairs = ZERO, TRUE, []
    for place, tensor in enumerate(tensors):
        end = offset + tensor.shape[along]
        inside = TRUE if place == len(tensors) - 1 else compare("<", axis(along), end)
        shifted = _at(converted(tensor, call.dtype), along, axis(along) - offset)
        pairs += [(conjunction(before, inside, condition), e) for condition, e in cases_of(shifted.value)]
        offset, before = end, conjunction(before, negation(inside))
    return make_tensor(call.shape, call.dtype, make_cases(pairs))


def _at(tensor: AbstractTensor, along: int, index: sympy.Expr) -> AbstractTensor:
    """The tensor read at `index` along one dimension (which may leave its range: the caller guards that)."""
    if tensor.shape[along] == 1:
        return tensor
    return AbstractTensor(tensor.shape, tensor.dtype, substitute_value(tensor.value, {axis(along): index}))


@operation("stack")
def _stack(call: Call, tensors: Any, dim: Any = 0) -> AbstractTensor:
    along = dimension(dim, len(call.shape))
    return _concatenated(call, [insert_axis(as_tensor(tensor), along) for tensor in tensors], along)


@operation("pad", "constant_pad_nd")
def _pad(call: Call, input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> AbstractTensor:
    tensor = as_tensor(input)
    if not isinstance(mode, str):
        mode, value = "constant", mode
    if mode != "constant":
        raise UnknownError(f"it pads with mode {mode!r}")
    inside, moved = TRUE, tensor
    for step in range(len(pad) // 2):
        along = tensor.rank - 1 - step
        low, high = as_size(pad[2 * step]), as_size(pad[2 * step + 1])
        conditions = []
        if low != 0:
            conditions.append(compare(">=", axis(along), low))
        if high != 0:
            conditions.append(compare("<", axis(along), low + tensor.shape[along]))
        inside = conjunction(inside, *conditions)
        if low != 0:
            moved = _at(moved, along, axis(along) - low)
    filled = converted(as_tensor(0 if value is None else value), call.dtype)
    pairs = [(conjunction(inside, condition), e) for condition, e in cases_of(moved.value)]
    pairs += [(conjunction(negation(inside), condition), e) for condition, e in cases_of(filled.value)]
    return make_tensor(call.shape, call.dtype, make_cases(pairs))


@operation("setitem")
def _setitem(call: Call, input: Any, key: Any, value: Any) -> AbstractTensor:
    tensor, filled = as_tensor(input), converted(as_tensor(value), call.dtype)
    places = list(key) if isinstance(key, tuple) else [key]
    if len(places) == 1 and isinstance(places[0], AbstractTensor) and places[0].dtype == torch.bool:
        if filled.rank or places[0].rank != tensor.rank:
            raise UnknownError("it assigns several values to the elements that a mask selects")
        written = places[0].formula
    else:
        written, filled = _assigned(call, tensor, places, filled)
    pairs = [(conjunction(written, condition), e) for condition, e in cases_of(filled.value)]
    pairs += [(conjunction(negation(written), condition), e) for condition, e in cases_of(tensor.value)]
    return make_tensor(call.shape, call.dtype, make_cases(pairs))


@operation("index_put")
def _index_put(call: Call, input: Any, indices: Any, values: Any, accumulate: Any = False) -> AbstractTensor:
    if accumulate:
        raise UnknownError("it adds to elements")
    return _setitem(call, input, tuple(slice(None) if place is None else place for place in indices), values)


def _assigned(
    call: Call, tensor: AbstractTensor, places: list[Any], filled: AbstractTensor
) -> tuple[Formula, AbstractTensor]:
    """Which elements an assignment writes, and what it writes there, in terms of the tensor's axes."""
    if Ellipsis in [place for place in places if not isinstance(place, AbstractTensor)]:
        at = next(k for k, place in enumerate(places) if place is Ellipsis)
        places = [*places[:at], *[slice(None)] * (tensor.rank - len(places) + 1), *places[at + 1 :]]
    places += [slice(None)] * (tensor.rank - len(places))
    conditions, region = [], []
    for dim, place in enumerate(places):
        size, here = tensor.shape[dim], ZERO if call.shape[dim] == 1 else axis(dim)
        if isinstance(place, slice):
            if place.step not in (None, 1):
                raise UnknownError("it assigns to a slice with a step")
            low = slice_start(place, size)
            if place.start is not None:
                conditions.append(compare(">=", here, low))
            if place.stop is not None:
                conditions.append(compare("<", here, slice_start(slice(place.stop, None), size)))
            region.append(here - low)
        elif isinstance(place, (bool, AbstractTensor)) or place is None:
            raise UnknownError("it assigns through an index that the prover does not follow")
        else:
            conditions.append(compare("==", here, wrapped_index(as_size(place), size)))
    if filled.rank > len(region):
        raise UnknownError("it assigns a tensor of more dimensions than it writes")
    moved = {axis(k): region[len(region) - filled.rank + k] for k in range(filled.rank)}
    return conjunction(*conditions), AbstractTensor(
        call.shape, filled.dtype, substitute_value(filled.value, moved) if moved else filled.value
    )
