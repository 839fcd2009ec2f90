"""Attention on a Hopper GPU, in Gluon: what these kernels take, and their calls.

Same results and arguments as the kernels in Triton of the folder above, which serve every other GPU, dtype, head size
and visibility, and the lse alone.  In each program one warp copies tiles from memory into a ring of shared memory
(ring.py), and two warpgroups of 64 rows each take them from there.  While one computes exponentials the other's matrix
products run; Triton, given the same loop, waits for each product.

* forward.py: the softmax over compressed keys, as in FlashAttention-3 (arXiv 2407.08608);
* query_gradient.py, key_gradient.py: its gradients, the latter for windows too;
* listed.py: the gradients of attention to listed blocks, without a loading warp, as its rows are gathered;
* gated_end.py: the last kernel of gated inference on long inputs.

Key i stands for the tokens [i·STRIDE, i·STRIDE + LENGTH), as in flash.py.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_compile.kernels.gpu import tiles
from nsa_compile.kernels.gpu.hopper import forward, key_gradient, listed, query_gradient
from nsa_compile.kernels.gpu.hopper import gated_end as end
from nsa_compile.kernels.gpu.launch import LOG2_E, Intervals, KeyGeometry, add_splits, gradient_splits
from nsa_compile.kernels.gpu.sizes import cdiv

# For fewer, launches take longer than kernels: descriptors are made anew for each.
FEWEST_QUERIES = 4096
KEYS = 128  # of a tile, and of a program that adds up gradients
QUERIES = {64: 128, 128: 64}  # of a tile that passes by, by the larger head size
ROWS = 64  # of a warpgroup
LISTED_REGISTERS = {64: 168, 128: 255}  # of a thread that adds up lists' gradients, by head size: 3 and 2 programs
SLOTS = 2  # of a ring
MOST_TURNS = 4  # of a program that ends gated attention: pairs of heads, one after the other
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_HEAD_SIZES = (64, 128)
_MOST_OFFSET = 1 << 31  # of a number in a sequence: what 32 bits count
_ALIGNMENT = 16  # bytes; of addresses and strides, for copies to shared memory


def is_hopper(device: torch.device) -> bool:
    """Whether the device has these kernels' instructions, which NVIDIA's later GPUs do not have either."""
    return tiles.capability(device)[0] == 9


def handles(
    stage: str, query: Tensor, key: Tensor, value: Tensor, intervals: Intervals, geometry: KeyGeometry, scale: float
) -> bool:
    """Whether these kernels serve a stage: "forward", "query_gradient" or "key_gradient"; by everything but the batch.

    Args:
        stage: only the last one takes windows.
        query: [B, H, T, D], last dimension contiguous, as for key and value.
        key: [B, H_kv, N, D].
        value: [B, H_kv, N, D_v].
        intervals: plain ones only.
        geometry: compressed keys, or a window.
        scale: positive.
    """
    is_window = geometry.window > 0 and intervals.is_causal and query.shape[2] == key.shape[2]
    return (
        _serves(query, key, value, intervals, scale)
        and (not geometry.is_cut or (is_window and stage == "key_gradient"))
        and geometry.initial == geometry.local_blocks == 0
    )


def handles_gated_end(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    window: int,
    scale: float,
) -> bool:
    """Whether `gated_end` serves; arguments as there."""
    return (
        _serves(query, key, value, intervals, scale)
        and query.shape[1] // key.shape[1] % 2 == 0
        and query.shape[2] == key.shape[2]
        and geometry.selection_block == ROWS
        and not geometry.empty
        and 0 < geometry.local_blocks * ROWS <= window
    )


def _serves(query: Tensor, key: Tensor, value: Tensor, intervals: Intervals, scale: float) -> bool:
    """Whether any of these kernels takes such tensors and a plain visibility."""
    return (
        is_hopper(query.device)
        and query.dtype in _DTYPES
        and key.dtype == value.dtype == query.dtype
        and query.shape[-1] in _HEAD_SIZES
        and value.shape[-1] in _HEAD_SIZES
        and query.shape[2] >= FEWEST_QUERIES
        and min(key.shape[2], query.numel()) > 0
        and intervals.first is None
        and intervals.valid is None
        and scale > 0
    )


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Writes output [B, H, T, D_v], as `new_output` makes it, and lse [B, H, T]."""
    B, H, T, _ = query.shape
    forward.hopper_forward[cdiv(T, 2 * ROWS), B * H](
        query, _descriptor(key, KEYS), _descriptor(value, KEYS), output, lse,
        *query.stride()[:3], H, T, key.shape[2], scale * LOG2_E,
        **_constants(query, key, value, intervals, geometry), BLOCK_N=KEYS,
    )  # fmt: skip


def flash_query_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
) -> None:
    """Writes grad_query [B, H, T, D], contiguous; lse and delta [B, H, T] contiguous float32."""
    B, H, T, _ = query.shape
    query_gradient.hopper_query_gradient[cdiv(T, 2 * ROWS), B * H](
        _descriptor(query, ROWS), _descriptor(grad, ROWS), _descriptor(key, KEYS), _descriptor(value, KEYS), lse, delta,
        grad_query, H, T, key.shape[2], scale, scale * LOG2_E,
        **_constants(query, key, value, intervals, geometry), BLOCK_N=KEYS,
    )  # fmt: skip


