"""Choosing blocks on CUDA: exact float32 block scores, then the top n (arXiv 2502.11089, equations 8-12).

Two kernels per chunk of queries.  `block_scores` holds a tile of compressed keys and lets the heads of the group, or
tiles of tokens of a small group, pass by, so that the sum over heads happens in registers and no group is padded;
probabilities never reach memory, only their sums per block do, twice: what a block's compressed tokens give to the
block itself, and what the last of them, which reach over its end, give to the next.  `top_blocks` adds the two and
takes the best.  Where compressed tokens do not overlap (LENGTH = STRIDE), none reaches over an end, and there are no
second sums.
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
def visible_columns(
    first_ptr, last_ptr, batch, tokens, token_end, T, S, N,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr,
):  # fmt: skip
    """Range [low, high] of compressed tokens that each token sees."""
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
    return key_range(first, last, S, N, 0, 0, LENGTH, STRIDE, 1)


@triton.jit
def store_scores(
    probability, own_ptr, next_ptr, first_ptr, last_ptr, valid_ptr, batch, pair, tile_start, block_start,
    T, S, N, num_blocks, token_start, token_end,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Writes the sums per block of a tile's `probability`, of what its tokens see."""
    blocks_per_tile: tl.constexpr = BLOCK_N // BLOCK_R
    tokens = tile_start + tl.arange(0, BLOCK_M)
    # Without intervals the first token sees least.
    narrowest = tokens if HAS_INTERVAL else tile_start + tl.arange(0, 1)
    low, high = visible_columns(
        first_ptr, last_ptr, batch, narrowest, token_end, T, S, N, LENGTH, STRIDE, IS_CAUSAL, HAS_INTERVAL
    )
    tile_low = block_start * PER_BLOCK
    is_edge = (tl.max(low) > tile_low) | (tl.min(high) < tile_low + BLOCK_N - 1)
    if is_edge | HAS_VALID | (PER_BLOCK != BLOCK_R):
        from_key, to_key = visible_columns(
            first_ptr, last_ptr, batch, tokens, token_end, T, S, N, LENGTH, STRIDE, IS_CAUSAL, HAS_INTERVAL
        )
        columns = tl.arange(0, BLOCK_N)
        keys = (block_start + columns // BLOCK_R) * PER_BLOCK + columns % BLOCK_R
        inside = (columns % BLOCK_R < PER_BLOCK) & (keys < N)
        if HAS_VALID:
            inside = inside & (tl.load(valid_ptr + batch.to(tl.int64) * N + keys, mask=inside, other=0) != 0)
        seen = (keys[None, :] >= from_key[:, None]) & (keys[None, :] <= to_key[:, None]) & inside[None, :]
        probability = tl.where(seen, probability, 0.0)

    by_block = tl.reshape(probability, [BLOCK_M, blocks_per_tile, BLOCK_R])
    blocks = block_start + tl.arange(0, blocks_per_tile)
    row = pair.to(tl.int64) * (token_end - token_start) + (tokens - token_start)
    offset = row[:, None] * num_blocks + blocks[None, :]
    mask = (tokens < token_end)[:, None] & (blocks < num_blocks)[None, :]
    if LENGTH > STRIDE:
        reach: tl.constexpr = LENGTH // STRIDE
        place = tl.arange(0, BLOCK_R)
        own_weight = tl.minimum(PER_BLOCK - place, reach).to(tl.float32)
        next_weight = tl.maximum(place + reach - PER_BLOCK, 0).to(tl.float32)
        tl.store(own_ptr + offset, tl.sum(by_block * own_weight[None, None, :], 2), mask=mask)
        tl.store(next_ptr + offset, tl.sum(by_block * next_weight[None, None, :], 2), mask=mask)
    else:
        tl.store(own_ptr + offset, tl.sum(by_block, 2), mask=mask)


@triton.jit
def block_scores(
    query_ptr, key_ptr, lse_ptr, first_ptr, last_ptr, valid_ptr, own_ptr, next_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn,
    H_kv, T, S, N, num_blocks, token_start, token_end, scale_log2,
    GROUP: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes own and next [B, H_kv, token, N_blk]: sums over the group's heads of probability x overlap / STRIDE.

    next is 0, and not written, where compressed tokens do not overlap.

    A column is one compressed token; BLOCK_R columns, the first PER_BLOCK of them in use, make one selection block.
    A tile of BLOCK_M rows is HEADS heads of BLOCK_M / HEADS tokens.  Heads of a larger group pass by one after the
    other; where one tile holds the group (HEADS = GROUP), TILES tiles do.  Programs whose columns none of their tokens
    sees write nothing; `top_blocks` does not read that.
    """
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    pair = tl.program_id(2)
    batch = pair // H_kv
    kv_head = pair % H_kv
    program_start = token_start + (tl.num_programs(0) - 1 - tl.program_id(0)) * (TILES * TOKENS)
    if HAS_INTERVAL:
        tokens = program_start + tl.arange(0, TILES * TOKENS)
    else:  # the last token sees most
        tokens = tl.minimum(program_start + TILES * TOKENS, token_end) - 1 + tl.arange(0, 1)
    low, high = visible_columns(
        first_ptr, last_ptr, batch, tokens, token_end, T, S, N, LENGTH, STRIDE, IS_CAUSAL, HAS_INTERVAL
    )
    blocks_per_tile: tl.constexpr = BLOCK_N // BLOCK_R
    block_start = tl.program_id(1) * blocks_per_tile
    tile_low = block_start * PER_BLOCK
    if (tl.max(high) < tile_low) | (tl.min(low) >= tile_low + blocks_per_tile * PER_BLOCK):
        return
    columns = tl.arange(0, BLOCK_N)
    places = columns // BLOCK_R * PER_BLOCK + columns % BLOCK_R
    inside = (columns % BLOCK_R < PER_BLOCK) & (tile_low + places < N)
    d = tl.arange(0, BLOCK_D)
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    key = load_tile(key_base + tl.cast(tile_low, tl.int64) * stride_kn, places, d, stride_kn, inside, D, BLOCK_D)
    first_head = kv_head.to(tl.int64) * GROUP
    query_base = query_ptr + batch.to(tl.int64) * stride_qb + first_head * stride_qh
    lse_base = lse_ptr + (batch.to(tl.int64) * (H_kv * GROUP) + first_head) * T
    rows = tl.arange(0, BLOCK_M)
    if HEADS == GROUP:
        # Rows that are 8 apart lie in one thread's registers, which therefore adds a token's heads.
        row_tokens = rows if HEADS == 1 else rows // 16 * 8 + rows % 8
        row_heads = (rows // 8 % HEADS).to(tl.int64)
        offsets = row_heads * stride_qh + row_tokens * stride_qt
        lse_rows = lse_base + row_heads * T + row_tokens
        lse = tl.load(lse_rows + program_start, mask=program_start + row_tokens < token_end, other=0.0)
        for tile in range(TILES):
            tile_start = program_start + tile * TOKENS
            stored = tile_start + row_tokens < token_end
            query = load_tile(query_base + tile_start.to(tl.int64) * stride_qt, offsets, d, 1, stored, D, BLOCK_D)
            following = tile_start + TOKENS
            next_lse = tl.load(lse_rows + following, mask=following + row_tokens < token_end, other=0.0)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
            probability = tl.exp2(logits - (lse * 1.4426950408889634)[:, None])
            lse = next_lse
            if HEADS == 2:
                parts = tl.permute(tl.reshape(probability, [BLOCK_M // 16, 2, 8, BLOCK_N]), [0, 2, 3, 1])
                one, other = tl.split(tl.reshape(parts, [TOKENS, BLOCK_N, 2]))
                probability = one + other
            store_scores(
                probability, own_ptr, next_ptr, first_ptr, last_ptr, valid_ptr, batch, pair, tile_start, block_start,
                T, S, N, num_blocks, token_start, token_end, LENGTH, STRIDE, PER_BLOCK, BLOCK_R, TOKENS, BLOCK_N,
                IS_CAUSAL, HAS_INTERVAL, HAS_VALID,
            )  # fmt: skip
    else:
        stored = program_start + rows < token_end
        query_base += program_start.to(tl.int64) * stride_qt
        probability = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for member in range(GROUP):
            head = tl.cast(member, tl.int64)
            query = load_tile(query_base + head * stride_qh, rows, d, stride_qt, stored, D, BLOCK_D)
            lse = tl.load(lse_base + head * T + program_start + rows, mask=stored, other=0.0)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
            probability += tl.exp2(logits - (lse * 1.4426950408889634)[:, None])
        store_scores(
            probability, own_ptr, next_ptr, first_ptr, last_ptr, valid_ptr, batch, pair, program_start, block_start,
            T, S, N, num_blocks, token_start, token_end, LENGTH, STRIDE, PER_BLOCK, BLOCK_R, TOKENS, BLOCK_N,
            IS_CAUSAL, HAS_INTERVAL, HAS_VALID,
        )  # fmt: skip


@triton.jit
def ranked_scores(
    blocks, own_ptr, next_ptr, valid_ptr, count_ptr, row, batch, num_blocks, lowest, highest, own_low, own_high,
    low_count, high_count, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, WRITTEN: tl.constexpr,
    OVERLAPS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Bits of the scores by which `blocks` from `lowest` to `highest` are chosen, −1 for others.

    Bits from 0 on are in the order of their scores.  With HAS_VALID, −1 for blocks without a valid key and +inf for
    forced ones; of the blocks with a valid key `low_count` come before the first that is seen, and `high_count` up to
    the last.

    Where one of WRITTEN blocks in a row is seen, 0 is stored for those that are not: whole vectors can be loaded.
    """
    inside = (blocks // WRITTEN >= own_low // WRITTEN) & (blocks // WRITTEN <= own_high // WRITTEN)
    score = tl.load(own_ptr + row + blocks, mask=inside & (blocks < num_blocks), other=0.0)
    if OVERLAPS:
        score += tl.load(next_ptr + row + blocks - 1, mask=(blocks > own_low) & (blocks <= own_high + 1), other=0.0)
    candidate = (blocks >= lowest) & (blocks <= highest)
    if HAS_VALID:
        valid = tl.load(valid_ptr + batch.to(tl.int64) * num_blocks + blocks, mask=candidate, other=0)
        before = tl.load(count_ptr + batch.to(tl.int64) * (num_blocks + 1) + blocks, mask=candidate, other=0)
        is_forced = (before - low_count < NUM_INITIAL) | (high_count - 1 - before < NUM_LOCAL)
        score = tl.where(is_forced, float("inf"), score)
        candidate = candidate & (valid != 0)
    return tl.where(candidate, tl.maximum(score.to(tl.int32, bitcast=True), 0), -1)


@triton.jit
def count_reaching(bits, threshold):
    """How many of `bits`, int32 from −1 on, are `threshold`, which is 0 or more, or above.

    Signs are added up: ptxas makes half as many instructions again of comparisons.
    """
    return -tl.sum((threshold - 1 - bits) >> 31, 0)


@triton.jit
def top_blocks(
    own_ptr, next_ptr, first_ptr, last_ptr, valid_ptr, count_ptr, output_ptr,
    H_kv, T, S, N, num_blocks, token_start, token_end,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, WRITTEN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """The best NUM_SELECTED blocks of one token: forced ones first, then by score, ties to the later block; ascending.

    valid [B, N_blk] says whether a block holds a valid key, count [B, N_blk + 1] how many such blocks come before.
    The score from which on blocks are taken is found by halving, on the scores' bits.  The best score of each of PARTS
    parts of the row narrows that down beforehand.
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

    low_count = 0
    high_count = 0
    if HAS_VALID:
        count_base = count_ptr + batch.to(tl.int64) * (num_blocks + 1)
        low_count = tl.load(count_base + tl.minimum(low_block, num_blocks))
        high_count = tl.load(count_base + tl.maximum(high_block + 1, 0))
        initial: tl.constexpr = 0
        local: tl.constexpr = 0
    else:
        # Forced blocks are known and not looked for.  Where the two kinds meet there are no others.
        initial: tl.constexpr = NUM_INITIAL
        local: tl.constexpr = NUM_LOCAL
    lowest = low_block + initial
    highest = high_block - local
    blocks = tl.arange(0, WIDTH)
    row = (pair.to(tl.int64) * (token_end - token_start) + tl.program_id(0)) * num_blocks
    bits = ranked_scores(
        blocks, own_ptr, next_ptr, valid_ptr, count_ptr, row, batch, num_blocks, lowest, highest, own_low, own_high,
        low_count, high_count, NUM_INITIAL, NUM_LOCAL, WRITTEN, LENGTH > STRIDE, HAS_VALID,
    )  # fmt: skip
    need = NUM_SELECTED - tl.minimum(tl.maximum(high_block - low_block + 1, 0), initial + local)
    candidates = count_reaching(bits, 0) if HAS_VALID else tl.maximum(highest - lowest + 1, 0)

    # The largest threshold that `need` blocks reach, 0 where there are no more.  `surplus` is how many more reach it,
    # and 1 as long as that is not known; below 0, how many are missing.
    bests = tl.max(tl.max(tl.reshape(bits, [WIDTH // (4 * PARTS), PARTS, 4]), 2), 0)
    upper = tl.where(candidates > need, tl.max(bests, 0), 0)
    threshold = tl.minimum(tl.maximum(tl.min(bests, 0), 0), upper) if PARTS >= NUM_SELECTED else 0
    threshold = tl.where(need > 0, threshold, upper)
    surplus = tl.minimum(candidates - need, 1)
    while threshold < upper:
        middle = upper - ((upper - threshold) >> 1)
        more = count_reaching(bits, middle) - need
        threshold = tl.where(more >= 0, middle, threshold)
        surplus = tl.where(more >= 0, more, surplus)
        upper = tl.where(more > 0, upper, tl.where(more == 0, middle, middle - 1))
    if surplus > 0:
        surplus = count_reaching(bits, threshold) - need
        is_tie = bits == threshold
        bits = tl.where(is_tie & (tl.cumsum(is_tie.to(tl.int32), 0) <= surplus), -1, bits)

    is_chosen = bits >= threshold
    # In 64 bits only at the end: the layout of the stores is another one, and 32 bits are moved there.
    place = tl.where(is_chosen, tl.cumsum(is_chosen.to(tl.int32), 0), 0).to(tl.int64)
    target = output_ptr + (pair.to(tl.int64) * T + token) * NUM_SELECTED
    tl.store(target + initial - 1 + place, blocks, mask=place > 0)
    slots = tl.arange(0, SLOTS)
    listed = NUM_SELECTED + tl.minimum(surplus, 0)
    rest = tl.where(slots < initial, low_block + slots, high_block + 1 - listed + slots)
    rest = tl.where(slots < listed, rest, -1)
    tl.store(target + slots, rest, mask=(slots < NUM_SELECTED) & ((slots < initial) | (slots >= listed - local)))


def _score_tile(query: Tensor, columns_per_block: int) -> dict[str, int]:
    """Tile of `block_scores`: tokens, compressed tokens, warps and stages."""
    if query.element_size() == 2 and query.shape[-1] <= 128:
        rows, columns, warps, stages = 64, 128, 4, 2
    elif query.element_size() == 2 and tiles.is_hopper(query.device):
        rows, columns, warps, stages = 64, 128, 8, 3
    else:
        rows, columns, warps, stages = 32, 32, 4, 1
    return {"BLOCK_M": rows, "BLOCK_N": max(columns_per_block, columns), "num_warps": warps, "num_stages": stages}


def _passing_tiles(group: int, tiles: int) -> dict[str, int]:
    """Heads in a tile's rows, and tiles of a program, where one head's would be `tiles` in all.

    A small group has too little to do in one tile of tokens.
    """
    if group > 2:
        return {"HEADS": 1, "TILES": 1}
    return {"HEADS": group, "TILES": 8 if tiles * group >= 8192 else 2}


def _top_warps(width: int) -> int:
    """Warps of `top_blocks` for a row of `width` blocks: in one, counts need no shared memory."""
    return 1 if width <= 1024 else 4 if width <= 8192 else 8


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
    slots = next_power_of_2(num_selected)
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
            passing = _passing_tiles(heads["GROUP"], (end - start) * column_tiles * B * H_kv // rows)
            tokens = rows // passing["HEADS"] * passing["TILES"]
            block_scores[(cdiv(end - start, tokens), column_tiles, B * H_kv)](
                query, compressed_key, lse, first, last, compressed, own, following,
                *query.stride()[:3], *compressed_key.stride()[:3],
                H_kv, T, num_keys, N, num_blocks, start, end, scale * launch.LOG2_E,
                GROUP=heads["GROUP"], LENGTH=block_length, STRIDE=block_stride, PER_BLOCK=per_block, BLOCK_R=block_r,
                D=heads["D"], BLOCK_D=heads["BLOCK_D"], PRECISION=heads["PRECISION"], **tile, **passing, **constants,
            )  # fmt: skip
        width = num_blocks
        if is_causal and first_key is None:
            width = cdiv(min(num_keys, end), selection_block)
        width = max(128, next_power_of_2(width))
        top_blocks[(end - start, B * H_kv)](
            own, following, first, last, valid, count, output, H_kv, T, num_keys, N, num_blocks, start, end,
            LENGTH=block_length, STRIDE=block_stride, PER_BLOCK=per_block, SELECTION_BLOCK=selection_block,
            NUM_SELECTED=num_selected, NUM_INITIAL=num_initial, NUM_LOCAL=num_local,
            SLOTS=slots, WIDTH=width, PARTS=min(width // 4, max(32, slots)), WRITTEN=min(4, columns // block_r),
            IS_CAUSAL=is_causal, HAS_INTERVAL=first_key is not None, HAS_VALID=block_valid is not None,
            num_warps=_top_warps(width),
        )  # fmt: skip
    return output
