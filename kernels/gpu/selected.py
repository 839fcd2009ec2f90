"""Selected branch on CUDA, and joint attention: softmax over listed blocks, with or without the window beside them.

Both are one computation (arXiv 2502.11089, equations 8-12 for the lists): the listed blocks before a contiguous range
of keys at the end of each query's interval go through `listed`; from that output the flash kernel starts on the range,
so that all is one softmax.  Joint attention's range is the window; the selected branch's is its forced local blocks
when the lists are known to hold them, else empty.  Work goes in chunks of queries, so that partial outputs stay small
and a chunk's queries stay in L2.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_compile.kernels.gpu import launch, listed, ranges, shares, tiles
from nsa_compile.kernels.gpu.inverted import invert_lists
from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry
from nsa_compile.kernels.gpu.sizes import cdiv, next_power_of_2

PARTIAL_BYTES = 1 << 30  # a chunk's partial outputs: bounds extra memory
BACKWARD_PARTIAL_BYTES = 2 << 30  # likewise; for each chunk the gradients of all keys are read and written
DIRECT_ENTRIES = 4096  # fewer list entries than this per KV head: no inverted list
# Programs, but for further shares, up to which those of all sequences and KV heads run side by side: no long one starts
# late.  With more of them the queries of a KV head at a time stay in L2.
PAIRS_FIRST = 2048


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
    num_initial: int = 0,
    num_local: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of query [B, H, T, D] to the visible keys of its listed blocks [B, H_kv, T, n].

    With num_initial or num_local, every list is known to hold those forced blocks, as `select_blocks` makes them.

    Returns:
        output [B, H, T, D_v], and lse [B, H, T] float32, natural logarithm, −inf where nothing is visible.
    """
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = selected_geometry(intervals, key.shape[2], selection_block, num_initial, num_local)
    return listed_forward(query, key, value, block_indices, intervals, geometry, scale)


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
    num_initial: int = 0,
    num_local: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    intervals = Intervals(first_key, last_key, key_valid, is_causal)
    geometry = selected_geometry(intervals, key.shape[2], selection_block, num_initial, num_local)
    return listed_backward(grad_output, query, key, value, block_indices, intervals, geometry, scale, delta, lse)


def selected_geometry(
    intervals: Intervals, num_keys: int, selection_block: int, num_initial: int, num_local: int
) -> KeyGeometry:
    """The range of keys that the selected branch reads beside its lists: forced blocks, where they are known."""
    plain = intervals.first is None and intervals.valid is None and intervals.is_causal
    if plain and num_local:
        return KeyGeometry(
            num_keys,
            local_blocks=num_local,
            initial=min(num_initial * selection_block, num_keys),
            selection_block=selection_block,
        )
    return KeyGeometry(num_keys, selection_block=selection_block, empty=True)


def _sub_block(selection_block: int) -> tuple[int, int]:
    """Keys that a program holds at a time, and how many such parts a selection block has."""
    size = min(max(16, next_power_of_2(selection_block)), 64)
    return size, cdiv(selection_block, size)


def _cuts_blocks(geometry: KeyGeometry, intervals: Intervals) -> bool:
    """Whether a query may see a part only of a listed block, or of the keys that a program holds."""
    # Else blocks end where the local blocks start, at a block's edge, or before.
    whole = intervals.first is None and intervals.valid is None and not geometry.empty and not geometry.window
    size, sub = _sub_block(geometry.selection_block)
    return not whole or size * sub != geometry.selection_block


def _seen_blocks(intervals: Intervals, geometry: KeyGeometry, end: int) -> int:
    """How many blocks, from the first on, can be routed in the lists of tokens before `end`."""
    # Where another kernel handles the keys before each token, blocks that start later are not routed.
    is_cut = intervals.first is None and intervals.is_causal and not geometry.empty
    return cdiv(min(end, geometry.num_tokens) if is_cut else geometry.num_tokens, geometry.selection_block)


