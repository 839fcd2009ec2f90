"""FlashAttention over one contiguous run of keys per query: what its passes share.

Every branch whose keys are a contiguous range, different for each query, runs through three kernels: the forward pass
(forward.py), the gradient of the queries, and the gradient of keys and values (backward.py).  What differs is how a
token's visible interval becomes a range of key indices, which `key_range` computes:

* compressed tokens: key i stands for the tokens [i·STRIDE, i·STRIDE + LENGTH);
* sliding window: the last `window` tokens of the interval;
* forced blocks: the last `local_blocks` selection blocks, plus `initial` keys at the start of the sequence.

Layout: one program handles BLOCK_M tokens of one query head; heads of a group read the same keys through L2.
Probabilities are kept relative to a running maximum in base 2; a query that sees nothing gets output 0, lse −inf.
"""

import triton
import triton.language as tl

EMPTY_LOW = tl.constexpr(1 << 30)


@triton.jit
def token_interval(
    first_ptr, last_ptr, batch, tokens, limit, T, S, IS_CAUSAL: tl.constexpr, HAS_INTERVAL: tl.constexpr
):
    """Visible interval [first, last] of each token; tokens from `limit` on get an empty one."""
    inside = tokens < limit
    if HAS_INTERVAL:
        offset = batch.to(tl.int64) * T + tokens
        first = tl.load(first_ptr + offset, mask=inside, other=EMPTY_LOW)
        last = tl.load(last_ptr + offset, mask=inside, other=-1)
    else:
        first = tokens * 0
        last = tokens if IS_CAUSAL else tokens * 0 + S - 1
        last = tl.where(inside, last, -1)
    return first, last


@triton.jit
def key_range(
    first, last, S, N, window, local_blocks, LENGTH: tl.constexpr, STRIDE: tl.constexpr, SELECTION_BLOCK: tl.constexpr
):
    """Range [low, high] of key indices for each token's interval; empty as low > high.

    `window` and `local_blocks` are 0 where the branch has none; with both, the range starts at the earlier of the two.

    There is no `if` on their values: Triton 3.9 does not pipeline a loop whose bounds come out of one.
    """
    block_start = (tl.minimum(last, S - 1) // SELECTION_BLOCK - local_blocks + 1) * SELECTION_BLOCK
    near = tl.minimum(
        tl.where(window > 0, last - window + 1, EMPTY_LOW), tl.where(local_blocks > 0, block_start, EMPTY_LOW)
    )
    low = tl.maximum(first, tl.where((window > 0) | (local_blocks > 0), near, 0))
    low = tl.maximum(low, 0)
    high = tl.minimum(last - (LENGTH - 1), S - LENGTH)
    if STRIDE != 1:
        low = (low + STRIDE - 1) // STRIDE
        high = tl.where(high < 0, -1, high // STRIDE)
    high = tl.minimum(high, N - 1)
    low = tl.where(low > high, EMPTY_LOW, low)
    high = tl.where(low > high, -1, high)
    return low, high


@triton.jit
def load_tile(pointer, rows, columns, stride, row_mask, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Loads a [rows, columns] tile, zero where masked; `columns` is padded to BLOCK when COLUMNS is no power of two."""
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if COLUMNS == BLOCK:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    return tl.load(pointers, mask=row_mask[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def sum_by_gates(
    output, other_ptr, gates_ptr, rows, gate_rows, stride_gate, columns, stored, GATE: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Gate GATE · output + what is summed already, [rows, columns] of memory [.., DV].

    Before GATE 1 that is the compressed branch's output, times gate 0.
    """
    inside = stored[:, None] & (columns < DV)[None, :]
    other = tl.load(other_ptr + rows[:, None] * DV + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE == 1:
        other *= tl.load(gates_ptr + gate_rows, mask=stored, other=0.0).to(tl.float32)[:, None]
    gate = tl.load(gates_ptr + gate_rows + GATE * stride_gate, mask=stored, other=0.0).to(tl.float32)
    return other + output * gate[:, None]


@triton.jit
def visible_keys(valid_ptr, keys, low, high, N, HAS_VALID: tl.constexpr):
    """Mask [rows, keys] of what each row sees of the given key indices."""
    seen = (keys[None, :] >= low[:, None]) & (keys[None, :] <= high[:, None])
    if HAS_VALID:
        seen = seen & (tl.load(valid_ptr + keys, mask=keys < N, other=0) != 0)[None, :]
    return seen


@triton.jit
def tile_bounds(low, high, BLOCK_N: tl.constexpr):
    """Where a tile's loop over keys starts and ends, and the part of it that every row sees whole.

    Returns (start, full_start, full_end, end), multiples of BLOCK_N, in ascending order.
    """
    start = tl.min(low) // BLOCK_N * BLOCK_N
    end = (tl.max(high) + BLOCK_N) // BLOCK_N * BLOCK_N
    start = tl.minimum(start, end)
    full_start = (tl.max(low) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = (tl.min(high) + 1) // BLOCK_N * BLOCK_N
    full_end = tl.minimum(tl.maximum(full_end, full_start), end)
    return start, full_start, full_end, end


@triton.jit
def range_step(step, initial_end, loop_start, initial_high, low, high):
    """Where a step of the one loop over a range starts, and which keys count there: the initial ones come first.

    One loop, since one for each part of the range would wait for memory anew in each, and with several ptxas no longer
    lets matrix products run while their inputs are on the way (its warning C7515).
    """
    is_initial = step < initial_end
    start = tl.where(is_initial, step, loop_start + step - initial_end)
    return start, tl.where(is_initial, 0, low), tl.where(is_initial, initial_high, high)


@triton.jit
def is_edge(step, start, initial_end, initial_full, full_start, full_end, HAS_VALID: tl.constexpr):
    """Whether a step needs a mask, which costs half as much as the rest of its arithmetic.

    All rows see the initial keys before `initial_full`, and those from `full_start` to before `full_end`.
    """
    is_cut = (start < full_start) | (start >= full_end)
    return tl.where(step < initial_end, step >= initial_full, is_cut) | HAS_VALID
