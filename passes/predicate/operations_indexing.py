"""Operations that pick elements: indexing, slices, and the parts that a tensor is split into."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from nsa_compile.passes.predicate.cases import substitute_value
from nsa_compile.passes.predicate.operations import Call, as_size, as_tensor, dimension, operation
from nsa_compile.passes.predicate.tensor import ZERO, AbstractTensor, axis, rearrange
from nsa_compile.passes.predicate.terms import UnknownError, replaced
from nsa_compile.passes.predicate.writes import is_captured_read

# Exported graphs write "to the end" as the largest 64-bit integer.
_LONGEST = 1 << 62


def index_tensor(call: Call, tensor: AbstractTensor, key: tuple[Any, ...]) -> AbstractTensor:
    """`tensor[key]`: None, Ellipsis, numbers, slices and integer tensors, as torch indexes."""
    index, shape = resolve_index(tensor.shape, key, call.shape)
    if len(shape) != len(call.shape):
        raise UnknownError("it indexes in a way that the prover does not know")
    return rearrange(tensor, call.shape, index)


def resolve_index(
    sizes: Sequence[sympy.Expr], key: tuple[Any, ...], result: Sequence[sympy.Expr]
) -> tuple[list[sympy.Expr], list[None]]:
    """Where each dimension of the indexed tensor is read, in terms of the result's axes.

    Returns:
        One expression for each dimension of the tensor, and a list as long as the result's rank should be.
    """
    used = sum(1 for place in key if place is not None and place is not Ellipsis)
    if used > len(sizes):
        raise UnknownError("it has more indices than dimensions")
    full = [slice(None)] * (len(sizes) - used)
    at = next((k for k, place in enumerate(key) if place is Ellipsis), len(key))
    places = [*key[:at], *full, *key[at + 1 :]]
    tensors = [place for place in places if isinstance(place, AbstractTensor) and place.rank]
    indices = [place for place in places if isinstance(place, (AbstractTensor, bool))]
    if not all(isinstance(place, AbstractTensor) and _is_index(place) for place in indices):
        raise UnknownError("it indexes with something other than integers")
    gathered = max((place.rank for place in tensors), default=0)
    positions = [k for k, place in enumerate(places) if isinstance(place, AbstractTensor) and place.rank]
    # Index tensors that are not next to each other put their dimensions in front.
    apart = bool(positions) and positions != list(range(positions[0], positions[-1] + 1))
    index: list[sympy.Expr] = []
    taken = gathered if apart else 0
    gathered_at = 0 if apart else None
    for place in places:
        if place is None:
            taken += 1
        elif isinstance(place, slice):
            size, step = sizes[len(index)], 1 if place.step is None else place.step
            if not isinstance(step, int) or step < 1:
                raise UnknownError("it slices with a step that is not a positive number")
            length = result[taken] if taken < len(result) else None
            index.append(slice_start(place, size, length) + step * axis(taken))
            taken += 1
        elif isinstance(place, AbstractTensor) and place.rank:
            if gathered_at is None:
                gathered_at, taken = taken, taken + gathered
            index.append(wrapped_index(_gather_index(place, gathered_at, gathered), sizes[len(index)]))
        else:
            index.append(wrapped_index(as_size(place), sizes[len(index)]))
    unit = {axis(k): ZERO for k, size in enumerate(result) if size == 1}
    return [replaced(expression, unit) for expression in index], [None] * taken


def _is_index(place: AbstractTensor) -> bool:
    return place.dtype in (torch.int32, torch.int64)


def _gather_index(place: AbstractTensor, at: int, rank: int) -> sympy.Expr:
    """The index tensor's element, its axes moved to where the gathered dimensions are in the result."""
    shift = at + rank - place.rank
    moved = substitute_value(place.value, {axis(k): axis(k + shift) for k in range(place.rank)})
    return AbstractTensor(place.shape, place.dtype, moved).number()


