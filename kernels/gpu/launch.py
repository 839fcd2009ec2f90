"""Launches of the flash kernels: which keys a branch has (`KeyGeometry`), tile sizes, and the three calls.

Nothing here looks at a value on the device, so launches can be captured in a CUDA graph.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_compile.kernels.gpu import backward, forward, tiles
from nsa_compile.kernels.gpu.sizes import cdiv, next_power_of_2

LOG2_E = math.log2(math.e)
MANY_PROGRAMS = 1024  # of a kernel whose programs differ in work: enough that all multiprocessors end together
QUERIES_OF_A_SPLIT = 2048  # a share of fewer queries is not worth a gradient buffer of its own
QUERIES_OF_AN_INITIAL_SPLIT = 512  # likewise, for the small buffer of the initial blocks


@dataclasses.dataclass(frozen=True)
class KeyGeometry:
    """How a token's visible interval becomes one range of key indices; see `flash.key_range`.

    Args:
        num_tokens: S, tokens that the keys stand for.
        length: l, tokens a key stands for (1: the key is a token).
        stride: d, tokens between neighbouring keys.
        window: w, tokens at the end of the interval that the range is cut to; 0 does not cut.
        local_blocks: selection blocks at the end of the interval that the range reaches back to; 0 does not cut.
        initial: tokens at the start of the keys that are attended to as well.
        selection_block: l', tokens in a selection block.
        empty: the range holds no key (what remains are the listed blocks).
    """

    num_tokens: int
    length: int = 1
    stride: int = 1
    window: int = 0
    local_blocks: int = 0
    initial: int = 0
    selection_block: int = 64
    empty: bool = False

    def constants(self) -> dict[str, int]:
        """The compile-time part."""
        return {"LENGTH": self.length, "STRIDE": self.stride, "SELECTION_BLOCK": self.selection_block}

    def list_constants(self, num_listed: int) -> dict[str, int]:
        """Which slots of a list of n can hold a block before the range: the first of them, and how many.

        Lists are ascending and hold all initial and local blocks, which are read as a part of the range.
        """
        first = min(cdiv(self.initial, self.selection_block), num_listed - 1)
        slots = max(1, num_listed - first - self.local_blocks)
        return {"NUM_LISTED": num_listed, "FIRST_SLOT": first, "SLOTS": slots}

    @property
    def span(self) -> tiles.Span:
        """What the range is, for the choice of tiles."""
        return "window" if self.window else "blocks" if self.local_blocks else "whole"

    @property
    def is_cut(self) -> bool:
        """Whether the range is cut to the end of the interval."""
        return self.window + self.local_blocks > 0


class Intervals(NamedTuple):
    """What each query sees: `first` and `last` [B, T] int32 or both None (plain), `valid` [B, N] bool or None."""

    first: Tensor | None
    last: Tensor | None
    valid: Tensor | None
    is_causal: bool

    def pointers(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, `unused` standing in for those that are None (the kernel does not read it)."""
        valid = unused if self.valid is None else self.valid.contiguous().view(torch.uint8)
        if self.first is None or self.last is None:
            return unused, unused, valid
        return self.first.contiguous(), self.last.contiguous(), valid

    def constants(self) -> dict[str, bool]:
        """The compile-time part."""
        return {
            "IS_CAUSAL": self.is_causal,
            "HAS_INTERVAL": self.first is not None,
            "HAS_VALID": self.valid is not None,
        }


class GatedSum(NamedTuple):
    """What a branch's output is summed with.

    Attributes:
        other: the compressed branch's output, before gate 1, or the sum so far, [B, H, T, D_v], as `new_output` makes
            it; may be the memory that is written.
        gates: [B, H, T, 3], any strides.
        gate: which of them is the branch's own: 1 selected, 2 window.
    """

    other: Tensor
    gates: Tensor
    gate: int


def gate_arguments(gated: GatedSum | None, unused: Tensor) -> tuple[Any, ...]:
    """The two tensors and the gates' strides, as kernels take them; `unused` stands in where there are none."""
    return (unused, unused, 0, 0, 0, 0) if gated is None else (*gated[:2], *gated.gates.stride())


