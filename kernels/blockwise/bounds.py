"""What each branch lets a query see, as bounds on positions."""

import torch
from torch import Tensor

from nsa_compile.kernels.intervals import default_intervals


def visible_bounds(
    first_key: Tensor | None, last_key: Tensor | None, *, is_causal: bool, query: Tensor, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Returns the first and last visible key of each query, `[B | 1, T]` int32, `last` not clamped to S − 1."""
    if first_key is None or last_key is None:
        return default_intervals(is_causal=is_causal, query=query, num_keys=num_keys)
    return first_key, last_key


def compressed_bounds(lo: Tensor, hi: Tensor, block_length: int, block_stride: int) -> tuple[Tensor, Tensor]:
    """Turns bounds on keys into bounds on compressed tokens, whose l keys all lie inside."""
    first = torch.div(lo + (block_stride - 1), block_stride, rounding_mode="floor")
    last = torch.div(hi - (block_length - 1), block_stride, rounding_mode="floor")
    return first, last


def window_bounds(lo: Tensor, hi: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Narrows bounds to the last w positions."""
    return torch.maximum(lo, hi - (window - 1)), hi