def _tile(query: Tensor, value: Tensor, group: int, direct: bool, backward: bool) -> dict[str, int]:
    """Rows (pairs x heads), heads handled together, warps, stages and registers of the listed kernels."""
    width = tiles.width(query.shape[-1], value.shape[-1])
    limit = {}
    if query.element_size() > 2:
        rows, warps, stages = 64, 4, 1
    elif not tiles.is_hopper(query.device):
        rows, warps, stages = (64, 8, 2) if backward and width <= 256 else (64, 4, 1)
    elif backward:
        rows, warps, stages = ((128, 4, 2), (128, 8, 2), (64, 8, 2), (64, 8, 1))[(width - 1) // 128]
    else:
        rows, warps, stages = 64, 4, 1
        limit = {"maxnreg": 168} if 128 < width <= 256 else {}  # three programs a multiprocessor
    group_block = min(group, rows)
    if direct:
        rows = max(16, next_power_of_2(group_block))
    return {"BLOCK_M": rows, "GROUP_BLOCK": group_block, "num_warps": warps, "num_stages": stages, **limit}


def _merge_tile(group: int) -> dict[str, int]:
    """Rows (tokens x heads), heads handled together and warps of the merging kernels."""
    group_block = min(group, 64)
    rows = max(16, next_power_of_2(group_block))
    return {"BLOCK_M": rows, "GROUP_BLOCK": group_block, "num_warps": 2 if rows == 16 else 4}


def _chunks(query: Tensor, width: int, slots: int, limit: int) -> list[tuple[int, int]]:
    """Token ranges whose partial outputs of `width` numbers a head and slot stay below `limit` bytes."""
    B, H, T, _ = query.shape
    per_token = max(1, B * H * slots * width * query.element_size())
    size = max(256, limit // per_token // 256 * 256)
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _merge(
    kernel: Any,
    block_indices: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    tokens: tuple[int, int],
    sub: int,
    constants: dict[str, Any],
    *tensors: Any,
    **widths: int,
) -> None:
    """Launches a merging kernel over the tokens [start, end): rows are tokens x heads of a group."""
    B, H_kv, T, n = block_indices.shape
    group = constants["GROUP"]
    tile = _merge_tile(group)
    group_block = tile["GROUP_BLOCK"]
    first, last, _ = intervals.pointers(block_indices)
    grid = (
        cdiv(tokens[1] - tokens[0], tile["BLOCK_M"] // group_block),
        B * H_kv,
        cdiv(group, group_block),
    )
    if grid[1] == 0:
        return
    kernel[grid](
        block_indices, first, last, *tensors,
        H_kv, T, geometry.num_tokens, geometry.window, geometry.local_blocks, geometry.initial, *tokens,
        GROUP=group, SUB=sub, SELECTION_BLOCK=geometry.selection_block, **geometry.list_constants(n),
        IS_CAUSAL=intervals.is_causal, HAS_INTERVAL=intervals.first is not None,
        HAS_DENSE=not geometry.empty, **tile, **widths,
    )  # fmt: skip


def listed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    with_range: bool = True,
    gated: launch.GatedSum | None = None,
    partial_bytes: int = PARTIAL_BYTES,
) -> tuple[Tensor, Tensor]:
    """Output and lse of one softmax over the geometry's range of keys and the listed blocks before it.

    Without `with_range`, over those listed blocks only.  With `gated` the output is summed with another.  Partial
    outputs take at most `partial_bytes`.
    """
    query, key, value = map(launch.contiguous_rows, (query, key, value))
    block_indices = block_indices.contiguous()
    B, H, T, _ = query.shape
    H_kv, S, DV = key.shape[1], key.shape[2], value.shape[-1]
    n = block_indices.shape[-1]
    lists = geometry.list_constants(n)
    slots = lists["SLOTS"]
    output = launch.new_output(query, value)
    lse = query.new_empty((B, H, T), dtype=torch.float32)
    block_size, sub = _sub_block(geometry.selection_block)
    num_blocks = cdiv(S, geometry.selection_block)
    constants = launch.head_constants(query, key, value)
    direct = T * n <= DIRECT_ENTRIES
    tile = _tile(query, value, constants["GROUP"], direct, backward=False)
    chunks = _chunks(query, DV, slots * sub, partial_bytes)
    has_range = with_range and not geometry.empty
    merge_sum = None if has_range else gated
    # The same memory for every chunk: its layout is [B, chunk, ...], so that a shorter one uses the start of it.
    longest = chunks[0][1] if chunks else 0
    partial = query.new_empty(B * longest * slots * sub * H * DV)
    partial_lse = query.new_empty(B * longest * slots * sub * H, dtype=torch.float32)
    has_entries = B * S * longest * n > 0
    inverted = invert_lists(block_indices, intervals, geometry, longest) if has_entries and not direct else None
    for index, (start, end) in enumerate(chunks):
        chunk = end - start
        if has_entries:
            if inverted is None:
                entries, sizes = (block_indices, block_indices, block_indices), (num_blocks, 0, 0)
                places = chunk * slots
            else:
                entries, sizes = inverted.chunk(index), (num_blocks, inverted.share, inverted.most_further)
                places = _seen_blocks(intervals, geometry, end)
            programs = places * sub * B * H_kv
            listed.attend_listed[(programs + sizes[-1] * sub * B * H_kv,)](
                query, key, value, *intervals.pointers(query), block_indices, *entries, partial, partial_lse,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
                B * H_kv, H_kv, T, S, *sizes, geometry.window, geometry.local_blocks, geometry.initial, start, end,
                scale * launch.LOG2_E,
                SUB=sub, BLOCK_S=block_size, SELECTION_BLOCK=geometry.selection_block, **lists,
                HAS_DENSE=not geometry.empty, DIRECT=direct, MASKED=_cuts_blocks(geometry, intervals),
                PAIRS_FIRST=programs <= PAIRS_FIRST,
                **constants, **intervals.constants(), **tile,
            )  # fmt: skip
        _merge(
            listed.merge_outputs, block_indices, intervals, geometry, (start, end), sub, constants,
            partial, partial_lse, output, lse, *launch.gate_arguments(merge_sum, query),
            DV=DV, BLOCK_DV=constants["BLOCK_DV"], **launch.gate_constant(merge_sum),
        )  # fmt: skip
    if has_range:
        launch.flash_forward(query, key, value, intervals, geometry, scale, output, lse, has_base=True, gated=gated)
    return output, lse


def listed_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    delta: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for `listed_forward`."""
    query, key, value, grad = map(launch.contiguous_rows, (query, key, value, grad_output))
    block_indices, lse, delta = (each.contiguous() for each in (block_indices, lse, delta))
    B, H, T, D = query.shape
    H_kv, S, DV = key.shape[1], key.shape[2], value.shape[-1]
    n = block_indices.shape[-1]
    slots = geometry.list_constants(n)["SLOTS"]
    grad_query = query.new_empty(query.shape)
    block_size, sub = _sub_block(geometry.selection_block)
    num_blocks = cdiv(S, geometry.selection_block)
    constants = launch.head_constants(query, key, value)
    chunks = _chunks(query, D, slots * sub, BACKWARD_PARTIAL_BYTES)
    longest = chunks[0][1] if chunks else 0
    has_entries = B * S * longest * n > 0
    inverted = invert_lists(block_indices, intervals, geometry, longest) if has_entries else None
    # Rows of further shares behind those of the keys (shares.py).
    further_rows = B * H_kv * inverted.most_further * sub * block_size if inverted else 0
    make = torch.empty if inverted else torch.zeros
    sums = [make((B * H_kv * S + further_rows, size), dtype=torch.float32, device=key.device) for size in (D, DV)]
    if not geometry.empty:
        launch.flash_query_gradient(query, key, value, intervals, geometry, scale, grad, lse, delta, grad_query)
    tile = _tile(query, value, constants["GROUP"], direct=False, backward=True)
    partial = query.new_empty(B * longest * slots * sub * H * D)
    is_masked = _cuts_blocks(geometry, intervals)
    hopper = ranges.hopper(query.device.type)
    if hopper is None or not hopper.handles_lists(query, key, value, grad, partial, block_size, is_masked, scale):
        hopper = None
    for index, (start, end) in enumerate(chunks):
        if inverted is not None:
            # The first chunk writes the gradients of all keys, others add to those that they see.
            blocks = num_blocks if index == 0 else _seen_blocks(intervals, geometry, end)
            entries, sizes = inverted.chunk(index), (num_blocks, inverted.share, inverted.most_further)
            programs = blocks * sub * B * H_kv
            grid = (programs + inverted.most_further * sub * B * H_kv,)
            lists = {
                "SUB": sub,
                "SLOTS": slots,
                "PAIRS_FIRST": programs <= PAIRS_FIRST,
                "IS_FIRST": index == 0,
            }
            if hopper is not None:
                hopper.listed_gradient(
                    grid, query, key, value, entries, grad, lse, delta, partial, *sums, sizes, (start, end), scale,
                    lists,
                )  # fmt: skip
            else:
                listed.listed_gradient[grid](
                    query, key, value, *intervals.pointers(query), *entries, grad, lse, delta, partial, *sums,
                    *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
                    B * H_kv, H_kv, T, S, *sizes, geometry.window, geometry.local_blocks, start, end,
                    scale, scale * launch.LOG2_E,
                    BLOCK_S=block_size, SELECTION_BLOCK=geometry.selection_block, HAS_DENSE=not geometry.empty,
                    MASKED=is_masked, **lists, **constants, **intervals.constants(), **tile,
                )  # fmt: skip
            if inverted.most_further:
                shares.add_shares[(blocks * sub, B * H_kv)](
                    inverted.further[index], *sums, B * H_kv, S, num_blocks, inverted.most_further,
                    SUB=sub, BLOCK_S=block_size, SELECTION_BLOCK=geometry.selection_block,
                    **{name: constants[name] for name in ("D", "DV", "BLOCK_D", "BLOCK_DV")}, num_warps=4,
                )  # fmt: skip
        _merge(
            listed.merge_query_gradients, block_indices, intervals, geometry, (start, end), sub, constants,
            partial, grad_query, D=D, BLOCK_D=constants["BLOCK_D"],
        )  # fmt: skip
    grad_key, grad_value = (each[: B * H_kv * S].view(B, H_kv, S, each.shape[1]) for each in sums)
    if geometry.empty:
        return grad_query, (grad_key * scale).to(key.dtype), grad_value.to(value.dtype)
    if geometry.initial:
        initial_key, initial_value = launch.flash_key_gradient(
            query, key, value, intervals, geometry, scale, grad, lse, delta, initial_only=True
        )
        grad_key[:, :, : initial_key.shape[2]] += initial_key
        grad_value[:, :, : initial_value.shape[2]] += initial_value
    grad_key, grad_value = launch.flash_key_gradient(
        query, key, value, intervals, geometry, scale, grad, lse, delta, base=(grad_key, grad_value)
    )
    return grad_query, grad_key, grad_value
