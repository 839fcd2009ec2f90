"""The composite operator: against the reference, against dense attention, and in linear memory."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from nsa_compile.kernels import operators, reference

SIZES: dict[str, Any] = {
    "block_length": 8,
    "block_stride": 4,
    "selection_block": 8,
    "num_selected": 4,
    "num_initial": 1,
    "num_local": 2,
    "window": 11,
}
COVERS_ALL = SIZES | {"num_selected": 64}
attention = torch.ops.nsa.attention


def test_importing_again_registers_nothing_twice():
    import importlib

    before = torch.ops.nsa.attention.default
    importlib.reload(operators)
    assert torch.ops.nsa.attention.default is before


def _gates(inputs):
    return torch.rand(*inputs.query.shape[:3], 3, dtype=inputs.query.dtype).requires_grad_()


def _compare(inputs, relative_error, budget, **arguments):
    """Outputs and gradients of everything that is differentiable, operator against reference."""
    tensors = {name: each for name, each in arguments.items() if isinstance(each, torch.Tensor)}
    tensors = dict(zip(("query", "key", "value"), inputs.tensors, strict=True)) | tensors
    rest = {name: each for name, each in arguments.items() if name not in tensors} | inputs.sight
    doubles = {name: each.detach().double().requires_grad_() for name, each in tensors.items()}
    output, exact = attention(**tensors, **rest), reference.attention(**doubles, **rest)
    assert output.dtype == inputs.query.dtype
    assert relative_error(output, exact) < budget
    if exact.requires_grad:
        grad_output = torch.randn_like(exact)
        given = torch.autograd.grad(output, [*tensors.values()], grad_output.to(output.dtype), allow_unused=True)
        expected = torch.autograd.grad(exact, [*doubles.values()], grad_output, allow_unused=True)
        for name, left, right in zip(tensors, given, expected, strict=True):
            assert (left is None) == (right is None), name
            assert left is None or relative_error(left, right) < budget, name


@pytest.mark.parametrize("combine", ["joint", "gated"])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_reference(draw_inputs, relative_error, visibility, combine, dtype, budget):
    for num_queries, num_keys in [(111, 111), (1, 63), (40, 25), (25, 40), (9, 5), (1, 1)]:
        inputs = draw_inputs(visibility, num_queries=num_queries, num_keys=num_keys, value_size=5, dtype=dtype)
        gates = {"gates": _gates(inputs)} if combine == "gated" else {}
        _compare(inputs, relative_error, budget, combine=combine, **gates, **SIZES)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (1, 2), (2, 3), (1, 4), (2, 7), (1, 16)])
def test_group_sizes(draw_inputs, relative_error, kv_heads, group):
    inputs = draw_inputs(batch=1, num_queries=63, kv_heads=kv_heads, group=group, dtype=torch.float64)
    _compare(inputs, relative_error, 1e-10, **SIZES)
    _compare(inputs, relative_error, 1e-10, combine="gated", gates=_gates(inputs), **SIZES)


def test_default_sizes_at_a_thousand_tokens(draw_inputs, relative_error):
    inputs = draw_inputs(batch=1, num_queries=1000, head_size=64, kv_heads=1, group=3)
    _compare(inputs, relative_error, 1e-5, num_selected=4)
    _compare(inputs, relative_error, 1e-5, num_selected=4, combine="gated", gates=_gates(inputs))


@pytest.mark.parametrize("scale", [1.0, -0.2, 0.0])
def test_scale(draw_inputs, relative_error, scale):
    _compare(draw_inputs(dtype=torch.float64), relative_error, 1e-10, scale=scale, **SIZES)


def test_learned_compression_and_independent_window(draw_inputs, relative_error):
    inputs = draw_inputs("packed", num_queries=63, value_size=5, dtype=torch.float64)
    num_compressed = (63 - 8) // 4 + 1
    compressed = [torch.randn(2, 2, num_compressed, size, dtype=torch.float64).requires_grad_() for size in (8, 5)]
    own = [torch.randn(2, 2, 63, size, dtype=torch.float64).requires_grad_() for size in (8, 5)]
    _compare(
        inputs,
        relative_error,
        1e-10,
        combine="gated",
        gates=_gates(inputs),
        compressed_key=compressed[0],
        compressed_value=compressed[1],
        window_key=own[0],
        window_value=own[1],
        **SIZES,
    )
    _compare(inputs, relative_error, 1e-10, compressed_key=compressed[0], **SIZES)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.fixed_dictionaries(
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
            "visibility": st.sampled_from(["causal", "all", "decode", "packed", "sliding", "scattered", "holes"]),
        }
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(3, 8),
    st.integers(1, 40),
)
def test_any_shape(draw_inputs, relative_error, scenario, stride, overlap, longer, num_selected, window):
    inputs = draw_inputs(dtype=torch.float64, **scenario)
    sizes = SIZES | {
        "block_stride": stride,
        "block_length": stride * overlap,
        "selection_block": stride * (overlap + longer),
        "num_selected": num_selected,
        "window": window,
    }
    _compare(inputs, relative_error, 1e-10, **sizes)
    _compare(inputs, relative_error, 1e-10, combine="gated", gates=_gates(inputs), **sizes)


def test_inference_mode_and_checkpointing_change_nothing(draw_inputs):
    inputs = draw_inputs("holes", num_queries=63)
    gates = _gates(inputs)

    def run(query, key, value, gates):
        return attention(query, key, value, gates=gates, combine="gated", **inputs.sight, **SIZES)

    leaves = [*inputs.tensors, gates]
    output = run(*leaves)
    with torch.inference_mode():
        assert torch.equal(run(*leaves), output)
    again = checkpoint(run, *leaves, use_reentrant=False)
    assert torch.equal(again, output)
    gradients = [torch.autograd.grad(each.sum(), leaves) for each in (output, again)]
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_missing_bounds_are_filled_in(draw_inputs):
    inputs = draw_inputs(num_queries=30, num_keys=40)
    first, last = torch.arange(30)[None] // 10 * 10, torch.arange(30)[None] + 5
    zeros, time, end = torch.zeros_like(first), torch.arange(30)[None], torch.full_like(first, 39)

    def both(**arguments):
        return attention(*inputs.tensors, **arguments, **SIZES)

    assert torch.equal(both(first_key=first), both(first_key=first, last_key=time))
    assert torch.equal(both(first_key=first, is_causal=False), both(first_key=first, last_key=end))
    assert torch.equal(both(last_key=last), both(first_key=zeros, last_key=last))
    assert torch.equal(both(last_key=last, is_causal=False), both(last_key=last))
    assert torch.equal(both(), both(first_key=zeros, last_key=time))
    assert torch.equal(both(last_key=last.to(torch.uint8)), both(last_key=last.expand(2, -1).to(torch.int32)))


def _boolean_mask(inputs):
    visible = reference.visible_keys(
        inputs.query, inputs.num_keys, **{"first_key": None, "last_key": None, "key_valid": None} | inputs.sight
    )
    return visible.unsqueeze(1)


def test_covering_lists_make_dense_attention(draw_inputs, relative_error, visibility):
    """Joint mode with n · l' ≥ S is scaled_dot_product_attention, gradients too."""
    for num_queries, num_keys in [(111, 111), (1, 63), (25, 40)]:
        inputs = draw_inputs(visibility, num_queries=num_queries, num_keys=num_keys, group=3, dtype=torch.float64)
        mask = _boolean_mask(inputs)
        query, key, value = inputs.tensors
        repeated = [each.repeat_interleave(3, 1) for each in (key, value)]
        dense = scaled_dot_product_attention(query, *repeated, attn_mask=mask).masked_fill(
            ~mask.any(-1, keepdim=True), 0.0
        )
        output = attention(query, key, value, **inputs.sight, **COVERS_ALL)
        assert relative_error(output, dense) < 1e-12
        grad_output = torch.randn_like(dense)
        given = torch.autograd.grad(output, inputs.tensors, grad_output)
        for left, right in zip(given, torch.autograd.grad(dense, inputs.tensors, grad_output), strict=True):
            assert relative_error(left, right) < 1e-12


