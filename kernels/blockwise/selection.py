"""Block selection without gradient: exact scores from compressed attention, then the n best blocks of each query."""

import dataclasses

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.bounds import compressed_bounds, visible_bounds
from nsa_compile.kernels.blockwise.state import hidden_bias, query_rows, to_log2_rows

# Elements of the largest chunk of logits, [B, H_kv, c, G, N_cmp].
_CHUNK_ELEMENTS = 1 << 19
_LEAST_QUERIES = 8


def select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    lse: Tensor | None,
    first_key: Tensor | None,
    last_key: Tensor | None,
    compressed_valid: Tensor | None,
    block_valid: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    block_length: int,
    block_stride: int,
    selection_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    num_keys: int,
) -> Tensor:
    """Chooses up to n blocks for each query and KV head.

    Args:
        query: `[B, H, T, D]`.
        compressed_key: `[B, H_kv, N_cmp, D]`.
        lse: `[B, H, T]` of the compressed branch, or None to compute it here.
        first_key: `[B, T]` int32 or None; a valid key where any is visible.
        last_key: `[B, T]` int32 or None; likewise.
        compressed_valid: `[B, N_cmp]` bool or None.
        block_valid: `[B, N_blk]` bool or None.
        is_causal: what missing bounds mean.
        scale: factor of the logits.
        block_length: l.
        block_stride: d.
        selection_block: l'.
        num_selected: n.
        num_initial: forced blocks at the start.
        num_local: forced blocks at the end.
        num_keys: S.

    Returns:
        `[B, H_kv, T, n]` int32, ascending, padded with −1.

    Reference: arXiv 2502.11089, eqs 8–12, in the overlap form.
    """
    batch, heads, num_queries, _ = query.shape
    num_kv_heads, num_compressed = compressed_key.shape[1:3]
    num_blocks = (num_keys + selection_block - 1) // selection_block
    lists = query.new_full((batch, num_kv_heads, num_queries, num_selected), -1, dtype=torch.int32)
    if lists.numel() == 0 or num_blocks == 0:
        return lists
    rows = query_rows(query, num_kv_heads, scale)
    row_lse = None if lse is None else to_log2_rows(lse, num_kv_heads)
    lo, hi = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=num_keys)
    size = batch * heads * max(num_compressed, num_blocks)
    chunk = max(_LEAST_QUERIES, _CHUNK_ELEMENTS // size)
    for begin in range(0, num_queries, chunk):
        at = slice(begin, min(begin + chunk, num_queries))
        found = _candidates(lo[:, at], hi[:, at].clamp_max(num_keys - 1), block_valid, selection_block)
        if found is None:
            continue
        scores = rows.new_zeros((batch, num_kv_heads, at.stop - begin, found.candidate.shape[-1]))
        if int(found.candidate.sum(-1).max()) > num_selected:  # else all candidates are listed, whatever their scores
            mass = _probability_mass(
                rows[:, :, at],
                compressed_key,
                None if row_lse is None else row_lse[:, :, at],
                *compressed_bounds(lo[:, at], hi[:, at], block_length, block_stride),
                compressed_valid,
                found.first_block * (selection_block // block_stride),
            )
            fold_to_blocks(mass, scores, block_length, block_stride, selection_block)
        forced = found.candidate & ((found.from_start < num_initial) | (found.from_end < num_local))
        scores.masked_fill_(forced.unsqueeze(1), float("inf")).masked_fill_(~found.candidate.unsqueeze(1), -1.0)
        lists[:, :, at] = best_blocks(scores, num_selected, found.first_block)
    return lists


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """Candidate blocks of a chunk of queries, in the range of blocks that holds them all.

    Attributes:
        first_block: where the range starts.
        candidate: `[B | 1, c, R]` bool, for the R blocks of the range.
        from_start: rank among the candidates, `[B | 1, c, R]`; meaningless for other blocks.
        from_end: rank from the last candidate.
    """

    first_block: int
    candidate: Tensor
    from_start: Tensor
    from_end: Tensor


def _candidates(lo: Tensor, hi: Tensor, block_valid: Tensor | None, selection_block: int) -> _Candidates | None:
    """Finds the blocks between the bounds `[B | 1, c]`, `hi` less than S; None when no query has any."""
    lo = lo.clamp_min(0)
    empty = lo > hi
    if bool(empty.all()):
        return None
    first = torch.div(lo, selection_block, rounding_mode="floor")
    last = torch.div(hi, selection_block, rounding_mode="floor").masked_fill(empty, -1)
    first_block = int(torch.where(empty, torch.iinfo(first.dtype).max, first).min())
    last_block = int(last.max())
    block = torch.arange(first_block, last_block + 1, device=lo.device)
    first, last = first.unsqueeze(-1), last.unsqueeze(-1)
    candidate = (block >= first) & (block <= last)
    if block_valid is None:
        return _Candidates(first_block, candidate, block - first, last - block)
    candidate = candidate & block_valid[:, None, first_block : last_block + 1]
    seen = candidate.cumsum(-1)
    return _Candidates(first_block, candidate, seen - 1, seen[..., -1:] - seen)


def _probability_mass(
    rows: Tensor, compressed_key: Tensor, lse: Tensor | None, lo: Tensor, hi: Tensor, valid: Tensor | None, start: int
) -> Tensor:
    """Sums the compressed branch's probabilities over each group.

    Args:
        rows: query rows `[B, H_kv, c, G, D]`.
        compressed_key: `[B, H_kv, N_cmp, D]`.
        lse: rows `[B, H_kv, c, G]` in units of log 2, or None.
        lo: `[B | 1, c]` first visible compressed token.
        hi: `[B | 1, c]` last one.
        valid: `[B, N_cmp]` bool or None.
        start: no token before this one is visible.

    Returns:
        `[B, H_kv, c, M]`, for the M tokens from `start` to the last visible one.
    """
    stop = max(start, min(compressed_key.shape[2], int(hi.max()) + 1))
    if stop == start:
        return rows.new_zeros((*rows.shape[:3], 0))
    keys = compressed_key[:, :, start:stop].to(rows.dtype)
    scores = (rows.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, rows.shape[2:4])
    position = torch.arange(start, stop, device=rows.device)
    hidden = (position < lo.unsqueeze(-1)) | (position > hi.unsqueeze(-1))
    if valid is not None:
        hidden = hidden | ~valid[:, None, start:stop]
    scores.add_(hidden_bias(hidden, rows.dtype)[:, None, :, None])
    if lse is not None:
        return scores.sub_(lse.unsqueeze(-1)).exp2_().sum(3)
    reference = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).min)
    weights = scores.sub_(reference).exp2_()
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total.masked_fill_(total == 0, 1.0)).sum(3)


