"""Visible keys as intervals: one `[first, last]` per query, and vectors of valid keys, blocks and compressed tokens."""

import torch
from torch import Tensor

from nsa_compile.kernels.compression import count_compressed


def resolve_intervals(
    first_key: Tensor | None, last_key: Tensor | None, *, is_causal: bool, query: Tensor, num_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """Completes a pair of interval bounds: both None, or both int32 `[B, T]` and contiguous.

    Args:
        first_key: `[B | 1, T]`, any integer dtype, first visible key of each query; None means 0.
        last_key: `[B | 1, T]`, any integer dtype, last visible key; None means t if `is_causal`, else S − 1.
        is_causal: what a missing `last_key` means.
        query: `[B, H, T, D]`, for its sizes and device.
        num_keys: S.

    Returns:
        `(first_key, last_key)`; both None when both were None.
    """
    if first_key is None and last_key is None:
        return None, None
    size = (query.shape[0], query.shape[2])
    first, last = default_intervals(is_causal=is_causal, query=query, num_keys=num_keys)
    first, last = (first if first_key is None else first_key), (last if last_key is None else last_key)
    return tuple(bound.to(torch.int32).expand(size).contiguous() for bound in (first, last))  # type: ignore[return-value]


def default_intervals(*, is_causal: bool, query: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Returns the bounds that a missing pair stands for, each int32 `[1, T]`."""
    num_queries = query.shape[2]
    first = torch.zeros(1, num_queries, dtype=torch.int32, device=query.device)
    if is_causal:
        last = torch.arange(num_queries, dtype=torch.int32, device=query.device).unsqueeze(0)
    else:
        last = torch.full_like(first, 0) + (num_keys - 1)
    return first, last


def tighten_intervals(
    first_key: Tensor | None, last_key: Tensor | None, key_valid: Tensor, *, is_causal: bool, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Moves both bounds inwards to valid keys, so that a non-empty interval starts and ends on one.

    Args:
        first_key: `[B, T]` int32 or None, as `resolve_intervals` makes it.
        last_key: `[B, T]` int32 or None, likewise.
        key_valid: `[B, S]` bool.
        is_causal: what missing bounds mean.
        query: `[B, H, T, D]`.

    Returns:
        `(first_key, last_key)`, each `[B, T]` int32; first > last where no valid key is visible.
    """
    if first_key is None or last_key is None:
        first_key, last_key = default_intervals(is_causal=is_causal, query=query, num_keys=key_valid.shape[1])
    batch, num_keys = key_valid.shape
    position = torch.arange(num_keys, dtype=torch.int32, device=key_valid.device)
    edge = key_valid.new_ones((batch, 1), dtype=torch.int32)
    following = torch.where(key_valid, position, num_keys).flip(1).cummin(1).values.flip(1)
    following = torch.cat([following, edge * num_keys], 1)  # [B, S + 1]: the first valid key at or after s
    preceding = torch.where(key_valid, position, -1).cummax(1).values
    preceding = torch.cat([edge * -1, preceding], 1)  # [B, S + 1]: the last valid key at or before s − 1
    size = (batch, first_key.shape[1])
    first = following.gather(1, first_key.clamp(0, num_keys).expand(size).long())
    last = preceding.gather(1, (last_key.clamp(-1, num_keys - 1) + 1).expand(size).long())
    return first.to(torch.int32), last.to(torch.int32)


def blocks_with_valid_key(key_valid: Tensor, selection_block: int) -> Tensor:
    """Says which selection blocks hold a valid key: `[B, S]` bool to `[B, N_blk]` bool."""
    num_keys = key_valid.shape[1]
    num_blocks = (num_keys + selection_block - 1) // selection_block
    padded = torch.nn.functional.pad(key_valid, (0, num_blocks * selection_block - num_keys), value=False)
    return padded.unflatten(1, (num_blocks, selection_block)).any(-1)


def valid_compressed_tokens(key_valid: Tensor, block_length: int, block_stride: int) -> Tensor:
    """Says which compressed tokens stand for valid keys only: `[B, S]` bool to `[B, N_cmp]` bool."""
    num_compressed = count_compressed(key_valid.shape[1], block_length, block_stride)
    before = torch.nn.functional.pad(key_valid.cumsum(1, dtype=torch.int32), (1, 0))  # valid keys before s
    start = torch.arange(num_compressed, device=key_valid.device) * block_stride
    return before.index_select(1, start + block_length) - before.index_select(1, start) == block_length