def test_future_keys_change_nothing(draw_inputs):
    inputs = draw_inputs(num_queries=63, requires_grad=False)
    before = attention(*inputs.tensors, **SIZES)
    for tensor in (inputs.key, inputs.value):
        tensor[:, :, 40:] += 1.0
    after = attention(*inputs.tensors, **SIZES)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


def test_decoding_equals_prefill(draw_inputs, relative_error):
    inputs = draw_inputs(num_queries=63, dtype=torch.float64, requires_grad=False)
    query, key, value = inputs.tensors
    prefill = attention(query, key, value, **SIZES)
    for position in (0, 7, 40, 62):
        # The cache is longer than what has been written: keys past `position` are another sequence's rubbish.
        step = attention(query[:, :, position : position + 1], key, value, last_key=torch.tensor([[position]]), **SIZES)
        assert relative_error(step, prefill[:, :, position : position + 1]) < 1e-12


def test_rows_that_see_nothing_are_zero(draw_inputs):
    inputs = draw_inputs(num_queries=40)
    first = torch.arange(40).expand(2, -1).clone()
    first[:, ::2] = 41  # beyond each even query's last key
    for combine, gates in (("joint", None), ("gated", _gates(inputs))):
        output = attention(*inputs.tensors, gates=gates, first_key=first, combine=combine, **SIZES)
        assert not output[:, :, ::2].any()
        assert output[:, :, 1::2].all()
        grad_query, grad_key, _ = torch.autograd.grad(output.sum(), inputs.tensors)
        assert not grad_query[:, :, ::2].any()
        assert not grad_key.isnan().any()


