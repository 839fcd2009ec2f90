"""Which program handles which list entries of which block: equal shares, so that no program runs much longer.

Some blocks are listed by most tokens.  A block's entries are cut into shares of `share` entries, the last one shorter.
There is a program for the first share of each block, and one for each further share that there may be; how many a block
has is known on the device alone, so that those at the end may find that there is nothing to do.  Gradients of a first
share go to the keys of its block, those of further ones to rows behind, from which `add_shares` adds them in order.
Those rows take SHARES · l' · (D + D_v) · 4 bytes a sequence at most: 100 MB for blocks of 64 and heads of 128.
"""

import triton
import triton.language as tl

from nsa_compile.kernels.gpu.sizes import cdiv

SHARES = 1536  # of the entries of a sequence and chunk: several for each program that a GPU runs at a time
SMALLEST_SHARE = 64  # a program that loads a block's keys for fewer entries gains nothing


def share_size(entries: int) -> int:
    """Entries of a share, of so many of one sequence and chunk: not by the batch, or sums would depend on it."""
    return cdiv(max(1, entries), SHARES * SMALLEST_SHARE) * SMALLEST_SHARE


@triton.jit
def bounds_width(num_blocks):
    """Numbers in a row of bounds: a multiple of four, so that a chunk's bounds are aligned as the first chunk's are."""
    return (num_blocks // 4 + 1) * 4


@triton.jit
def program_place(num_pairs, PAIRS_FIRST: tl.constexpr):
    """Which (sequence, KV head) a program handles, and which of as many places as there are programs for each.

    With PAIRS_FIRST in the order of places: the first blocks are listed most, so that no long program starts late.
    """
    number = tl.program_id(0)
    if PAIRS_FIRST:
        pair = number % num_pairs
        place = number // num_pairs
    else:
        places = tl.num_programs(0) // num_pairs
        pair = number // places
        place = number % places
    return pair, place


@triton.jit
def place_entries(bounds_ptr, further_ptr, pair, place, num_blocks, share, most_further):
    """The block of a place, and where the share of its entries starts and ends in a chunk's entries of one pair.

    The first `most_further` places are further shares, as those are the longest; then one for each block.
    """
    row = pair.to(tl.int64) * bounds_width(num_blocks)
    block = place - most_further
    part = place * 0
    if place < most_further:
        # The last block with so many further shares before it; N_blk if there are fewer in all.
        block = place * 0
        above = num_blocks + 1
        while above - block > 1:
            middle = (block + above) // 2
            is_before = tl.load(further_ptr + row + middle) <= place
            block = tl.where(is_before, middle, block)
            above = tl.where(is_before, above, middle)
        part = place - tl.load(further_ptr + row + block) + 1
    end = tl.load(bounds_ptr + row + block + 1, mask=block < num_blocks, other=0)
    start = tl.minimum(tl.load(bounds_ptr + row + block) + part * share, end)
    return block, start, tl.minimum(start + share, end)


@triton.jit
def gradient_row(num_pairs, pair, place, key_start, S, most_further, sub, SUB: tl.constexpr, BLOCK_S: tl.constexpr):
    """First row of a place's gradients: of [B, H_kv, S] keys, or of [B, H_kv, place, SUB·BLOCK_S] rows behind them."""
    keys = pair.to(tl.int64) * S + key_start
    further = tl.cast(num_pairs, tl.int64) * S + ((pair.to(tl.int64) * most_further + place) * SUB + sub) * BLOCK_S
    return tl.where(place < most_further, further, keys)


@triton.jit
def add_rows(
    pointer, first, last, row, further_row, rows, stored, STRIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to rows of float32 [·, D] those of further shares, of which STRIDE rows are one."""
    columns = tl.arange(0, BLOCK_D)
    mask = stored[:, None] & (columns < D)[None, :]
    tile = rows[:, None] * D + columns[None, :]
    total = tl.load(pointer + row * D + tile, mask=mask, other=0.0)
    for place in range(first, last):
        total += tl.load(pointer + (further_row + tl.cast(place, tl.int64) * STRIDE) * D + tile, mask=mask, other=0.0)
    tl.store(pointer + row * D + tile, total, mask=mask)


@triton.jit
def add_shares(
    further_ptr, grad_key_ptr, grad_value_ptr, num_pairs, S, num_blocks, most_further,
    SUB: tl.constexpr, BLOCK_S: tl.constexpr, SELECTION_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of a block's further shares, in their order, to those of its keys and values."""
    block = tl.program_id(0) // SUB
    sub = tl.program_id(0) % SUB
    pair = tl.program_id(1)
    further = further_ptr + pair.to(tl.int64) * bounds_width(num_blocks) + block
    first = tl.load(further)
    last = tl.load(further + 1)
    if first < last:
        key_start = block * SELECTION_BLOCK + sub * BLOCK_S
        rows = tl.arange(0, BLOCK_S)
        stored = key_start + rows < tl.minimum((block + 1) * SELECTION_BLOCK, S)
        row = pair.to(tl.int64) * S + key_start
        further_row = gradient_row(num_pairs, pair, 0, key_start, S, most_further, sub, SUB, BLOCK_S)
        stride: tl.constexpr = SUB * BLOCK_S
        add_rows(grad_key_ptr, first, last, row, further_row, rows, stored, stride, D, BLOCK_D)
        add_rows(grad_value_ptr, first, last, row, further_row, rows, stored, stride, DV, BLOCK_DV)
