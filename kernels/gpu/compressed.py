"""Compressed branch on CUDA: softmax attention over visible compressed tokens (arXiv 2502.11089, equation 7).

Same functions and arguments as the operators; shapes in the letters of the definition: query [B, H, T, D],
compressed_key [B, H_kv, N_cmp, D], compressed_value [B, H_kv, N_cmp, D_v].
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from nsa_compile.kernels.gpu import launch


@functools.cache
def _hopper() -> ModuleType | None:
    """The launches of the kernels in Gluon, whose interface may still change from one Triton to the next."""
    try:
        from nsa_compile.kernels.gpu.hopper import launch as hopper
    except (ImportError, AttributeError) as error:
        warnings.warn(f"this Triton's Gluon is unknown, and compressed attention slower: {error}", stacklevel=2)
        return None
    return hopper


def _faster(query: Tensor, key: Tensor, value: Tensor, intervals: launch.Intervals, scale: float) -> ModuleType | None:
    """The launches to use in place of `launch`'s, if there are any for such tensors."""
    hopper = _hopper() if query.device.type == "cuda" else None
    return hopper if hopper is not None and hopper.handles(query, key, value, intervals, scale) else None


def compressed_lse(
    query: Tensor,
    compressed_key: Tensor,
    intervals: launch.Intervals,
    geometry: launch.KeyGeometry,
    scale: float,
) -> Tensor:
    """Returns lse [B, H, T] float32 of attention to the compressed keys, without its output."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    _forward(query, compressed_key, compressed_key, intervals, geometry, scale, None, lse)
    return lse


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: launch.Intervals,
    geometry: launch.KeyGeometry,
    scale: float,
    output: Tensor | None,
    lse: Tensor,
) -> None:
    hopper = _faster(query, key, value, intervals, scale)
    if hopper is not None:
        hopper.flash_forward(query, key, value, geometry, intervals.is_causal, scale, output, lse)
    else:
        launch.flash_forward(query, key, value, intervals, geometry, scale, output, lse)


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
) -> tuple[Tensor, Tensor]:
    """Returns output [B, H, T, D_v] and lse [B, H, T] float32, natural logarithm, −inf where nothing is visible."""
    query, compressed_key, compressed_value = map(launch.contiguous_rows, (query, compressed_key, compressed_value))
    B, H, T, _ = query.shape
    output = launch.new_output(query, compressed_value)
    lse = query.new_empty((B, H, T), dtype=torch.float32)
    intervals = launch.Intervals(first_key, last_key, compressed_valid, is_causal)
    geometry = launch.KeyGeometry(num_keys, block_length, block_stride)
    _forward(query, compressed_key, compressed_value, intervals, geometry, scale, output, lse)
    return output, lse


def compressed_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    compressed_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    block_length: int,
    block_stride: int,
    num_keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, compressed_key and compressed_value."""
    query, compressed_key, compressed_value = map(launch.contiguous_rows, (query, compressed_key, compressed_value))
    intervals = launch.Intervals(first_key, last_key, compressed_valid, is_causal)
    geometry = launch.KeyGeometry(num_keys, block_length, block_stride)
    hopper = _faster(query, compressed_key, compressed_value, intervals, scale)
    if hopper is not None:
        return hopper.flash_backward(
            grad_output, query, compressed_key, compressed_value, geometry, is_causal, scale, output, lse
        )
    return launch.flash_backward(
        grad_output, query, compressed_key, compressed_value, intervals, geometry, scale, output, lse
    )