@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_transposed_and_strided_inputs_are_the_same(draw_inputs, combine):
    inputs = draw_inputs(num_queries=63, requires_grad=False)
    gates = _gates(inputs).detach() if combine == "gated" else None
    layouts = (
        lambda each: each.transpose(1, 2).contiguous().transpose(1, 2),
        lambda each: torch.stack([each, each + 1], -1)[..., 0],  # last dimension not contiguous
        lambda each: torch.cat([each, each + 1], 2)[:, :, : each.shape[2]],
    )
    expected = attention(*inputs.tensors, gates=gates, combine=combine, **SIZES)
    for layout in layouts:
        output = attention(*map(layout, inputs.tensors), gates=gates, combine=combine, **SIZES)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        assert output.is_contiguous()


def test_gates_in_float32_with_half_precision_inputs(draw_inputs, relative_error):
    inputs = draw_inputs(num_queries=63, dtype=torch.bfloat16)
    gates = torch.rand(2, 4, 63, 3).requires_grad_()
    output = attention(*inputs.tensors, gates=gates, combine="gated", **SIZES)
    assert output.dtype == torch.bfloat16
    doubles = [each.detach().double() for each in inputs.tensors]
    exact = reference.attention(*doubles, gates=gates.detach(), combine="gated", **SIZES)
    assert relative_error(output, exact) < 2**-6
    (grad,) = torch.autograd.grad(output.float().sum(), gates)
    assert grad.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has, opaque operators' inner ones too."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view with stride 0 takes no memory of its own.
            if isinstance(leaf, torch.Tensor) and 0 not in leaf.stride():
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_memory_is_linear_in_the_keys(monkeypatch, combine):
    """At 16,384 tokens no tensor has a quarter of T · S elements, by far, forward and backward."""
    from nsa_compile.kernels import dispatch

    length = 16_384
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 8).requires_grad_() for _ in range(3))
    gates = torch.rand(1, 1, length, 3) if combine == "gated" else None
    # The mode does not see inside opaque operators, so it is entered there.
    recorded = LargestTensor()
    plain = dispatch.blockwise_function

    def watched(operator):
        function = plain(operator)

        def run(*arguments, **keywords):
            with recorded:
                return function(*arguments, **keywords)

        return run

    monkeypatch.setattr(dispatch, "blockwise_function", watched)
    with recorded:
        output = attention(query, key, value, gates=gates, combine=combine)
    output.sum().backward()
    assert 0 < recorded.numel < length * length // 64
    assert all(tensor.grad is not None for tensor in (query, key, value))


def test_no_operand_is_changed(draw_inputs):
    for visibility, combine in itertools.product(["packed", "holes"], ["joint", "gated"]):
        inputs = draw_inputs(visibility, num_queries=63)
        gates = _gates(inputs) if combine == "gated" else None
        copies = [each.detach().clone() for each in inputs.tensors]
        sight = {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in inputs.sight.items()}
        attention(*inputs.tensors, gates=gates, combine=combine, **inputs.sight, **SIZES).sum().backward()
        assert all(torch.equal(left, right) for left, right in zip(copies, inputs.tensors, strict=True))
        assert all(
            torch.equal(torch.as_tensor(sight[name]), torch.as_tensor(each)) for name, each in inputs.sight.items()
        )
