"""One softmax over the keys that a branch names: a contiguous range of keys, listed blocks, or both."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from nsa_compile.kernels.blockwise.gathers import (
    Gather,
    accumulate_gathers,
    accumulate_gathers_backward,
    iterate_gathers,
)
from nsa_compile.kernels.blockwise.lists import Visit, accumulate_lists, accumulate_lists_backward, iterate_visits
from nsa_compile.kernels.blockwise.ranges import accumulate_ranges, accumulate_ranges_backward
from nsa_compile.kernels.blockwise.state import Gradients, RunningSoftmax, query_rows

# Elements that can be gathered in the time of one step over a block: about 0.1 ms on a CPU.
_STEP_COST = 1 << 15


@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Every key in `lo … hi`, each `[B | 1, T]`."""

    lo: Tensor
    hi: Tensor

    def accumulate(self, state: RunningSoftmax, rows: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Adds the part's keys to `state`."""
        accumulate_ranges(state, rows, key, value, self.lo, self.hi, valid)

    def accumulate_backward(
        self, gradients: Gradients, rows: Tensor, key: Tensor, value: Tensor, valid: Tensor | None
    ) -> None:
        """Adds the gradients that flow through the part's keys."""
        accumulate_ranges_backward(gradients, rows, key, value, self.lo, self.hi, valid)


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

    def accumulate(self, state: RunningSoftmax, rows: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Adds the part's keys to `state`."""
        if self._is_query_major(key, value):
            accumulate_gathers(state, rows, key, value, self._gathers(rows, value, valid))
        else:
            accumulate_lists(state, rows, key, value, self._visits(rows, key, valid))

    def accumulate_backward(
        self, gradients: Gradients, rows: Tensor, key: Tensor, value: Tensor, valid: Tensor | None
    ) -> None:
        """Adds the gradients that flow through the part's keys."""
        if self._is_query_major(key, value):
            accumulate_gathers_backward(gradients, rows, key, value, self._gathers(rows, value, valid))
        else:
            accumulate_lists_backward(gradients, rows, key, value, self._visits(rows, key, valid))

    def _is_query_major(self, key: Tensor, value: Tensor) -> bool:
        """Whether gathering each query's keys costs less than a step for each block, by a rough model."""
        num_queries, num_selected = self.block_indices.shape[2:]
        num_blocks = (key.shape[2] + self.block - 1) // self.block
        gathered = num_queries * num_selected * self.block * (key.shape[3] + value.shape[3])
        return gathered <= _STEP_COST * min(num_queries * num_selected, num_blocks)

    def _gathers(self, rows: Tensor, value: Tensor, valid: Tensor | None) -> Iterator[Gather]:
        size, num_keys = value.shape[3], value.shape[2]
        return iterate_gathers(rows, size, self.block_indices, self.block, num_keys, self.lo, self.hi, valid)

    def _visits(self, rows: Tensor, key: Tensor, valid: Tensor | None) -> Iterator[Visit]:
        return iterate_visits(rows, self.block_indices, self.block, key.shape[2], self.lo, self.hi, valid)


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
    rows = query_rows(query, key.shape[1], scale)
    state = RunningSoftmax.empty(rows, value.shape[-1])
    for part in parts if key.shape[2] else ():
        part.accumulate(state, rows, key, value, valid)
    return state.finish(query.dtype)


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    delta: Tensor,
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
        delta: `[B, H, T]`, Σ over D_v of output · its gradient.
        lse: `[B, H, T]`.
        scale: factor of the logits.
        parts: as given to `attend`.

    Returns:
        `(grad_query, grad_key, grad_value)`, shapes and dtypes of query, key and value.
    """
    rows = query_rows(query, key.shape[1], scale)
    gradients = Gradients.start(grad_output, delta, lse, rows, key, value)
    for part in parts if key.shape[2] else ():
        part.accumulate_backward(gradients, rows, key, value, valid)
    return gradients.finish(scale, query.dtype)