def fold_to_blocks(mass: Tensor, scores: Tensor, block_length: int, block_stride: int, selection_block: int) -> None:
    """Adds Σ_i mass_i · |compressed token i ∩ block j| / d to `scores`, in place.

    Args:
        mass: `[B, H_kv, c, M]` probability of the first M compressed tokens, summed over the group.
        scores: `[B, H_kv, c, N_blk]`.
        block_length: l.
        block_stride: d.
        selection_block: l'.
    """
    overlap, per_block = block_length // block_stride, selection_block // block_stride
    num_blocks = scores.shape[-1]
    # Chunk k of d keys is covered by the compressed tokens k − l/d + 1 … k; a block is l'/d chunks.
    chunks = mass.new_zeros((*mass.shape[:-1], max(num_blocks * per_block, mass.shape[-1] + overlap - 1)))
    for shift in range(overlap):
        chunks[..., shift : shift + mass.shape[-1]] += mass
    scores += chunks[..., : num_blocks * per_block].unflatten(-1, (num_blocks, per_block)).sum(-1)


def best_blocks(scores: Tensor, num_selected: int, first_block: int) -> Tensor:
    """Returns the n highest-scoring blocks, ties to the later block, ascending, padded with −1.

    Args:
        scores: `[B, H_kv, c, R]`; negative for blocks that are no candidates.
        num_selected: n.
        first_block: number of the block that column 0 stands for.

    Returns:
        `[B, H_kv, c, n]` int32.
    """
    num_blocks = scores.shape[-1]
    count = min(num_selected, num_blocks)
    threshold = scores.topk(count, dim=-1).values[..., -1:]
    above = scores > threshold
    level = (scores == threshold) & (scores >= 0)
    wanted = count - above.sum(-1, keepdim=True)
    if bool((level.sum(-1, keepdim=True) > wanted).any()):  # a tie
        level &= level.flip(-1).cumsum(-1).flip(-1) <= wanted
    block = torch.arange(num_blocks, dtype=torch.int32, device=scores.device)
    listed = torch.where(above | level, block, num_blocks).topk(count, dim=-1, largest=False).values
    listed = torch.where(listed == num_blocks, -1, listed + first_block)
    return torch.nn.functional.pad(listed, (0, num_selected - count), value=-1).to(torch.int32)
