"""Attention over lists of blocks, query-major: gathers each query's keys.

For few queries, as in decoding: a block is then listed by hardly more than one of them, and lists.py would take a
step per block.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.state import Gradients, RunningSoftmax, hidden_bias

# Elements of the keys and values gathered at once.
_GATHERED_ELEMENTS = 1 << 21


@dataclasses.dataclass(frozen=True)
class Gather:
    """A chunk of queries and the keys that their lists name.

    Attributes:
        queries: slice of T.
        positions: `[B, H_kv, c, L]` int64, key positions, L = n · l'; anything where hidden.
        bias: `[B, H_kv, c, 1, L]`, −inf for hidden keys.
    """

    queries: slice
    positions: Tensor
    bias: Tensor


def iterate_gathers(
    rows: Tensor,
    value_size: int,
    block_indices: Tensor,
    block: int,
    num_keys: int,
    lo: Tensor,
    hi: Tensor,
    valid: Tensor | None,
) -> Iterator[Gather]:
    """Yields chunks of queries of bounded size.

    Args:
        rows: query rows `[B, H_kv, T, G, D]`.
        value_size: D_v.
        block_indices: `[B, H_kv, T, n]` int32, −1 for none.
        block: l'.
        num_keys: S.
        lo: `[B | 1, T]` first visible key.
        hi: `[B | 1, T]` last visible key.
        valid: `[B, S]` bool or None.
    """
    batch, num_kv_heads, num_queries, num_selected = block_indices.shape
    per_query = batch * num_kv_heads * num_selected * block * (rows.shape[-1] + value_size)
    chunk = max(1, _GATHERED_ELEMENTS // max(1, per_query))
    inside = torch.arange(block, device=rows.device)
    for begin in range(0, num_queries, chunk):
        queries = slice(begin, begin + chunk)
        listed = block_indices[:, :, queries].long().unsqueeze(-1)
        positions = (listed * block + inside).flatten(3)
        low, high = (bound[:, None, queries, None] for bound in (lo, hi))
        hidden = (listed < 0).expand(*listed.shape[:4], block).flatten(3)
        hidden = hidden | (positions < low) | (positions > high) | (positions >= num_keys)
        positions = positions.clamp_(0, num_keys - 1)
        if valid is not None:
            hidden |= ~valid.unsqueeze(1).expand(-1, num_kv_heads, -1).gather(2, positions.flatten(2)).view_as(hidden)
        yield Gather(queries, positions, hidden_bias(hidden, rows.dtype).unsqueeze(3))


def _take(tensor: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Gathers `[B, H_kv, S, D]` at `[B, H_kv, c, L]` positions: `[B, H_kv, c, L, D]`."""
    batch, num_kv_heads = positions.shape[:2]
    index = torch.arange(max(batch, num_kv_heads), device=tensor.device)
    return tensor[index[:batch, None, None, None], index[:num_kv_heads, None, None], positions].to(dtype)


def accumulate_gathers(
    state: RunningSoftmax, rows: Tensor, key: Tensor, value: Tensor, gathers: Iterator[Gather]
) -> None:
    """Adds the gathered keys to `state`.

    Args:
        state: of all queries, updated in place.
        rows: query rows `[B, H_kv, T, G, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        gathers: which queries attend to which keys.
    """
    for gather in gathers:
        scores = rows[:, :, gather.queries] @ _take(key, gather.positions, rows.dtype).transpose(-1, -2)
        scores.add_(gather.bias)
        weights = state.absorb((slice(None), slice(None), gather.queries), scores)
        state.weighted[:, :, gather.queries] += weights @ _take(value, gather.positions, rows.dtype)


def accumulate_gathers_backward(
    gradients: Gradients, rows: Tensor, key: Tensor, value: Tensor, gathers: Iterator[Gather]
) -> None:
    """Adds the gradients that flow through the gathered keys.

    Args:
        gradients: updated in place.
        rows: query rows `[B, H_kv, T, G, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        gathers: which queries attend to which keys.
    """
    batch, num_kv_heads, num_keys, _ = key.shape
    head_start = torch.arange(batch * num_kv_heads, device=key.device).view(batch, num_kv_heads, 1, 1) * num_keys
    for gather in gathers:
        at = (slice(None), slice(None), gather.queries)
        part, grads = rows[at], gradients.output[at]
        keys, values = _take(key, gather.positions, rows.dtype), _take(value, gather.positions, rows.dtype)
        weights = (part @ keys.transpose(-1, -2)).add_(gather.bias).sub_(gradients.lse[at].unsqueeze(-1)).exp2_()
        grad_scores = (grads @ values.transpose(-1, -2)).sub_(gradients.delta[at].unsqueeze(-1)).mul_(weights)
        gradients.query[at] += grad_scores @ keys
        index = (gather.positions + head_start).flatten()
        for total, change in (
            (gradients.key, grad_scores.transpose(-1, -2) @ part),
            (gradients.value, weights.transpose(-1, -2) @ grads),
        ):
            total.view(-1, total.shape[-1]).index_add_(0, index, change.flatten(0, 3))
