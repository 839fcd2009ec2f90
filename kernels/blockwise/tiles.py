"""Attention of query chunks over contiguous key ranges, with a running softmax: the dense half of the blockwise path."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the largest score tile, all heads together; 2^20 float32 are 4 MiB, about what caches hold.
_TILE_ELEMENTS = 1 << 20
_CHUNK_QUERIES = 128


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of sums over `tensor`: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def group_heads(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """Views `[B, H, T, ...]` as `[B, H_kv, G, T, ...]`."""
    return tensor.unflatten(1, (num_kv_heads, tensor.shape[1] // num_kv_heads))


@dataclasses.dataclass
class RunningSoftmax:
    """Softmax attention in progress; contributions of further keys rescale what is there.

    Attributes:
        maximum: `[B, H_kv, G, T]`, largest logit so far; −inf before the first.
        total: `[B, H_kv, G, T]`, Σ exp(logit − maximum).
        weighted: `[B, H_kv, G, T, D_v]`, Σ exp(logit − maximum) · value.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, query: Tensor, value: Tensor) -> "RunningSoftmax":
        """Starts with no keys, for `query` `[B, H, T, D]` and `value` `[B, H_kv, S, D_v]`."""
        batch, heads, num_queries, _ = query.shape
        num_kv_heads = value.shape[1]
        rows = (batch, num_kv_heads, heads // num_kv_heads, num_queries)
        dtype = accumulation_dtype(query)
        return cls(
            query.new_full(rows, float("-inf"), dtype=dtype),
            query.new_zeros(rows, dtype=dtype),
            query.new_zeros((*rows, value.shape[-1]), dtype=dtype),
        )

    def finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns `output` `[B, H, T, D_v]` in `dtype` and natural-log `lse` `[B, H, T]`."""
        seen = self.total > 0
        output = self.weighted / torch.where(seen, self.total, 1).unsqueeze(-1)
        lse = torch.where(seen, self.maximum + self.total.log(), float("-inf"))
        return output.flatten(1, 2).to(dtype).contiguous(), lse.flatten(1, 2).contiguous()


def merge_scores(
    scores: Tensor, maximum: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes logits of further keys into a running softmax; overwrites `scores`.

    Args:
        scores: `[..., L]` logits, −inf for invisible keys.
        maximum: `[...]` running maximum.
        total: `[...]` running sum.

    Returns:
        `(weights [..., L], rescale [...], maximum, total)`: the new keys' weights and the factor of what was there.
    """
    new_maximum = torch.maximum(maximum, scores.amax(-1))
    reference = new_maximum.clamp_min(torch.finfo(scores.dtype).min)  # finite, so that −inf − reference is −inf
    rescale = torch.exp(maximum - reference)
    weights = scores.sub_(reference.unsqueeze(-1)).exp_()
    return weights, rescale, new_maximum, total * rescale + weights.sum(-1)


def hide_keys(scores: Tensor, position: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None) -> Tensor:
    """Sets logits of invisible keys to −inf, in place.

    Args:
        scores: `[B, H_kv, G, c, L]`.
        position: `[L]` key positions.
        lo: `[B | 1, c]` first visible position.
        hi: `[B | 1, c]` last visible position.
        valid: `[B, L]` bool or None.
    """
    hidden = (position < lo.unsqueeze(-1)) | (position > hi.unsqueeze(-1))
    if valid is not None:
        hidden = hidden | ~valid.unsqueeze(1)
    return scores.masked_fill_(hidden[:, None, None], float("-inf"))


@dataclasses.dataclass(frozen=True)
class Tile:
    """A chunk of queries and a range of keys that some of them see.

    Attributes:
        queries: slice of T.
        keys: slice of S.
        lo: `[B | 1, c]`.
        hi: `[B | 1, c]`.
        partial: False when every query of the chunk sees every key of the range, validity apart.
    """

    queries: slice
    keys: slice
    lo: Tensor
    hi: Tensor
    partial: bool


def iterate_tiles(lo: Tensor, hi: Tensor, num_keys: int, num_heads: int, chunk: int = _CHUNK_QUERIES) -> Iterator[Tile]:
    """Yields the tiles that cover the intervals `[lo, hi]` (each `[B | 1, T]`), bounded in size."""
    num_queries = lo.shape[1]
    for begin in range(0, num_queries, chunk):
        queries = slice(begin, min(begin + chunk, num_queries))
        low, high = lo[:, queries], hi[:, queries]
        empty = low > high
        start = max(0, int(low.masked_fill(empty, num_keys).min()))
        stop = min(num_keys, int(high.masked_fill(empty, -1).max()) + 1)
        all_low, all_high = int(low.max()), int(high.min())
        width = max(64, _TILE_ELEMENTS // (num_heads * low.shape[1] * lo.shape[0]))
        for key_begin in range(start, stop, width):
            key_end = min(key_begin + width, stop)
            partial = all_low > key_begin or all_high < key_end - 1
            yield Tile(queries, slice(key_begin, key_end), low, high, partial)


def tile_scores(query: Tensor, key: Tensor, tile: Tile, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Computes a tile's logits, invisible keys −inf.

    Args:
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        tile: which part.
        valid: `[B, S]` bool or None.
        scale: factor of the logits.

    Returns:
        `(scores [B, H_kv, G, c, L], rows [B, H_kv, G·c, D])`, the rows scaled.
    """
    chunk = query[:, :, :, tile.queries]
    rows = (chunk.to(accumulation_dtype(query)) * scale).flatten(2, 3)
    keys = key[:, :, tile.keys].to(rows.dtype)
    scores = (rows @ keys.transpose(-1, -2)).unflatten(2, chunk.shape[2:4])
    if tile.partial or valid is not None:
        position = torch.arange(tile.keys.start, tile.keys.stop, device=query.device)
        hide_keys(scores, position, tile.lo, tile.hi, None if valid is None else valid[:, tile.keys])
    return scores, rows


def accumulate_interval(
    state: RunningSoftmax, query: Tensor, key: Tensor, value: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None, scale: float
) -> None:
    """Adds the keys `lo … hi` of each query to `state`.

    Args:
        state: running softmax of all queries, updated in place.
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
        scale: factor of the logits.
    """
    heads = query.shape[1] * query.shape[2] * query.shape[0] // lo.shape[0]
    for tile in iterate_tiles(lo, hi, key.shape[2], heads):
        scores, _ = tile_scores(query, key, tile, valid, scale)
        region = (slice(None), slice(None), slice(None), tile.queries)
        weights, rescale, maximum, total = merge_scores(scores, state.maximum[region], state.total[region])
        product = weights.flatten(2, 3) @ value[:, :, tile.keys].to(weights.dtype)
        state.weighted[region].mul_(rescale.unsqueeze(-1)).add_(product.unflatten(2, weights.shape[2:4]))
        state.maximum[region] = maximum
        state.total[region] = total


@dataclasses.dataclass
class Gradients:
    """Gradients in progress, in the accumulation dtype.

    Attributes:
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def zeros(cls, query: Tensor, key: Tensor, value: Tensor) -> "Gradients":
        """Starts at zero, for `query` `[B, H_kv, G, T, D]`."""
        dtype = accumulation_dtype(query)
        return cls(*(tensor.new_zeros(tensor.shape, dtype=dtype) for tensor in (query, key, value)))

    def finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of query `[B, H, T, D]`, key and value in `dtype`."""
        return self.query.flatten(1, 2).to(dtype), self.key.to(dtype), self.value.to(dtype)


def row_delta(grad_output: Tensor, output: Tensor) -> Tensor:
    """Returns Σ_dv grad · output of each row, `[B, H, T]`, in the accumulation dtype."""
    dtype = accumulation_dtype(output)
    return (grad_output.to(dtype) * output.to(dtype)).sum(-1)


def accumulate_interval_backward(
    gradients: Gradients,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    lo: Tensor,
    hi: Tensor,
    valid: Tensor | None,
    scale: float,
) -> None:
    """Adds the gradients that flow through the keys `lo … hi` of each query.

    Args:
        gradients: updated in place.
        grad_output: `[B, H_kv, G, T, D_v]`.
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        lse: `[B, H_kv, G, T]` of the whole softmax; +inf for rows that see nothing.
        delta: `[B, H_kv, G, T]`.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
        scale: factor of the logits.
    """
    heads = query.shape[1] * query.shape[2] * query.shape[0] // lo.shape[0]
    for tile in iterate_tiles(lo, hi, key.shape[2], heads):
        scores, rows = tile_scores(query, key, tile, valid, scale)
        region = (slice(None), slice(None), slice(None), tile.queries)
        grads = grad_output[region].to(rows.dtype).flatten(2, 3)
        weights = scores.sub_(lse[region].unsqueeze(-1)).exp_().flatten(2, 3)
        values = value[:, :, tile.keys].to(rows.dtype)
        grad_scores = (grads @ values.transpose(-1, -2)).sub_(delta[region].flatten(2, 3).unsqueeze(-1)).mul_(weights)
        gradients.value[:, :, tile.keys] += weights.transpose(-1, -2) @ grads
        gradients.key[:, :, tile.keys] += grad_scores.transpose(-1, -2) @ rows
        keys = key[:, :, tile.keys].to(rows.dtype)
        gradients.query[region] += (grad_scores @ keys).mul_(scale).unflatten(2, scores.shape[2:4])
