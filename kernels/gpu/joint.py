"""Joint attention on CUDA: one softmax over the union of the selected blocks and the sliding window.

The window is the contiguous range of `selected.listed_forward`; listed blocks count only before it, so no key counts
twice.  Same functions and arguments as the operators.
"""

from torch import Tensor

from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry
from nsa_compile.kernels.gpu.selected import listed_backward, listed_forward


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
    num_initial: int = 0,
    num_local: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of query [B, H, T, D] to listed blocks [B, H_kv, T, n] and to the last `window` visible positions.

    With num_initial or num_local, every list is known to hold those forced blocks, as `select_blocks` makes them.

    Returns:
        output [B, H, T, D_v], and lse [B, H, T] float32, natural logarithm, −inf where nothing is visible.
    """
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = _geometry(intervals, key.shape[2], selection_block, window, num_initial, num_local)
    return listed_forward(query, key, value, block_indices, intervals, geometry, scale)


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
) -> tuple[Tensor, Tensor]:
    """The share of `joint_attention` that its last kernel starts from: listed blocks outside the densely read keys.

    Returns:
        output [B, H, T, D_v], and lse [B, H, T] float32, natural logarithm, −inf where nothing is visible.
    """
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = _geometry(intervals, key.shape[2], selection_block, window, num_initial, num_local)
    return listed_forward(query, key, value, block_indices, intervals, geometry, scale, with_range=False)


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
    num_initial: int = 0,
    num_local: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = _geometry(intervals, key.shape[2], selection_block, window, num_initial, num_local)
    return listed_backward(grad_output, query, key, value, block_indices, intervals, geometry, scale, delta, lse)


def _geometry(
    intervals: Intervals, num_keys: int, selection_block: int, window: int, num_initial: int, num_local: int
) -> KeyGeometry:
    plain = intervals.first is None and intervals.valid is None and intervals.is_causal
    return KeyGeometry(
        num_keys,
        window=window,
        local_blocks=num_local if plain else 0,
        initial=min(num_initial * selection_block, num_keys) if plain else 0,
        selection_block=selection_block,
    )
