"""Runs the Triton kernels in Triton's interpreter and prints, a JSON line a case, how far they are from the reference.

A process of its own: TRITON_INTERPRET must be set before a kernel is defined.  Run by test_interpreter.py.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from nsa_compile.kernels import reference
from nsa_compile.kernels.blockwise import branches
from nsa_compile.kernels.compression import mean_compress
from nsa_compile.kernels.gpu import compressed, gated, inverted, joint, launch, selected, selection, shares, window
from nsa_compile.kernels.intervals import blocks_with_valid_key, tighten_intervals

SIZES = {"compression": {"block_length": 8, "block_stride": 4}, "block": 16, "window": 20, "selected": 4}
# Scales that are not 1/√D.
SCALES = {"negative_scale": -0.3, "no_scale": 0.0}
# Cases in which blocks are chosen in every way, which takes the interpreter longest; in the others in one way.
CHOICES = ("causal", "intervals", "padded", "more_queries_than_keys", "one_query")
# Windows that tiles of keys fit into, which then need no mask.
WINDOWS = {"long_ranges": 130}
# name: B, H, H_kv, T, S, D, D_v, dtype, visibility, bytes of partial outputs (small: several chunks, inverted lists)
CASES = {
    "causal": (1, 4, 2, 70, 70, 16, 16, torch.float32, "causal", 1 << 30),
    "causal_chunks": (1, 6, 2, 90, 90, 16, 16, torch.float32, "causal", 1),
    "intervals": (2, 3, 1, 50, 81, 32, 16, torch.float32, "intervals", 1),
    "padded": (1, 4, 4, 33, 63, 24, 40, torch.float32, "padded", 1 << 30),
    "more_queries_than_keys": (1, 2, 1, 60, 30, 16, 16, torch.float32, "causal", 1),
    "one_query": (2, 4, 2, 1, 77, 16, 16, torch.float32, "intervals", 1 << 30),
    "negative_scale": (1, 2, 1, 50, 50, 16, 16, torch.float32, "padded", 1),
    "no_scale": (1, 2, 1, 50, 50, 16, 16, torch.float32, "causal", 1 << 30),
    "more_heads_than_rows": (1, 68, 1, 40, 40, 16, 16, torch.float32, "causal", 1),
    "long_ranges": (1, 2, 1, 270, 270, 16, 16, torch.float32, "causal", 1),
    "float16": (1, 4, 1, 64, 64, 16, 16, torch.float16, "causal", 1),
}
# name: B, H_kv, T, n, blocks, different blocks, tokens of a chunk, list entries of a tile, bytes of counts, visibility
LISTS = {
    "lists": (2, 3, 97, 5, 13, 13, 97, 1024, 1 << 25, "causal"),
    "lists_in_tiles": (2, 1, 111, 7, 20, 20, 111, 128, 1 << 25, "intervals"),
    "lists_in_chunks": (1, 2, 111, 5, 9, 9, 32, 64, 1 << 25, "intervals"),
    "lists_of_equal_blocks": (2, 2, 63, 9, 30, 2, 40, 128, 1 << 25, "range"),
    "lists_of_many_blocks": (1, 2, 50, 6, 1100, 1100, 50, 64, 1 << 25, "intervals"),
    "lists_in_one_tile": (1, 2, 80, 4, 17, 17, 40, 64, 1, "range"),
}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error, or the absolute one where that is smaller than rounding; NaN counts as infinite."""
    difference = (actual.double() - expected).norm()
    if difference < 1e-5:  # of gradients that are 0, where every query sees one key at most
        return 0.0
    value = (difference / expected.norm().clamp_min(1e-30)).item()
    return value if value == value else float("inf")


