"""The attention branches in aten: memory linear in S, sums in float32 (float64 for float64).

Each function implements the operator of the same name; kernels/operators.py documents arguments and results.
Forced blocks (`num_initial`, `num_local`) stand in the lists, and are read from there as any other.
"""

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise.bounds import compressed_bounds, visible_bounds, window_bounds
from nsa_compile.kernels.blockwise.parts import KeyRange, ListedBlocks, attend, attend_backward
from nsa_compile.kernels.compression import sum_dtype

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def output_dot_gradient(output: Tensor, grad_output: Tensor) -> Tensor:
    """Multiplies rows with their gradients, and sums over D_v."""
    dtype = sum_dtype(output)
    return (output.to(dtype) * grad_output.to(dtype)).sum(-1)


def _compressed_part(
    query: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    *,
    is_causal: bool,
    block_length: int,
    block_stride: int,
    num_keys: int,
) -> KeyRange:
    lo, hi = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=num_keys)
    return KeyRange(*compressed_bounds(lo, hi, block_length, block_stride))


def compressed_attention(
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    compressed_valid: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    block_length: int,
    block_stride: int,
    num_keys: int,
) -> Pair:
    """Attends to the visible compressed tokens."""
    part = _compressed_part(
        query,
        first_key,
        last_key,
        is_causal=is_causal,
        block_length=block_length,
        block_stride=block_stride,
        num_keys=num_keys,
    )
    return attend(query, compressed_key, compressed_value, compressed_valid, scale, part)


def compressed_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    compressed_valid: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    block_length: int,
    block_stride: int,
    num_keys: int,
) -> Triple:
    """Gradients of `compressed_attention`."""
    part = _compressed_part(
        query,
        first_key,
        last_key,
        is_causal=is_causal,
        block_length=block_length,
        block_stride=block_stride,
        num_keys=num_keys,
    )
    return attend_backward(
        grad_output, query, compressed_key, compressed_value, compressed_valid, delta, lse, scale, part
    )


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    num_initial: int = 0,  # noqa: ARG001
    num_local: int = 0,  # noqa: ARG001
) -> Pair:
    """Attends to the visible tokens of the listed blocks."""
    bounds = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=key.shape[2])
    return attend(query, key, value, key_valid, scale, ListedBlocks(block_indices, selection_block, *bounds))


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    compressed_output: Tensor,
    gates: Tensor,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    window: int,
    num_initial: int = 0,  # noqa: ARG001
    num_local: int = 0,  # noqa: ARG001
) -> Tensor:
    """Sums the compressed branch's output, `selected_attention` and `window_attention` by their gates."""
    sight = (first_key, last_key, key_valid)
    causal = {"is_causal": is_causal, "scale": scale}
    dtype = sum_dtype(query)
    compressed_gate, selected_gate, window_gate = gates.to(dtype).split(1, -1)
    total = compressed_output * compressed_gate
    output, _ = selected_attention(query, key, value, block_indices, *sight, **causal, selection_block=selection_block)
    total.addcmul_(output.to(dtype), selected_gate)
    output, _ = window_attention(query, window_key, window_value, *sight, **causal, window=window)
    return output.copy_(total.addcmul_(output.to(dtype), window_gate))


def selected_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    num_initial: int = 0,  # noqa: ARG001
    num_local: int = 0,  # noqa: ARG001
) -> Triple:
    """Gradients of `selected_attention`."""
    bounds = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=key.shape[2])
    part = ListedBlocks(block_indices, selection_block, *bounds)
    return attend_backward(grad_output, query, key, value, key_valid, delta, lse, scale, part)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    window: int,
) -> Pair:
    """Attends to the visible tokens among the last w positions."""
    bounds = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=key.shape[2])
    return attend(query, key, value, key_valid, scale, KeyRange(*window_bounds(*bounds, window)))


def window_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    window: int,
) -> Triple:
    """Gradients of `window_attention`."""
    bounds = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=key.shape[2])
    part = KeyRange(*window_bounds(*bounds, window))
    return attend_backward(grad_output, query, key, value, key_valid, delta, lse, scale, part)


def _joint_parts(
    query: Tensor,
    key: Tensor,
    block_indices: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    *,
    is_causal: bool,
    selection_block: int,
    window: int,
) -> tuple[KeyRange, ListedBlocks]:
    lo, hi = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=key.shape[2])
    window_lo, _ = window_bounds(lo, hi, window)
    return KeyRange(window_lo, hi), ListedBlocks(block_indices, selection_block, lo, window_lo - 1)


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    window: int,
    num_initial: int = 0,  # noqa: ARG001
    num_local: int = 0,  # noqa: ARG001
) -> Pair:
    """Attends to the union of the listed blocks' tokens and the window, in one softmax."""
    parts = _joint_parts(
        query,
        key,
        block_indices,
        first_key,
        last_key,
        is_causal=is_causal,
        selection_block=selection_block,
        window=window,
    )
    return attend(query, key, value, key_valid, scale, *parts)


def joint_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    window: int,
    num_initial: int = 0,
    num_local: int = 0,
) -> Pair:
    """Attends to the listed blocks' tokens outside what `joint_attention` reads densely."""
    num_keys = key.shape[2]
    lo, hi = visible_bounds(first_key, last_key, is_causal=is_causal, query=query, num_keys=num_keys)
    dense_lo, _ = window_bounds(lo, hi, window)
    if first_key is None and key_valid is None and is_causal:
        local_lo = (hi.clamp_max(num_keys - 1) // selection_block - num_local + 1) * selection_block
        dense_lo = torch.minimum(dense_lo, local_lo) if num_local else dense_lo
        lo = lo.clamp_min(num_initial * selection_block)
    listed = ListedBlocks(block_indices, selection_block, lo, dense_lo - 1)
    return attend(query, key, value, key_valid, scale, listed)


def joint_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    window: int,
    num_initial: int = 0,  # noqa: ARG001
    num_local: int = 0,  # noqa: ARG001
) -> Triple:
    """Gradients of `joint_attention`."""
    parts = _joint_parts(
        query,
        key,
        block_indices,
        first_key,
        last_key,
        is_causal=is_causal,
        selection_block=selection_block,
        window=window,
    )
    return attend_backward(grad_output, query, key, value, key_valid, delta, lse, scale, *parts)
