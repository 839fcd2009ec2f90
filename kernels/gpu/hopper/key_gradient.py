"""Gradients of keys and values: compressed ones, which all later tokens see, or those of a window."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_compile.kernels.gpu.hopper.ring import (
    REGISTERS,
    ROWS,
    WARPGROUPS,
    load_tile,
    new_barriers,
    wait_filled,
    wait_free,
)


@gluon.jit
def load_queries(
    query_desc, grad_desc, key_desc, value_desc, lse_ptr, delta_ptr, query_ring, grad_ring, lse_ring, delta_ring, keys,
    values, keys_filled, filled, free, start, tiles, batch, kv_head, first_head, key_start, H, T,
    HEADS: gl.constexpr, BLOCK_M: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys and values once, then tiles of queries with what belongs to them, head by head."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    own = keys_filled.index(0)
    mbarrier.expect(own, WARPGROUPS * (key_desc.block_type.nbytes + value_desc.block_type.nbytes))
    for part in gl.static_range(WARPGROUPS):
        place = [batch, kv_head, key_start + part * ROWS, 0]
        load_tile(key_desc, place, own, keys.index(part))
        load_tile(value_desc, place, own, values.index(part))
    for step in range(HEADS * tiles):
        head = first_head + step // tiles
        token = start + step % tiles * BLOCK_M
        slot = step % SLOTS
        tokens = token + gl.arange(0, BLOCK_M, LINE)
        row = (batch * H + head).to(gl.int64) * T + tokens
        lse = gl.load(lse_ptr + row, mask=tokens < T, other=float("-inf"))
        delta = gl.load(delta_ptr + row, mask=tokens < T, other=0.0)
        wait_free(free, step, SLOTS)
        mbarrier.expect(filled.index(slot), query_desc.block_type.nbytes + grad_desc.block_type.nbytes)
        load_tile(query_desc, [batch, head, token, 0], filled.index(slot), query_ring.index(slot))
        load_tile(grad_desc, [batch, head, token, 0], filled.index(slot), grad_ring.index(slot))
        # An empty row, and one after the last token, weighs nothing.
        lse_ring.index(slot).store(gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634))
        delta_ring.index(slot).store(delta)
        mbarrier.arrive(filled.index(slot))


@gluon.jit
def add_up_queries(
    grad_key_ptr, grad_value_ptr, query_ring, grad_ring, lse_ring, delta_ring, keys, values, keys_filled, filled, free,
    start, whole_start, whole_end, tiles, key_start, first_row, N, scale, scale_log2,
    PART: gl.constexpr, WINDOW: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, HEADS: gl.constexpr, BLOCK_M: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: the gradients of ROWS keys and values, logits transposed."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    dtype: gl.constexpr = keys.dtype
    row_start = key_start + PART * ROWS
    key = keys.index(PART).reshape([ROWS, D])
    value = values.index(PART).reshape([ROWS, DV])
    first_token = (row_start + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))) * STRIDE + LENGTH - 1
    nothing = gl.zeros([ROWS, BLOCK_M], gl.float32, LOGITS)
    grad_key = gl.zeros([ROWS, D], gl.float32, KEYS)
    grad_value = gl.zeros([ROWS, DV], gl.float32, VALUES)
    wait_filled(keys_filled, 0, 1)
    for step in range(HEADS * tiles):
        slot = step % SLOTS
        query = query_ring.index(slot).reshape([BLOCK_M, D])
        grad = grad_ring.index(slot).reshape([BLOCK_M, DV])
        wait_filled(filled, step, SLOTS)
        pending = warpgroup_mma(key, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
        pending_grad = warpgroup_mma(value, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[pending])
        lse_log2 = lse_ring.index(slot).load(gl.SliceLayout(0, LOGITS))
        weights = gl.exp2(logits * scale_log2 - lse_log2[None, :])
        token = start + step % tiles * BLOCK_M
        if token < whole_start:
            tokens = token + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LOGITS))
            weights = gl.where(first_token[:, None] <= tokens[None, :], weights, 0.0)
        if WINDOW > 0:
            if token + BLOCK_M > whole_end:
                tokens = token - WINDOW + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LOGITS))
                weights = gl.where(first_token[:, None] > tokens[None, :], weights, 0.0)
        operand = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, VALUES, 2))
        pending_value = warpgroup_mma(operand, grad, grad_value, is_async=True)
        grad_weights = warpgroup_mma_wait(1, deps=[pending_grad])
        delta = delta_ring.index(slot).load(gl.SliceLayout(0, LOGITS))
        grad_logits = (weights * (grad_weights - delta[None, :])).to(dtype)
        grad_operand = gl.convert_layout(grad_logits, gl.DotOperandLayout(0, KEYS, 2))
        pending_key = warpgroup_mma(grad_operand, query, grad_key, is_async=True)
        grad_value, grad_key, _operand, _grad_operand = warpgroup_mma_wait(
            0, deps=[pending_value, pending_key, operand, grad_operand]
        )
        mbarrier.arrive(free.index(slot))

    store_rows(grad_key_ptr, grad_key * scale, row_start, first_row, N, D)
    store_rows(grad_value_ptr, grad_value, row_start, first_row, N, DV)


@gluon.jit
def store_rows(pointer, tile, row_start, first_row, N, WIDTH: gl.constexpr):
    """Stores ROWS rows of a contiguous [·, WIDTH], those of keys before the N-th."""
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
    stored = gl.convert_layout(tile.to(pointer.dtype.element_ty), STORE)
    gl.store(pointer + (first_row + rows)[:, None] * WIDTH + columns[None, :], stored, mask=(rows < N)[:, None])


@gluon.jit
def hopper_key_gradient(
    query_desc, grad_desc, key_desc, value_desc, lse_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, H, T, N,
    query_splits, scale, scale_log2,
    GROUP: gl.constexpr, HEADS: gl.constexpr, WINDOW: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_M: gl.constexpr, SLOTS: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Gradients of 128 keys and values, summed over HEADS query heads and one of `query_splits` token ranges.

    A key is seen by the first WINDOW tokens that may see it, without one by all of them.
    Writes [split, B, H_kv, N, ·] with split = head split x query split, as `flash_key_gradient` does.
    """
    dtype: gl.constexpr = key_desc.dtype
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    H_kv = H // GROUP
    batch = gl.program_id(0) // H_kv
    kv_head = gl.program_id(0) % H_kv
    head_split = gl.program_id(2) // query_splits
    query_split = gl.program_id(2) % query_splits
    first_head = kv_head * GROUP + head_split * HEADS
    key_start = gl.program_id(1) * (WARPGROUPS * ROWS)  # causal: keys that most tokens see come first
    first_row = (gl.program_id(2).to(gl.int64) * gl.num_programs(0) + gl.program_id(0)) * N
    # Tokens from `start` to before `end` see some of the keys, those from `whole_start` to before `whole_end` all.
    start = T * 0
    end = T
    whole_start = T * 0
    whole_end = T
    if IS_CAUSAL:
        start = key_start * STRIDE + LENGTH - 1
        whole_start = (key_start + WARPGROUPS * ROWS - 1) * STRIDE + LENGTH - 1
        if WINDOW > 0:
            end = gl.minimum(whole_start + WINDOW, T)
            whole_end = start + WINDOW
    end = (end + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = gl.minimum(start // BLOCK_M * BLOCK_M, end)
    share = ((end - start) // BLOCK_M + query_splits - 1) // query_splits * BLOCK_M
    start = gl.minimum(start + query_split * share, end)
    tiles = gl.minimum(share, end - start) // BLOCK_M
    query_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, D], query_desc.layout)
    grad_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, DV], grad_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], LINES)
    delta_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], LINES)
    keys = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, DV], value_desc.layout)
    keys_filled = new_barriers(1, 1)
    filled = new_barriers(SLOTS, 2)  # the copies, and the warp that stores lse and delta
    free = new_barriers(SLOTS, WARPGROUPS)
    gl.warp_specialize(
        [
            (add_up_queries, (
                grad_key_ptr, grad_value_ptr, query_ring, grad_ring, lse_ring, delta_ring, keys, values, keys_filled,
                filled, free, start, whole_start, whole_end, tiles, key_start, first_row, N, scale, scale_log2, 0,
                WINDOW, LENGTH, STRIDE, D, DV, HEADS, BLOCK_M, SLOTS,
            )),
            (add_up_queries, (
                grad_key_ptr, grad_value_ptr, query_ring, grad_ring, lse_ring, delta_ring, keys, values, keys_filled,
                filled, free, start, whole_start, whole_end, tiles, key_start, first_row, N, scale, scale_log2, 1,
                WINDOW, LENGTH, STRIDE, D, DV, HEADS, BLOCK_M, SLOTS,
            )),
            (load_queries, (
                query_desc, grad_desc, key_desc, value_desc, lse_ptr, delta_ptr, query_ring, grad_ring, lse_ring,
                delta_ring, keys, values, keys_filled, filled, free, start, tiles, batch, kv_head, first_head,
                key_start, H, T, HEADS, BLOCK_M, SLOTS,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