def flash_key_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of key [B, H_kv, N, D] and value [B, H_kv, N, D_v], contiguous."""
    B, H, T, D = query.shape
    H_kv, N, DV = key.shape[1], key.shape[2], value.shape[-1]
    group, programs, queries = H // H_kv, cdiv(N, 2 * ROWS), QUERIES[max(D, DV)]
    head_splits, query_splits = gradient_splits(geometry, programs * H_kv, group, T)
    splits = head_splits * query_splits
    dtype = torch.float32 if splits > 1 else key.dtype
    grad_key = key.new_empty((splits, B, H_kv, N, D), dtype=dtype)
    grad_value = key.new_empty((splits, B, H_kv, N, DV), dtype=dtype)
    key_gradient.hopper_key_gradient[B * H_kv, programs, splits](
        _descriptor(query, queries), _descriptor(grad, queries), _descriptor(key, ROWS), _descriptor(value, ROWS), lse,
        delta, grad_key, grad_value, H, T, N, query_splits, scale, scale * LOG2_E,
        HEADS=group // head_splits, WINDOW=geometry.window, BLOCK_M=queries,
        **_constants(query, key, value, intervals, geometry),
    )  # fmt: skip
    return add_splits(grad_key, key.dtype), add_splits(grad_value, value.dtype)


def gated_end(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: KeyGeometry,
    window: int,
    scale: float,
    output: Tensor,
    lse: Tensor,
    compressed_output: Tensor,
    gates: Tensor,
) -> None:
    """Adds window, blocks beside the lists, and the compressed branch's output, by gates.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, T, D], of both branches.
        value: [B, H_kv, T, D_v], likewise.
        geometry: of the selected branch, with local blocks.
        window: w, tokens; no fewer than those of the local blocks.
        scale: factor on the logits.
        output: [B, H, T, D_v], as `new_output` makes it; attention to the listed blocks, becomes the sum.
        lse: [B, H, T], of that attention; contiguous.
        compressed_output: like `output`.
        gates: [B, H, T, 3].
    """
    B, H, T, D = query.shape
    DV = value.shape[-1]
    group = H // key.shape[1]
    turns = math.gcd(group // 2, MOST_TURNS)
    end.hopper_gated_end[H // (2 * turns), cdiv(T, ROWS), B](
        _descriptor(query, ROWS), _descriptor(key, ROWS), _descriptor(value, ROWS), _descriptor(output, ROWS),
        _descriptor(compressed_output, ROWS), lse, gates, output, *gates.stride(), H, T, window,
        geometry.local_blocks, cdiv(geometry.initial, ROWS), scale * LOG2_E,
        GROUP=group, D=D, DV=DV, TURNS=turns, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip


def handles_lists(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    partial: Tensor,
    block_size: int,
    is_masked: bool,
    scale: float,
) -> bool:
    """Whether `listed_gradient` serves.

    Args:
        query: [B, H, T, D], last dimension contiguous, as for the other three.
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D_v].
        grad: [B, H, T, D_v].
        partial: the memory for partial gradients of queries.
        block_size: keys of a program.
        is_masked: queries may see a part only of them.
        scale: factor on the logits.
    """
    tensors = (query, key, value, grad)
    steps = [step * each.element_size() for each in tensors for step in each.stride()[:3]]
    return (
        _serves(query, key, value, Intervals(None, None, None, is_causal=True), scale)
        and not is_masked
        and block_size == ROWS
        and query.shape[-1] == value.shape[-1]
        and query.shape[1] // key.shape[1] <= ROWS
        and max(partial.numel(), *map(_last_offset, tensors)) < _MOST_OFFSET
        and not any(step % _ALIGNMENT for step in (*steps, *(each.data_ptr() for each in tensors)))
    )


def listed_gradient(
    grid: tuple[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    partial: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    sizes: tuple[int, int, int],
    chunk: tuple[int, int],
    scale: float,
    lists: dict[str, Any],
) -> None:
    """Adds and writes what `listed_gradient` of the folder above does, for the tokens of a chunk.

    Args as there, but for these:
        entries: order, bounds and further of an inverted chunk.
        sizes: N_blk, entries of a share, and how many further shares there may be.
        chunk: first token, and the one after the last.
        lists: constants of the kernel.
    """
    B, H, T, D = query.shape
    H_kv, S = key.shape[1], key.shape[2]
    listed.hopper_listed_gradient[grid](
        query, key, value, *entries, grad, lse, delta, partial, grad_key, grad_value,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
        B * H_kv, H_kv, T, S, *sizes, *chunk, scale, scale * LOG2_E,
        GROUP=H // H_kv, D=D, num_warps=4, maxnreg=LISTED_REGISTERS[D], **lists,
    )  # fmt: skip


def _constants(
    query: Tensor, key: Tensor, value: Tensor, intervals: Intervals, geometry: KeyGeometry
) -> dict[str, Any]:
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "LENGTH": geometry.length,
        "STRIDE": geometry.stride,
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "SLOTS": SLOTS,
        "IS_CAUSAL": intervals.is_causal,
        "num_warps": 4,
    }


def _last_offset(tensor: Tensor) -> int:
    """Of a sequence's last number, counted from its first."""
    return sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """What copies tiles of `rows` rows of a [B, heads, ·, D] tensor to shared memory, zeros after its last row."""
    # A dimension of size 1 may have any stride, which the hardware would refuse.
    size, shape = tensor.shape[-1], list(tensor.shape)
    strides = [stride if count > 1 else size for count, stride in zip(shape, tensor.stride(), strict=True)]
    steps = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in strides[:-1])]
    if any(step % _ALIGNMENT or not step for step in steps):
        return _descriptor(tensor.clone(memory_format=torch.contiguous_format), rows)
    block, layout = _block(rows, size, tensor.dtype)
    return TensorDescriptor(tensor, shape, [*strides[:-1], 1], block, layout)


@functools.cache
def _block(rows: int, size: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [1, 1, rows, size]
    return block, gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])
