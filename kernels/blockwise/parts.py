"""One softmax over the keys that a branch names: a contiguous range of keys, listed blocks, or both."""

import dataclasses

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.lists import accumulate_lists, accumulate_lists_backward
from nsa_compile.kernels.blockwise.tiles import (
    Gradients,
    RunningSoftmax,
    accumulate_interval,
    accumulate_interval_backward,
    accumulation_dtype,
    group_heads,
)


@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Every key in `lo … hi`, each `[B | 1, T]`."""

    lo: Tensor
    hi: Tensor


@dataclasses.dataclass(frozen=True)
class ListedBlocks:
    """The keys in `lo … hi` of the listed blocks.

    Attributes:
        block_indices: `[B, H_kv, T, n]` int32, −1 for none.
        block: l'.
        lo: `[B | 1, T]`.
        hi: `[B | 1, T]`.
    """

    block_indices: Tensor
    block: int
    lo: Tensor
    hi: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float, *parts: KeyRange | ListedBlocks
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of disjoint parts.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        valid: `[B, S]` bool or None.
        scale: factor of the logits.
        parts: which keys each query sees; no key may be in two parts.

    Returns:
        `(output [B, H, T, D_v], lse [B, H, T])`.
    """
    state = RunningSoftmax.empty(query, value)
    rows = group_heads(query, key.shape[1])
    for part in parts:
        if isinstance(part, KeyRange):
            accumulate_interval(state, rows, key, value, part.lo, part.hi, valid, scale)
        else:
            accumulate_lists(
                state, rows, key, value, part.block_indices, part.lo, part.hi, valid, part.block, scale
            )
    return state.finish(query.dtype)


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    *parts: KeyRange | ListedBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`, with the weights computed again from `lse`.

    Args:
        grad_output: `[B, H, T, D_v]`.
        query: `[B, H, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        valid: `[B, S]` bool or None.
        output: `[B, H, T, D_v]`.
        lse: `[B, H, T]`.
        scale: factor of the logits.
        parts: as given to `attend`.

    Returns:
        `(grad_query, grad_key, grad_value)`, shapes and dtypes of query, key and value.
    """
    dtype = accumulation_dtype(query)
    delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1)
    finite = torch.where(lse == float("-inf"), float("inf"), lse)  # exp(logit − inf) = 0: such rows have no gradient
    rows, grads, row_lse, row_delta = (group_heads(each, key.shape[1]) for each in (query, grad_output, finite, delta))
    gradients = Gradients.zeros(rows, key, value)
    for part in parts:
        if isinstance(part, KeyRange):
            accumulate_interval_backward(
                gradients, grads, rows, key, value, row_lse, row_delta, part.lo, part.hi, valid, scale
            )
        else:
            accumulate_lists_backward(
                gradients,
                grads,
                rows,
                key,
                value,
                part.block_indices,
                row_lse,
                row_delta,
                part.lo,
                part.hi,
                valid,
                part.block,
                scale,
            )
    return gradients.finish(query.dtype)
