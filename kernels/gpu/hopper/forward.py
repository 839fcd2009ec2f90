"""Forward pass over the compressed keys: FlashAttention-3 without its explicit turns of the two warpgroups."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
    key_desc, value_desc, key_ring, value_ring, key_filled, value_filled, key_free, value_free, tiles, batch, kv_head,
    BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: tiles of keys and values, the last one first."""
    for step in range(tiles):
        place = [batch, kv_head, (tiles - 1 - step) * BLOCK_N, 0]
        slot = step % SLOTS
        wait_free(key_free, step, SLOTS)
        mbarrier.expect(key_filled.index(slot), key_desc.block_type.nbytes)
        load_tile(key_desc, place, key_filled.index(slot), key_ring.index(slot))
        wait_free(value_free, step, SLOTS)
        mbarrier.expect(value_filled.index(slot), value_desc.block_type.nbytes)
        load_tile(value_desc, place, value_filled.index(slot), value_ring.index(slot))


@gluon.jit
def logits_of(query, key_ring, slot, D: gl.constexpr, BLOCK_N: gl.constexpr, MMA: gl.constexpr):
    """Starts query · key, [ROWS, BLOCK_N] float32, without the scale."""
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, MMA)
    key = key_ring.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
    return warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)


@gluon.jit
def masked(logits, tile, seen, BLOCK_N: gl.constexpr, MMA: gl.constexpr):
    """−inf for the keys that a row does not see."""
    keys = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
    return gl.where(keys[None, :] < seen[:, None], logits, float("-inf"))


@gluon.jit
def add_keys(logits, maximum, total, scale_log2):
    """A tile's step of the online softmax: weights, the new maximum and total, and the factor of what came before."""
    new_maximum = gl.maximum(maximum, gl.max(logits, 1) * scale_log2)
    reference = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = gl.exp2(logits * scale_log2 - reference[:, None])
    rescale = gl.exp2(maximum - reference)
    return weights, new_maximum, total * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def attend_rows(
    query_ptr, output_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, queries, key_ring, value_ring, key_filled,
    value_filled, key_free, value_free, tiles, whole, tile_start, batch, head, H, T, N, scale_log2,
    PART: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: output and lse of ROWS tokens of one head."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = key_ring.dtype
    row_start = tile_start + PART * ROWS

    rows = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))
    base = query_ptr + batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
    pointers = base + rows[:, None].to(gl.int64) * stride_qt + gl.arange(0, D, gl.SliceLayout(0, LOAD))[None, :]
    query = queries.index(PART)
    query.store(gl.load(pointers, mask=(rows < T)[:, None], other=0.0))
    fence_async_shared()

    tokens = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    seen = seen_keys(tokens, N, LENGTH, STRIDE, IS_CAUSAL)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    accumulator = gl.zeros([ROWS, DV], gl.float32, OUTPUT)
    # The last tile is the one that some rows see in part or not at all.
    wait_filled(key_filled, 0, SLOTS)
    logits = warpgroup_mma_wait(0, deps=[logits_of(query, key_ring, 0, D, BLOCK_N, LOGITS)])
    mbarrier.arrive(key_free.index(0))
    logits = masked(logits, tiles - 1, seen, BLOCK_N, LOGITS)
    weights, maximum, total, _rescale = add_keys(logits, maximum, total, scale_log2)
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    for step in range(1, tiles):
        # This tile's logits and the output of the one before are under way together.
        slot = step % SLOTS
        before = (step - 1) % SLOTS
        wait_filled(key_filled, step, SLOTS)
        pending = logits_of(query, key_ring, slot, D, BLOCK_N, LOGITS)
        wait_filled(value_filled, step - 1, SLOTS)
        value = value_ring.index(before).reshape([BLOCK_N, DV])
        pending_output = warpgroup_mma(operand, value, accumulator, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[pending])
        mbarrier.arrive(key_free.index(slot))
        tile = tiles - 1 - step
        if tile >= whole:
            logits = masked(logits, tile, seen, BLOCK_N, LOGITS)
        weights, maximum, total, rescale = add_keys(logits, maximum, total, scale_log2)
        accumulator, _operand = warpgroup_mma_wait(0, deps=[pending_output, operand])
        mbarrier.arrive(value_free.index(before))
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        operand = gl.convert_layout(weights.to(dtype), WEIGHTS)

    some = total > 0
    lse = gl.where(some, (maximum + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    gl.store(lse_ptr + (batch * H + head).to(gl.int64) * T + tokens, lse, mask=tokens < T)
    wait_filled(value_filled, tiles - 1, SLOTS)
    value = value_ring.index((tiles - 1) % SLOTS).reshape([BLOCK_N, DV])
    accumulator = warpgroup_mma(operand, value, accumulator)
    factor = 1.0 / gl.where(some, total, 1.0)
    output = accumulator * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    rows = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    row = (batch.to(gl.int64) * T + rows) * H + head
    pointers = output_ptr + row[:, None] * DV + gl.arange(0, DV, gl.SliceLayout(0, STORE))[None, :]
    gl.store(pointers, gl.convert_layout(output.to(dtype), STORE), mask=(rows < T)[:, None])


@gluon.jit
def hopper_forward(
    query_ptr, key_desc, value_desc, output_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, H, T, N, scale_log2,
    GROUP: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Output [B, T, H, DV] and lse [B, H, T] of 128 tokens of one head; scale_log2 > 0."""
    dtype: gl.constexpr = key_desc.dtype
    tile_start = (gl.num_programs(0) - 1 - gl.program_id(0)) * (WARPGROUPS * ROWS)  # causal: most keys first
    batch = gl.program_id(1) // H
    head = gl.program_id(1) % H
    kv_head = head // GROUP
    tiles, whole = key_tiles(tile_start, T, N, LENGTH, STRIDE, BLOCK_N, IS_CAUSAL)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    queries = gl.allocate_shared_memory(dtype, [WARPGROUPS, ROWS, D], layout)
    key_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, D], key_desc.layout)
    value_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, DV], value_desc.layout)
    key_filled = new_barriers(SLOTS, 1)
    value_filled = new_barriers(SLOTS, 1)
    key_free = new_barriers(SLOTS, WARPGROUPS)
    value_free = new_barriers(SLOTS, WARPGROUPS)
    gl.warp_specialize(
        [
            (attend_rows, (
                query_ptr, output_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, queries, key_ring, value_ring,
                key_filled, value_filled, key_free, value_free, tiles, whole, tile_start, batch, head, H, T, N,
                scale_log2, 0, LENGTH, STRIDE, D, DV, BLOCK_N, SLOTS, IS_CAUSAL,
            )),
            (attend_rows, (
                query_ptr, output_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, queries, key_ring, value_ring,
                key_filled, value_filled, key_free, value_free, tiles, whole, tile_start, batch, head, H, T, N,
                scale_log2, 1, LENGTH, STRIDE, D, DV, BLOCK_N, SLOTS, IS_CAUSAL,
            )),
            (load_keys, (
                key_desc, value_desc, key_ring, value_ring, key_filled, value_filled, key_free, value_free, tiles,
                batch, kv_head, BLOCK_N, SLOTS,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
