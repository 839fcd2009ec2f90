"""View operations as relations between the axes of what they read and the axes of what they make.

One table says for each operation how dimensions correspond.  The same relation serves both directions: from a
tensor to its views, and from a view back to what it was made from.  Copies that change no value (`contiguous`,
`clone`) count as views; repetition (`expand`, `repeat`, `repeat_interleave`) makes axes that the source lacks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.axes import Axis, Dimension, Dimensions, dimension, dimensions, flat, unify, unify_dimensions
from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import number_of, same_size, shape_of, tensor_of
from nsa_compile.passes.sites import Shape


@dataclasses.dataclass(frozen=True)
class View:
    """How a node's tensor corresponds to the one it was made from.

    Attributes:
        source: the node that is viewed.
        source_dims: its dimensions.
        dims: those of the view, in the same axes; axes that `source_dims` lacks are repetitions.
    """

    source: fx.Node
    source_dims: Dimensions
    dims: Dimensions


def is_view(node: fx.Node) -> bool:
    """Tells whether a node's operation is one that only views, casts or copies."""
    return node.op in ("call_function", "call_method") and operation(node) in _RULES


def read_view(node: fx.Node) -> View | None:
    """Describes a node as a view of its first input; None where it is not one, or shapes are unknown."""
    rule = _RULES.get(operation(node))
    if rule is None or node.op not in ("call_function", "call_method") or not node.args:
        return None
    source, *rest = node.args
    if isinstance(source, list | tuple) and source and all(part is source[0] for part in source):
        rest, source = [len(source), *rest], source[0]
    if not isinstance(source, fx.Node):
        return None
    tensor, view = tensor_of(source), tensor_of(node)
    if tensor is None or view is None or not _keeps_values(tensor.dtype, view.dtype):
        return None
    related = rule(_Call(tuple(tensor.shape), tuple(view.shape), rest, node.kwargs))
    return None if related is None else View(source, *related)


def _keeps_values(source: torch.dtype, view: torch.dtype) -> bool:
    """Whether every number of one dtype is one of the other: a cast from bfloat16 to float32 loses nothing."""
    return source == view or (source.is_floating_point and torch.promote_types(source, view) == view)


def back_through(node: fx.Node, dims: Dimensions) -> "tuple[fx.Node, Dimensions] | None":
    """Carries a tensor's dimensions back to what it is a view of; axes made by repetition are dropped."""
    view = read_view(node)
    if view is None or not unify_dimensions(dims, view.dims):
        return None
    return view.source, view.source_dims


def forth_through(node: fx.Node, source: fx.Node, dims: Dimensions) -> Dimensions | None:
    """Carries a tensor's dimensions on to a view of it."""
    view = read_view(node)
    if view is None or view.source is not source or not unify_dimensions(dims, view.source_dims):
        return None
    return view.dims


