"""Gradient of the queries over the compressed keys."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_compile.kernels.gpu.hopper.ring import (
    REGISTERS,
    ROWS,
    WARPGROUPS,
    key_tiles,
    load_tile,
    new_barriers,
    seen_keys,
    wait_filled,
    wait_free,
)


@gluon.jit
def load_keys(
    query_desc, grad_desc, key_desc, value_desc, queries, grads, key_ring, value_ring, queries_filled, filled, free,
    tiles, tile_start, batch, head, kv_head, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: the queries and their output gradients once, then tiles of keys and values."""
    own = queries_filled.index(0)
    mbarrier.expect(own, WARPGROUPS * (query_desc.block_type.nbytes + grad_desc.block_type.nbytes))
    for part in gl.static_range(WARPGROUPS):
        place = [batch, head, tile_start + part * ROWS, 0]
        load_tile(query_desc, place, own, queries.index(part))
        load_tile(grad_desc, place, own, grads.index(part))
    for step in range(tiles):
        place = [batch, kv_head, step * BLOCK_N, 0]
        slot = step % SLOTS
        wait_free(free, step, SLOTS)
        mbarrier.expect(filled.index(slot), key_desc.block_type.nbytes + value_desc.block_type.nbytes)
        load_tile(key_desc, place, filled.index(slot), key_ring.index(slot))
        load_tile(value_desc, place, filled.index(slot), value_ring.index(slot))


@gluon.jit
def add_up_keys(
    lse_ptr, delta_ptr, grad_query_ptr, queries, grads, key_ring, value_ring, queries_filled, filled, free, tiles,
    whole, tile_start, pair, T, N, scale, scale_log2,
    PART: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: the gradient of ROWS tokens of one head."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    GRADIENT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = key_ring.dtype
    row_start = tile_start + PART * ROWS
    first_row = pair.to(gl.int64) * T
    tokens = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    seen = seen_keys(tokens, N, LENGTH, STRIDE, IS_CAUSAL)
    lse = gl.load(lse_ptr + first_row + tokens, mask=tokens < T, other=float("-inf"))
    lse_log2 = gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # an empty row weighs nothing
    delta = gl.load(delta_ptr + first_row + tokens, mask=tokens < T, other=0.0)
    query = queries.index(PART).reshape([ROWS, D])
    grad = grads.index(PART).reshape([ROWS, DV])
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    accumulator = gl.zeros([ROWS, D], gl.float32, GRADIENT)
    wait_filled(queries_filled, 0, 1)
    for step in range(tiles):
        slot = step % SLOTS
        key = key_ring.index(slot).reshape([BLOCK_N, D])
        value = value_ring.index(slot).reshape([BLOCK_N, DV])
        wait_filled(filled, step, SLOTS)
        pending = warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)
        pending_grad = warpgroup_mma(grad, value.permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[pending])
        weights = gl.exp2(logits * scale_log2 - lse_log2[:, None])
        if step >= whole:
            keys = step * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LOGITS))
            weights = gl.where(keys[None, :] < seen[:, None], weights, 0.0)
        # The weights are named here, or the compiler would work them out after the wait.
        grad_weights, weights = warpgroup_mma_wait(0, deps=[pending_grad, weights])
        grad_logits = (weights * (grad_weights - delta[:, None])).to(dtype)
        accumulator = warpgroup_mma(
            gl.convert_layout(grad_logits, gl.DotOperandLayout(0, GRADIENT, 2)), key, accumulator
        )
        mbarrier.arrive(free.index(slot))

    rows = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    columns = gl.arange(0, D, gl.SliceLayout(0, STORE))
    pointers = grad_query_ptr + (first_row + rows)[:, None] * D + columns[None, :]
    gl.store(pointers, gl.convert_layout((accumulator * scale).to(dtype), STORE), mask=(rows < T)[:, None])


@gluon.jit
def hopper_query_gradient(
    query_desc, grad_desc, key_desc, value_desc, lse_ptr, delta_ptr, grad_query_ptr, H, T, N, scale, scale_log2,
    GROUP: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Gradient [B, H, T, D] of 128 tokens of one head."""
    dtype: gl.constexpr = key_desc.dtype
    tile_start = (gl.num_programs(0) - 1 - gl.program_id(0)) * (WARPGROUPS * ROWS)
    pair = gl.program_id(1)
    batch = pair // H
    head = pair % H
    kv_head = head // GROUP
    tiles, whole = key_tiles(tile_start, T, N, LENGTH, STRIDE, BLOCK_N, IS_CAUSAL)
    queries = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, D], query_desc.layout)
    grads = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, DV], grad_desc.layout)
    key_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, D], key_desc.layout)
    value_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, DV], value_desc.layout)
    queries_filled = new_barriers(1, 1)
    filled = new_barriers(SLOTS, 1)
    free = new_barriers(SLOTS, WARPGROUPS)
    gl.warp_specialize(
        [
            (add_up_keys, (
                lse_ptr, delta_ptr, grad_query_ptr, queries, grads, key_ring, value_ring, queries_filled, filled, free,
                tiles, whole, tile_start, pair, T, N, scale, scale_log2, 0, LENGTH, STRIDE, D, DV, BLOCK_N, SLOTS,
                IS_CAUSAL,
            )),
            (add_up_keys, (
                lse_ptr, delta_ptr, grad_query_ptr, queries, grads, key_ring, value_ring, queries_filled, filled, free,
                tiles, whole, tile_start, pair, T, N, scale, scale_log2, 1, LENGTH, STRIDE, D, DV, BLOCK_N, SLOTS,
                IS_CAUSAL,
            )),
            (load_keys, (
                query_desc, grad_desc, key_desc, value_desc, queries, grads, key_ring, value_ring, queries_filled,
                filled, free, tiles, tile_start, batch, head, kv_head, BLOCK_N, SLOTS,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
