"""Operations that show elements in another shape: views, expansion, torch.vmap's batch dimensions."""
# ruff: noqa: A002  (parameters have the names that torch gives them)

from collections.abc import Sequence
from typing import Any

import sympy

from nsa_compile.passes.predicate.cases import substitute_value
from nsa_compile.passes.predicate.operations import Call, as_tensor, dimension, operation
from nsa_compile.passes.predicate.tensor import ZERO, AbstractTensor, axis, make_tensor, rearrange
from nsa_compile.passes.predicate.terms import UnknownError


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


def level_symbol(level: Any) -> sympy.Symbol:
    """The index along the dimension that torch.vmap maps over at a nesting level."""
    return sympy.Symbol(f"vmap{level}", integer=True, nonnegative=True)


@operation("_add_batch_dim")
def _add_batch_dim(call: Call, input: Any, batch_dim: Any, level: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    along = dimension(batch_dim, tensor.rank)
    index: list[sympy.Expr] = [axis(k if k < along else k - 1) for k in range(tensor.rank)]
    index[along] = ZERO if tensor.shape[along] == 1 else level_symbol(level)
    return rearrange(tensor, call.shape, index)


@operation("_remove_batch_dim")
def _remove_batch_dim(call: Call, input: Any, level: Any, batch_size: Any, out_dim: Any) -> AbstractTensor:
    tensor = as_tensor(input)
    along = dimension(out_dim, len(call.shape))
    del batch_size
    mapped = level_symbol(level)
    moved = {axis(k): axis(k if k < along else k + 1) for k in range(tensor.rank)}
    return make_tensor(call.shape, call.dtype, substitute_value(tensor.value, {**moved, mapped: axis(along)}))


@operation("item of meshgrid")
def _meshgrid_item(call: Call, item: int, *tensors: Any, indexing: Any = "ij") -> AbstractTensor:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    along = 1 - item if indexing == "xy" and item < 2 else item
    return rearrange(as_tensor(given[item]), call.shape, [axis(along)])
