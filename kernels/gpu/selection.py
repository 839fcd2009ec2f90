"""Choosing blocks on CUDA: exact float32 block scores, then the top n (arXiv 2502.11089, equations 8-12).

Two kernels per chunk of queries.  `block_scores` holds a tile of compressed keys and lets the heads of the group pass
by, so that the sum over heads happens in registers and no group is padded; probabilities never reach memory, only
their sums per block do, twice: what a block's compressed tokens give to the block itself, and what the last
of them, which reach over its end, give to the next.  `top_blocks` adds the two and takes the best.  Where compressed
tokens do not overlap (LENGTH = STRIDE), none reaches over an end, and there are no second sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.kernels.gpu import launch, ranges, tiles
from nsa_compile.kernels.gpu.flash import key_range, load_tile, token_interval
from nsa_compile.kernels.gpu.sizes import cdiv, next_power_of_2

SCORE_BYTES = 1 << 28  # a chunk's scores: bounds extra memory


@triton.jit
def block_scores(
    query_ptr, key_ptr, lse_ptr, first_ptr, last_ptr, valid_ptr, own_ptr, next_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn,
    H_kv, T, S, N, num_blocks, token_start, token_end, scale_log2,
    GROUP: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes own and next [B, H_kv, token, N_blk]: sums over the group's heads of probability x overlap / STRIDE.

    next is 0, and not written, where compressed tokens do not overlap.

    A column is one compressed token; BLOCK_R columns, the first PER_BLOCK of them in use, make one selection block.
    Tiles that no token of the program sees are left unwritten; `top_blocks` does not read them.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(2)
    batch = pair // H_kv
    kv_head = pair % H_kv
    rows = tl.arange(0, BLOCK_M)
    tile_start = token_start + tile * BLOCK_M
    tokens = tile_start + rows
    stored = tokens < token_end
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
    low, high = key_range(first, last, S, N, 0, 0, LENGTH, STRIDE, 1)
    blocks_per_tile: tl.constexpr = BLOCK_N // BLOCK_R
    block_start = tl.program_id(1) * blocks_per_tile
    columns = tl.arange(0, BLOCK_N)
    keys = (block_start + columns // BLOCK_R) * PER_BLOCK + columns % BLOCK_R
    in_block = columns % BLOCK_R < PER_BLOCK
    tile_low = block_start * PER_BLOCK
    if (tl.max(high) < tile_low) | (tl.min(low) >= tile_low + blocks_per_tile * PER_BLOCK):
        return
    d = tl.arange(0, BLOCK_D)
    inside = in_block & (keys < N)
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    key = load_tile(
        key_base + tl.cast(tile_low, tl.int64) * stride_kn, keys - tile_low, d, stride_kn, inside, D, BLOCK_D
    )
    if HAS_VALID:
        inside = inside & (tl.load(valid_ptr + batch.to(tl.int64) * N + keys, mask=inside, other=0) != 0)
    seen = (keys[None, :] >= low[:, None]) & (keys[None, :] <= high[:, None]) & inside[None, :]
    query_base = query_ptr + batch.to(tl.int64) * stride_qb + tile_start.to(tl.int64) * stride_qt
    probability = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(GROUP):
        head = (kv_head * GROUP + member).to(tl.int64)
        query = load_tile(query_base + head * stride_qh, rows, d, stride_qt, stored, D, BLOCK_D)
        lse = tl.load(lse_ptr + (batch.to(tl.int64) * (H_kv * GROUP) + head) * T + tokens, mask=stored, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        probability += tl.exp2(logits - (lse * 1.4426950408889634)[:, None])
    probability = tl.where(seen, probability, 0.0)

    reach: tl.constexpr = LENGTH // STRIDE
    place = tl.arange(0, BLOCK_R)
    own_weight = tl.minimum(PER_BLOCK - place, reach).to(tl.float32)
    by_block = tl.reshape(probability, [BLOCK_M, blocks_per_tile, BLOCK_R])
    own = tl.sum(by_block * own_weight[None, None, :], 2)
    blocks = block_start + tl.arange(0, blocks_per_tile)
    row = pair.to(tl.int64) * (token_end - token_start) + (tokens - token_start)
    offset = row[:, None] * num_blocks + blocks[None, :]
    mask = stored[:, None] & (blocks < num_blocks)[None, :]
    tl.store(own_ptr + offset, own, mask=mask)
    if LENGTH > STRIDE:
        next_weight = tl.maximum(place + reach - PER_BLOCK, 0).to(tl.float32)
        tl.store(next_ptr + offset, tl.sum(by_block * next_weight[None, None, :], 2), mask=mask)


@triton.jit
def ranked_scores(
    blocks, own_ptr, next_ptr, valid_ptr, count_ptr, row, batch, num_blocks, lowest, highest, own_low, own_high,
    low_count, high_count, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, OVERLAPS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Scores by which `blocks` from `lowest` to `highest` are chosen, −1 for others.

    With HAS_VALID, −1 for blocks without a valid key and +inf for forced ones; of the blocks with a valid key
    `low_count` come before the first that is seen, and `high_count` up to the last.
    """
    score = tl.load(own_ptr + row + blocks, mask=(blocks >= own_low) & (blocks <= own_high), other=0.0)
    if OVERLAPS:
        score += tl.load(next_ptr + row + blocks - 1, mask=(blocks > own_low) & (blocks <= own_high + 1), other=0.0)
    candidate = (blocks >= lowest) & (blocks <= highest)
    if HAS_VALID:
        valid = tl.load(valid_ptr + batch.to(tl.int64) * num_blocks + blocks, mask=candidate, other=0)
        before = tl.load(count_ptr + batch.to(tl.int64) * (num_blocks + 1) + blocks, mask=candidate, other=0)
        is_forced = (before - low_count < NUM_INITIAL) | (high_count - 1 - before < NUM_LOCAL)
        score = tl.where(is_forced, float("inf"), score)
        candidate = candidate & (valid != 0)
    return tl.where(candidate, score, -1.0)


