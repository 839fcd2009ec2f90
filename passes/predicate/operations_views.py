"""Operations that move elements about: views, indexing, slices, expansion, torch.vmap's batch dimensions."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from nsa_compile.passes.predicate.formula import UnknownError, substitute_value
from nsa_compile.passes.predicate.operations import Call, as_size, as_tensor, dimension, operation
from nsa_compile.passes.predicate.tensor import ZERO, AbstractTensor, axis, make_tensor, rearrange

# Exported graphs write "to the end" as the largest 64-bit integer.
_LONGEST = 1 << 62


def insert_axis(tensor: AbstractTensor, place: int) -> AbstractTensor:
    """Inserts a dimension of size 1."""
    shape = (*tensor.shape[:place], sympy.Integer(1), *tensor.shape[place:])
    return rearrange(tensor, shape, [axis(k if k < place else k + 1) for k in range(tensor.rank)])


@operation("unsqueeze")
def _unsqueeze(call: Call, input: Any, dim: Any) -> AbstractTensor:
    return insert_axis(as_tensor(input), dimension(dim, len(call.shape)))


@operation("expand", "expand_as", "broadcast_to", "repeat_to")
def _expand(call: Call, input: Any, *_: Any, **__: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    shift = len(call.shape) - tensor.rank
    return rearrange(tensor, call.shape, [axis(k + shift) for k in range(tensor.rank)])


@operation("permute")
def _permute(call: Call, input: Any, *dims: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    order = [dimension(d, tensor.rank) for d in (dims[0] if isinstance(dims[0], (list, tuple)) else dims)]
    return rearrange(tensor, call.shape, [axis(order.index(k)) for k in range(tensor.rank)])


@operation("transpose", "swapaxes", "swapdims")
def _transpose(call: Call, input: Any, dim0: Any, dim1: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    first, second = dimension(dim0, tensor.rank), dimension(dim1, tensor.rank)
    order = [second if k == first else first if k == second else k for k in range(tensor.rank)]
    return rearrange(tensor, call.shape, [axis(order[k]) for k in range(tensor.rank)])


@operation("t", "mT", "T", "numpy_T", "matrix_H", "adjoint")
def _matrix_transpose(call: Call, input: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    return _transpose(call, tensor, -2, -1) if tensor.rank > 1 else tensor


@operation("getattr")
def _attribute(call: Call, input: Any, name: Any) -> AbstractTensor:
    if name in ("T", "mT", "H", "mH"):
        return _matrix_transpose(call, input)
    if name == "data":
        return as_tensor(input)
    raise UnknownError(f"the prover does not know the attribute {name!r}")


@operation("view", "reshape", "_unsafe_view", "squeeze", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(call: Call, input: Any, *_: Any, **__: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    if tensor.dtype != call.dtype:
        raise UnknownError("it reads memory as another dtype")
    return rearrange(tensor, call.shape, _reshaped_index(tensor, call.shape))


def _reshaped_index(tensor: AbstractTensor, shape: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """Where each dimension's index comes from, for a reshape that splits or merges groups of dimensions."""
    index: list[sympy.Expr] = [ZERO] * tensor.rank
    source = [k for k, size in enumerate(tensor.shape) if size != 1]
    result = [k for k, size in enumerate(shape) if size != 1]
    while source and result:
        inputs, outputs = [source.pop(0)], [result.pop(0)]
        while (ratio := _product(tensor.shape, inputs) / _product(shape, outputs)) != 1:
            more = outputs if _exceeds_one(ratio) else inputs if _exceeds_one(1 / ratio) else None
            rest = result if more is outputs else source
            if more is None or not rest:
                raise UnknownError(f"it reshapes {tensor.shape} to {tuple(shape)}")
            more.append(rest.pop(0))
        flat = sum((axis(k) * _product(shape, outputs[n + 1 :]) for n, k in enumerate(outputs)), ZERO)
        for n, k in enumerate(inputs):
            inner = _product(tensor.shape, inputs[n + 1 :])
            position = flat if inner == 1 else sympy.floor(sympy.expand(flat / inner))
            index[k] = position if n == 0 else sympy.Mod(position, tensor.shape[k])
    if source or result:
        raise UnknownError(f"it reshapes {tensor.shape} to {tuple(shape)}")
    return index


