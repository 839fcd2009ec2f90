"""Attention over lists of blocks, with a running softmax: the sparse half of the blockwise path.

Two loop orders.  Key-major walks the blocks and takes, for each, the queries that list it: every key is read once
per KV head, and gradients of keys need no scatter.  Query-major gathers the keys that a query lists: for few queries.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.tiles import Gradients, RunningSoftmax, accumulation_dtype, merge_scores

# Rows of one key-major step; 8,192 rows of 64 float32 logits are 2 MiB.
_STEP_ROWS = 8192
# Elements of the membership table of one query chunk.
_TABLE_ELEMENTS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Visit:
    """Queries of one KV head that attend to one block.

    Attributes:
        batch: index into B.
        head: index into H_kv.
        keys: slice of S.
        queries: `[m]` int64, ascending.
        hidden: `[m, l']` bool, keys of the block that a query does not see.
    """

    batch: int
    head: int
    keys: slice
    queries: Tensor
    hidden: Tensor


def iterate_visits(
    block_indices: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None, block: int, num_keys: int, group: int
) -> Iterator[Visit]:
    """Yields every pair of a block and the queries that list it and see part of it.

    Args:
        block_indices: `[B, H_kv, T, n]` int32, −1 for none.
        lo: `[B | 1, T]` first visible key.
        hi: `[B | 1, T]` last visible key.
        valid: `[B, S]` bool or None.
        block: l'.
        num_keys: S.
        group: G, to bound the rows of a visit.
    """
    batch, num_kv_heads, num_queries, _ = block_indices.shape
    num_blocks = (num_keys + block - 1) // block
    chunk = max(1, _TABLE_ELEMENTS // max(1, num_blocks))
    step = max(1, _STEP_ROWS // group)
    position = torch.arange(num_keys, device=block_indices.device)
    for b in range(batch):
        low, high = lo[b % lo.shape[0]], hi[b % hi.shape[0]]
        for head in range(num_kv_heads):
            for begin in range(0, num_queries, chunk):
                end = min(begin + chunk, num_queries)
                listed = block_indices[b, head, begin:end].long()
                start = listed * block
                useful = (listed >= 0) & (start <= high[begin:end, None]) & (start + block > low[begin:end, None])
                table = torch.zeros(num_blocks + 1, end - begin, dtype=torch.bool, device=listed.device)
                table.scatter_(0, torch.where(useful, listed, num_blocks).T, True)
                table = table[:num_blocks]
                queries = table.nonzero()[:, 1] + begin
                offset = 0
                for index, count in enumerate(table.sum(1).tolist()):
                    keys = slice(index * block, min((index + 1) * block, num_keys))
                    for first in range(offset, offset + count, step):
                        rows = queries[first : min(first + step, offset + count)]
                        hidden = (position[keys] < low[rows, None]) | (position[keys] > high[rows, None])
                        if valid is not None:
                            hidden |= ~valid[b, keys]
                        yield Visit(b, head, keys, rows, hidden)
                    offset += count


def visit_scores(query: Tensor, key: Tensor, visit: Visit, scale: float) -> tuple[Tensor, Tensor]:
    """Computes a visit's logits, invisible keys −inf.

    Args:
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        visit: which part.
        scale: factor of the logits.

    Returns:
        `(scores [G, m, l'], rows [G·m, D])`, the rows scaled.
    """
    chunk = query[visit.batch, visit.head].index_select(1, visit.queries)
    rows = (chunk.to(accumulation_dtype(query)) * scale).flatten(0, 1)
    keys = key[visit.batch, visit.head, visit.keys].to(rows.dtype)
    scores = (rows @ keys.T).unflatten(0, chunk.shape[:2])
    return scores.masked_fill_(visit.hidden, float("-inf")), rows


def accumulate_lists(
    state: RunningSoftmax,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    lo: Tensor,
    hi: Tensor,
    valid: Tensor | None,
    block: int,
    scale: float,
) -> None:
    """Adds to `state` the keys of the listed blocks that lie in `lo … hi`.

    Args:
        state: running softmax of all queries, updated in place.
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        block_indices: `[B, H_kv, T, n]` int32, −1 for none.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
        block: l'.
        scale: factor of the logits.
    """
    for visit in iterate_visits(block_indices, lo, hi, valid, block, key.shape[2], query.shape[2]):
        scores, _ = visit_scores(query, key, visit, scale)
        maximum, total, weighted = (part[visit.batch, visit.head] for part in (state.maximum, state.total, state.weighted))
        rows = visit.queries
        weights, rescale, new_maximum, new_total = merge_scores(
            scores, maximum.index_select(1, rows), total.index_select(1, rows)
        )
        values = value[visit.batch, visit.head, visit.keys].to(weights.dtype)
        product = (weights.flatten(0, 1) @ values).unflatten(0, weights.shape[:2])
        weighted.index_copy_(1, rows, product.addcmul_(weighted.index_select(1, rows), rescale.unsqueeze(-1)))
        maximum.index_copy_(1, rows, new_maximum)
        total.index_copy_(1, rows, new_total)


def accumulate_lists_backward(
    gradients: Gradients,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    lse: Tensor,
    delta: Tensor,
    lo: Tensor,
    hi: Tensor,
    valid: Tensor | None,
    block: int,
    scale: float,
) -> None:
    """Adds the gradients that flow through the listed blocks' keys in `lo … hi`.

    Args:
        gradients: updated in place.
        grad_output: `[B, H_kv, G, T, D_v]`.
        query: `[B, H_kv, G, T, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        block_indices: `[B, H_kv, T, n]` int32, −1 for none.
        lse: `[B, H_kv, G, T]` of the whole softmax; +inf for rows that see nothing.
        delta: `[B, H_kv, G, T]`.
        lo: `[B | 1, T]` first key.
        hi: `[B | 1, T]` last key.
        valid: `[B, S]` bool or None.
        block: l'.
        scale: factor of the logits.
    """
    for visit in iterate_visits(block_indices, lo, hi, valid, block, key.shape[2], query.shape[2]):
        scores, rows = visit_scores(query, key, visit, scale)
        at = (visit.batch, visit.head)
        weights = scores.sub_(lse[at].index_select(1, visit.queries).unsqueeze(-1)).exp_().flatten(0, 1)
        grads = grad_output[at].index_select(1, visit.queries).to(rows.dtype).flatten(0, 1)
        keys, values = (tensor[at][visit.keys].to(rows.dtype) for tensor in (key, value))
        row_deltas = delta[at].index_select(1, visit.queries).flatten(0, 1)
        grad_scores = (grads @ values.T).sub_(row_deltas.unsqueeze(-1)).mul_(weights)
        gradients.value[at][visit.keys] += weights.T @ grads
        gradients.key[at][visit.keys] += grad_scores.T @ rows
        grad_rows = (grad_scores @ keys).mul_(scale).unflatten(0, scores.shape[:2])
        gradients.query[at].index_add_(1, visit.queries, grad_rows)
