"""Compressed branch on CUDA: softmax attention over visible compressed tokens (arXiv 2502.11089, equation 7).

Same functions and arguments as the operators; shapes in the letters of the definition: query [B, H, T, D],
compressed_key [B, H_kv, N_cmp, D], compressed_value [B, H_kv, N_cmp, D_v].
"""

from torch import Tensor

from nsa_compile.kernels.gpu import ranges
from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry


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
    intervals = Intervals(first_key, last_key, compressed_valid, is_causal)
    geometry = KeyGeometry(num_keys, block_length, block_stride)
    return ranges.attend(query, compressed_key, compressed_value, intervals, geometry, scale)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, compressed_key and compressed_value."""
    intervals = Intervals(first_key, last_key, compressed_valid, is_causal)
    geometry = KeyGeometry(num_keys, block_length, block_stride)
    return ranges.attend_backward(
        grad_output, query, compressed_key, compressed_value, intervals, geometry, scale, delta, lse
    )