def _exceeds_one(ratio: sympy.Expr) -> bool:
    return ratio > 1 if ratio.is_number else bool(ratio.is_integer)


def _product(shape: Sequence[sympy.Expr], numbers: Sequence[int]) -> sympy.Expr:
    return sympy.expand(sympy.prod([shape[k] for k in numbers])) if numbers else sympy.Integer(1)


@operation("repeat")
def _repeat(call: Call, input: Any, *_: Any, **__: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    shift = len(call.shape) - tensor.rank
    index = [
        axis(k + shift) if size == call.shape[k + shift] else sympy.Mod(axis(k + shift), size)
        for k, size in enumerate(tensor.shape)
    ]
    return rearrange(tensor, call.shape, index)


@operation("flip")
def _flip(call: Call, input: Any, *dims: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    flipped = {dimension(d, tensor.rank) for d in (dims[0] if isinstance(dims[0], (list, tuple)) else dims)}
    return rearrange(
        tensor, call.shape, [size - 1 - axis(k) if k in flipped else axis(k) for k, size in enumerate(tensor.shape)]
    )


@operation("narrow")
def _narrow(call: Call, input: Any, dim: Any, start: Any, length: Any) -> AbstractTensor:
    return _sliced(call, as_tensor(input), dim, slice(start, as_size(start) + as_size(length)))


@operation("slice")
def _slice(call: Call, input: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> AbstractTensor:
    open_ended = isinstance(end, int) and end > _LONGEST
    return _sliced(call, as_tensor(input), dim, slice(start, None if open_ended else end, step))


def _sliced(call: Call, tensor: AbstractTensor, dim: Any, place: slice) -> AbstractTensor:
    along = dimension(dim, tensor.rank)
    index: list[sympy.Expr] = [axis(k) for k in range(tensor.rank)]
    step = 1 if place.step is None else as_size(place.step)
    index[along] = slice_start(place, tensor.shape[along], call.shape[along]) + step * axis(along)
    return rearrange(tensor, call.shape, index)


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


@operation("index", "_unsafe_index")
def _index(call: Call, input: Any, indices: Any) -> AbstractTensor:
    places = tuple(slice(None) if place is None else place for place in indices)
    return index_tensor(call, as_tensor(input), places)


@operation("getitem")
def _getitem(call: Call, input: Any, key: Any) -> AbstractTensor:
    return index_tensor(call, as_tensor(input), key if isinstance(key, tuple) else (key,))


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
    return [expression.xreplace(unit) for expression in index], [None] * taken


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


def level_symbol(level: int, size: sympy.Expr) -> sympy.Symbol:
    """The index along the dimension that torch.vmap maps over at a nesting level."""
    del size
    return sympy.Symbol(f"vmap{level}", integer=True, nonnegative=True)


@operation("_add_batch_dim")
def _add_batch_dim(call: Call, input: Any, batch_dim: Any, level: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    along = dimension(batch_dim, tensor.rank)
    index = [axis(k if k < along else k - 1) for k in range(tensor.rank)]
    index[along] = ZERO if tensor.shape[along] == 1 else level_symbol(int(level), tensor.shape[along])
    return rearrange(tensor, call.shape, index)


@operation("_remove_batch_dim")
def _remove_batch_dim(call: Call, input: Any, level: Any, batch_size: Any, out_dim: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    along = dimension(out_dim, len(call.shape))
    mapped = level_symbol(int(level), as_size(batch_size))
    moved = {axis(k): axis(k if k < along else k + 1) for k in range(tensor.rank)}
    return make_tensor(call.shape, call.dtype, substitute_value(tensor.value, {**moved, mapped: axis(along)}))


@operation("item of meshgrid")
def _meshgrid_item(call: Call, item: int, *tensors: Any, indexing: Any = "ij") -> AbstractTensor:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    along = 1 - item if indexing == "xy" and item < 2 else item
    return rearrange(as_tensor(given[item]), call.shape, [axis(along)])


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
