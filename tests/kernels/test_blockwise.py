"""The aten implementation of each operator against the reference: outputs, log-sum-exps, lists and gradients."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_compile.kernels import reference
from nsa_compile.kernels.blockwise import branches, gathers, lists, parts, ranges, selection
from nsa_compile.kernels.intervals import (
    blocks_with_valid_key,
    resolve_intervals,
    tighten_intervals,
    valid_compressed_tokens,
)

SIZES: dict[str, Any] = {
    "block_length": 8,
    "block_stride": 4,
    "selection_block": 8,
    "num_selected": 4,
    "num_initial": 1,
    "num_local": 2,
}
WINDOW = 13
BRANCHES = ("compressed", "selected", "window", "joint")
BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}


def _random_lists(inputs, num_selected, block):
    """Ascending lists of any blocks, visible or not, some short, some empty."""
    batch, kv_heads, num_keys, _ = inputs.key.shape
    num_queries, num_blocks = inputs.query.shape[2], -(-num_keys // block)
    chosen = torch.rand(batch, kv_heads, num_queries, num_blocks).argsort(-1)[..., :num_selected]
    keep = torch.arange(chosen.shape[-1]) < torch.randint(0, num_selected + 1, (batch, kv_heads, num_queries, 1))
    chosen = chosen.masked_fill(~keep, num_blocks).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, num_selected - chosen.shape[-1]), value=num_blocks)
    return chosen.masked_fill(chosen == num_blocks, -1).to(torch.int32)


def _operator_sight(inputs):
    """What the operators take: bounds both None or both int32 [B, T], and key_valid."""
    first, last = resolve_intervals(
        inputs.sight.get("first_key"),
        inputs.sight.get("last_key"),
        is_causal=inputs.sight["is_causal"],
        query=inputs.query,
        num_keys=inputs.num_keys,
    )
    return first, last, inputs.sight.get("key_valid")


class Branch:
    """One branch, to be computed by the reference and by the implementation."""

    def __init__(self, name, inputs, scale=0.3, sizes=SIZES, window=WINDOW):
        self.name, self.inputs, self.scale, self.sizes, self.window = name, inputs, scale, sizes, window
        first, last, valid = _operator_sight(inputs)
        attributes = {"is_causal": inputs.sight["is_causal"], "scale": scale}
        compression = {name: sizes[name] for name in ("block_length", "block_stride")}
        selection_block = {"selection_block": sizes["selection_block"]}
        key, value = inputs.key, inputs.value
        extra = {
            "window": {"window": window},
            "selected": selection_block,
            "joint": selection_block | {"window": window},
        }
        if name == "compressed":
            with torch.no_grad():
                key = reference.compress_mean(inputs.key, **compression).to(inputs.key.dtype)
                value = reference.compress_mean(inputs.value, **compression).to(inputs.key.dtype)
            key, value = key.requires_grad_(), value.requires_grad_()
            valid = None if valid is None else valid_compressed_tokens(valid, **compression)
            extra["compressed"] = compression | {"num_keys": inputs.num_keys}
        listed = (
            [_random_lists(inputs, sizes["num_selected"], sizes["selection_block"])]
            if name in ("selected", "joint")
            else []
        )
        self.leaves = (inputs.query, key, value)
        self.operands = [*listed, first, last, valid]
        self.attributes = attributes | extra[name]
        self._reference_arguments = ([*listed], extra[name] | inputs.sight | {"scale": scale})

    def expected(self, grad_output):
        function = getattr(reference, f"{self.name}_attention")
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        positional, keywords = self._reference_arguments
        output, lse = function(*leaves, *positional, **keywords)
        gradients = torch.autograd.grad(output, leaves, grad_output.double(), allow_unused=True)
        zeros = (torch.zeros_like(leaf) for leaf in leaves)
        return output, lse, *(zero if grad is None else grad for grad, zero in zip(gradients, zeros, strict=True))

    def given(self, grad_output):
        with torch.no_grad():
            forward = getattr(branches, f"{self.name}_attention")
            backward = getattr(branches, f"{self.name}_attention_backward")
            output, lse = forward(*self.leaves, *self.operands, **self.attributes)
            delta = branches.output_dot_gradient(output, grad_output)
            gradients = backward(grad_output, *self.leaves, *self.operands, delta, lse, **self.attributes)
        return output, lse, *gradients

    def grad_output(self):
        query, _, value = self.leaves
        return torch.randn(*query.shape[:3], value.shape[3], dtype=torch.float64).to(query.dtype)


def _check(branch, relative_error, budget):
    grad_output = branch.grad_output()
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    for name, result, exact in zip(names, branch.given(grad_output), branch.expected(grad_output), strict=True):
        assert (result.transpose(1, 2) if name == "output" else result).is_contiguous(), name
        if name == "lse":
            assert torch.equal(result == -torch.inf, exact == -torch.inf)
        assert relative_error(result.nan_to_num(neginf=0.0, nan=torch.nan), exact.nan_to_num(neginf=0.0)) < budget, name


@pytest.fixture(params=["key_major", "query_major"])
def loop_order(request, monkeypatch):
    monkeypatch.setattr(parts, "_STEP_COST", 0 if request.param == "key_major" else 1 << 60)
    return request.param


@pytest.fixture(params=["one_chunk", "many_chunks"])
def chunking(request, monkeypatch):
    if request.param == "many_chunks":
        monkeypatch.setattr(ranges, "_CHUNK_QUERIES", 5)
        monkeypatch.setattr(ranges, "_TILE_ELEMENTS", 64)
        monkeypatch.setattr(lists, "_STEP_ROWS", 7)
        monkeypatch.setattr(lists, "_SORTED_PAIRS", 50)
        monkeypatch.setattr(gathers, "_GATHERED_ELEMENTS", 900)
        monkeypatch.setattr(selection, "_CHUNK_ELEMENTS", 600)
    return request.param


LENGTHS = ((63, 63), (1, 111), (40, 25), (9, 5), (1, 1))  # (T, S)


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_equals_reference(draw_inputs, relative_error, visibility, branch, loop_order, chunking):
    for num_queries, num_keys in LENGTHS:
        inputs = draw_inputs(
            visibility, num_queries=num_queries, num_keys=num_keys, head_size=5, value_size=3, dtype=torch.float64
        )
        _check(Branch(branch, inputs), relative_error, 1e-10)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("length", "kv_heads", "group"), [(1, 3, 1), (63, 1, 7), (111, 2, 3), (63, 1, 16), (111, 3, 4), (1000, 1, 2)]
)
def test_branch_at_odd_lengths_and_groups(draw_inputs, relative_error, branch, dtype, length, kv_heads, group):
    inputs = draw_inputs(
        num_queries=length, kv_heads=kv_heads, group=group, batch=1, head_size=16, dtype=dtype, transposed=True
    )
    _check(Branch(branch, inputs), relative_error, BUDGET[dtype])


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_loses_one_rounding(draw_inputs, relative_error, branch, dtype, budget):
    """Sums are float32: what is lost is the rounding of the result, and in gradients that of the stored output."""
    inputs = draw_inputs("packed", num_queries=63, head_size=16, dtype=dtype)
    branch = Branch(branch, inputs)
    grad_output = branch.grad_output()
    output, _, *gradients = branch.given(grad_output)
    exact_output, _, *exact_gradients = branch.expected(grad_output)
    assert output.dtype == dtype
    assert relative_error(output, exact_output) < budget
    for given_value, exact in zip(gradients, exact_gradients, strict=True):
        assert given_value.dtype == dtype
        assert relative_error(given_value, exact) < 4 * budget


@pytest.mark.parametrize("branch", BRANCHES)
def test_large_logits_stay_finite(draw_inputs, relative_error, branch, loop_order):
    """A logit far above all earlier ones must neither overflow nor lose the others."""
    inputs = draw_inputs(num_queries=63, dtype=torch.float32)
    with torch.no_grad():
        inputs.query.mul_(40.0)
        inputs.key.mul_(torch.linspace(0.01, 8.0, 63)[:, None])
    _check(Branch(branch, inputs), relative_error, 1e-4)


def _selection(inputs, sizes, scale, lse):
    key_valid = inputs.sight.get("key_valid")
    first, last, _ = _operator_sight(inputs)
    compression = {name: sizes[name] for name in ("block_length", "block_stride")}
    compressed_key = reference.compress_mean(inputs.key.detach(), **compression).to(inputs.key.dtype)
    compressed_valid = block_valid = None
    bounds = (first, last)
    if key_valid is not None:
        compressed_valid = valid_compressed_tokens(key_valid, **compression)
        block_valid = blocks_with_valid_key(key_valid, sizes["selection_block"])
        bounds = tighten_intervals(first, last, key_valid, is_causal=inputs.sight["is_causal"], query=inputs.query)
    exact = reference.select_blocks(
        inputs.query.detach(), compressed_key, num_keys=inputs.num_keys, scale=scale, **sizes, **inputs.sight
    )
    branch_lse = None
    if lse == "given":
        _, branch_lse = reference.compressed_attention(
            inputs.query.detach(),
            compressed_key,
            compressed_key,
            num_keys=inputs.num_keys,
            scale=scale,
            **compression,
            **inputs.sight,
        )
        branch_lse = branch_lse.to(torch.float64 if inputs.query.dtype == torch.float64 else torch.float32)
    chosen = selection.select_blocks(
        inputs.query.detach(),
        compressed_key,
        branch_lse,
        *bounds,
        compressed_valid,
        block_valid,
        is_causal=inputs.sight["is_causal"],
        scale=scale,
        num_keys=inputs.num_keys,
        **sizes,
    )
    return chosen, exact


@pytest.mark.parametrize("lse", ["given", "computed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lists_equal_the_reference(draw_inputs, visibility, lse, dtype, chunking):
    for (num_queries, num_keys), forced in itertools.product(LENGTHS, [(1, 2), (0, 0), (2, 1)]):
        inputs = draw_inputs(visibility, num_queries=num_queries, num_keys=num_keys, group=3, dtype=dtype)
        sizes = SIZES | {"num_initial": forced[0], "num_local": forced[1]}
        chosen, exact = _selection(inputs, sizes, 0.35, lse)
        assert chosen.dtype == torch.int32
        assert chosen.is_contiguous()
        assert torch.equal(chosen, exact)


def test_ties_go_to_the_later_block(draw_inputs):
    inputs = draw_inputs(num_queries=111, dtype=torch.float64, requires_grad=False)
    inputs.query.zero_()  # every visible compressed token has the same probability
    sizes = SIZES | {"block_length": 4, "num_local": 1}
    chosen, exact = _selection(inputs, sizes, 1.0, "computed")
    assert torch.equal(chosen, exact)
    # Query 110 sees 13 full blocks of equal score and part of the fourteenth, which is forced.
    assert chosen[0, 0, 110].tolist() == [0, 11, 12, 13]


SCENARIOS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3, 4, 7]),
        "num_queries": st.integers(1, 70),
        "num_keys": st.integers(1, 90),
        "head_size": st.integers(1, 12),
        "value_size": st.integers(1, 12),
        "transposed": st.booleans(),
    }
)
STRIDES = st.integers(1, 5)


@st.composite
def _block_sizes(draw):
    stride = draw(STRIDES)
    length = stride * draw(st.integers(1, 3))
    block = -(-length // stride) * stride + stride * draw(st.integers(0, 3))
    forced = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return {
        "block_length": length,
        "block_stride": stride,
        "selection_block": block,
        "num_selected": max(1, sum(forced)) + draw(st.integers(0, 4)),
        "num_initial": forced[0],
        "num_local": forced[1],
    }


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(scenario=SCENARIOS, sizes=_block_sizes(), window=st.integers(1, 100), data=st.data())
def test_any_shape(draw_inputs, relative_error, scenario, sizes, window, data):
    visibility = data.draw(st.sampled_from(["causal", "all", "decode", "packed", "sliding", "scattered", "holes"]))
    inputs = draw_inputs(visibility, dtype=torch.float64, **scenario)
    for branch in BRANCHES:
        _check(Branch(branch, inputs, sizes=sizes, window=window), relative_error, 1e-10)
    chosen, exact = _selection(inputs, sizes, 0.4, "computed")
    assert torch.equal(chosen, exact)


@pytest.mark.parametrize("branch", ["selected", "window", "joint"])
def test_hidden_keys_are_never_read_into_the_result(draw_inputs, branch):
    """What lies in keys that no query sees changes nothing."""
    inputs = draw_inputs("holes", num_queries=63, requires_grad=False)
    before = Branch(branch, inputs)
    grad_output = before.grad_output()
    outputs = before.given(grad_output)
    hidden = ~inputs.sight["key_valid"][:, None, :, None]
    for tensor in (inputs.key, inputs.value):
        tensor.masked_fill_(hidden, 1e4)
    for left, right in zip(outputs, before.given(grad_output), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("branch", BRANCHES)
def test_two_runs_are_bit_equal(draw_inputs, branch, loop_order):
    branch = Branch(branch, draw_inputs(num_queries=300, batch=1, group=3))
    grad_output = branch.grad_output()
    for left, right in zip(branch.given(grad_output), branch.given(grad_output), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("branch", BRANCHES)
def test_results_do_not_depend_on_the_batch(draw_inputs, relative_error, branch):
    inputs = draw_inputs("packed", batch=3, num_queries=63, dtype=torch.float64, requires_grad=False)
    whole = Branch(branch, inputs)
    grad_output = whole.grad_output()
    together = whole.given(grad_output)
    for index in range(3):
        alone = Branch(branch, inputs)
        query, key, value = (leaf[index : index + 1] for leaf in whole.leaves)
        alone.leaves = (query, key, value)
        alone.operands = [None if each is None else each[index : index + 1] for each in whole.operands]
        for left, right in zip(together, alone.given(grad_output[index : index + 1]), strict=True):
            assert relative_error(left[index : index + 1].nan_to_num(neginf=0.0), right.nan_to_num(neginf=0.0)) < 1e-13


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("empty", ["batch", "num_queries", "num_keys"])
def test_empty_tensors(draw_inputs, empty, branch):
    inputs = draw_inputs("right_padding", **{"num_queries": 8, "num_keys": 8} | {empty: 0})
    branch = Branch(branch, inputs)
    output, lse, *gradients = branch.given(branch.grad_output())
    if empty == "num_keys":
        assert not output.any()
        assert lse.eq(-torch.inf).all()
    else:
        assert output.numel() == lse.numel() == 0
    assert [grad.shape for grad in gradients] == [leaf.shape for leaf in branch.leaves]
    assert not any(grad.any() for grad in gradients)