def run(
    B: int,
    H: int,
    H_kv: int,
    T: int,
    S: int,
    D: int,
    DV: int,
    dtype: torch.dtype,
    visibility: str,
    limit: int,
    scale: float | None = None,
    width: int = 20,
    every_choice: bool = True,
) -> dict:
    torch.manual_seed(torch.seed() % 2**31)
    selected.PARTIAL_BYTES = selected.BACKWARD_PARTIAL_BYTES = limit
    gated.PARTIAL_BYTES = limit, limit
    selected.DIRECT_ENTRIES = 0 if limit == 1 else 4096
    selected.PAIRS_FIRST = 0 if limit == 1 else 4096
    # Blocks with several shares of list entries, and those with one.
    launch.QUERIES_OF_A_SPLIT, shares.SMALLEST_SHARE, shares.SHARES = (20, 4, 20) if limit == 1 else (2048, 64, 1536)
    launch.QUERIES_OF_AN_INITIAL_SPLIT = 20 if limit == 1 else 512
    query = torch.randn(B, T, H, D, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(B, S, H_kv, size, dtype=dtype).transpose(1, 2) for size in (D, DV))
    scale, compression = D**-0.5 if scale is None else scale, SIZES["compression"]
    sight: dict = {}
    if visibility != "causal":
        last = torch.randint(0, S, (B, T), dtype=torch.int32)
        sight = {"last_key": last, "first_key": last - torch.randint(-3, S, (B, T), dtype=torch.int32)}
    if visibility == "padded":
        sight["key_valid"] = torch.rand(B, S) > 0.1
    first, last, valid = sight.get("first_key"), sight.get("last_key"), sight.get("key_valid")
    errors: dict[str, float] = {}
    grad = torch.randn(B, H, T, DV, dtype=dtype)

    def compare(
        name: str, module, tensors: tuple[Tensor, ...], key_valid: Tensor | None, attributes: dict, extra: dict
    ) -> None:
        arguments = (*tensors, first, last, key_valid)
        output, lse = getattr(module, name)(*arguments, **attributes)
        double = [each.detach().double().requires_grad_() for each in tensors[:3]]
        expected, expected_lse = getattr(reference, name)(*double, *tensors[3:], scale=scale, **extra, **sight)
        errors[name] = error(output, expected)
        errors[f"{name} lse"] = error(lse.exp(), expected_lse.exp())
        delta = launch.output_dot_gradient(output, grad)
        gradients = getattr(module, f"{name}_backward")(grad, *arguments, delta, lse, **attributes)
        for letter, one, other in zip(
            "qkv", gradients, torch.autograd.grad(expected, double, grad.double()), strict=True
        ):
            errors[f"{name} grad {letter}"] = error(one, other)

    base = {"is_causal": True, "scale": scale}
    compressed_key, compressed_value = mean_compress(key, **compression), mean_compress(value, **compression)
    whole = None if valid is None else valid.unfold(1, 8, 4).all(-1)
    numbers = {**compression, "num_keys": S}
    compare(
        "compressed_attention", compressed, (query, compressed_key, compressed_value), whole, base | numbers, numbers
    )
    compare("window_attention", window, (query, key, value), valid, {**base, "window": width}, {"window": width})
    choice = {"selection_block": 16, "num_selected": 4, "num_initial": 1, "num_local": 2}
    lists = reference.select_blocks(query, compressed_key, scale=scale, **numbers, **choice, **sight)
    candidates = (first, last)
    if valid is not None:
        candidates = tighten_intervals(first, last, valid, is_causal=True, query=query)
    apart = {"block_length": 4, "block_stride": 4}
    choices = (
        ("select_blocks", query, compression, {}),
        ("select_blocks of equal scores", torch.zeros_like(query), compression, {}),
        ("select_blocks, no overlap", query, apart, {}),
        ("select_blocks of many", query, apart, {"selection_block": 4, "num_selected": 9}),
        ("select_blocks of many equal scores", torch.zeros_like(query), apart, {"selection_block": 4}),
    )
    for name, queries, parts, more in choices if every_choice else choices[:1]:
        keys = mean_compress(key, **parts)
        settings = {**parts, "num_keys": S, **choice, **more}
        seen = None if valid is None else valid.unfold(1, *parts.values()).all(-1)
        block_valid = None if valid is None else blocks_with_valid_key(valid, settings["selection_block"])
        wanted = reference.select_blocks(queries, keys, scale=scale, **settings, **sight)
        chosen = selection.select_blocks(queries, keys, None, *candidates, seen, block_valid, **base, **settings)
        errors[name] = float((chosen != wanted).float().mean())
    forced = {"num_initial": 1, "num_local": 2}
    blocks = {"selection_block": 16}
    compare("selected_attention", selected, (query, key, value, lists), valid, {**base, **blocks, **forced}, blocks)
    gates, other = torch.rand(B, T, 3, H).permute(0, 3, 1, 2), torch.randn(B, H, T, DV, dtype=dtype)
    listed = (query, key, value, lists, first, last, valid)
    both = {**blocks, "window": width}
    own = (*listed[:4], torch.randn_like(key), torch.randn_like(value))
    summed = gated.gated_attention(*own, *listed[4:], other, gates, **base, **both, **forced)
    errors["gated_attention"] = error(
        summed, reference.gated_attention(*own, other, gates, scale=scale, **both, **sight)
    )
    compare("joint_attention", joint, (query, key, value, lists), valid, {**base, **both, **forced}, both)
    output, lse = joint.joint_listed(*listed, **base, **both, **forced)
    double = [each.double() if each is not None and each.is_floating_point() else each for each in listed]
    expected, expected_lse = branches.joint_listed(*double, **base, **both, **forced)
    errors["joint_listed"] = error(output, expected)
    errors["joint_listed lse"] = error(lse.exp(), expected_lse.exp())
    return errors


