"""Forward pass of attention over one contiguous run of keys per query, as in FlashAttention.

`attend_range` is the whole computation of a tile.  Two kernels wrap it: `flash_forward` here, which eager calls launch,
and the template (templates.py) that Inductor generates a kernel from, with what follows the attention fused behind it.
"""

import triton
import triton.language as tl

from nsa_compile.kernels.gpu.flash import (
    is_edge,
    key_range,
    load_tile,
    range_step,
    sum_by_gates,
    tile_bounds,
    token_interval,
    visible_keys,
)


@triton.jit
def forward_step(
    accumulator, maximum, total, query, key_ptr, value_ptr, valid_ptr, start, low, high, edge, N, scale_log2,
    stride_kn, stride_vn, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_VALID: tl.constexpr, LSE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax; unless at an `edge`, every row sees all of it."""
    columns = tl.arange(0, BLOCK_N)
    keys = start + columns
    key_base = key_ptr + tl.cast(start, tl.int64) * stride_kn
    key = load_tile(key_base, columns, tl.arange(0, BLOCK_D), stride_kn, keys < N, D, BLOCK_D)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
    if edge:
        logits = tl.where(visible_keys(valid_ptr, keys, low, high, N, HAS_VALID), logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(logits - reference[:, None])
    rescale = tl.exp2(maximum - reference)
    total = total * rescale + tl.sum(weights, 1)
    if not LSE_ONLY:
        accumulator = accumulator * rescale[:, None]
        value_base = value_ptr + tl.cast(start, tl.int64) * stride_vn
        value = load_tile(value_base, columns, tl.arange(0, BLOCK_DV), stride_vn, keys < N, DV, BLOCK_DV)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, new_maximum, total


@triton.jit
def attend_range(
    query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, base_ptr, base_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    batch, head, tile, H, T, S, N, window, local_blocks, initial, scale_log2,
    GROUP: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_BASE: tl.constexpr, LSE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [BLOCK_M, BLOCK_DV] float32 and natural-log lse [BLOCK_M] of one tile of tokens of one query head.

    With HAS_BASE the softmax starts from an attention to other keys: base [B, T, H, DV] and its lse [B, H, T].
    """
    rows = tl.arange(0, BLOCK_M)
    tile_start = tile * BLOCK_M
    tokens = tile_start + rows
    stored = tokens < T
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, T, T, S, IS_CAUSAL, HAS_INTERVAL)
    low, high = key_range(first, last, S, N, window, local_blocks, LENGTH, STRIDE, SELECTION_BLOCK)

    query_base = query_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    query_base += tile_start.to(tl.int64) * stride_qt
    query = load_tile(query_base, rows, tl.arange(0, BLOCK_D), stride_qt, stored, D, BLOCK_D)
    kv_head = (head // GROUP).to(tl.int64)
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    value_base = value_ptr + batch.to(tl.int64) * stride_vb + kv_head * stride_vh
    valid_base = valid_ptr + batch.to(tl.int64) * N

    if HAS_BASE:
        lse_base = base_lse_ptr + (batch * H + head).to(tl.int64) * T
        maximum = tl.load(lse_base + tokens, mask=stored, other=float("-inf")) * 1.4426950408889634
        some = maximum > float("-inf")
        total = tl.where(some, 1.0, 0.0)
        base = base_ptr + ((batch.to(tl.int64) * T + tile_start) * H + head) * DV
        accumulator = load_tile(base, rows, tl.arange(0, BLOCK_DV), H * DV, some, DV, BLOCK_DV).to(tl.float32)
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    initial_high = tl.where(last >= first, tl.minimum(initial if HAS_INITIAL else 0, low), 0) - 1
    loop_start, full_start, full_end, loop_end = tile_bounds(low, high, BLOCK_N)
    initial_end = (tl.max(initial_high) + BLOCK_N) // BLOCK_N * BLOCK_N
    initial_full = (tl.min(initial_high) + 1) // BLOCK_N * BLOCK_N
    for step in range(0, initial_end + loop_end - loop_start, BLOCK_N):
        start, step_low, step_high = range_step(step, initial_end, loop_start, initial_high, low, high)
        edge = is_edge(step, start, initial_end, initial_full, full_start, full_end, HAS_VALID)
        accumulator, maximum, total = forward_step(
            accumulator, maximum, total, query, key_base, value_base, valid_base, start, step_low, step_high, edge, N,
            scale_log2, stride_kn, stride_vn, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_VALID, LSE_ONLY, PRECISION,
        )  # fmt: skip

    seen = total > 0
    output = accumulator / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (maximum + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    return output, lse


@triton.jit
def flash_forward(
    query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, output_ptr, lse_ptr, other_ptr, gates_ptr,
    stride_gb, stride_gh, stride_gt, stride_gate,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, T, S, N, window, local_blocks, initial, scale_log2,
    GROUP: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_BASE: tl.constexpr, LSE_ONLY: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Output [B, T, H, DV] and lse [B, H, T] of BLOCK_M tokens of a head; with HAS_BASE, added to what they hold.

    With GATE the output is summed with another, [B, T, H, DV], by gates [B, H, T, 3], as `sum_by_gates` does.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: heaviest tiles first
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    output, lse = attend_range(
        query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, output_ptr, lse_ptr,
        stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        batch, head, tile, H, T, S, N, window, local_blocks, initial, scale_log2, GROUP, LENGTH, STRIDE,
        SELECTION_BLOCK, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_INTERVAL, HAS_VALID, HAS_INITIAL,
        HAS_BASE, LSE_ONLY, PRECISION,
    )  # fmt: skip
    tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DV)
    stored = tokens < T
    if not LSE_ONLY:
        row = (batch.to(tl.int64) * T + tokens) * H + head
        if GATE > 0:
            gate_row = batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh + tokens.to(tl.int64) * stride_gt
            output = sum_by_gates(
                output, other_ptr, gates_ptr, row, gate_row, stride_gate, columns, stored, GATE, DV
            )  # fmt: skip
        tl.store(
            output_ptr + row[:, None] * DV + columns[None, :], output.to(output_ptr.dtype.element_ty),
            mask=stored[:, None] & (columns < DV)[None, :],
        )  # fmt: skip
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * T + tokens, lse, mask=stored)