@triton.jit
def top_blocks(
    own_ptr, next_ptr, first_ptr, last_ptr, valid_ptr, count_ptr, output_ptr,
    H_kv, T, S, N, num_blocks, token_start, token_end,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """The best NUM_SELECTED blocks of one token: forced ones first, then by score, ties to the later block; ascending.

    valid [B, N_blk] says whether a block holds a valid key, count [B, N_blk + 1] how many such blocks come before.
    Of NEIGHBOURS blocks in a row only the best score is kept; the others are read again when the group wins.
    """
    token = token_start + tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // H_kv
    tokens = token + tl.arange(0, 1)
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
    low, high = key_range(first, last, S, N, 0, 0, LENGTH, STRIDE, 1)
    first_seen = tl.max(tl.maximum(first, 0))
    last_seen = tl.max(tl.minimum(last, S - 1))
    low_block = first_seen // SELECTION_BLOCK
    high_block = tl.where(last_seen >= first_seen, last_seen // SELECTION_BLOCK, -1)
    own_low = tl.max(low) // PER_BLOCK
    own_high = tl.where(tl.max(high) < 0, -1, tl.max(high) // PER_BLOCK)

    slots = tl.arange(0, SLOTS)
    chosen = tl.full([SLOTS], -1, tl.int32)
    lowest = low_block
    highest = high_block
    low_count = 0
    high_count = 0
    if HAS_VALID:
        count_base = count_ptr + batch.to(tl.int64) * (num_blocks + 1)
        low_count = tl.load(count_base + tl.minimum(low_block, num_blocks))
        high_count = tl.load(count_base + tl.maximum(high_block + 1, 0))
        first_slot: tl.constexpr = 0
    else:
        # Forced blocks are known and take no round of the search.  Where the two kinds meet there are no others.
        local = high_block + 1 + slots - (NUM_INITIAL + NUM_LOCAL)
        chosen = tl.where(slots < NUM_INITIAL, low_block + slots, tl.maximum(local, low_block + slots))
        chosen = tl.where((slots < NUM_INITIAL + NUM_LOCAL) & (chosen <= high_block), chosen, -1)
        lowest += NUM_INITIAL
        highest -= NUM_LOCAL
        first_slot: tl.constexpr = NUM_INITIAL + NUM_LOCAL

    row = (pair.to(tl.int64) * (token_end - token_start) + tl.program_id(0)) * num_blocks
    groups = tl.arange(0, WIDTH // NEIGHBOURS)
    member = tl.arange(0, NEIGHBOURS)
    scores = ranked_scores(
        groups[:, None] * NEIGHBOURS + member[None, :], own_ptr, next_ptr, valid_ptr, count_ptr, row, batch, num_blocks,
        lowest, highest, own_low, own_high, low_count, high_count, NUM_INITIAL, NUM_LOCAL, LENGTH > STRIDE, HAS_VALID,
    )  # fmt: skip
    bests = tl.max(scores, 1)

    # Blocks are chosen in descending order of (score, block): those left are below what was chosen last.
    last_score = float("inf")
    last_block = WIDTH
    for slot in range(first_slot, NUM_SELECTED):
        best = tl.max(bests, 0)
        group = tl.max(tl.where((bests == best) & (bests >= 0.0), groups, -1), 0)
        members = tl.where(group < 0, -NEIGHBOURS, group * NEIGHBOURS) + member
        again = ranked_scores(
            members, own_ptr, next_ptr, valid_ptr, count_ptr, row, batch, num_blocks,
            lowest, highest, own_low, own_high, low_count, high_count, NUM_INITIAL, NUM_LOCAL, LENGTH > STRIDE,
            HAS_VALID,
        )  # fmt: skip
        left = (again < last_score) | (members < last_block)
        block = tl.max(tl.where((again == best) & left, members, -1), 0)
        chosen = tl.where(slots == slot, block, chosen)
        rest = (again < best) | ((again == best) & (members < block))
        bests = tl.where(groups == group, tl.max(tl.where(rest, again, -1.0), 0), bests)
        last_score = best
        last_block = block
    chosen = tl.sort(tl.where(chosen < 0, 2147483647, chosen))
    chosen = tl.where(chosen == 2147483647, -1, chosen)
    target = (pair.to(tl.int64) * T + token) * NUM_SELECTED + slots
    tl.store(output_ptr + target, chosen, mask=slots < NUM_SELECTED)


def _score_tile(query: Tensor, columns_per_block: int) -> dict[str, int]:
    """Tile of `block_scores`: tokens, compressed tokens, warps and stages."""
    if query.element_size() == 2 and query.shape[-1] <= 128:
        rows, columns, warps, stages = 64, 128, 4, 2
    elif query.element_size() == 2 and tiles.is_hopper(query.device):
        rows, columns, warps, stages = 64, 128, 8, 3
    else:
        rows, columns, warps, stages = 32, 32, 4, 1
    return {"BLOCK_M": rows, "BLOCK_N": max(columns_per_block, columns), "num_warps": warps, "num_stages": stages}


def _top_warps(width: int) -> int:
    """Warps of `top_blocks` for a row of `width` blocks."""
    return 1 if width <= 1024 else 4


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
    """Lists of selected blocks [B, H_kv, T, n] int32, ascending, padded with −1.

    query [B, H, T, D], compressed_key [B, H_kv, N_cmp, D]; lse [B, H, T] is the compressed branch's, worked out here
    when None.  Intervals are tightened to valid keys.
    """
    query, compressed_key = launch.contiguous_rows(query), launch.contiguous_rows(compressed_key)
    B, _, T, _ = query.shape
    H_kv, N = compressed_key.shape[1], compressed_key.shape[2]
    num_blocks = cdiv(num_keys, selection_block)
    output = query.new_empty((B, H_kv, T, num_selected), dtype=torch.int32)
    if output.numel() == 0:
        return output
    if num_blocks == 0:
        return output.fill_(-1)
    intervals = launch.Intervals(first_key, last_key, compressed_valid, is_causal)
    geometry = launch.KeyGeometry(num_keys, block_length, block_stride)
    if lse is None and N:
        lse = ranges.attention_lse(query, compressed_key, intervals, geometry, scale)
    first, last, compressed = intervals.pointers(query)
    constants = intervals.constants()
    heads = launch.head_constants(query, compressed_key, compressed_key)
    per_block = selection_block // block_stride
    block_r = next_power_of_2(per_block)
    tile = _score_tile(query, block_r)
    rows, columns = tile["BLOCK_M"], tile["BLOCK_N"]
    if block_valid is not None:
        valid = block_valid.contiguous().view(torch.uint8)
        count = torch.nn.functional.pad(valid.cumsum(-1, dtype=torch.int32), (1, 0))
    else:
        valid = count = query
    overlaps = block_length > block_stride
    per_token = (1 + overlaps) * B * H_kv * num_blocks * 4
    size = max(256, SCORE_BYTES // per_token // 256 * 256)
    for start in range(0, T, size):
        end = min(start + size, T)
        own = query.new_empty((B, H_kv, end - start, num_blocks), dtype=torch.float32)
        following = torch.empty_like(own) if overlaps else own
        if N:
            # Without intervals no token of the chunk sees a block after its own.
            seen_keys = min(num_keys, end) if is_causal and first_key is None else num_keys
            column_tiles = cdiv(cdiv(seen_keys, selection_block), columns // block_r)
            block_scores[(cdiv(end - start, rows), column_tiles, B * H_kv)](
                query, compressed_key, lse, first, last, compressed, own, following,
                *query.stride()[:3], *compressed_key.stride()[:3],
                H_kv, T, num_keys, N, num_blocks, start, end, scale * launch.LOG2_E,
                GROUP=heads["GROUP"], LENGTH=block_length, STRIDE=block_stride, PER_BLOCK=per_block, BLOCK_R=block_r,
                D=heads["D"], BLOCK_D=heads["BLOCK_D"], PRECISION=heads["PRECISION"], **tile, **constants,
            )  # fmt: skip
        width = next_power_of_2(num_blocks)
        if is_causal and first_key is None:
            width = next_power_of_2(cdiv(min(num_keys, end), selection_block))
        top_blocks[(end - start, B * H_kv)](
            own, following, first, last, valid, count, output, H_kv, T, num_keys, N, num_blocks, start, end,
            LENGTH=block_length, STRIDE=block_stride, PER_BLOCK=per_block, SELECTION_BLOCK=selection_block,
            NUM_SELECTED=num_selected, NUM_INITIAL=num_initial, NUM_LOCAL=num_local,
            SLOTS=next_power_of_2(num_selected), WIDTH=width, NEIGHBOURS=min(width, 8),
            IS_CAUSAL=is_causal, HAS_INTERVAL=first_key is not None, HAS_VALID=block_valid is not None,
            num_warps=_top_warps(width),
        )  # fmt: skip
    return output