def gate_constant(gated: GatedSum | None) -> dict[str, int]:
    """The compile-time part."""
    return {"GATE": 0 if gated is None else gated.gate}


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def new_output(query: Tensor, value: Tensor) -> Tensor:
    """Memory for a branch's output [B, H, T, D_v], in the order [B, T, H, D_v]."""
    B, H, T, _ = query.shape
    return query.new_empty((B, T, H, value.shape[-1])).transpose(1, 2)


def head_constants(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int | str]:
    """Compile-time facts about the heads: group size, head sizes and their powers of two, dot precision."""
    return tiles.head_sizes(query.shape[1] // key.shape[1], query.shape[-1], value.shape[-1], query.dtype)


def tile_sizes(stage: str, geometry: KeyGeometry, query: Tensor, value: Tensor) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a stage: "forward", "query_gradient" or "key_gradient"."""
    width = tiles.width(query.shape[-1], value.shape[-1])
    return tiles.tiles_for(stage, geometry.span, width, query.element_size(), query.device)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    output: Tensor | None,
    lse: Tensor,
    has_base: bool = False,
    gated: GatedSum | None = None,
) -> None:
    """Writes output [B, H, T, D_v] and lse [B, H, T].

    Without `output` only the lse is worked out, and the values are not read.

    Args:
        query: [B, H, T, D], last dimension contiguous, as for key and value.
        key: [B, H_kv, N, D], N keys (compressed tokens or tokens).
        value: [B, H_kv, N, D_v].
        intervals: what each query sees; `valid` counts keys.
        geometry: which keys of the interval the branch attends to.
        scale: factor on the logits.
        output: as `new_output` makes it; written.
        lse: contiguous float32; written, natural logarithm.
        has_base: output and lse hold an attention to other keys, and become that to both.
        gated: what the output, not the lse, is summed with.
    """
    B, H, T, _ = query.shape
    if T == 0 or B == 0:
        return
    sizes = tile_sizes("forward", geometry, query, value)
    grid = (cdiv(T, sizes["BLOCK_M"]), B * H)
    lse_only = output is None
    output = lse if output is None else output
    forward.flash_forward[grid](
        query, key, value, *intervals.pointers(query), output, lse, *gate_arguments(gated, query),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        H, T, geometry.num_tokens, key.shape[2], geometry.window, geometry.local_blocks, geometry.initial,
        scale * LOG2_E,
        HAS_INITIAL=geometry.initial > 0, HAS_BASE=has_base, LSE_ONLY=lse_only,
        **gate_constant(gated), **head_constants(query, key, value), **geometry.constants(), **intervals.constants(),
        **sizes,
    )  # fmt: skip


def output_dot_gradient(output: Tensor, grad: Tensor) -> Tensor:
    """Σ over D_v of output · grad_output, [B, H, T] float32."""
    output, grad = contiguous_rows(output), contiguous_rows(grad)
    B, H, T, DV = output.shape
    delta = output.new_empty((B, H, T), dtype=torch.float32)
    rows = 64
    if delta.numel():
        backward.output_dot_gradient[(cdiv(T, rows), B * H)](
            output, grad, delta, *output.stride()[:3], *grad.stride()[:3], H, T,
            DV=DV, BLOCK_DV=next_power_of_2(DV), BLOCK_M=rows, num_warps=4,
        )  # fmt: skip
    return delta


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
    """Writes grad_query [B, H, T, D]; arguments as in `flash_forward`.

    `grad` is the output's gradient, `lse` and `delta` belong to the whole softmax.
    """
    B, H, T, _ = query.shape
    if T == 0 or B == 0:
        return
    sizes = tile_sizes("query_gradient", geometry, query, value)
    grid = (cdiv(T, sizes["BLOCK_M"]), B * H)
    backward.flash_query_gradient[grid](
        query, key, value, *intervals.pointers(query), grad, lse, delta, grad_query,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
        H, T, geometry.num_tokens, key.shape[2], geometry.window, geometry.local_blocks, geometry.initial,
        scale, scale * LOG2_E,
        HAS_INITIAL=geometry.initial > 0,
        **head_constants(query, key, value), **geometry.constants(), **intervals.constants(), **sizes,
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
    base: tuple[Tensor, Tensor] | None = None,
    initial_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of key [B, H_kv, N, D] and value [B, H_kv, N, D_v]; arguments as in `flash_query_gradient`.

    With `base`, starts from these float32 gradients, the keys' not yet multiplied by the scale.  With `initial_only`,
    only the share of the first `geometry.initial` keys, [B, H_kv, initial, ·] in that same form.
    """
    B, H, T, D = query.shape
    H_kv, N, DV = key.shape[1], key.shape[2], value.shape[-1]
    constants = head_constants(query, key, value)
    group = constants["GROUP"]
    sizes = tile_sizes("key_gradient", geometry, query, value)
    limit = min(geometry.initial, N) if initial_only else N
    if initial_only:
        sizes["BLOCK_N"] = min(sizes["BLOCK_N"], max(16, next_power_of_2(limit)))
    tiles = cdiv(limit, sizes["BLOCK_N"])
    programs = max(1, tiles * H_kv)
    head_splits = query_splits = 1
    if base is None:
        head_splits, query_splits = gradient_splits(geometry, programs, group, T, initial_only=initial_only)
    splits = head_splits * query_splits
    dtype = torch.float32 if splits > 1 or initial_only else key.dtype
    grad_key = key.new_empty((splits, B, H_kv, limit, D), dtype=dtype)
    grad_value = key.new_empty((splits, B, H_kv, limit, DV), dtype=dtype)
    if limit == 0 or B == 0:
        return grad_key.sum(0).to(key.dtype), grad_value.sum(0).to(value.dtype)
    ranges = _query_ranges(query, intervals, geometry, N, tiles, sizes["BLOCK_N"])
    base_key, base_value = base or (lse, lse)
    backward.flash_key_gradient[(tiles, B * H_kv, splits)](
        query, key, value, *intervals.pointers(query), grad, lse, delta, ranges, base_key, base_value,
        grad_key, grad_value,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
        H, T, geometry.num_tokens, N, limit, geometry.window, geometry.local_blocks, geometry.initial, query_splits,
        1.0 if initial_only else scale, scale * LOG2_E,
        HEADS=group // head_splits, HAS_BASE=base is not None, INITIAL_ONLY=initial_only,
        **constants, **geometry.constants(), **intervals.constants(), **sizes,
    )  # fmt: skip
    if initial_only:
        return grad_key.sum(0), grad_value.sum(0)
    return add_splits(grad_key, key.dtype), add_splits(grad_value, value.dtype)


def add_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds up [split, ...], in a fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def gradient_splits(
    geometry: KeyGeometry, programs: int, group: int, num_queries: int, *, initial_only: bool = False
) -> tuple[int, int]:
    """Into how many parts the sum for keys' gradients is split over the G heads of a group, and over T queries.

    Few tiles of keys (compressed tokens, initial blocks) leave the device idle; the parts are added in a fixed order
    afterwards.  `programs` are those of a sequence, not of a batch, or its gradients would depend on the others.
    """
    head_splits = group if programs < MANY_PROGRAMS else 1
    if geometry.is_cut and not initial_only:  # few queries see a key
        return head_splits, 1
    fewest = QUERIES_OF_AN_INITIAL_SPLIT if initial_only else QUERIES_OF_A_SPLIT
    return head_splits, max(1, min(MANY_PROGRAMS // (programs * head_splits), num_queries // fewest))


def _query_ranges(
    query: Tensor, intervals: Intervals, geometry: KeyGeometry, num_keys: int, tiles: int, block: int
) -> Tensor:
    """Token range that sees each tile of keys, [B, tiles, 2] int32 (unused without intervals)."""
    B, _, T, _ = query.shape
    if intervals.first is None:
        return query
    ranges = query.new_empty((B, tiles, 2), dtype=torch.int32)
    backward.query_ranges[(tiles, B)](
        *intervals.pointers(query)[:2], ranges, T, geometry.num_tokens, num_keys, geometry.window,
        geometry.local_blocks, **geometry.constants(), BLOCK_N=block, BLOCK_T=1024, num_warps=4,
    )  # fmt: skip
    return ranges
