"""Large outputs without gradients: `gated_attention`, and when the composite calls it."""

import contextlib
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nsa_compile.errors import NSAError
from nsa_compile.kernels import attention, reference

SIZES: dict[str, Any] = {
    "block_length": 8,
    "block_stride": 4,
    "selection_block": 8,
    "num_selected": 4,
    "num_initial": 1,
    "num_local": 2,
    "window": 11,
}
nsa = torch.ops.nsa


def _gated_arguments(draw_inputs, bounds="missing", **options):
    inputs = draw_inputs(num_queries=40, value_size=6, **options)
    lists = torch.tensor([0, 2, 3, -1], dtype=torch.int32).expand(2, 2, 40, 4).contiguous()
    sight = [None, None, None]
    if bounds == "given":
        last = torch.arange(40, dtype=torch.int32).expand(2, -1).contiguous()
        sight = [last - 30, last, torch.rand(2, inputs.num_keys) > 0.1]
    compressed = torch.randn(2, 40, 4, 6, dtype=inputs.query.dtype).transpose(1, 2)
    attributes = {"is_causal": True, "scale": 0.3, "selection_block": 8, "window": 11, "num_initial": 1, "num_local": 0}
    window = [torch.randn_like(each) for each in inputs.tensors[1:]]
    return [*inputs.tensors, lists, *window, *sight, compressed, torch.rand(2, 4, 40, 3)], attributes


@pytest.mark.parametrize("bounds", ["missing", "given"])
def test_opcheck_of_gated_attention(draw_inputs, bounds):
    positional, keywords = _gated_arguments(draw_inputs, bounds, requires_grad=False)
    torch.library.opcheck(nsa.gated_attention.default, positional, keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gated_attention(draw_inputs, relative_error, dtype):
    positional, keywords = _gated_arguments(draw_inputs, dtype=dtype, requires_grad=False)
    tensors, compressed, gates = positional[:6], *positional[-2:]
    kept = compressed.clone()
    output = nsa.gated_attention(*positional, **keywords)
    assert output.dtype == dtype
    assert output.transpose(1, 2).is_contiguous()
    assert torch.equal(compressed, kept)
    attributes = {name: keywords[name] for name in ("scale", "selection_block", "window")}
    expected = reference.gated_attention(*tensors, compressed, gates, **attributes)
    assert relative_error(output, expected) < {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def test_gated_attention_refuses_gradients(draw_inputs):
    positional, keywords = _gated_arguments(draw_inputs)
    output = nsa.gated_attention(*positional, **keywords)
    with pytest.raises(NSAError, match="captured for inference"):
        output.sum().backward()


def _operators_called(call):
    """Names of the operators of NSA that a call runs."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **kwargs or {})

    with Recorder():
        call()
    return {name.removeprefix("nsa::") for name in names if name.startswith("nsa::")}


@pytest.mark.parametrize("by", ["no_grad", "frozen", "trained", "small"])
def test_large_outputs_are_summed_in_one_where_no_gradient_is_needed(draw_inputs, monkeypatch, by):
    inputs = draw_inputs("holes", num_queries=40, value_size=6, requires_grad=by != "frozen")
    gates = torch.rand(2, 4, 40, 3)

    def attend():
        with torch.set_grad_enabled(by != "no_grad"):
            return nsa.attention(*inputs.tensors, gates=gates, combine="gated", **inputs.sight, **SIZES)

    expected = attend()
    size = 4 * 40 * 6 * inputs.value.element_size()  # of a sequence, of two
    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", size + (by == "small"))
    with torch.no_grad() if by == "small" else contextlib.nullcontext():
        called = _operators_called(attend)
        is_in_one = by in ("no_grad", "frozen")
        assert ("gated_attention" in called) == is_in_one
        assert ("selected_attention" in called) != is_in_one
        torch.testing.assert_close(attend(), expected, rtol=1e-5, atol=1e-6)


def test_the_operator_counts_as_the_two_that_it_stands_for(draw_inputs, monkeypatch):
    inputs, gates = draw_inputs(num_queries=40, num_keys=40, requires_grad=False), torch.rand(2, 4, 40, 3)
    counts = []
    for limit in (1 << 40, 1):
        monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", limit)
        with FlopCounterMode(display=False) as counter:
            nsa.attention(*inputs.tensors, gates=gates, combine="gated", **SIZES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("is_training", [False, True])
def test_graphs_of_large_outputs(draw_inputs, monkeypatch, is_training):
    """A graph that is captured for training has gradients, one that is captured for inference needs less memory."""
    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", 1)
    torch.compiler.reset()
    graphs = []

    def keep(graph_module, _inputs):
        graphs.append(graph_module)
        return graph_module.forward

    def attend(query, key, value, gates):
        return nsa.attention(query, key, value, gates=gates.sigmoid(), combine="gated", **SIZES)

    leaves = *draw_inputs(num_queries=40, value_size=6).tensors, torch.randn(2, 4, 40, 3).requires_grad_()
    compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=False)
    with torch.set_grad_enabled(is_training):
        given = compiled(*leaves)
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert (nsa.gated_attention.default in targets) != is_training
    expected = attend(*leaves)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    if is_training:
        for left, right in zip(
            torch.autograd.grad(given.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
