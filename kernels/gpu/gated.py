"""Gated inference on CUDA after the compressed branch: selected branch, window, and the sum of all three by gates.

For long inputs without gradients.  Beside the compressed branch's output one more needs memory: first the attention to
the listed blocks, in the end the sum.
"""

from torch import Tensor

from nsa_compile.kernels.gpu import launch, ranges
from nsa_compile.kernels.gpu.launch import GatedSum, Intervals, KeyGeometry
from nsa_compile.kernels.gpu.selected import listed_forward, selected_geometry

MEMORY_BYTES = 1408 << 20  # of the output and a chunk's partial outputs together
PARTIAL_BYTES = 384 << 20, 1 << 30  # of the latter at least, and at most


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
    num_initial: int = 0,
    num_local: int = 0,
) -> Tensor:
    """Sums the compressed branch's output [B, H, T, D_v], the selected branch and the window by gates [B, H, T, 3].

    Arguments as for `selected_attention`; the window's keys and values may be tensors of their own.

    Returns:
        [B, H, T, D_v], as `new_output` makes it.
    """
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = selected_geometry(intervals, key.shape[2], selection_block, num_initial, num_local)
    query, key, value, window_key, window_value = map(
        launch.contiguous_rows, (query, key, value, window_key, window_value)
    )
    selected = (query, key, value, block_indices, intervals, geometry, scale)
    least, most = PARTIAL_BYTES
    partial_bytes = max(least, min(most, MEMORY_BYTES - compressed_output.numel() * compressed_output.element_size()))
    compressed_output = compressed_output.transpose(1, 2).contiguous().transpose(1, 2)
    hopper = ranges.hopper(query.device.type)
    if (
        hopper is not None
        and _is_same(key, window_key)
        and _is_same(value, window_value)
        and hopper.handles_gated_end(query, key, value, intervals, geometry, window, scale)
    ):
        output, lse = listed_forward(*selected, with_range=False, partial_bytes=partial_bytes)
        hopper.gated_end(query, key, value, geometry, window, scale, output, lse, compressed_output, gates)
        return output
    summed = GatedSum(compressed_output, gates, 1)
    output, lse = listed_forward(*selected, gated=summed, partial_bytes=partial_bytes)
    launch.flash_forward(
        query, window_key, window_value, intervals, KeyGeometry(key.shape[2], window=window), scale, output, lse,
        gated=GatedSum(output, gates, 2),
    )  # fmt: skip
    return output


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
