"""Attention to listed blocks, block by block: keys stay in shared memory while the queries that listed them pass by.

A query-major loop (one token walks its own list, as in the paper) fetches every block through L2 once per token.
Here the lists are inverted (inverted.py): for each block, in token order, the (token, slot) pairs that name it.  A
block's keys and values are loaded once, its queries stream through, and each (token, slot) leaves a normalised partial
output with its lse, which `merge_outputs` merges.  The gradient kernel is the same loop; it sums the gradients of a
block's keys and values in registers, in token order, so nothing is atomic and results repeat to the bit.

A selection block longer than BLOCK_S is handled as `sub` blocks, each with a partial of its own.
"""

import triton
import triton.language as tl

from nsa_compile.kernels.gpu.flash import load_tile, sum_by_gates, token_interval
from nsa_compile.kernels.gpu.inverted import dense_start, routed
from nsa_compile.kernels.gpu.shares import gradient_row, place_entries, program_place


@triton.jit
def entry_places(
    order_ptr, first_entry, start, end, step, PARTS: tl.constexpr, PAIRS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Place of each row's list entry, which a step of the loop handles, in [token, slot]."""
    entries = start + step // PARTS * PAIRS + tl.arange(0, BLOCK_M) // GROUP_BLOCK
    if DIRECT:
        place = first_entry + entries
    else:
        place = tl.load(order_ptr + entries, mask=entries < end, other=first_entry)
    return place


@triton.jit
def entry_heads(
    start, end, step, kv_head, PARTS: tl.constexpr, PAIRS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The query head of each row in a step, and whether the row is used."""
    rows = tl.arange(0, BLOCK_M)
    entries = start + step // PARTS * PAIRS + rows // GROUP_BLOCK
    member = step % PARTS * GROUP_BLOCK + rows % GROUP_BLOCK
    used = (entries < end) & (rows < PAIRS * GROUP_BLOCK) & (member < GROUP)
    return kv_head * GROUP + member, used


@triton.jit
def load_entries(pointer, heads, tokens, used, stride_h, stride_t, columns, COLUMNS: tl.constexpr):
    """Loads the rows [BLOCK_M, columns] of a [.., H, T, COLUMNS] tensor, zero where not used."""
    rows = pointer + heads.to(tl.int64) * stride_h + tokens.to(tl.int64) * stride_t
    return tl.load(rows[:, None] + columns[None, :], mask=used[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def attend_listed(
    query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, blocks_ptr, order_ptr, bounds_ptr, further_ptr,
    partial_ptr, partial_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_pairs, H_kv, T, S, num_blocks, share, most_further, window, local_blocks, initial, token_start, token_end,
    scale_log2,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, SUB: tl.constexpr, BLOCK_S: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr, NUM_LISTED: tl.constexpr, FIRST_SLOT: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_DENSE: tl.constexpr, DIRECT: tl.constexpr, MASKED: tl.constexpr, PAIRS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial output and base-2 lse of the (token, slot) pairs of one block; rows are pairs x heads of the group.

    Writes partial [B, token, slot·SUB + sub, H, DV].  DIRECT: the program's block is that of one pair, without an
    inverted list, for few tokens (decoding).  Not MASKED: every pair sees all BLOCK_S keys.
    """
    pair, place = program_place(num_pairs, PAIRS_FIRST)
    batch = pair // H_kv
    kv_head = pair % H_kv
    sub = place % SUB
    chunk = token_end - token_start
    if DIRECT:
        start = place // SUB
        end = start + 1
        entry_token = token_start + start // SLOTS
        listed = blocks_ptr + (pair.to(tl.int64) * T + entry_token) * NUM_LISTED
        block = tl.load(listed + FIRST_SLOT + start % SLOTS)
        entry_first, entry_last = token_interval(
            first_ptr, last_ptr, batch, entry_token, token_end, T, S, IS_CAUSAL, HAS_INTERVAL
        )
        entry_low = dense_start(entry_first, entry_last, S, window, local_blocks, HAS_DENSE, SELECTION_BLOCK)
        if not routed(block, entry_low, initial, SELECTION_BLOCK):
            return
    else:
        block, start, end = place_entries(bounds_ptr, further_ptr, pair, place // SUB, num_blocks, share, most_further)
        if start >= end:
            return
    columns = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    key_start = block * SELECTION_BLOCK + sub * BLOCK_S
    keys = key_start + columns
    key_end = tl.minimum((block + 1) * SELECTION_BLOCK, S)
    inside = keys < key_end
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_base = value_ptr + batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    key = load_tile(key_base + tl.cast(key_start, tl.int64) * stride_kn, columns, d, stride_kn, inside, D, BLOCK_D)
    value = load_tile(
        value_base + tl.cast(key_start, tl.int64) * stride_vn, columns, dv, stride_vn, inside, DV, BLOCK_DV
    )
    if HAS_VALID:
        inside = inside & (tl.load(valid_ptr + batch.to(tl.int64) * S + keys, mask=inside, other=0) != 0)

    query_base = query_ptr + batch.to(tl.int64) * stride_qb
    parts: tl.constexpr = (GROUP + GROUP_BLOCK - 1) // GROUP_BLOCK
    pairs_per_tile: tl.constexpr = BLOCK_M // GROUP_BLOCK
    first_entry = token_start * SLOTS
    order = order_ptr + pair.to(tl.int64) * T * SLOTS + first_entry
    place = entry_places(order, first_entry, start, end, 0, parts, pairs_per_tile, GROUP_BLOCK, BLOCK_M, DIRECT)
    pairs = place - first_entry
    following = entry_places(order, first_entry, start, end, 1, parts, pairs_per_tile, GROUP_BLOCK, BLOCK_M, DIRECT)
    heads, active = entry_heads(start, end, 0, kv_head, parts, pairs_per_tile, GROUP, GROUP_BLOCK, BLOCK_M)
    query = load_entries(query_base, heads, token_start + pairs // SLOTS, active, stride_qh, stride_qt, d, D)
    for step in range(tl.cdiv(end - start, pairs_per_tile) * parts):
        # What the next step needs is on its way while this one computes.
        coming = entry_places(
            order, first_entry, start, end, step + 2, parts, pairs_per_tile, GROUP_BLOCK, BLOCK_M, DIRECT
        )
        following_pairs = following - first_entry
        heads, active = entry_heads(start, end, step + 1, kv_head, parts, pairs_per_tile, GROUP, GROUP_BLOCK, BLOCK_M)
        coming_query = load_entries(
            query_base, heads, token_start + following_pairs // SLOTS, active, stride_qh, stride_qt, d, D
        )
        heads, active = entry_heads(start, end, step, kv_head, parts, pairs_per_tile, GROUP, GROUP_BLOCK, BLOCK_M)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        if MASKED:
            tokens = token_start + pairs // SLOTS
            first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
            low = dense_start(first, last, S, window, local_blocks, HAS_DENSE, SELECTION_BLOCK)
            last = tl.minimum(last, low - 1)
            seen = inside[None, :] & (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        maximum = tl.max(logits, 1)
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)
        weights = tl.exp2(logits - reference[:, None])
        total = tl.sum(weights, 1)
        output = tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        output *= (1.0 / tl.where(total > 0, total, 1.0))[:, None]
        lse = tl.where(total > 0, reference + tl.log2(total), float("-inf"))
        row = ((batch.to(tl.int64) * chunk * SLOTS + pairs) * SUB + sub) * (H_kv * GROUP) + heads
        tl.store(
            partial_ptr + row[:, None] * DV + dv[None, :], output.to(partial_ptr.dtype.element_ty),
            mask=active[:, None] & (dv < DV)[None, :],
        )  # fmt: skip
        tl.store(partial_lse_ptr + row, lse, mask=active)
        pairs = following_pairs
        following = coming
        query = coming_query


@triton.jit
def listed_gradient(
    query_ptr, key_ptr, value_ptr, first_ptr, last_ptr, valid_ptr, order_ptr, bounds_ptr, further_ptr, grad_ptr,
    lse_ptr, delta_ptr, partial_ptr, grad_key_ptr, grad_value_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gt,
    num_pairs, H_kv, T, S, num_blocks, share, most_further, window, local_blocks, token_start, token_end, scale,
    scale_log2,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, SUB: tl.constexpr, BLOCK_S: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_DENSE: tl.constexpr, MASKED: tl.constexpr, PAIRS_FIRST: tl.constexpr, IS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that pass through one block of keys, for the (token, slot) pairs that list it; MASKED as above.

    Adds to grad_key and grad_value [B, H_kv, S, ·] float32, the keys' without the scale, or writes them if this
    IS_FIRST; writes the rows of further shares behind them (shares.py), and what the block gives to the gradient of its
    queries, partial [B, token, slot·SUB + sub, H, D].
    """
    pair, place = program_place(num_pairs, PAIRS_FIRST)
    batch = pair // H_kv
    kv_head = pair % H_kv
    sub = place % SUB
    place //= SUB
    chunk = token_end - token_start
    block, start, end = place_entries(bounds_ptr, further_ptr, pair, place, num_blocks, share, most_further)
    is_further = place < most_further
    if (start >= end) & (is_further | (not IS_FIRST)):
        return
    columns = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    key_start = block * SELECTION_BLOCK + sub * BLOCK_S
    keys = key_start + columns
    inside = keys < tl.minimum((block + 1) * SELECTION_BLOCK, S)
    stored = inside
    key_base = key_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_base = value_ptr + batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    key = load_tile(key_base + tl.cast(key_start, tl.int64) * stride_kn, columns, d, stride_kn, inside, D, BLOCK_D)
    value = load_tile(
        value_base + tl.cast(key_start, tl.int64) * stride_vn, columns, dv, stride_vn, inside, DV, BLOCK_DV
    )
    if HAS_VALID:
        inside = inside & (tl.load(valid_ptr + batch.to(tl.int64) * S + keys, mask=inside, other=0) != 0)

    grad_key = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    query_base = query_ptr + batch.to(tl.int64) * stride_qb
    grad_base = grad_ptr + batch.to(tl.int64) * stride_gb
    parts: tl.constexpr = (GROUP + GROUP_BLOCK - 1) // GROUP_BLOCK
    pairs_per_tile: tl.constexpr = BLOCK_M // GROUP_BLOCK
    first_entry = token_start * SLOTS
    order = order_ptr + pair.to(tl.int64) * T * SLOTS + first_entry
    entries = entry_places(order, first_entry, start, end, 0, parts, pairs_per_tile, GROUP_BLOCK, BLOCK_M, False)
    pairs = entries - first_entry
    following = entry_places(order, first_entry, start, end, 1, parts, pairs_per_tile, GROUP_BLOCK, BLOCK_M, False)
    for step in range(tl.cdiv(end - start, pairs_per_tile) * parts):
        # Two steps ahead, so that the next step's rows, which are loaded in this one, need not wait for their places.
        coming = entry_places(
            order, first_entry, start, end, step + 2, parts, pairs_per_tile, GROUP_BLOCK, BLOCK_M, False
        )
        heads, active = entry_heads(start, end, step, kv_head, parts, pairs_per_tile, GROUP, GROUP_BLOCK, BLOCK_M)
        tokens = token_start + pairs // SLOTS
        query = load_entries(query_base, heads, tokens, active, stride_qh, stride_qt, d, D)
        grad = load_entries(grad_base, heads, tokens, active, stride_gh, stride_gt, dv, DV)
        row = (batch.to(tl.int64) * (H_kv * GROUP) + heads) * T + tokens
        lse = tl.load(lse_ptr + row, mask=active, other=float("-inf"))
        lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        delta = tl.load(delta_ptr + row, mask=active, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        weights = tl.exp2(logits - lse_log2[:, None])
        if MASKED:
            first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
            low = dense_start(first, last, S, window, local_blocks, HAS_DENSE, SELECTION_BLOCK)
            last = tl.minimum(last, low - 1)
            seen = inside[None, :] & (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad_value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_logits = (weights * (grad_weights - delta[:, None])).to(key.dtype)
        grad_key = tl.dot(tl.trans(grad_logits), query, grad_key, input_precision=PRECISION)
        grad_query = tl.dot(grad_logits, key, input_precision=PRECISION) * scale
        partial_row = ((batch.to(tl.int64) * chunk * SLOTS + pairs) * SUB + sub) * (H_kv * GROUP) + heads
        tl.store(
            partial_ptr + partial_row[:, None] * D + d[None, :], grad_query.to(partial_ptr.dtype.element_ty),
            mask=active[:, None] & (d < D)[None, :],
        )  # fmt: skip
        pairs = following - first_entry
        following = coming

    row = gradient_row(num_pairs, pair, place, key_start, S, most_further, sub, SUB, BLOCK_S)
    key_out = grad_key_ptr + row * D + columns[:, None] * D + d[None, :]
    value_out = grad_value_ptr + row * DV + columns[:, None] * DV + dv[None, :]
    key_mask = stored[:, None] & (d < D)[None, :]
    value_mask = stored[:, None] & (dv < DV)[None, :]
    if not IS_FIRST:
        grad_key += tl.load(key_out, mask=key_mask & (not is_further), other=0.0)
        grad_value += tl.load(value_out, mask=value_mask & (not is_further), other=0.0)
    tl.store(key_out, grad_key, mask=key_mask)
    tl.store(value_out, grad_value, mask=value_mask)


@triton.jit
def merge_outputs(
    blocks_ptr, first_ptr, last_ptr, partial_ptr, partial_lse_ptr, output_ptr, lse_ptr, other_ptr, gates_ptr,
    stride_gb, stride_gh, stride_gt, stride_gate,
    H_kv, T, S, window, local_blocks, initial, token_start, token_end,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, SUB: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    NUM_LISTED: tl.constexpr, FIRST_SLOT: tl.constexpr, SLOTS: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_DENSE: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One softmax of partial outputs [B, token, slot·SUB + sub, H, DV].

    Rows are tokens x heads of a group.  Writes output [B, T, H, DV] and lse [B, H, T], natural logarithm.  GATE as in
    `flash_forward`.
    """
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP_BLOCK
    pair = tl.program_id(1)
    batch = pair // H_kv
    rows = tl.arange(0, BLOCK_M)
    local = tl.program_id(0) * tokens_per_tile + rows // GROUP_BLOCK
    tokens = token_start + local
    member = tl.program_id(2) * GROUP_BLOCK + rows % GROUP_BLOCK
    stored = (tokens < token_end) & (rows < tokens_per_tile * GROUP_BLOCK) & (member < GROUP)
    heads = (pair % H_kv) * GROUP + member
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
    low = dense_start(first, last, S, window, local_blocks, HAS_DENSE, SELECTION_BLOCK)
    columns = tl.arange(0, BLOCK_DV)
    wide = (columns < DV)[None, :]
    H = H_kv * GROUP
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    listed = blocks_ptr + (pair.to(tl.int64) * T + tokens) * NUM_LISTED
    row = (batch.to(tl.int64) * (token_end - token_start) + local) * (SLOTS * SUB)
    for slot in tl.range(SLOTS * SUB, num_stages=3):
        block = tl.load(listed + FIRST_SLOT + slot // SUB, mask=stored, other=-1)
        used = routed(block, low, initial, SELECTION_BLOCK)
        offset = (row + slot) * H + heads
        lse = tl.load(partial_lse_ptr + offset, mask=used, other=float("-inf"))
        partial = tl.load(partial_ptr + offset[:, None] * DV + columns[None, :], mask=used[:, None] & wide, other=0.0)
        new_maximum = tl.maximum(maximum, lse)
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - reference)
        weight = tl.exp2(lse - reference)
        accumulator = accumulator * rescale[:, None] + partial.to(tl.float32) * weight[:, None]
        total = total * rescale + weight
        maximum = new_maximum
    seen = total > 0
    output = accumulator / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (maximum + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    target = (batch.to(tl.int64) * T + tokens) * H + heads
    if GATE > 0:
        gate_row = batch.to(tl.int64) * stride_gb + heads.to(tl.int64) * stride_gh + tokens.to(tl.int64) * stride_gt
        output = sum_by_gates(
            output, other_ptr, gates_ptr, target, gate_row, stride_gate, columns, stored, GATE, DV
        )  # fmt: skip
    tl.store(
        output_ptr + target[:, None] * DV + columns[None, :], output.to(output_ptr.dtype.element_ty),
        mask=stored[:, None] & wide,
    )  # fmt: skip
    tl.store(lse_ptr + (batch * H + heads).to(tl.int64) * T + tokens, lse, mask=stored)


@triton.jit
def merge_query_gradients(
    blocks_ptr, first_ptr, last_ptr, partial_ptr, grad_query_ptr,
    H_kv, T, S, window, local_blocks, initial, token_start, token_end,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, SUB: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    NUM_LISTED: tl.constexpr, FIRST_SLOT: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_DENSE: tl.constexpr,
):  # fmt: skip
    """Sum of partial gradients [B, token, slot·SUB + sub, H, D] and, with HAS_DENSE, of what grad_query holds."""
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP_BLOCK
    pair = tl.program_id(1)
    batch = pair // H_kv
    rows = tl.arange(0, BLOCK_M)
    local = tl.program_id(0) * tokens_per_tile + rows // GROUP_BLOCK
    tokens = token_start + local
    member = tl.program_id(2) * GROUP_BLOCK + rows % GROUP_BLOCK
    stored = (tokens < token_end) & (rows < tokens_per_tile * GROUP_BLOCK) & (member < GROUP)
    heads = (pair % H_kv) * GROUP + member
    first, last = token_interval(first_ptr, last_ptr, batch, tokens, token_end, T, S, IS_CAUSAL, HAS_INTERVAL)
    low = dense_start(first, last, S, window, local_blocks, HAS_DENSE, SELECTION_BLOCK)
    columns = tl.arange(0, BLOCK_D)
    wide = (columns < D)[None, :]
    H = H_kv * GROUP
    target = ((batch * H + heads).to(tl.int64) * T + tokens)[:, None] * D + columns[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_DENSE:
        accumulator += tl.load(grad_query_ptr + target, mask=stored[:, None] & wide, other=0.0).to(tl.float32)
    listed = blocks_ptr + (pair.to(tl.int64) * T + tokens) * NUM_LISTED
    row = (batch.to(tl.int64) * (token_end - token_start) + local) * (SLOTS * SUB)
    for slot in tl.range(SLOTS * SUB, num_stages=3):
        block = tl.load(listed + FIRST_SLOT + slot // SUB, mask=stored, other=-1)
        used = routed(block, low, initial, SELECTION_BLOCK)
        offset = (row + slot) * H + heads
        partial = tl.load(partial_ptr + offset[:, None] * D + columns[None, :], mask=used[:, None] & wide, other=0.0)
        accumulator += partial.to(tl.float32)
    tl.store(grad_query_ptr + target, accumulator.to(grad_query_ptr.dtype.element_ty), mask=stored[:, None] & wide)
