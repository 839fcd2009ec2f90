"""Gradients of attention to listed blocks, block by block, as in the folder above (listed.py), for whole blocks.

A program is one warpgroup, and three share a multiprocessor, two with heads of 128: while one waits for rows, or
computes exponentials, the others' matrix products run.  Rows are (list entry, head of the group); those of the next
step are on their way into shared memory while this one computes, as are the list entries of the step after it.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_compile.kernels.gpu.hopper.ring import ROWS
from nsa_compile.kernels.gpu.shares import gradient_row, place_entries, program_place

# Steps whose list entries are in shared memory: this one's, and those of the next two.
PLACES = gl.constexpr(3)

# Triton 3.6 has one name, later ones the other.
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def copy_places(target, order_ptr, start, end, step, GROUP: gl.constexpr):
    """Starts to copy the place in [token, slot] of each row's list entry in a step; the last one for rows after it."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    entries = start + step * (ROWS // GROUP) + gl.arange(0, ROWS, LINE) // GROUP
    copy_rows(target, order_ptr + gl.minimum(entries, end - 1))


@gluon.jit
def used_rows(start, end, step, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Which rows of a step have a list entry."""
    rows = gl.arange(0, ROWS, LAYOUT)
    return rows // GROUP < gl.minimum(end - start - step * (ROWS // GROUP), ROWS // GROUP)


@gluon.jit
def gather_rows(
    target, pointer, places, used, stride_h, stride_t, SLOTS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    LOAD: gl.constexpr,
):  # fmt: skip
    """Starts to copy the rows of list entries from [head of the group, token, D]; zeros for rows without an entry."""
    heads = gl.arange(0, ROWS, gl.SliceLayout(1, LOAD)) % GROUP
    row = places // SLOTS * stride_t + heads * stride_h
    pointers = pointer + row[:, None] + gl.arange(0, D, gl.SliceLayout(0, LOAD))[None, :]
    copy_rows(target, pointers, mask=used[:, None])


@gluon.jit
def copy_keys(target, pointer, key_start, stride, D: gl.constexpr, LOAD: gl.constexpr):
    """Starts to copy ROWS keys, or values."""
    keys = key_start + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))
    columns = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    copy_rows(target, pointer + keys[:, None].to(gl.int64) * stride + columns[None, :])


@gluon.jit
def store_partial(
    pointer, tile, memory, places, used, H, SUB: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    LOAD: gl.constexpr,
):  # fmt: skip
    """Stores the rows of list entries to a partial [token, slot·SUB, H, D], of which `pointer` is the first row.

    By way of shared `memory`, which products of all warps have read, so that whole rows are written.
    """
    barrier()
    memory.store(tile.to(pointer.dtype.element_ty))
    heads = gl.arange(0, ROWS, gl.SliceLayout(1, LOAD)) % GROUP
    row = places * (SUB * H) + heads
    pointers = pointer + row[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, LOAD))[None, :]
    gl.store(pointers, memory.load(LOAD), mask=used[:, None], cache_modifier=".cs")


@gluon.jit
def gather_step(
    query_target, grad_target, lse_target, delta_target, query_ptr, grad_ptr, lse_ptr, delta_ptr, order,
    start, end, step, stride_qh, stride_qt, stride_gh, stride_gt, T,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Starts to copy what a step of the gradient reads: rows of queries and of the output's gradient, lse and delta."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    places = order.load(gl.SliceLayout(1, LOAD))
    used = used_rows(start, end, step, GROUP, gl.SliceLayout(1, LOAD))
    gather_rows(query_target, query_ptr, places, used, stride_qh, stride_qt, SLOTS, GROUP, D, LOAD)
    gather_rows(grad_target, grad_ptr, places, used, stride_gh, stride_gt, SLOTS, GROUP, D, LOAD)
    used = used_rows(start, end, step, GROUP, LINE)
    numbers = gl.arange(0, ROWS, LINE) % GROUP * T + order.load(LINE) // SLOTS
    copy_rows(lse_target, lse_ptr + numbers, mask=used)
    copy_rows(delta_target, delta_ptr + numbers, mask=used)


@gluon.jit
def hopper_listed_gradient(
    query_ptr, key_ptr, value_ptr, order_ptr, bounds_ptr, further_ptr, grad_ptr, lse_ptr, delta_ptr, partial_ptr,
    grad_key_ptr, grad_value_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gt,
    num_pairs, H_kv, T, S, num_blocks, share, most_further, token_start, token_end, scale, scale_log2,
    GROUP: gl.constexpr, SUB: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, PAIRS_FIRST: gl.constexpr,
    IS_FIRST: gl.constexpr,
):  # fmt: skip
    """Gradients that pass through ROWS keys, for the (token, slot) pairs that list their block; all see all of them.

    Adds and writes what `listed_gradient` does; logits are transposed, so that weights and gradients of logits go from
    registers into the products that sum over rows.
    """
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LOADED: gl.constexpr = gl.SliceLayout(1, LOAD)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = key_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    square_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], dtype)
    pair, place = program_place(num_pairs, PAIRS_FIRST)
    batch = (pair // H_kv).to(gl.int64)
    kv_head = (pair % H_kv).to(gl.int64)
    sub = place % SUB
    place //= SUB
    block, start, end = place_entries(bounds_ptr, further_ptr, pair, place, num_blocks, share, most_further)
    key_start = (block * SUB + sub) * ROWS
    first_row = gradient_row(num_pairs, pair, place, key_start, S, most_further, sub, SUB, ROWS)
    grad_key_ptr += first_row * D
    grad_value_ptr += first_row * D
    grad_key = gl.zeros([ROWS, D], gl.float32, WIDE)
    grad_value = gl.zeros([ROWS, D], gl.float32, WIDE)
    is_further = place < most_further
    if start >= end:
        if IS_FIRST:
            if not is_further:
                add_rows(grad_key_ptr, grad_key, S - key_start, is_further, D, IS_FIRST)
                add_rows(grad_value_ptr, grad_value, S - key_start, is_further, D, IS_FIRST)
        return
    H = H_kv * GROUP
    first_head = kv_head * GROUP
    first_entry = token_start * SLOTS
    order_ptr += pair.to(gl.int64) * T * SLOTS + first_entry
    query_ptr += batch * stride_qb + first_head * stride_qh
    grad_ptr += batch * stride_gb + first_head * stride_gh
    lse_ptr += (batch * H + first_head) * T
    delta_ptr += (batch * H + first_head) * T
    partial_ptr += ((batch * (token_end - token_start) * SLOTS * SUB + sub) * H + first_head) * D
    key = gl.allocate_shared_memory(dtype, [ROWS, D], tile_layout)
    value = gl.allocate_shared_memory(dtype, [ROWS, D], tile_layout)
    order = gl.allocate_shared_memory(gl.int32, [PLACES, ROWS], LINES)
    queries = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile_layout)
    grads = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile_layout)
    lses = gl.allocate_shared_memory(gl.float32, [2, ROWS], LINES)
    deltas = gl.allocate_shared_memory(gl.float32, [2, ROWS], LINES)
    shared_logits = gl.allocate_shared_memory(dtype, [ROWS, ROWS], square_layout)
    copy_keys(key, key_ptr + batch * stride_kb + kv_head * stride_kh, key_start, stride_kn, D, LOAD)
    copy_keys(value, value_ptr + batch * stride_vb + kv_head * stride_vh, key_start, stride_vn, D, LOAD)

    copy_places(order.index(0), order_ptr, start, end, 0, GROUP)
    copy_places(order.index(1), order_ptr, start, end, 1, GROUP)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gather_step(
        queries.index(0), grads.index(0), lses.index(0), deltas.index(0), query_ptr, grad_ptr, lse_ptr, delta_ptr,
        order.index(0), start, end, 0, stride_qh, stride_qt, stride_gh, stride_gt, T, SLOTS, GROUP, D, LOAD,
    )  # fmt: skip
    async_copy.commit_group()
    first_shift = gl.log2(scale) / scale_log2
    lse_factor = 1.4426950408889634 / scale_log2
    none = gl.zeros([ROWS, D], gl.float32, WIDE)
    for step in range((end - start + ROWS // GROUP - 1) // (ROWS // GROUP)):
        slot = step % 2
        following = 1 - slot
        # This step's rows are here, and the step before has read its own.
        async_copy.wait_group(0)
        fence_async_shared()
        gather_step(
            queries.index(following), grads.index(following), lses.index(following), deltas.index(following),
            query_ptr, grad_ptr, lse_ptr, delta_ptr, order.index((step + 1) % PLACES), start, end, step + 1,
            stride_qh, stride_qt, stride_gh, stride_gt, T, SLOTS, GROUP, D, LOAD,
        )  # fmt: skip
        copy_places(order.index((step + 2) % PLACES), order_ptr, start, end, step + 2, GROUP)
        async_copy.commit_group()
        query = queries.index(slot)
        grad = grads.index(slot)
        # Products start from what is subtracted, and weights carry the scale, so that gradients of queries do.
        shift = first_shift - lses.index(slot).load(COLUMNS) * lse_factor
        logits = gl.zeros([ROWS, ROWS], gl.float32, LOGITS) + shift[None, :]
        grad_weights = gl.zeros([ROWS, ROWS], gl.float32, LOGITS) - deltas.index(slot).load(COLUMNS)[None, :]
        logits, grad_weights = warpgroup_mma_wait(0, deps=[logits, grad_weights])
        pending = warpgroup_mma(key, query.permute((1, 0)), logits, is_async=True)
        pending_grad = warpgroup_mma(value, grad.permute((1, 0)), grad_weights, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[pending])
        weights = gl.exp2(logits * scale_log2)
        # The weights are named here, or the compiler would work them out after the wait.
        grad_weights, weights = warpgroup_mma_wait(0, deps=[pending_grad, weights])
        grad_logits = (weights * grad_weights).to(dtype)
        shared_logits.store(grad_logits)
        operand = gl.convert_layout(weights.to(dtype), OPERAND)
        pending_value = warpgroup_mma(operand, grad, grad_value, is_async=True)
        grad_operand = gl.convert_layout(grad_logits, OPERAND)
        pending_key = warpgroup_mma(grad_operand, query, grad_key, is_async=True)
        fence_async_shared()
        pending_query = warpgroup_mma(shared_logits.permute((1, 0)), key, none, use_acc=False, is_async=True)
        grad_value, grad_key, grad_query, _operand, _grad_operand = warpgroup_mma_wait(
            0, deps=[pending_value, pending_key, pending_query, operand, grad_operand]
        )
        used = used_rows(start, end, step, GROUP, LOADED)
        places = order.index(step % PLACES).load(LOADED) - first_entry
        store_partial(partial_ptr, grad_query, query, places, used, H, SUB, GROUP, D, LOAD)

    async_copy.wait_group(0)
    add_rows(grad_key_ptr, grad_key / scale, S - key_start, is_further, D, IS_FIRST)
    add_rows(grad_value_ptr, grad_value / scale, S - key_start, is_further, D, IS_FIRST)


@gluon.jit
def add_rows(pointer, tile, count, is_further, D: gl.constexpr, IS_FIRST: gl.constexpr):
    """Adds the first `count` of ROWS rows to a contiguous float32 [·, D]; writes the first ones, and further shares."""
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    pointers = pointer + rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, STORE))[None, :]
    total = gl.convert_layout(tile, STORE)
    if not IS_FIRST:
        total += gl.load(pointers, mask=(rows < gl.where(is_further, 0, count))[:, None], other=0.0)
    gl.store(pointers, total, mask=(rows < count)[:, None])
