"""Compressed branch on CUDA: softmax attention over visible compressed tokens (arXiv 2502.11089, equation 7).

Same functions and arguments as the operators; shapes in the letters of the definition: query [B, H, T, D],
compressed_key [B, H_kv, N_cmp, D], compressed_value [B, H_kv, N_cmp, D_v].
"""

import torch
from torch import Tensor

from nsa_compile.kernels.gpu import launch


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
    launch.flash_forward(query, compressed_key, compressed_value, intervals, geometry, scale, output, lse)
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
    return launch.flash_backward(
        grad_output, query, compressed_key, compressed_value, intervals, geometry, scale, output, lse
    )