def broadcast_dimensions(node: fx.Node, full: Dimensions) -> Dimensions | None:
    """Returns a tensor's dimensions in axes of the one it is broadcast to; None where the shapes do not fit."""
    shape = shape_of(node)
    if shape is None or len(shape) > len(full):
        return None
    dims = []
    for size, wanted in zip(shape, full[len(full) - len(shape) :], strict=True):
        own = dimension(size)
        if own and not unify(own, wanted):
            return None
        dims.append(wanted if own else ())
    return tuple(dims)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a view operation: shapes before and after, and its arguments after the tensor."""

    shape: Shape
    view_shape: Shape
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


Related = tuple[Dimensions, Dimensions]
Rule = Callable[[_Call], "Related | None"]


def _same(call: _Call) -> Related | None:
    dims = dimensions(call.shape)
    return (dims, dims) if len(call.shape) == len(call.view_shape) else None


def _reshape(call: _Call) -> Related | None:
    source, view = dimensions(call.shape), dimensions(call.view_shape)
    return (source, view) if unify(flat(source), flat(view)) else None


def _permute(call: _Call) -> Related | None:
    order = (
        call.args[0] if call.args and isinstance(call.args[0], list | tuple) else call.args or call.kwargs.get("dims")
    )
    if not order or not all(isinstance(dim, int) for dim in order):
        return None
    return _permuted(call.shape, [dim % len(call.shape) for dim in order])


def _transpose(call: _Call) -> Related | None:
    pair = [*call.args, *call.kwargs.values()]
    return _swapped(call.shape, pair[0], pair[1]) if len(pair) == 2 else None


def _transpose_last(call: _Call) -> Related | None:
    return _swapped(call.shape, -1, -2)


def _property(call: _Call) -> Related | None:
    return _swapped(call.shape, -1, -2) if list(call.args) in (["T"], ["mT"]) and len(call.shape) >= 2 else None


def _swapped(shape: Shape, first: Any, second: Any) -> Related | None:
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order = list(range(len(shape)))
    order[first], order[second] = order[second], order[first]
    return _permuted(shape, order)


def _permuted(shape: Shape, order: Sequence[int]) -> Related:
    source = dimensions(shape)
    return source, tuple(source[dim] for dim in order)


def _expand(call: _Call) -> Related | None:
    source = dimensions(call.shape)
    added = dimensions(call.view_shape[: len(call.view_shape) - len(call.shape)])
    view = list(added)
    for dim, size, view_size in zip(source, call.shape, call.view_shape[len(added) :], strict=True):
        if dim and not same_size(size, view_size):
            return None
        view.append(dim or dimension(view_size))
    return source, tuple(view)


def _repeat(call: _Call) -> Related | None:
    source = dimensions(call.shape)
    added = len(call.view_shape) - len(call.shape)
    view: list[Dimension] = list(dimensions(call.view_shape[:added]))
    for dim, size, view_size in zip(source, call.shape, call.view_shape[added:], strict=True):
        if same_size(size, view_size):
            view.append(dim)
        elif isinstance(size, int) and isinstance(view_size, int) and size and view_size % size == 0:
            view.append((Axis(view_size // size), *dim))
        else:
            return None
    return source, tuple(view)


def _repeat_interleave(call: _Call) -> Related | None:
    bound = dict(zip(("repeats", "dim"), call.args, strict=False)) | dict(call.kwargs)
    times, dim = number_of(bound.get("repeats")), bound.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    source = dimensions(call.shape)
    view = list(source)
    view[dim] = (*view[dim], *dimension(times))
    return source, tuple(view)


def _cat(call: _Call) -> Related | None:
    times, *rest = call.args
    dim = rest[0] if rest else call.kwargs.get("dim", 0)
    source = dimensions(call.shape)
    view = list(source)
    view[dim] = (*dimension(times), *view[dim])
    return source, tuple(view)


def _stack(call: _Call) -> Related | None:
    times, *rest = call.args
    dim = rest[0] if rest else call.kwargs.get("dim", 0)
    source = dimensions(call.shape)
    view = list(source)
    view.insert(dim % (len(call.shape) + 1), dimension(times))
    return source, tuple(view)


def _drop_or_add_units(call: _Call) -> Related | None:
    """unsqueeze, squeeze: only dimensions of size 1 come and go, so the order of the others tells all."""
    source = dimensions(call.shape)
    kept = iter([dim for dim in source if dim])
    view = tuple(next(kept, ()) if not same_size(size, 1) else () for size in call.view_shape)
    return source, view


def _getitem(call: _Call) -> Related | None:
    for item in call.args[0] if isinstance(call.args[0], tuple) else (call.args[0],):
        is_slice = isinstance(item, slice) and item.step in (None, 1)
        is_number = isinstance(item, int) and not isinstance(item, bool)
        if not (is_slice or is_number or item is None or item is Ellipsis):
            return None
    # A slice that shortens nothing is whole, a number that drops a dimension of size 1 loses nothing.
    return None if _elements_differ(call) else _drop_or_add_units(call)


def _slice(call: _Call) -> Related | None:
    dims = dimensions(call.shape)
    return (dims, dims) if all(map(same_size, call.shape, call.view_shape)) else None


def _select(call: _Call) -> Related | None:
    return None if _elements_differ(call) else _drop_or_add_units(call)


def _elements_differ(call: _Call) -> bool:
    """Whether dimensions other than those of size 1 were lost or shortened."""
    rest = [size for size in call.shape if not same_size(size, 1)]
    view_rest = [size for size in call.view_shape if not same_size(size, 1)]
    return len(rest) != len(view_rest) or not all(map(same_size, rest, view_rest))


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("contiguous", "clone", "alias", "identity", "to", "lift_fresh_copy"), _same),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("unsqueeze", "squeeze"), _drop_or_add_units),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), _transpose),
    **dict.fromkeys(("t", "mT", "adjoint"), _transpose_last),
    "getattr": _property,
    "permute": _permute,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "cat": _cat,
    "stack": _stack,
    "getitem": _getitem,
    "slice": _slice,
    "select": _select,
}
