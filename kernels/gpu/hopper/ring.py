"""What the kernels share: which keys a tile of tokens sees, and the barriers of a ring of tiles in shared memory."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Rows of a warpgroup: the matrix instruction's own; two warpgroups a program.
ROWS = gl.constexpr(64)
WARPGROUPS = gl.constexpr(2)
# Registers of the second warpgroup, whose number the first gets too, and of the warp that loads.
REGISTERS = gl.constexpr((240, 24))

# Triton 3.6 has one name, later ones the other.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def seen_keys(tokens, N, LENGTH: gl.constexpr, STRIDE: gl.constexpr, IS_CAUSAL: gl.constexpr):
    """How many keys, from the first on, a token sees."""
    if IS_CAUSAL:
        return gl.minimum(gl.maximum(tokens - LENGTH + 1 + STRIDE, 0) // STRIDE, N)
    return tokens * 0 + N


@gluon.jit
def key_tiles(
    tile_start, T, N, LENGTH: gl.constexpr, STRIDE: gl.constexpr, BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """Tiles of keys that a program's tokens see, at least one, and how many, from the first on, all see whole."""
    last = gl.minimum(tile_start + WARPGROUPS * ROWS, T) - 1
    tiles = (seen_keys(last, N, LENGTH, STRIDE, IS_CAUSAL) + BLOCK_N - 1) // BLOCK_N
    return gl.maximum(tiles, 1), seen_keys(tile_start, N, LENGTH, STRIDE, IS_CAUSAL) // BLOCK_N


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which opens when that many have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def wait_filled(barriers, step, SLOTS: gl.constexpr):
    """Waits until the tile of a step lies in its slot."""
    mbarrier.wait(barriers.index(step % SLOTS), (step // SLOTS) & 1)


@gluon.jit
def wait_free(barriers, step, SLOTS: gl.constexpr):
    """Waits until both warpgroups are done with what a step's tile will overwrite."""
    mbarrier.wait(barriers.index(step % SLOTS), ((step // SLOTS) & 1) ^ 1)
