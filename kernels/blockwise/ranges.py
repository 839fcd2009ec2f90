"""Attention of query chunks over contiguous key ranges: the dense half of the blockwise path."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.state import Gradients, RunningSoftmax, hidden_bias

# Queries of a tile, and the elements of its logits: 2^19 float32 are 2 MiB, near to what caches hold.
_CHUNK_QUERIES = 64
_TILE_ELEMENTS = 1 << 19


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some heads' chunk of queries, and a range of keys that some of the queries see.

    Attributes:
        rows: index into `[B, H_kv, T]`.
        keys: index into `[B, H_kv, S]`.
        bias: `[B | 1, 1, c, 1, L]`, −inf for hidden keys, or None when every query sees every key.
    """

    rows: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]
    bias: Tensor | None


def iterate_tiles(rows: Tensor, num_keys: int, lo: Tensor, hi: Tensor, valid: Tensor | None) -> Iterator[Tile]:
    """Yields tiles of bounded size that cover the intervals.

    Args:
        rows: query rows `[B, H_kv, T, G, D]`.
        num_keys: S.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
    """
    batch, num_kv_heads, num_queries, group, _ = rows.shape
    for begin in range(0, num_queries, _CHUNK_QUERIES):
        queries = slice(begin, min(begin + _CHUNK_QUERIES, num_queries))
        low, high = lo[:, queries], hi[:, queries]
        empty = low > high
        start = max(0, int(low.masked_fill(empty, num_keys).min()))
        stop = min(num_keys, int(high.masked_fill(empty, -1).max()) + 1)
        if start >= stop:
            continue
        shared_start, shared_stop = int(low.max()), int(high.min()) + 1
        per_key = group * (queries.stop - begin)
        width = min(stop - start, max(64, _TILE_ELEMENTS // per_key))
        heads = max(1, _TILE_ELEMENTS // (per_key * width))  # of all batches together
        for key_begin in range(start, stop, width):
            keys = slice(key_begin, min(key_begin + width, stop))
            bias = None
            if valid is not None or shared_start > keys.start or shared_stop < keys.stop:
                bias = _range_bias(low, high, keys, None if valid is None else valid[:, keys], rows.dtype)
            for batches, kv_heads in _head_groups(batch, num_kv_heads, heads):
                cut = bias if bias is None or bias.shape[0] == 1 else bias[batches]
                yield Tile((batches, kv_heads, queries), (batches, kv_heads, keys), cut)


def _range_bias(low: Tensor, high: Tensor, keys: slice, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    position = torch.arange(keys.start, keys.stop, device=low.device)
    hidden = (position < low.unsqueeze(-1)) | (position > high.unsqueeze(-1))
    if valid is not None:
        hidden = hidden | ~valid.unsqueeze(1)
    return hidden_bias(hidden, dtype)[:, None, :, None]


def _head_groups(batch: int, num_kv_heads: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """Yields slices of B and H_kv that hold at most `heads` KV heads, whole batches where possible."""
    if heads >= num_kv_heads:
        step = heads // num_kv_heads
        for begin in range(0, batch, step):
            yield slice(begin, min(begin + step, batch)), slice(0, num_kv_heads)
        return
    for index in range(batch):
        for begin in range(0, num_kv_heads, heads):
            yield slice(index, index + 1), slice(begin, min(begin + heads, num_kv_heads))


def _tile_scores(rows: Tensor, key: Tensor, tile: Tile) -> Tensor:
    """Computes a tile's logits, `[B', H_kv', c, G, L]`."""
    part = rows[tile.rows]
    scores = part.flatten(2, 3) @ key[tile.keys].to(rows.dtype).transpose(-1, -2)
    scores = scores.unflatten(2, part.shape[2:4])
    return scores if tile.bias is None else scores.add_(tile.bias)


def accumulate_ranges(
    state: RunningSoftmax, rows: Tensor, key: Tensor, value: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None
) -> None:
    """Adds the keys `lo … hi` of each query to `state`.

    Args:
        state: of all queries, updated in place.
        rows: query rows `[B, H_kv, T, G, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
    """
    for tile in iterate_tiles(rows, key.shape[2], lo, hi, valid):
        weights = state.absorb(tile.rows, _tile_scores(rows, key, tile))
        product = weights.flatten(2, 3) @ value[tile.keys].to(weights.dtype)
        state.weighted[tile.rows].add_(product.unflatten(2, weights.shape[2:4]))


def accumulate_ranges_backward(
    gradients: Gradients, rows: Tensor, key: Tensor, value: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None
) -> None:
    """Adds the gradients that flow through the keys `lo … hi` of each query.

    Args:
        gradients: updated in place.
        rows: query rows `[B, H_kv, T, G, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
    """
    for tile in iterate_tiles(rows, key.shape[2], lo, hi, valid):
        weights = _tile_scores(rows, key, tile).sub_(gradients.lse[tile.rows].unsqueeze(-1)).exp2_()
        part, grads = rows[tile.rows].flatten(2, 3), gradients.output[tile.rows].flatten(2, 3)
        keys, values = key[tile.keys].to(rows.dtype), value[tile.keys].to(rows.dtype)
        grad_scores = (grads @ values.transpose(-1, -2)).unflatten(2, weights.shape[2:4])
        grad_scores = grad_scores.sub_(gradients.delta[tile.rows].unsqueeze(-1)).mul_(weights).flatten(2, 3)
        gradients.value[tile.keys].add_(weights.flatten(2, 3).transpose(-1, -2) @ grads)
        gradients.key[tile.keys].add_(grad_scores.transpose(-1, -2) @ part)
        gradients.query[tile.rows].add_((grad_scores @ keys).unflatten(2, weights.shape[2:4]))
