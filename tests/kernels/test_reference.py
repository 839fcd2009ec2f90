"""The reference against loops over single queries and keys, written from nsa.md's definitions and nothing else."""

import math
from typing import Any

import pytest
import torch

from nsa_compile.kernels import reference

SIZES: dict[str, Any] = {
    "block_length": 4,
    "block_stride": 2,
    "selection_block": 6,
    "num_selected": 3,
    "num_initial": 1,
    "num_local": 1,
    "window": 5,
}


def _dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def _softmax_mean(logits, values, value_size):
    """Softmax-weighted mean of values; zeros without any."""
    if not logits:
        return [0.0] * value_size
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [_dot(weights, column) / sum(weights) for column in zip(*values, strict=True)]


def brute_force(query, key, value, gates, sight, *, combine, scale=None, **sizes):
    """Lists of lists all the way; returns `(output [B, H, T, D_v], block lists [B, H_kv, T])`."""
    batch, heads, num_queries, head_size = query.shape
    kv_heads, num_keys, value_size = key.shape[1], key.shape[2], value.shape[3]
    group, factor = heads // kv_heads, head_size**-0.5 if scale is None else scale
    length, stride, block = sizes["block_length"], sizes["block_stride"], sizes["selection_block"]
    num_blocks = -(-num_keys // block)
    output = torch.zeros(batch, heads, num_queries, value_size, dtype=torch.float64)
    lists = [[[None] * num_queries for _ in range(kv_heads)] for _ in range(batch)]
    for b in range(batch):
        for g in range(kv_heads):
            keys, values = key[b, g].tolist(), value[b, g].tolist()
            starts = [s for s in range(0, num_keys, stride) if s + length <= num_keys]
            compressed_keys = [[sum(c) / length for c in zip(*keys[s : s + length], strict=True)] for s in starts]
            compressed_values = [[sum(c) / length for c in zip(*values[s : s + length], strict=True)] for s in starts]
            for t in range(num_queries):
                first, last, valid = 0, (t if sight["is_causal"] else num_keys - 1), [True] * num_keys
                if "first_key" in sight:
                    first = int(sight["first_key"].expand(batch, -1)[b, t])
                if "last_key" in sight:
                    last = int(sight["last_key"].expand(batch, -1)[b, t])
                if "key_valid" in sight:
                    valid = sight["key_valid"].expand(batch, -1)[b].tolist()
                visible = {s for s in range(num_keys) if first <= s <= last and valid[s]}
                seen = [i for i, s in enumerate(starts) if all(x in visible for x in range(s, s + length))]
                scores = [0.0] * num_blocks
                compressed_output = []
                for head in range(g * group, (g + 1) * group):
                    row = query[b, head, t].tolist()
                    logits = [_dot(row, compressed_keys[i]) * factor for i in seen]
                    total = sum(math.exp(x) for x in logits)
                    for i, logit in zip(seen, logits, strict=True):
                        for j in range(num_blocks):
                            inside = [s for s in range(starts[i], starts[i] + length) if s // block == j]
                            scores[j] += math.exp(logit) / total * len(inside) / stride
                    compressed_output.append(_softmax_mean(logits, [compressed_values[i] for i in seen], value_size))
                candidates = [j for j in range(num_blocks) if any(s // block == j for s in visible)]
                forced = set(candidates[: sizes["num_initial"]])
                forced |= set(candidates[max(0, len(candidates) - sizes["num_local"]) :])
                rest = sorted((j for j in candidates if j not in forced), key=lambda j: (-scores[j], -j))
                chosen = sorted([*forced, *rest[: max(0, sizes["num_selected"] - len(forced))]])
                lists[b][g][t] = chosen
                window = {s for s in visible if last - sizes["window"] < s <= last}
                selected = {s for s in visible if s // block in chosen}
                for head in range(g * group, (g + 1) * group):
                    row = query[b, head, t].tolist()

                    def attend(tokens, row=row, keys=keys, values=values):
                        tokens = sorted(tokens)
                        logits = [_dot(row, keys[s]) * factor for s in tokens]
                        return torch.tensor(_softmax_mean(logits, [values[s] for s in tokens], value_size))

                    if combine == "joint":
                        output[b, head, t] = attend(selected | window)
                    else:
                        weight = gates[b, head, t].tolist()
                        compressed = torch.tensor(compressed_output[head - g * group])
                        output[b, head, t] = (
                            weight[0] * compressed + weight[1] * attend(selected) + weight[2] * attend(window)
                        )
    return output, lists


@pytest.fixture(autouse=True)
def _double_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("combine", ["joint", "gated"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(25, 25), (1, 25), (9, 23), (30, 17), (5, 3), (1, 1)])
def test_reference_is_the_definition(draw_inputs, relative_error, visibility, combine, num_queries, num_keys):
    inputs = draw_inputs(
        visibility, num_queries=num_queries, num_keys=num_keys, head_size=3, value_size=2, dtype=torch.float64
    )
    query, key, value = (tensor.detach() for tensor in inputs.tensors)
    gates = torch.rand(*query.shape[:3], 3)
    expected, lists = brute_force(query, key, value, gates, inputs.sight, combine=combine, **SIZES)
    given = reference.attention(
        query, key, value, gates=gates if combine == "gated" else None, combine=combine, **inputs.sight, **SIZES
    )
    assert relative_error(given, expected) < 1e-13
    sizes = {name: size for name, size in SIZES.items() if name != "window"}
    compressed_key = reference.compress_mean(key, block_length=4, block_stride=2)
    indices = reference.select_blocks(query, compressed_key, num_keys=num_keys, **inputs.sight, **sizes)
    assert [[[[j for j in row if j >= 0] for row in head] for head in one] for one in indices.tolist()] == lists


def test_reference_gradients(draw_inputs):
    inputs = draw_inputs("scattered", batch=1, num_queries=7, num_keys=13, head_size=2, dtype=torch.float64)
    gates = torch.rand(*inputs.query.shape[:3], 3, requires_grad=True)

    def gated(query, key, value, gates):
        return reference.attention(query, key, value, gates=gates, combine="gated", **inputs.sight, **SIZES)

    def joint(query, key, value):
        return reference.attention(query, key, value, **inputs.sight, **SIZES)

    assert torch.autograd.gradcheck(gated, (*inputs.tensors, gates))
    assert torch.autograd.gradcheck(joint, inputs.tensors)


def test_chunks_of_queries_do_not_matter(draw_inputs, relative_error, monkeypatch, visibility):
    inputs = draw_inputs(visibility, num_queries=41, num_keys=37, dtype=torch.float64, requires_grad=False)
    whole = reference.attention(*inputs.tensors, **inputs.sight, **SIZES)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 5 * 2 * 4 * 37)
    assert relative_error(reference.attention(*inputs.tensors, **inputs.sight, **SIZES), whole) < 1e-13
