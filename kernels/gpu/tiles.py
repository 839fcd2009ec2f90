"""Compile-time facts of the kernels: head sizes, and tile sizes by what was measured (NOTES.md)."""

import functools
from typing import Literal

import torch

from nsa_compile.kernels.gpu.sizes import next_power_of_2


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) for other devices."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def head_sizes(group: int, size: int, value_size: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Compile-time facts about G heads in a group, of size D and D_v: powers of two, dot precision."""
    return {
        "GROUP": group,
        "D": size,
        "DV": value_size,
        "BLOCK_D": max(16, next_power_of_2(size)),
        "BLOCK_DV": max(16, next_power_of_2(value_size)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def is_hopper(device: torch.device) -> bool:
    """Whether tiles may use the shared memory of a Hopper GPU (227 KB a program) rather than an Ampere's (163 KB)."""
    return capability(device) >= (9, 0)


# A query's range of keys: all that it sees, a window, or some blocks at the end of what it sees.
Span = Literal["whole", "window", "blocks"]

# (stage, span) -> by width (see `width`) up to 128, 256, 384, 512: BLOCK_M, BLOCK_N, warps, stages; 16-bit, measured on
# an H200 (NOTES.md).  Blocks have a window's where nothing else is given.
_HOPPER_TILES = {
    ("forward", "whole"): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("forward", "window"): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2)),
    ("forward", "blocks"): ((64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    ("query_gradient", "whole"): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    ("query_gradient", "window"): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)),
    ("query_gradient", "blocks"): ((64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)),
    ("key_gradient", "whole"): ((64, 64, 4, 3), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2)),
    ("key_gradient", "window"): ((64, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2)),
}
# Without Hopper's shared memory: the same for all spans; widths up to 256, and above.
_SMALLER_TILES = {
    "forward": ((128, 64, 8, 2), (64, 64, 8, 2)),
    "query_gradient": ((128, 64, 8, 2), (64, 32, 8, 2)),
    "key_gradient": ((64, 128, 8, 2), (32, 64, 8, 2)),
}


# What `max_autotune` times beside the table's choice, for the forward pass over a window.
_FORWARD_CANDIDATES = ((64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2))
_SMALLER_FORWARD_CANDIDATES = ((64, 32, 4, 2), (64, 64, 4, 2), (32, 32, 4, 1))


def width(size: int, value_size: int) -> int:
    """Numbers that a kernel holds of a token's key and value: D and D_v as powers of two."""
    return sum(max(16, next_power_of_2(each)) for each in (size, value_size))


def tiles_for(stage: str, span: Span, width: int, element_size: int, device: torch.device) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a stage.

    Args:
        stage: "forward", "query_gradient" or "key_gradient".
        span: the range of keys.
        width: what `width` returns, at most 512.
        element_size: bytes of a number.
        device: where the kernel runs.
    """
    if element_size > 2:
        sizes = (64, 32, 4, 2) if width <= 256 else (32, 16, 4, 1)
    elif is_hopper(device):
        sizes = _HOPPER_TILES.get((stage, span), _HOPPER_TILES[stage, "window"])[(width - 1) // 128]
    else:
        sizes = _SMALLER_TILES[stage][width > 256]
    return _named(sizes)


def forward_candidates(width: int, element_size: int, device: torch.device) -> list[dict[str, int]]:
    """Tile sizes of a forward pass over a window that are worth timing, the default first; see `tiles_for`."""
    small = width > 256 or element_size > 2 or not is_hopper(device)
    others = map(_named, _SMALLER_FORWARD_CANDIDATES if small else _FORWARD_CANDIDATES)
    default = tiles_for("forward", "window", width, element_size, device)
    return [default, *(sizes for sizes in others if sizes != default)]


def _named(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))
