"""Attention over lists of blocks, key-major: the sparse half of the blockwise path.

The loop walks the blocks and takes, for each, the queries that list it.  A block's keys are read once per KV head,
its G · m logits are one matrix product, and the gradients of its keys need no scatter.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.state import Gradients, RunningSoftmax, hidden_bias, lift_reference

# Rows of one step; 4,096 rows of 64 float32 logits are 1 MiB, about what a core's cache holds.
_STEP_ROWS = 4096
# Pairs of a query and a listed block that are sorted at once.
_SORTED_PAIRS = 1 << 21


@dataclasses.dataclass(frozen=True)
class Visit:
    """Queries of one KV head that attend to one block.

    Attributes:
        head: index into `[B, H_kv]`.
        keys: slice of S.
        queries: `[m]` int64, without repetition.
        bias: `[m, 1, l']`, −inf for hidden keys, or None when every query sees the whole block.
    """

    head: tuple[int, int]
    keys: slice
    queries: Tensor
    bias: Tensor | None


def iterate_visits(
    rows: Tensor, block_indices: Tensor, block: int, num_keys: int, lo: Tensor, hi: Tensor, valid: Tensor | None
) -> Iterator[Visit]:
    """Yields every pair of a block and the queries that list it and may see some of it.

    Args:
        rows: query rows `[B, H_kv, T, G, D]`.
        block_indices: `[B, H_kv, T, n]` int32, −1 for none.
        block: l'.
        num_keys: S.
        lo: `[B | 1, T]` first visible key.
        hi: `[B | 1, T]` last visible key.
        valid: `[B, S]` bool or None.
    """
    batch, num_kv_heads, num_queries, num_selected = block_indices.shape
    chunk = max(1, _SORTED_PAIRS // max(1, num_selected))
    step = max(1, _STEP_ROWS // rows.shape[3])
    position = torch.arange(num_keys, device=rows.device)
    complete = None if valid is None else _complete_blocks(valid, block)
    for b in range(batch):
        low, high = lo[b % lo.shape[0]].long(), hi[b % hi.shape[0]].long()
        for head in range(num_kv_heads):
            for begin in range(0, num_queries, chunk):
                at = slice(begin, begin + chunk)
                pairs = _sort_pairs(
                    block_indices[b, head, at],
                    block,
                    num_keys,
                    low[at],
                    high[at],
                    None if complete is None else complete[b],
                )
                queries = pairs.queries + begin
                offset = 0
                for code, count in zip(pairs.codes, pairs.counts, strict=True):
                    index, partial = divmod(code, 2)
                    keys = slice(index * block, min((index + 1) * block, num_keys))
                    for first in range(offset, offset + count, step):
                        members = queries[first : min(first + step, offset + count)]
                        bias = None
                        if partial:
                            hidden = (position[keys] < low[members, None]) | (position[keys] > high[members, None])
                            if valid is not None:
                                hidden |= ~valid[b, keys]
                            bias = hidden_bias(hidden, rows.dtype).unsqueeze(1)
                        yield Visit((b, head), keys, members, bias)
                    offset += count


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Pairs of a query and a block, sorted by block, pairs with hidden keys apart.

    Attributes:
        queries: `[P]` int64.
        codes: 2 · block + (1 if keys are hidden), ascending.
        counts: pairs of each code.
    """

    queries: Tensor
    codes: list[int]
    counts: list[int]


def _sort_pairs(
    listed: Tensor, block: int, num_keys: int, low: Tensor, high: Tensor, complete: Tensor | None
) -> _Pairs:
    start = listed.long() * block
    end = (start + block).clamp_max(num_keys)
    low, high = low.unsqueeze(1), high.unsqueeze(1)
    useful = (start >= 0) & (start <= high) & (end > low)
    partial = (start < low) | (end - 1 > high)
    if complete is not None:
        partial = partial | ~complete[listed.clamp_min(0).long()]
    codes = (2 * listed + partial)[useful]
    codes, order = codes.sort(stable=True)
    queries = useful.nonzero()[:, 0].index_select(0, order)
    distinct, counts = codes.unique_consecutive(return_counts=True)
    return _Pairs(queries, distinct.tolist(), counts.tolist())


def _complete_blocks(valid: Tensor, block: int) -> Tensor:
    """Which blocks have valid keys only: `[B, S]` to `[B, N_blk]`."""
    padding = -valid.shape[1] % block
    return torch.nn.functional.pad(valid, (0, padding), value=True).unflatten(1, (-1, block)).all(-1)


def _visit_scores(rows: Tensor, key: Tensor, visit: Visit) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a visit's logits.

    Returns:
        `(scores [m, G, l'], part [m·G, D], keys [l', D])`: logits, and what they are the product of.
    """
    part = rows[visit.head].index_select(0, visit.queries).flatten(0, 1)
    keys = key[visit.head][visit.keys].to(rows.dtype)
    scores = (part @ keys.T).unflatten(0, (visit.queries.shape[0], rows.shape[3]))
    return (scores if visit.bias is None else scores.add_(visit.bias)), part, keys


def accumulate_lists(state: RunningSoftmax, rows: Tensor, key: Tensor, value: Tensor, visits: Iterator[Visit]) -> None:
    """Adds the keys of the visits to `state`.

    Args:
        state: of all queries, updated in place.
        rows: query rows `[B, H_kv, T, G, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        visits: which queries attend to which block.
    """
    for visit in visits:
        scores, _, _ = _visit_scores(rows, key, visit)
        reference, total, weighted = (part[visit.head] for part in (state.reference, state.total, state.weighted))
        current = reference.index_select(0, visit.queries)
        lifted = lift_reference(current, scores)
        if lifted is not None:
            factor = current.sub_(lifted).exp2_()
            for part in (total, weighted):
                scaled = part.index_select(0, visit.queries) * factor.reshape(factor.shape + (1,) * (part.dim() - 2))
                part.index_copy_(0, visit.queries, scaled)
            reference.index_copy_(0, visit.queries, lifted)
            current = lifted
        weights = scores.sub_(current.unsqueeze(-1)).exp2_()
        total.index_add_(0, visit.queries, weights.sum(-1))
        product = weights.flatten(0, 1) @ value[visit.head][visit.keys].to(weights.dtype)
        weighted.index_add_(0, visit.queries, product.unflatten(0, weights.shape[:2]))


def accumulate_lists_backward(
    gradients: Gradients, rows: Tensor, key: Tensor, value: Tensor, visits: Iterator[Visit]
) -> None:
    """Adds the gradients that flow through the visits.

    Args:
        gradients: updated in place.
        rows: query rows `[B, H_kv, T, G, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        visits: which queries attend to which block.
    """
    for visit in visits:
        scores, part, keys = _visit_scores(rows, key, visit)
        lse, delta, grads = (
            each[visit.head].index_select(0, visit.queries)
            for each in (gradients.lse, gradients.delta, gradients.output)
        )
        grads = grads.flatten(0, 1)
        values = value[visit.head][visit.keys].to(rows.dtype)
        weights = scores.sub_(lse.unsqueeze(-1)).exp2_()
        grad_scores = (grads @ values.T).unflatten(0, weights.shape[:2]).sub_(delta.unsqueeze(-1)).mul_(weights)
        grad_scores, flat = grad_scores.flatten(0, 1), weights.flatten(0, 1)
        gradients.value[visit.head][visit.keys].add_(flat.T @ grads)
        gradients.key[visit.head][visit.keys].add_(grad_scores.T @ part)
        grad_rows = (grad_scores @ keys).unflatten(0, weights.shape[:2])
        gradients.query[visit.head].index_add_(0, visit.queries, grad_rows)
