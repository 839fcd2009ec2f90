"""The specification: Native Sparse Attention written down densely, in float64, differentiable by autograd.

It shares no code with the other implementations and is tested against plain loops.  Queries are handled in chunks,
so that a few thousand tokens fit in memory; any device.

Letters: B batch, H query heads, H_kv KV heads, G = H / H_kv, T queries, S keys, D and D_v head sizes, l
`block_length`, d `block_stride`, l' `selection_block`, n `num_selected`, w `window`, N_cmp compressed tokens, N_blk
selection blocks.

Arguments that all functions share:
    query `[B, H, T, D]`; key `[B, H_kv, S, D]`; value `[B, H_kv, S, D_v]`; any floating dtype, used as float64.
    first_key, last_key: `[B | 1, T]` integers or None; missing bounds mean 0, and t if `is_causal` else S − 1.
    key_valid: `[B | 1, S]` bool or None.
    scale: factor of the logits, None for 1/√D.

Reference: arXiv 2502.11089, section 3.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Elements of one chunk's [B, H, c, S] logits.
_CHUNK_ELEMENTS = 1 << 25


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gates: Tensor | None = None,
    compressed_key: Tensor | None = None,
    compressed_value: Tensor | None = None,
    window_key: Tensor | None = None,
    window_value: Tensor | None = None,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    block_length: int = 32,
    block_stride: int = 16,
    selection_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    combine: str = "joint",
) -> Tensor:
    """Native Sparse Attention as `nsa_attention` defines it, with the arguments of `torch.ops.nsa.attention`.

    Returns:
        `[B, H, T, D_v]` float64.

    Reference: arXiv 2502.11089, eq 5 for "gated"; "joint" is one softmax over selected and window tokens.
    """
    sight = {"first_key": first_key, "last_key": last_key, "key_valid": key_valid, "is_causal": is_causal}
    blocks = {"block_length": block_length, "block_stride": block_stride}
    if compressed_key is None:
        compressed_key = compress_mean(key, **blocks)
    block_indices = select_blocks(
        query,
        compressed_key,
        num_keys=key.shape[2],
        scale=scale,
        selection_block=selection_block,
        num_selected=num_selected,
        num_initial=num_initial,
        num_local=num_local,
        **blocks,
        **sight,
    )
    if combine == "joint":
        output, _ = joint_attention(
            query, key, value, block_indices, selection_block=selection_block, window=window, scale=scale, **sight
        )
        return output
    if compressed_value is None:
        compressed_value = compress_mean(value, **blocks)
    compressed, _ = compressed_attention(
        query, compressed_key, compressed_value, num_keys=key.shape[2], scale=scale, **blocks, **sight
    )
    window_key, window_value = (
        (key if window_key is None else window_key),
        (value if window_value is None else window_value),
    )
    if gates is None:
        raise ValueError("gated attention needs gates")
    tensors = (query, key, value, block_indices, window_key, window_value, compressed, gates)
    return gated_attention(*tensors, selection_block=selection_block, window=window, scale=scale, **sight)


def compress_mean(tokens: Tensor, *, block_length: int, block_stride: int) -> Tensor:
    """Means of l tokens, d apart: `[B, H_kv, S, D]` to `[B, H_kv, N_cmp, D]` float64.

    Reference: arXiv 2502.11089, eq 7, with φ the mean.
    """
    if tokens.shape[2] < block_length:
        return tokens[:, :, :0].double()
    return tokens.double().unfold(2, block_length, block_stride).mean(-1)


def visible_keys(
    query: Tensor,
    num_keys: int,
    *,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Which keys each query sees: `[B, T, S]` bool."""
    first, last = _interval(query, num_keys, first_key, last_key, is_causal)
    position = torch.arange(num_keys, device=query.device)
    visible = (position >= first.unsqueeze(-1)) & (position <= last.unsqueeze(-1))
    return visible if key_valid is None else visible & key_valid.unsqueeze(1)