def wrapped_index(index: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """An index that may count from the back, counted from the front."""
    if size == 1:
        return ZERO
    if index.is_nonnegative:
        return index
    if index.is_negative:
        return index + size
    # −size ≤ index < size, or the indexing fails.
    return sympy.Mod(index, size)


def slice_start(place: slice, size: sympy.Expr, length: sympy.Expr | None = None) -> sympy.Expr:
    """Where a slice begins, counted from the front.

    Args:
        place: the slice.
        size: of the dimension that is sliced.
        length: of the result, where it is known: it tells apart starts that count from the front or from the back.

    Raises:
        UnknownError: it is not known whether the start counts from the back.
    """
    if place.start is None:
        return ZERO
    first = as_size(place.start)
    if first.is_nonnegative:
        return first
    if first.is_negative:
        counted = size + first
        return counted if counted.is_nonnegative else sympy.Max(counted, 0)
    stop = size if place.stop is None else as_size(place.stop)
    if length is not None and place.step in (None, 1) and stop.is_nonnegative and length == sympy.expand(stop - first):
        return first
    raise UnknownError(f"a slice starts at {first}, whose sign is not known")


@operation("getitem")
def _getitem(call: Call, input: Any, key: Any) -> AbstractTensor:
    return index_tensor(call, as_tensor(input), key if isinstance(key, tuple) else (key,))


@operation("index", "_unsafe_index")
def _index(call: Call, input: Any, indices: Any) -> AbstractTensor:
    places = tuple(slice(None) if place is None else place for place in indices)
    return index_tensor(call, as_tensor(input), places)


@operation("flat_apply")
def _flat_apply(call: Call, function: Any, specification: Any, name: Any, input: Any, *indices: Any) -> AbstractTensor:
    """How exported graphs read a tensor that flex_attention's modifications capture."""
    del function, specification
    if not is_captured_read(call.node):
        raise UnknownError(f"the prover does not know {name}")
    return index_tensor(call, as_tensor(input), indices)


@operation("select")
def _select(call: Call, input: Any, dim: Any, index: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    along = dimension(dim, tensor.rank)
    places: list[Any] = [slice(None)] * along
    return index_tensor(call, tensor, (*places, index))


@operation("index_select")
def _index_select(call: Call, input: Any, dim: Any, index: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    places: list[Any] = [slice(None)] * dimension(dim, tensor.rank)
    return index_tensor(call, tensor, (*places, as_tensor(index)))


@operation("slice")
def _slice(call: Call, input: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> AbstractTensor:
    open_ended = isinstance(end, int) and end > _LONGEST
    return _sliced(call, as_tensor(input), dim, slice(start, None if open_ended else end, step))


@operation("narrow")
def _narrow(call: Call, input: Any, dim: Any, start: Any, length: Any) -> AbstractTensor:
    return _sliced(call, as_tensor(input), dim, slice(start, as_size(start) + as_size(length)))


def _sliced(call: Call, tensor: AbstractTensor, dim: Any, place: slice) -> AbstractTensor:
    along = dimension(dim, tensor.rank)
    index: list[sympy.Expr] = [axis(k) for k in range(tensor.rank)]
    step = 1 if place.step is None else as_size(place.step)
    index[along] = slice_start(place, tensor.shape[along], call.shape[along]) + step * axis(along)
    return rearrange(tensor, call.shape, index)


@operation("item of unbind")
def _unbind_item(call: Call, item: int, input: Any, dim: Any = 0) -> AbstractTensor:
    return _select(call, input, dim, item)


@operation("item of split", "item of split_with_sizes")
def _split_item(call: Call, item: int, input: Any, split_size_or_sections: Any, dim: Any = 0) -> AbstractTensor:
    if isinstance(split_size_or_sections, (tuple, list)):
        start = sum(map(as_size, split_size_or_sections[:item]), ZERO)
    else:
        start = as_size(split_size_or_sections) * item
    tensor = as_tensor(input)
    index: list[sympy.Expr] = [axis(k) for k in range(tensor.rank)]
    index[dimension(dim, tensor.rank)] += start
    return rearrange(tensor, call.shape, index)


@operation("item of chunk")
def _chunk_item(call: Call, item: int, input: Any, chunks: Any, dim: Any = 0) -> AbstractTensor:
    size = as_tensor(input).shape[dimension(dim, as_tensor(input).rank)]
    return _split_item(call, item, input, sympy.ceiling(size / as_size(chunks)), dim)
