"""Bringing tensors from the layout a model has them in to the operator's, and back."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from nsa_compile.passes.axes import Axis, Dimension, Dimensions, leaves, resolved, size_of
from nsa_compile.passes.metadata import dtype_of, shape_of
from nsa_compile.passes.sites import Operand, Step

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class LabelledTensor:
    """A tensor of the graph with its dimensions in axes of the attention.

    Attributes:
        node: the tensor.
        dims: its dimensions, outermost first.
    """

    node: fx.Node
    dims: Dimensions

    @property
    def axes(self) -> frozenset[Axis]:
        """The unsplit axes that the tensor depends on."""
        return frozenset(leaves(axis for dim in self.dims for axis in dim))


def arrange(dims: Dimensions, target: Dimensions) -> "tuple[Step, ...] | None":
    """Finds the views that bring a tensor's dimensions to others made of the same axes.

    Args:
        dims: the tensor's dimensions.
        target: the wanted ones; empty dimensions have size 1.

    Returns:
        The views, none where the dimensions are as wanted already; None where no views do it.
    """
    have, want = resolved(dims), resolved(target)
    if have == want:
        return ()
    if set(leaves(axis for dim in have for axis in dim)) != set(leaves(axis for dim in want for axis in dim)):
        return None
    steps: list[Step] = []
    current = list(have)
    for position in reversed(range(len(current))):
        dim = current[position]
        if not dim:
            steps.append(Step(_aten.squeeze.dim, (position,)))
            del current[position]
        elif dim not in want and len(dim) > 1:
            sizes = _sizes_with_one_left_open(dim)
            if sizes is None:
                return None
            steps.append(Step(_aten.unflatten.int, (position, sizes)))
            current[position : position + 1] = [(axis,) for axis in dim]
    filled = [dim for dim in want if dim]
    wanted = [piece for dim in filled for piece in ([dim] if dim in current else [(axis,) for axis in dim])]
    order = [current.index(piece) for piece in wanted]
    if order != sorted(order):
        steps.append(Step(_aten.permute.default, (order,)))
    for position, dim in enumerate(want):
        if not dim:
            steps.append(Step(_aten.unsqueeze.default, (position,)))
        elif dim not in current and len(dim) > 1:
            steps.append(Step(_aten.flatten.using_ints, (position, position + len(dim) - 1)))
    return tuple(steps)


def _sizes_with_one_left_open(dim: Dimension) -> "list[int] | None":
    known = [axis.size if isinstance(axis.size, int) else -1 for axis in dim]
    if known.count(-1) > 1:
        return None
    return known if -1 in known else [-1, *known[1:]]


def operand(candidates: Sequence[LabelledTensor], target: Dimensions, dtype: torch.dtype | None) -> Operand | None:
    """Chooses, of nodes that hold the same tensor in other layouts and dtypes, the one that needs the fewest steps.

    Args:
        candidates: the tensor in each layout; among equals the first is taken.
        target: the wanted dimensions.
        dtype: the wanted dtype; None leaves it.

    Returns:
        The operand; None where no candidate can be brought to `target`.
    """
    best: Operand | None = None
    for tensor in candidates:
        steps = arrange(tensor.dims, target)
        if steps is None:
            continue
        if dtype not in (None, dtype_of(tensor.node)):
            steps = (*steps, Step(_aten.to.dtype, (dtype,)))
        if best is None or len(steps) < len(best.steps):
            shape = shape_of(tensor.node) if not steps else None
            best = Operand(tensor.node, tuple(shape or map(size_of, resolved(target))), steps)
    return best


def head_operand(candidates: Sequence[LabelledTensor], target: Dimensions, dtype: torch.dtype | None) -> Operand | None:
    """Chooses keys or values as `operand` does, and repeats their heads where the other of the two has more.

    Args:
        candidates: the tensor in each layout.
        target: the wanted batch, heads, length and size.
        dtype: the wanted dtype; None leaves it.
    """
    found = operand(candidates, target, dtype)
    batch, heads, *rest = resolved(target)
    held = candidates[0].axes
    if found is not None or all(axis in held for axis in heads):
        return found
    sizes = [-1 if axis in held else axis.size for axis in heads]
    apart = operand(candidates[:1], (batch, *((axis,) if axis in held else () for axis in heads), *rest), dtype)
    if apart is None or not all(isinstance(size, int) for size in sizes):
        return None
    steps = [Step(_aten.expand.default, ([-1, *sizes, -1, -1],))]
    steps += [Step(_aten.flatten.using_ints, (1, len(heads)))] if len(heads) > 1 else []
    return Operand(apart.node, tuple(map(size_of, resolved(target))), (*apart.steps, *steps))
