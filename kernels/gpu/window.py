"""Window branch on CUDA: softmax attention over the last w visible positions (arXiv 2502.11089, section 3.3.3).

Same functions and arguments as the operators; query [B, H, T, D], key [B, H_kv, S, D], value [B, H_kv, S, D_v].
"""

from torch import Tensor

from nsa_compile.kernels.gpu import ranges
from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry


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
) -> tuple[Tensor, Tensor]:
    """Returns output [B, H, T, D_v] and lse [B, H, T] float32, natural logarithm, −inf where nothing is visible."""
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = KeyGeometry(key.shape[2], window=window)
    return ranges.attend(query, key, value, intervals, geometry, scale)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = KeyGeometry(key.shape[2], window=window)
    return ranges.attend_backward(grad_output, query, key, value, intervals, geometry, scale, delta, lse)
