"""Block selection without gradient: exact scores from compressed attention, then the n best blocks of each query."""

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.bounds import compressed_bounds, visible_bounds
from nsa_compile.kernels.blockwise.tiles import accumulation_dtype, group_heads, hide_keys

# Elements of the largest score chunk [B, H, c, N_cmp].
_CHUNK_ELEMENTS = 1 << 21


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
    lo, hi = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=num_keys)
    token_lo, token_hi = compressed_bounds(lo, hi, block_length, block_stride)
    rows = group_heads(query, num_kv_heads)
    row_lse = None if lse is None else group_heads(lse, num_kv_heads)
    candidates = _Candidates(lo, hi, block_valid, selection_block, num_blocks)
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * max(num_compressed, num_blocks)))
    for begin in range(0, num_queries, chunk):
        at = slice(begin, min(begin + chunk, num_queries))
        candidate, from_start, from_end = candidates.ranks(at)
        scores = query.new_zeros((batch, num_kv_heads, at.stop - at.start, num_blocks), dtype=accumulation_dtype(query))
        visible = min(num_compressed, int(token_hi[:, at].max()) + 1)
        if visible > 0 and int(candidate.sum(-1).max()) > num_selected:
            logits = (rows[:, :, :, at].to(scores.dtype) * scale).flatten(2, 3) @ compressed_key[:, :, :visible].to(
                scores.dtype
            ).transpose(-1, -2)
            logits = logits.unflatten(2, (heads // num_kv_heads, at.stop - at.start))
            position = torch.arange(visible, device=query.device)
            valid = None if compressed_valid is None else compressed_valid[:, :visible]
            hide_keys(logits, position, token_lo[:, at], token_hi[:, at], valid)
            normaliser = logits.logsumexp(-1) if row_lse is None else row_lse[:, :, :, at]
            finite = torch.where(normaliser == float("-inf"), 0.0, normaliser)
            mass = logits.sub_(finite.unsqueeze(-1)).exp_().sum(2)
            fold_to_blocks(mass, scores, block_length, block_stride, selection_block)
        forced = candidate & ((from_start < num_initial) | (from_end < num_local))
        scores = torch.where(forced.unsqueeze(1), float("inf"), scores)
        scores = torch.where(candidate.unsqueeze(1), scores, -1.0)
        lists[:, :, at] = best_blocks(scores, num_selected)
    return lists


class _Candidates:
    """Candidate blocks of each query, and their ranks from both ends."""

    def __init__(self, lo: Tensor, hi: Tensor, block_valid: Tensor | None, selection_block: int, num_blocks: int) -> None:
        self._empty = lo > hi
        self._first = torch.div(lo, selection_block, rounding_mode="floor").clamp_min(0)
        self._last = torch.div(hi, selection_block, rounding_mode="floor").clamp_max(num_blocks - 1)
        self._block = torch.arange(num_blocks, device=lo.device)
        self._valid = block_valid

    def ranks(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(candidate, from_start, from_end)` for a slice of T, each `[B | 1, c, N_blk]`."""
        first, last = self._first[:, at, None], self._last[:, at, None]
        candidate = (self._block >= first) & (self._block <= last) & ~self._empty[:, at, None]
        if self._valid is None:
            return candidate, self._block - first, last - self._block
        candidate = candidate & self._valid[:, None]
        seen = candidate.cumsum(-1)
        return candidate, seen - 1, seen[..., -1:] - seen


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


def best_blocks(scores: Tensor, num_selected: int) -> Tensor:
    """Returns the n highest-scoring blocks, ties to the later block, ascending, padded with −1.

    Args:
        scores: `[B, H_kv, c, N_blk]`; negative for blocks that are no candidates.
        num_selected: n.

    Returns:
        `[B, H_kv, c, n]` int32.
    """
    num_blocks = scores.shape[-1]
    count = min(num_selected, num_blocks)
    threshold = scores.topk(count, dim=-1, sorted=True).values[..., -1:]
    above, level = scores > threshold, (scores == threshold)
    wanted = count - above.sum(-1, keepdim=True)
    from_end = level.flip(-1).cumsum(-1).flip(-1)
    chosen = (above | (level & (from_end <= wanted))) & (scores >= 0)
    block = torch.arange(num_blocks, dtype=torch.int32, device=scores.device)
    listed = torch.where(chosen, block, num_blocks).topk(count, dim=-1, largest=False, sorted=True).values
    listed = torch.where(listed == num_blocks, -1, listed)
    return torch.nn.functional.pad(listed, (0, num_selected - count), value=-1).to(torch.int32)