def compressed_attention(
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    *,
    num_keys: int,
    block_length: int,
    block_stride: int,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed tokens whose l keys are all visible.

    `compressed_key` is `[B, H_kv, N_cmp, D]`, `compressed_value` `[B, H_kv, N_cmp, D_v]`, `num_keys` S.

    Returns:
        `(output [B, H, T, D_v], lse [B, H, T])`, float64; 0 and −inf where nothing is visible.
    """
    sight = {"first_key": first_key, "last_key": last_key, "key_valid": key_valid, "is_causal": is_causal}

    def mask(queries: slice) -> Tensor:
        keys = visible_keys(query[:, :, queries], num_keys, **_cut(sight, query, num_keys, queries))
        return _all_visible(keys, block_length, block_stride).unsqueeze(1)

    return _masked_attention(query, compressed_key, compressed_value, mask, scale)


def block_scores(
    query: Tensor,
    compressed_key: Tensor,
    visible: Tensor,
    *,
    num_blocks: int,
    block_length: int,
    block_stride: int,
    selection_block: int,
    scale: float | None = None,
) -> Tensor:
    """Scores of the blocks: the compressed branch's probability mass on each, summed over the group.

    `compressed_key` is `[B, H_kv, N_cmp, D]`, `visible` `[B, T, S]` bool, `num_blocks` N_blk.

    Returns:
        `[B, H_kv, T, N_blk]` float64.

    Reference: arXiv 2502.11089, eqs 8–10, in the overlap form.
    """
    tokens = _all_visible(visible, block_length, block_stride).unsqueeze(1)
    probability = torch.exp(_log_probability(_logits(query, compressed_key, tokens, scale)))
    grouped = probability.unflatten(1, (compressed_key.shape[1], -1)).sum(2)
    start = torch.arange(compressed_key.shape[2], device=query.device).unsqueeze(1) * block_stride
    block = torch.arange(num_blocks, device=query.device) * selection_block
    end = torch.minimum(start + block_length, block + selection_block)
    overlap = (end - torch.maximum(start, block)).clamp_min(0)  # [N_cmp, N_blk] tokens in common
    return grouped @ (overlap.double() / block_stride)


@torch.no_grad()
def select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    *,
    num_keys: int,
    block_length: int,
    block_stride: int,
    selection_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Lists the blocks of each query and KV head.

    `compressed_key` is `[B, H_kv, N_cmp, D]`, `num_keys` S.  The first `num_initial` and the last `num_local`
    candidates are always listed.

    Returns:
        `[B, H_kv, T, n]` int32, ascending, padded with −1.

    Reference: arXiv 2502.11089, eqs 11 and 12; ties go to the later block.
    """
    num_blocks = math.ceil(num_keys / selection_block)
    sight = {"first_key": first_key, "last_key": last_key, "key_valid": key_valid, "is_causal": is_causal}
    lists = []
    for queries in _chunks(query, num_keys):
        part = query[:, :, queries]
        visible = visible_keys(part, num_keys, **_cut(sight, query, num_keys, queries))
        scores = block_scores(
            part,
            compressed_key,
            visible,
            num_blocks=num_blocks,
            block_length=block_length,
            block_stride=block_stride,
            selection_block=selection_block,
            scale=scale,
        )
        padded = torch.nn.functional.pad(visible, (0, num_blocks * selection_block - num_keys))
        candidate = padded.unflatten(-1, (num_blocks, selection_block)).any(-1).unsqueeze(1)  # [B, 1, c, N_blk]
        rank = candidate.cumsum(-1)  # 1 for the first candidate
        forced = candidate & ((rank <= num_initial) | (rank > rank[..., -1:] - num_local))
        scores = scores.masked_fill(forced, math.inf).masked_fill(~candidate, -math.inf)
        # A stable sort of the reversed row puts the later of two equal blocks first.
        order = num_blocks - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        best = order[..., :num_selected]
        listed = candidate.expand_as(scores).gather(-1, best)
        best = best.masked_fill(~listed, num_blocks).sort(-1).values
        best = torch.nn.functional.pad(best, (0, num_selected - best.shape[-1]), value=num_blocks)
        lists.append(best.masked_fill(best == num_blocks, -1))
    return torch.cat(lists, 2).to(torch.int32)


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    selection_block: int,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the visible tokens of the listed blocks.

    `block_indices` is `[B, H_kv, T, n]` integers, −1 for none.

    Returns:
        `(output [B, H, T, D_v], lse [B, H, T])`, float64.
    """
    sight = {"first_key": first_key, "last_key": last_key, "key_valid": key_valid, "is_causal": is_causal}

    def mask(queries: slice) -> Tensor:
        visible = visible_keys(query[:, :, queries], key.shape[2], **_cut(sight, query, key.shape[2], queries))
        return visible.unsqueeze(1) & _listed_keys(block_indices[:, :, queries], key.shape[2], selection_block)

    return _masked_attention(query, key, value, mask, scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the visible keys among positions max(first, last − w + 1) … last.

    Returns:
        `(output [B, H, T, D_v], lse [B, H, T])`, float64.
    """
    sight = {"first_key": first_key, "last_key": last_key, "key_valid": key_valid, "is_causal": is_causal}

    def mask(queries: slice) -> Tensor:
        return _window_keys(
            query[:, :, queries], key.shape[2], window, **_cut(sight, query, key.shape[2], queries)
        ).unsqueeze(1)

    return _masked_attention(query, key, value, mask, scale)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    compressed_output: Tensor,
    gates: Tensor,
    *,
    selection_block: int,
    window: int,
    scale: float | None = None,
    **sight: Any,
) -> Tensor:
    """The three branches, the compressed one's output given, summed by gates `[B, H, T, 3]`.

    Returns:
        `[B, H, T, D_v]` float64.
    """
    selected, _ = selected_attention(
        query, key, value, block_indices, selection_block=selection_block, scale=scale, **sight
    )
    windowed, _ = window_attention(query, window_key, window_value, window=window, scale=scale, **sight)
    branches = torch.stack([compressed_output.double(), selected, windowed], -2)  # [B, H, T, 3, D_v]
    return (gates.double().unsqueeze(-1) * branches).sum(-2)


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    selection_block: int,
    window: int,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, in one softmax, to the visible tokens that are in a listed block or in the window.

    `block_indices` is `[B, H_kv, T, n]` integers, −1 for none.

    Returns:
        `(output [B, H, T, D_v], lse [B, H, T])`, float64.
    """
    sight = {"first_key": first_key, "last_key": last_key, "key_valid": key_valid, "is_causal": is_causal}

    def mask(queries: slice) -> Tensor:
        part, cut = query[:, :, queries], _cut(sight, query, key.shape[2], queries)
        listed = _listed_keys(block_indices[:, :, queries], key.shape[2], selection_block)
        visible = visible_keys(part, key.shape[2], **cut).unsqueeze(1)
        return (visible & listed) | _window_keys(part, key.shape[2], window, **cut).unsqueeze(1)

    return _masked_attention(query, key, value, mask, scale)


def _interval(
    query: Tensor, num_keys: int, first_key: Tensor | None, last_key: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[2])
    time = torch.arange(shape[1], device=query.device)
    if first_key is None:
        first_key = torch.zeros_like(time)
    if last_key is None:
        last_key = time if is_causal else torch.full_like(time, num_keys - 1)
    return first_key.long().expand(shape), last_key.long().expand(shape)


def _cut(sight: dict, query: Tensor, num_keys: int, queries: slice) -> dict:
    """Restricts what the queries see to a slice of them; bounds become explicit."""
    first, last = _interval(query, num_keys, sight["first_key"], sight["last_key"], sight["is_causal"])
    return sight | {"first_key": first[:, queries], "last_key": last[:, queries]}


def _all_visible(visible: Tensor, block_length: int, block_stride: int) -> Tensor:
    """Which compressed tokens are visible: `[B, T, S]` to `[B, T, N_cmp]`, all l keys of each."""
    if visible.shape[-1] < block_length:
        return visible[..., :0]
    return visible.unfold(-1, block_length, block_stride).all(-1)


def _listed_keys(block_indices: Tensor, num_keys: int, selection_block: int) -> Tensor:
    """Which keys lie in listed blocks: `[B, H_kv, T, n]` to `[B, H_kv, T, S]`."""
    block = torch.arange(num_keys, device=block_indices.device) // selection_block
    listed = torch.zeros((*block_indices.shape[:-1], num_keys), dtype=torch.bool, device=block_indices.device)
    for slot in range(block_indices.shape[-1]):
        listed |= block_indices[..., slot : slot + 1] == block
    return listed


def _window_keys(
    query: Tensor,
    num_keys: int,
    window: int,
    *,
    first_key: Tensor,
    last_key: Tensor,
    key_valid: Tensor | None,
    is_causal: bool,
) -> Tensor:
    position = torch.arange(num_keys, device=query.device)
    visible = visible_keys(
        query, num_keys, first_key=first_key, last_key=last_key, key_valid=key_valid, is_causal=is_causal
    )
    return visible & (position > last_key.unsqueeze(-1) - window)


def _chunks(query: Tensor, num_keys: int) -> list[slice]:
    batch, heads, num_queries, _ = query.shape
    size = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * num_keys))
    return [slice(begin, begin + size) for begin in range(0, max(num_queries, 1), size)]


def _logits(query: Tensor, key: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Masked logits `[B, H, T, S]`, −inf where `mask` `[B, 1 | H_kv, T, S]` is False."""
    group = query.shape[1] // key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query.double() @ key.double().repeat_interleave(group, 1).transpose(-1, -2) * factor
    mask = mask.expand(-1, key.shape[1], -1, -1).repeat_interleave(group, 1)
    return logits.masked_fill(~mask, -math.inf)


def _log_probability(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension; −inf throughout where all logits are −inf."""
    return logits - _log_sum_exp(logits).nan_to_num(neginf=0.0).unsqueeze(-1)


def _log_sum_exp(logits: Tensor) -> Tensor:
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -math.inf)
    # Rows without a visible key get a stand-in, so that their gradient is 0 and not NaN.
    nothing = (logits == -math.inf).all(-1)
    return logits.masked_fill(nothing.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(nothing, -math.inf)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Callable[[slice], Tensor], scale: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention under a mask that is made for one slice of queries at a time."""
    outputs, sums = [], []
    values = value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    for queries in _chunks(query, key.shape[2]):
        logits = _logits(query[:, :, queries], key, mask(queries), scale)
        outputs.append(torch.exp(_log_probability(logits)) @ values)
        sums.append(_log_sum_exp(logits).detach())
    return torch.cat(outputs, 2), torch.cat(sums, 2)
