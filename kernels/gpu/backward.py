"""Backward pass of attention over one contiguous run of keys per query, as in FlashAttention.

Two kernels recompute the probabilities from the saved lse: one sums the gradient of a tile of queries over their keys,
the other those of a tile of keys and values over the queries that see them.  Nothing is atomic: results repeat to the
bit.
"""

import triton
import triton.language as tl

from nsa_compile.kernels.gpu.flash import (
    is_edge,
    key_range,
    load_tile,
    range_step,
    tile_bounds,
    token_interval,
    visible_keys,
)


@triton.jit
def output_dot_gradient(
    output_ptr, grad_ptr, delta_ptr, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, T,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Delta = Σ_dv output · grad_output for each row: what the softmax's backward subtracts."""
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DV)
    mask = (tokens < T)[:, None] & (columns < DV)[None, :]
    row = tl.program_id(1).to(tl.int64) * T + tokens
    output_base = output_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    output = tl.load(output_base + tokens.to(tl.int64)[:, None] * stride_ot + columns[None, :], mask=mask, other=0.0)
    grad_base = grad_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    grad = tl.load(grad_base + tokens.to(tl.int64)[:, None] * stride_gt + columns[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + row, tl.sum(output.to(tl.float32) * grad.to(tl.float32), 1), mask=tokens < T)


@triton.jit
def query_gradient_step(
    accumulator, query, grad, lse_log2, delta, key_ptr, value_ptr, valid_ptr, start, low, high, edge, N, scale_log2,
    stride_kn, stride_vn, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys' share in the gradient of the queries (scale left out); `edge` as in the forward pass."""
    columns = tl.arange(0, BLOCK_N)
    keys = start + columns
    key_base = key_ptr + tl.cast(start, tl.int64) * stride_kn
    value_base = value_ptr + tl.cast(start, tl.int64) * stride_vn
    key = load_tile(key_base, columns, tl.arange(0, BLOCK_D), stride_kn, keys < N, D, BLOCK_D)
    value = load_tile(value_base, columns, tl.arange(0, BLOCK_DV), stride_vn, keys < N, DV, BLOCK_DV)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
    weights = tl.exp2(logits - lse_log2[:, None])
    if edge:
        weights = tl.where(visible_keys(valid_ptr, keys, low, high, N, HAS_VALID), weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    grad_logits = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_logits.to(key.dtype), key, accumulator, input_precision=PRECISION)


@triton.jit
def flash_query_gradient(
    query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, grad_ptr, lse_ptr, delta_ptr, grad_query_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gt,
    H, T, S, N, window, local_blocks, initial, scale, scale_log2,
    GROUP: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries for BLOCK_M tokens of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    rows = tl.arange(0, BLOCK_M)
    tile_start = tile * BLOCK_M
    tokens = tile_start + rows
    stored = tokens < T
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, T, T, S, IS_CAUSAL, HAS_INTERVAL)
    low, high = key_range(first, last, S, N, window, local_blocks, LENGTH, STRIDE, SELECTION_BLOCK)

    query_base = query_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    query_base += tile_start.to(tl.int64) * stride_qt
    grad_base = grad_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    grad_base += tile_start.to(tl.int64) * stride_gt
    query = load_tile(query_base, rows, tl.arange(0, BLOCK_D), stride_qt, stored, D, BLOCK_D)
    grad = load_tile(grad_base, rows, tl.arange(0, BLOCK_DV), stride_gt, stored, DV, BLOCK_DV)
    row = tl.program_id(1).to(tl.int64) * T + tokens
    lse = tl.load(lse_ptr + row, mask=stored, other=float("-inf"))
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # an empty row weighs nothing
    delta = tl.load(delta_ptr + row, mask=stored, other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    value_base = value_ptr + batch.to(tl.int64) * stride_vb + kv_head * stride_vh
    valid_base = valid_ptr + batch.to(tl.int64) * N

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    initial_high = tl.where(last >= first, tl.minimum(initial if HAS_INITIAL else 0, low), 0) - 1
    loop_start, full_start, full_end, loop_end = tile_bounds(low, high, BLOCK_N)
    initial_end = (tl.max(initial_high) + BLOCK_N) // BLOCK_N * BLOCK_N
    initial_full = (tl.min(initial_high) + 1) // BLOCK_N * BLOCK_N
    for step in range(0, initial_end + loop_end - loop_start, BLOCK_N):
        start, step_low, step_high = range_step(step, initial_end, loop_start, initial_high, low, high)
        edge = is_edge(step, start, initial_end, initial_full, full_start, full_end, HAS_VALID)
        accumulator = query_gradient_step(
            accumulator, query, grad, lse_log2, delta, key_base, value_base, valid_base, start, step_low, step_high,
            edge, N, scale_log2, stride_kn, stride_vn, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_VALID, PRECISION,
        )  # fmt: skip
    accumulator *= scale

    columns = tl.arange(0, BLOCK_D)
    tl.store(
        grad_query_ptr + row[:, None] * D + columns[None, :], accumulator.to(grad_query_ptr.dtype.element_ty),
        mask=stored[:, None] & (columns < D)[None, :],
    )  # fmt: skip


@triton.jit
def key_gradient_step(
    grad_key, grad_value, key, value, query_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, batch, keys,
    key_valid, tile_start, edge, T, S, N, window, local_blocks, initial, scale_log2, stride_qt, stride_gt,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr, INITIAL_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries' share in the gradients of a block of keys and values (scale left out).

    Unless at an `edge`, every query sees all of the keys.
    """
    rows = tl.arange(0, BLOCK_M)
    tokens = tile_start + rows
    inside = tokens < T
    query_base = query_ptr + tl.cast(tile_start, tl.int64) * stride_qt
    grad_base = grad_ptr + tl.cast(tile_start, tl.int64) * stride_gt
    query = load_tile(query_base, rows, tl.arange(0, BLOCK_D), stride_qt, inside, D, BLOCK_D)
    grad = load_tile(grad_base, rows, tl.arange(0, BLOCK_DV), stride_gt, inside, DV, BLOCK_DV)
    lse = tl.load(lse_ptr + tokens, mask=inside, other=float("-inf"))
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    delta = tl.load(delta_ptr + tokens, mask=inside, other=0.0)
    logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2
    weights = tl.exp2(logits - lse_log2[None, :])
    if edge:
        first, last = token_interval(first_ptr, last_ptr, batch, tokens, T, T, S, IS_CAUSAL, HAS_INTERVAL)
        low, high = key_range(first, last, S, N, window, local_blocks, LENGTH, STRIDE, SELECTION_BLOCK)
        if INITIAL_ONLY:
            high = tl.where(last >= first, tl.minimum(initial, low), 0) - 1
            low = rows * 0
        seen = (keys[:, None] >= low[None, :]) & (keys[:, None] <= high[None, :])
        weights = tl.where(seen, weights, 0.0)
    if HAS_VALID:
        weights = tl.where(key_valid[:, None], weights, 0.0)
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
    grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    grad_logits = weights * (grad_weights - delta[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def query_tiles(
    key_start, key_end, range_ptr, tile_index, T, S, window, local_blocks,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, SELECTION_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, INITIAL_ONLY: tl.constexpr,
):  # fmt: skip
    """Tokens [start, end) that may see the keys [key_start, key_end], and [full_start, full_end) that see them all.

    All four are multiples of BLOCK_M (end may pass T).  With intervals, start and end come from `range_ptr`.
    """
    if HAS_INTERVAL:
        start = tl.load(range_ptr + tile_index * 2)
        end = tl.load(range_ptr + tile_index * 2 + 1)
        full_start = end
        full_end = end
    elif IS_CAUSAL and not INITIAL_ONLY:
        start = key_start * STRIDE + LENGTH - 1
        full_start = key_end * STRIDE + LENGTH - 1
        # With T > S the local blocks stay at the end of the keys for all later tokens.
        stay = (local_blocks > 0) & (T > S)
        near_end = tl.maximum(key_end + window, (key_end // SELECTION_BLOCK + local_blocks) * SELECTION_BLOCK)
        near_full = tl.maximum(key_start + window, (key_start // SELECTION_BLOCK + local_blocks) * SELECTION_BLOCK)
        is_cut = (window > 0) | (local_blocks > 0)
        end = tl.where(is_cut, tl.where(stay, T, near_end), T)
        full_end = tl.where(is_cut, tl.where(stay, 0, near_full), T)
        end = tl.minimum(end, T)
        full_end = tl.minimum(full_end, T)
    else:
        start = key_start * 0
        end = start + T
        full_start = end
        full_end = end
    start = start // BLOCK_M * BLOCK_M
    end = (end + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.minimum(start, end)
    full_start = tl.minimum(tl.maximum((full_start + BLOCK_M - 1) // BLOCK_M * BLOCK_M, start), end)
    full_end = tl.minimum(tl.maximum(full_end // BLOCK_M * BLOCK_M, full_start), end)
    return start, full_start, full_end, end


@triton.jit
def flash_key_gradient(
    query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, grad_ptr, lse_ptr, delta_ptr, range_ptr,
    base_key_ptr, base_value_ptr, grad_key_ptr, grad_value_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gt,
    H, T, S, N, key_limit, window, local_blocks, initial, query_splits, scale, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_BASE: tl.constexpr, INITIAL_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, summed over HEADS query heads and one of `query_splits` token ranges.

    Writes [split, B, H_kv, N, D] with split = head split x query split; with HAS_BASE starts from a float32
    [B, H_kv, N, D] that is already unscaled the same way.  With INITIAL_ONLY, only keys below `key_limit` are handled.
    """
    tile = tl.program_id(0)
    H_kv = H // GROUP
    batch = tl.program_id(1) // H_kv
    kv_head = tl.program_id(1) % H_kv
    head_split = tl.program_id(2) // query_splits
    query_split = tl.program_id(2) % query_splits
    columns = tl.arange(0, BLOCK_N)
    key_start = tile * BLOCK_N
    keys = key_start + columns
    stored = keys < key_limit
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_base = value_ptr + batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    key_base += key_start.to(tl.int64) * stride_kn
    value_base += key_start.to(tl.int64) * stride_vn
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    key = load_tile(key_base, columns, d, stride_kn, stored, D, BLOCK_D)
    value = load_tile(value_base, columns, dv, stride_vn, stored, DV, BLOCK_DV)
    if HAS_VALID:
        key_valid = tl.load(valid_ptr + batch.to(tl.int64) * N + keys, mask=stored, other=0) != 0
    else:
        key_valid = stored

    row = (tl.program_id(1).to(tl.int64) * key_limit + keys)[:, None]
    if HAS_BASE:
        grad_key = tl.load(base_key_ptr + row * D + d[None, :], mask=stored[:, None] & (d < D)[None, :], other=0.0)
        grad_value = tl.load(
            base_value_ptr + row * DV + dv[None, :], mask=stored[:, None] & (dv < DV)[None, :], other=0.0
        )
    else:
        grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    key_end = tl.minimum(key_start + BLOCK_N, key_limit) - 1
    start, full_start, full_end, end = query_tiles(
        key_start, key_end, range_ptr, batch.to(tl.int64) * tl.num_programs(0) + tile, T, S, window, local_blocks,
        LENGTH, STRIDE, SELECTION_BLOCK, BLOCK_M, IS_CAUSAL, HAS_INTERVAL, INITIAL_ONLY,
    )  # fmt: skip
    share = ((end - start) // BLOCK_M + query_splits - 1) // query_splits * BLOCK_M
    start = tl.minimum(start + query_split * share, end)
    end = tl.minimum(start + share, end)
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.minimum(tl.maximum(full_end, full_start), end)
    first_head = kv_head * GROUP + head_split * HEADS
    # One loop over the tiles of all heads: each may have few, and would wait for memory anew in a loop of its own.
    tiles = (end - start) // BLOCK_M
    for step in range(HEADS * tiles):
        head = first_head + step // tiles
        query_base = query_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        grad_base = grad_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
        rows = (batch * H + head).to(tl.int64) * T
        tile_start = start + step % tiles * BLOCK_M
        edge = (tile_start < full_start) | (tile_start >= full_end)
        grad_key, grad_value = key_gradient_step(
            grad_key, grad_value, key, value, query_base, grad_base, lse_ptr + rows, delta_ptr + rows, first_ptr,
            last_ptr, batch, keys, key_valid, tile_start, edge, T, S, N, window, local_blocks, initial, scale_log2,
            stride_qt, stride_gt, LENGTH, STRIDE, SELECTION_BLOCK, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, IS_CAUSAL,
            HAS_INTERVAL, HAS_VALID, INITIAL_ONLY, PRECISION,
        )  # fmt: skip

    split = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * key_limit
    tl.store(
        grad_key_ptr + (split + row) * D + d[None, :], (grad_key * scale).to(grad_key_ptr.dtype.element_ty),
        mask=stored[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(
        grad_value_ptr + (split + row) * DV + dv[None, :], grad_value.to(grad_value_ptr.dtype.element_ty),
        mask=stored[:, None] & (dv < DV)[None, :],
    )  # fmt: skip


@triton.jit
def query_ranges(
    first_ptr, last_ptr, range_ptr, T, S, N, window, local_blocks, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """For each tile of keys the smallest token range [start, end) outside of which no token sees any of them."""
    tile = tl.program_id(0)
    batch = tl.program_id(1)
    key_start = tile * BLOCK_N
    key_end = key_start + BLOCK_N - 1
    earliest = tl.zeros([BLOCK_T], tl.int32) + T
    latest = tl.zeros([BLOCK_T], tl.int32)
    for block_start in range(0, T, BLOCK_T):
        tokens = block_start + tl.arange(0, BLOCK_T)
        first, last = token_interval(first_ptr, last_ptr, batch, tokens, T, T, S, False, True)
        low, high = key_range(first, last, S, N, window, local_blocks, LENGTH, STRIDE, SELECTION_BLOCK)
        sees = (low <= key_end) & (high >= key_start)
        earliest = tl.minimum(earliest, tl.where(sees, tokens, T))
        latest = tl.maximum(latest, tl.where(sees, tokens + 1, 0))
    offset = (batch.to(tl.int64) * tl.num_programs(0) + tile) * 2
    tl.store(range_ptr + offset, tl.min(earliest))
    tl.store(range_ptr + offset + 1, tl.max(latest))
