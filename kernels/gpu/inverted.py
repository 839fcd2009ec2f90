"""Inverts lists of blocks: for each block, in token order, the (token, slot) pairs that name it.

A counting sort, stable and without atomics: four launches for all chunks of tokens together, none of which waits for
the host.  Entries go in tiles.  A tile counts its entries of each block, and each entry's rank among them; the counts,
summed over earlier blocks and tiles, say where a tile's entries of a block start; start and rank are an entry's place.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.kernels.gpu.flash import EMPTY_LOW, key_range, token_interval
from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry
from nsa_compile.kernels.gpu.shares import bounds_width, share_size
from nsa_compile.kernels.gpu.sizes import cdiv, next_power_of_2

TILE = 1024  # list entries that are counted together, or more:
MOST_TILES = 512  # of a chunk, which one program sums
STEP = 32  # list entries that are compared with each other: more cost comparisons, fewer cost waiting
WARPS = 1  # that compare them: one need not wait for another
COUNT_BYTES = 1 << 25  # of the counts, unless those of one tile a chunk take more


@triton.jit
def dense_start(
    first, last, S, window, local_blocks, HAS_DENSE: tl.constexpr, SELECTION_BLOCK: tl.constexpr
):  # fmt: skip
    """First key of the contiguous range that another kernel handles; listed blocks count only before it."""
    if HAS_DENSE:
        low, _ = key_range(first, last, S, S, window, local_blocks, 1, 1, SELECTION_BLOCK)
    else:
        low = first * 0 + EMPTY_LOW
    return low


@triton.jit
def routed(block, low, initial, SELECTION_BLOCK: tl.constexpr):
    """Whether a listed block holds keys of its own: after the initial keys and before the contiguous range."""
    start = block * SELECTION_BLOCK
    return (block >= 0) & (start >= initial) & (start < low)


@triton.jit
def rank_entries(
    blocks_ptr, first_ptr, last_ptr, counts_ptr, ranks_ptr, T, S, num_blocks, H_kv, window, local_blocks, initial,
    chunk_entries, tile_entries, tiles, IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr, HAS_DENSE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr, NUM_LISTED: tl.constexpr, FIRST_SLOT: tl.constexpr, SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Counts a tile's entries of each block, and each entry's rank among them, −1 where it is not `routed`.

    Writes ranks [B, H_kv, token, slot]; adds to counts [chunk, B, H_kv, tile, N_blk], which hold zeros.
    """
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(1)
    start = chunk * chunk_entries + tile * tile_entries
    end = tl.minimum(tl.minimum(start + tile_entries, (chunk + 1) * chunk_entries), T * NUM_LISTED)
    row = pair.to(tl.int64) * T * NUM_LISTED
    counts = counts_ptr + ((chunk.to(tl.int64) * tl.num_programs(1) + pair) * tiles + tile) * num_blocks
    index = tl.arange(0, STEP)
    weight = tl.where(index[:, None] < index[None, :], 65537, 1)
    coming = tl.load(blocks_ptr + row + start + index, mask=start + index < end, other=-1)
    for step_start in range(start, end, STEP):
        entries = step_start + index
        inside = entries < end
        tokens = entries // NUM_LISTED
        first, last = token_interval(first_ptr, last_ptr, pair // H_kv, tokens, T, T, S, IS_CAUSAL, HAS_INTERVAL)
        low = dense_start(first, last, S, window, local_blocks, HAS_DENSE, SELECTION_BLOCK)
        block = coming
        coming = tl.load(blocks_ptr + row + entries + STEP, mask=entries + STEP < end, other=-1)
        slot = entries % NUM_LISTED - FIRST_SLOT
        used = routed(block, low, initial, SELECTION_BLOCK) & (block < num_blocks) & (slot >= 0) & (slot < SLOTS)
        block = tl.where(used, block, -1)
        # Both in one sum: equal blocks in the lower half, equal ones before in the upper.
        equal = tl.sum(tl.where(block[:, None] == block[None, :], weight, 0), 0)
        before = tl.load(counts + block, mask=used, other=0)
        tl.store(ranks_ptr + row + entries, tl.where(used, before + (equal >> 16), -1), mask=inside)
        # Threads hand counts to each other through memory: every read of a step before its writes, and those before
        # the next step's reads.
        tl.debug_barrier()
        tl.store(counts + block, before + (equal & 65535), mask=used)
        tl.debug_barrier()


@triton.jit
def start_tiles(
    counts_ptr, bounds_ptr, num_blocks, tiles, TILES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Turns WIDTH blocks' counts [tile, N_blk] of one chunk into where, among a block's entries, a tile's start.

    Writes how many entries each block has to bounds [N_blk + 1].  TILES, a power of two, is at least `tiles`.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    blocks = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    target = counts_ptr + (row * tiles + tile[:, None]) * num_blocks + blocks[None, :]
    mask = (tile < tiles)[:, None] & (blocks < num_blocks)[None, :]
    count = tl.load(target, mask=mask, other=0)
    tl.store(target, tl.cumsum(count, 0) - count, mask=mask)
    tl.store(bounds_ptr + row * bounds_width(num_blocks) + blocks, tl.sum(count, 0), mask=blocks < num_blocks)


@triton.jit
def start_blocks(bounds_ptr, further_ptr, num_blocks, share, WIDTH: tl.constexpr):
    """Turns how many entries each block of a chunk has into where they start, and where the last block's end.

    Writes the same of further shares of `share` entries, beside each block's first.
    """
    row = tl.program_id(0).to(tl.int64) * bounds_width(num_blocks)
    placed = 0
    shared = 0
    for block_start in range(0, num_blocks + 1, WIDTH):
        blocks = block_start + tl.arange(0, WIDTH)
        count = tl.load(bounds_ptr + row + blocks, mask=blocks < num_blocks, other=0)
        further = tl.maximum(tl.cdiv(count, share) - 1, 0)
        tl.store(bounds_ptr + row + blocks, placed + tl.cumsum(count, 0) - count, mask=blocks <= num_blocks)
        tl.store(further_ptr + row + blocks, shared + tl.cumsum(further, 0) - further, mask=blocks <= num_blocks)
        placed += tl.sum(count, 0)
        shared += tl.sum(further, 0)


@triton.jit
def order_entries(
    blocks_ptr, ranks_ptr, starts_ptr, bounds_ptr, order_ptr, num_entries, num_blocks, chunk_entries, tile_entries,
    tiles, NUM_LISTED: tl.constexpr, FIRST_SLOT: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the place of each entry that has a rank to where it belongs in order [B, H_kv, T·SLOTS], by chunks."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.program_id(1)
    row = pair.to(tl.int64) * num_entries
    rank = tl.load(ranks_ptr + row + entries, mask=entries < num_entries, other=-1)
    used = rank >= 0
    block = tl.load(blocks_ptr + row + entries, mask=used, other=0)
    chunk = entries // chunk_entries
    chunk_start = chunk * chunk_entries
    chunk_row = chunk.to(tl.int64) * tl.num_programs(1) + pair
    tile = chunk_row * tiles + (entries - chunk_start) // tile_entries
    start = tl.load(bounds_ptr + chunk_row * bounds_width(num_blocks) + block, mask=used, other=0)
    start += tl.load(starts_ptr + tile * num_blocks + block, mask=used, other=0)
    row = (row + chunk_start) // NUM_LISTED * SLOTS
    place = entries // NUM_LISTED * SLOTS + entries % NUM_LISTED - FIRST_SLOT
    tl.store(order_ptr + row + start + rank, place, mask=used)


class InvertedLists(NamedTuple):
    """Each chunk's list entries by block, then by token.

    Attributes:
        order: [B·H_kv, T·SLOTS] int32 (see `KeyGeometry.list_constants`); from a chunk's first token on, the places in
            [token, slot] of its entries that are used, block after block.  What follows them is not written.
        bounds: [chunks, B·H_kv, N_blk + 1 or more] int32; where a block's entries start, counted from the chunk's
            first.
        further: likewise, how many further shares of entries the blocks before have (shares.py).
        share: entries of a share.
        most_further: further shares that the blocks of a chunk have at most, for each of B·H_kv.
    """

    order: Tensor
    bounds: Tensor
    further: Tensor
    share: int
    most_further: int

    def chunk(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns order, and bounds and further of a chunk."""
        return self.order, self.bounds[index], self.further[index]


def invert_lists(block_indices: Tensor, intervals: Intervals, geometry: KeyGeometry, chunk: int) -> InvertedLists:
    """Inverts contiguous lists [B, H_kv, T, n] int32, not empty, in chunks of `chunk` tokens."""
    B, H_kv, T, n = block_indices.shape
    pairs, entries, chunk_entries = B * H_kv, T * n, chunk * n
    chunks = cdiv(T, chunk)
    num_blocks = cdiv(geometry.num_tokens, geometry.selection_block)
    most_tiles = max(1, min(MOST_TILES, COUNT_BYTES // (4 * chunks * pairs * num_blocks)))
    tile = max(TILE, next_power_of_2(cdiv(chunk_entries, most_tiles)))
    tiles = cdiv(chunk_entries, tile)
    counts = torch.zeros((chunks, pairs, tiles, num_blocks), dtype=torch.int32, device=block_indices.device)
    ranks = block_indices.new_empty((pairs, entries))
    constants = geometry.list_constants(n)
    order = block_indices.new_empty((pairs, T * constants["SLOTS"]))
    bounds, further = block_indices.new_empty((2, chunks, pairs, (num_blocks // 4 + 1) * 4))
    used = chunk * constants["SLOTS"]
    share = share_size(H_kv * used)
    first, last, _ = intervals.pointers(block_indices)
    rank_entries[(chunks * tiles, pairs)](
        block_indices, first, last, counts, ranks, T, geometry.num_tokens, num_blocks, H_kv, geometry.window,
        geometry.local_blocks, geometry.initial, chunk_entries, tile, tiles, IS_CAUSAL=intervals.is_causal,
        HAS_INTERVAL=intervals.first is not None, HAS_DENSE=not geometry.empty,
        SELECTION_BLOCK=geometry.selection_block, **constants, STEP=STEP, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    padded = next_power_of_2(tiles)
    width = min(16, next_power_of_2(num_blocks))
    start_tiles[(chunks * pairs, cdiv(num_blocks, width))](
        counts, bounds, num_blocks, tiles, TILES=padded, WIDTH=width, num_warps=4
    )  # fmt: skip
    start_blocks[(chunks * pairs,)](bounds, further, num_blocks, share, WIDTH=1024, num_warps=4)
    size = 1024
    order_entries[(cdiv(entries, size), pairs)](
        block_indices, ranks, counts, bounds, order, entries, num_blocks, chunk_entries, tile, tiles, **constants,
        BLOCK=size, num_warps=4,
    )  # fmt: skip
    return InvertedLists(order, bounds, further, share, used // share)
