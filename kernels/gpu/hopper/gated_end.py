"""The end of gated inference in one kernel: window, blocks beside the lists, and the sum of all branches by gates.

A tile of 64 tokens sees the same keys of its local blocks in the window and in the selected branch.  So the softmax
over them is worked out once; from there the selected branch goes on with the initial blocks and the listed ones, whose
attention is given, and the window with the blocks before.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

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
def load_tiles(
    query_desc, key_desc, value_desc, listed_desc, compressed_desc, queries, sides, key_ring, value_ring,
    queries_filled, sides_filled, key_filled, value_filled, queries_free, sides_free, key_free, value_free, block,
    local, initial, tiles, batch, first_head, kv_head, TURNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: in each turn tiles of keys and values, queries, and the two outputs that are summed."""
    token = block * ROWS
    for step in range(TURNS * tiles):
        turn = step // tiles
        place = step - turn * tiles
        # Local blocks, initial ones, and those of the window before the local ones, each from the last one on.
        tile = gl.where(place < local + initial, local + initial - 1, block + initial) - place
        tile = gl.where(place < local, block - place, tile)
        slot = step % SLOTS
        wait_free(key_free, step, SLOTS)
        mbarrier.expect(key_filled.index(slot), key_desc.block_type.nbytes)
        load_tile(key_desc, [batch, kv_head, tile * ROWS, 0], key_filled.index(slot), key_ring.index(slot))
        if place == 0:
            wait_free(queries_free, turn, 1)
            filled = queries_filled.index(0)
            mbarrier.expect(filled, WARPGROUPS * query_desc.block_type.nbytes)
            for part in gl.static_range(WARPGROUPS):
                head = first_head + turn * WARPGROUPS + part
                load_tile(query_desc, [batch, head, token, 0], filled, queries.index(part))
        wait_free(value_free, step, SLOTS)
        mbarrier.expect(value_filled.index(slot), value_desc.block_type.nbytes)
        load_tile(value_desc, [batch, kv_head, tile * ROWS, 0], value_filled.index(slot), value_ring.index(slot))
        if place == 0:
            wait_free(sides_free, turn, 1)
            filled = sides_filled.index(0)
            mbarrier.expect(filled, WARPGROUPS * (listed_desc.block_type.nbytes + compressed_desc.block_type.nbytes))
            for part in gl.static_range(WARPGROUPS):
                head = first_head + turn * WARPGROUPS + part
                load_tile(listed_desc, [batch, head, token, 0], filled, sides.index(2 * part))
                load_tile(compressed_desc, [batch, head, token, 0], filled, sides.index(2 * part + 1))