def invert(
    B: int, H_kv: int, T: int, n: int, blocks: int, different: int, chunk: int, tile: int, limit: int, visibility: str
) -> dict:
    """Numbers in which inverted lists differ from torch's stable sort."""
    inverted.TILE, inverted.COUNT_BYTES = tile, limit
    shares.SMALLEST_SHARE, shares.SHARES = 4, 1536
    S = blocks * 16 - 3
    lists = torch.randint(-1, different, (B, H_kv, T, n), dtype=torch.int32)
    first = last = None
    low = torch.full((B, T), S)
    geometry = launch.KeyGeometry(S, selection_block=16, empty=True)
    if visibility == "intervals":
        last = torch.randint(0, S, (B, T), dtype=torch.int32)
        first = torch.zeros_like(last)
        geometry = launch.KeyGeometry(S, selection_block=16, window=20, initial=16)
        low = (last - 19).clamp_min(0)
    elif visibility == "range":  # two blocks at the end of what a token sees
        geometry = launch.KeyGeometry(S, selection_block=16, local_blocks=2)
        low = ((torch.arange(T).clamp_max(S - 1) // 16 - 1) * 16).clamp_min(0).expand(B, T)
    intervals = launch.Intervals(first, last, None, is_causal=True)
    order, bounds, further, share, most_further = inverted.invert_lists(lists, intervals, geometry, chunk)
    used = (lists >= 0) & (lists * 16 >= geometry.initial) & (lists * 16 < low[:, None, :, None])
    # Lists that break their promise are read like others: what stands where forced blocks do is not used.
    constants = geometry.list_constants(n)
    first_slot, slots = constants["FIRST_SLOT"], constants["SLOTS"]
    used[..., :first_slot] = used[..., first_slot + slots :] = False
    keys = torch.where(used, lists, blocks).reshape(B * H_kv, T * n)
    wrong = {"order": 0, "bounds": 0, "further": 0}
    for index, start in enumerate(range(0, T * n, chunk * n)):
        part, places = keys[:, start : start + chunk * n].sort(stable=True)
        edges = torch.arange(blocks + 1, dtype=torch.int32).expand(B * H_kv, -1).contiguous()
        starts = torch.searchsorted(part, edges)
        wrong["bounds"] += int((starts != bounds[index, :, : blocks + 1]).sum())
        before = ((starts.diff() + share - 1) // share - 1).clamp_min(0).cumsum(1)
        wrong["further"] += int((before != further[index, :, 1 : blocks + 1]).sum() + further[index, :, 0].sum())
        wrong["further"] += int((before[:, -1] > most_further).sum())
        places += start
        expected = places // n * slots + places % n - first_slot
        given = order[:, start // n * slots :][:, : part.shape[1]]
        padded = torch.nn.functional.pad(given, (0, part.shape[1] - given.shape[1]))
        wrong["order"] += int(((padded != expected) & (part < blocks)).sum())
    return wrong | {"used": int(used.sum()), "shared": int(further[..., blocks].sum())}


if __name__ == "__main__":
    for name, case in CASES.items():
        errors = run(*case, scale=SCALES.get(name), width=WINDOWS.get(name, 20), every_choice=name in CHOICES)
        sys.stdout.write(json.dumps({"case": name, "errors": errors}) + "\n")
        sys.stdout.flush()
    for name, case in LISTS.items():
        sys.stdout.write(json.dumps({"case": name, "errors": invert(*case)}) + "\n")