@gluon.jit
def attend_tiles(
    query, key_ring, value_ring, key_filled, value_filled, key_free, value_free, start, end, offset, block, whole,
    tokens, window, accumulator, maximum, total, scale_log2,
    D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr, LOGITS: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Steps start … end − 1 of the online softmax.

    A step's tile is `offset` − step.  All tokens see it whole, but for their own `block` and what is before `whole`.
    """
    dtype: gl.constexpr = key_ring.dtype
    nothing = gl.zeros([ROWS, ROWS], gl.float32, LOGITS)
    for step in range(start, end):
        slot = step % SLOTS
        key = key_ring.index(slot).reshape([ROWS, D])
        wait_filled(key_filled, step, SLOTS)
        logits = warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False)
        mbarrier.arrive(key_free.index(slot))
        tile = offset - step
        if (tile == block) | (tile < whole):
            keys = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, LOGITS))
            seen = (keys[None, :] <= tokens[:, None]) & (keys[None, :] > tokens[:, None] - window)
            logits = gl.where(seen, logits, float("-inf"))
        # Every token sees itself, in the first step: maxima are finite.
        new_maximum = gl.maximum(maximum, gl.max(logits, 1) * scale_log2)
        weights = gl.exp2(logits * scale_log2 - new_maximum[:, None])
        rescale = gl.exp2(maximum - new_maximum)
        total = total * rescale + gl.sum(weights, 1)
        maximum = new_maximum
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        operand = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))
        wait_filled(value_filled, step, SLOTS)
        accumulator = warpgroup_mma(operand, value_ring.index(slot).reshape([ROWS, DV]), accumulator)
        mbarrier.arrive(value_free.index(slot))
    return accumulator, maximum, total


@gluon.jit
def end_rows(
    listed_lse_ptr, gates_ptr, output_ptr, stride_gb, stride_gh, stride_gt, stride_gate, queries, sides, key_ring,
    value_ring, queries_filled, sides_filled, key_filled, value_filled, queries_free, sides_free, key_free, value_free,
    block, local, initial, tiles, batch, first_head, H, T, window, scale_log2,
    PART: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, TURNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: in each turn the output of a block's tokens of one head."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    tokens = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    rows = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    stored_rows = gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    stored = stored_rows[:, None] * (H * DV) + gl.arange(0, DV, gl.SliceLayout(0, STORE))[None, :]
    # The first tile that the block's last token sees whole.
    whole = gl.maximum(block * ROWS + ROWS - window + ROWS - 1, 0) // ROWS
    query = queries.index(PART).reshape([ROWS, D])
    for turn in range(TURNS):
        head = first_head + turn * WARPGROUPS + PART
        gate = gates_ptr + batch.to(gl.int64) * stride_gb + head.to(gl.int64) * stride_gh
        gate += rows.to(gl.int64) * stride_gt
        listed_lse = listed_lse_ptr + (batch * H + head).to(gl.int64) * T + rows
        listed_maximum = gl.load(listed_lse, mask=rows < T, other=float("-inf")) * 1.4426950408889634
        compressed_gate = gl.load(gate, mask=rows < T, other=0.0).to(gl.float32)
        selected_gate = gl.load(gate + stride_gate, mask=rows < T, other=0.0).to(gl.float32)
        maximum = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
        accumulator = gl.zeros([ROWS, DV], gl.float32, OUTPUT)
        first = turn * tiles
        shared = first + local
        own = shared + initial
        wait_filled(queries_filled, turn, 1)

        # Both branches see the local blocks.
        accumulator, maximum, total = attend_tiles(
            query, key_ring, value_ring, key_filled, value_filled, key_free, value_free, first, shared, block + first,
            block, whole, tokens, window, accumulator, maximum, total, scale_log2, D, DV, SLOTS, LOGITS, OUTPUT,
        )  # fmt: skip
        selected, selected_maximum, selected_total = attend_tiles(
            query, key_ring, value_ring, key_filled, value_filled, key_free, value_free, shared, own, own - 1,
            block, 0, tokens, window, accumulator, maximum, total, scale_log2, D, DV, SLOTS, LOGITS, OUTPUT,
        )  # fmt: skip
        selected_maximum = gl.convert_layout(selected_maximum, gl.SliceLayout(1, OUTPUT))
        selected_total = gl.convert_layout(selected_total, gl.SliceLayout(1, OUTPUT))
        new_maximum = gl.maximum(selected_maximum, listed_maximum)
        rescale = gl.exp2(selected_maximum - new_maximum)
        listed_weight = gl.exp2(listed_maximum - new_maximum)
        factor = selected_gate / (selected_total * rescale + listed_weight)
        wait_filled(sides_filled, turn, 1)
        listed = sides.index(2 * PART).reshape([ROWS, DV]).load(OUTPUT).to(gl.float32)
        compressed = sides.index(2 * PART + 1).reshape([ROWS, DV]).load(OUTPUT).to(gl.float32)
        mbarrier.arrive(sides_free.index(0))
        summed = selected * (rescale * factor)[:, None] + listed * (listed_weight * factor)[:, None]
        summed = summed + compressed * compressed_gate[:, None]

        accumulator, maximum, total = attend_tiles(
            query, key_ring, value_ring, key_filled, value_filled, key_free, value_free, own, first + tiles,
            block + first + initial, block, whole, tokens, window, accumulator, maximum, total, scale_log2, D, DV,
            SLOTS, LOGITS, OUTPUT,
        )  # fmt: skip
        mbarrier.arrive(queries_free.index(0))
        window_gate = gl.load(gate + 2 * stride_gate, mask=rows < T, other=0.0).to(gl.float32)
        factor = window_gate / gl.convert_layout(total, gl.SliceLayout(1, OUTPUT))
        output = gl.convert_layout((summed + accumulator * factor[:, None]).to(output_ptr.dtype.element_ty), STORE)
        first_row = (batch.to(gl.int64) * T + block * ROWS) * H + head
        gl.store(output_ptr + first_row * DV + stored, output, mask=(stored_rows < T - block * ROWS)[:, None])


@gluon.jit
def hopper_gated_end(
    query_desc, key_desc, value_desc, listed_desc, compressed_desc, listed_lse_ptr, gates_ptr, output_ptr,
    stride_gb, stride_gh, stride_gt, stride_gate, H, T, window, local_blocks, initial_blocks, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, TURNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Output [B, T, H, DV] of a block of 64 tokens of 2·TURNS heads of a group.

    Takes the compressed branch's output and the attention to listed blocks that are neither local nor initial, whose
    memory the output may be.  The window reaches back to the first local block, or further; scale_log2 > 0.
    """
    dtype: gl.constexpr = key_desc.dtype
    first_head = gl.program_id(0) * (TURNS * WARPGROUPS)
    kv_head = first_head // GROUP
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    batch = gl.program_id(2)
    local = gl.minimum(local_blocks, block + 1)
    initial = gl.minimum(initial_blocks, block + 1 - local)
    first_block = gl.maximum(block * ROWS - window + 1, 0) // ROWS
    tiles = local + initial + gl.maximum(block + 1 - local - first_block, 0)
    queries = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, D], query_desc.layout)
    sides = gl.allocate_shared_memory(dtype, [2 * WARPGROUPS, 1, 1, ROWS, DV], listed_desc.layout)
    key_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, ROWS, D], key_desc.layout)
    value_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, ROWS, DV], value_desc.layout)
    queries_filled = new_barriers(1, 1)
    sides_filled = new_barriers(1, 1)
    key_filled = new_barriers(SLOTS, 1)
    value_filled = new_barriers(SLOTS, 1)
    queries_free = new_barriers(1, WARPGROUPS)
    sides_free = new_barriers(1, WARPGROUPS)
    key_free = new_barriers(SLOTS, WARPGROUPS)
    value_free = new_barriers(SLOTS, WARPGROUPS)
    gl.warp_specialize(
        [
            (end_rows, (
                listed_lse_ptr, gates_ptr, output_ptr, stride_gb, stride_gh, stride_gt, stride_gate, queries, sides,
                key_ring, value_ring, queries_filled, sides_filled, key_filled, value_filled, queries_free,
                sides_free, key_free, value_free, block, local, initial, tiles, batch, first_head, H, T, window,
                scale_log2, 0, D, DV, TURNS, SLOTS,
            )),
            (end_rows, (
                listed_lse_ptr, gates_ptr, output_ptr, stride_gb, stride_gh, stride_gt, stride_gate, queries, sides,
                key_ring, value_ring, queries_filled, sides_filled, key_filled, value_filled, queries_free,
                sides_free, key_free, value_free, block, local, initial, tiles, batch, first_head, H, T, window,
                scale_log2, 1, D, DV, TURNS, SLOTS,
            )),
            (load_tiles, (
                query_desc, key_desc, value_desc, listed_desc, compressed_desc, queries, sides, key_ring, value_ring,
                queries_filled, sides_filled, key_filled, value_filled, queries_free, sides_free, key_free, value_free,
                block, local, initial, tiles, batch, first_head, kv_head, TURNS, SLOTS,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
