"""Compiled for a GPU, kernels from templates against the float64 reference, and the generated code."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_compile import NSABackend, NSAConfig, attach, compat, nsa_attention
from nsa_compile.kernels import reference

pytestmark = pytest.mark.gpu

# Relative error in the Frobenius norm, bfloat16: of the output, and of gradients.
OUTPUT_BUDGET, GRADIENT_BUDGET = 5e-3, 1.5e-2
MODES: dict[str, dict[str, Any]] = {
    "static": {"dynamic": False},
    "dynamic": {"dynamic": True},
    "max_autotune": {"dynamic": False, "mode": "max-autotune-no-cudagraphs"},
    "cuda_graphs": {"dynamic": False, "mode": "reduce-overhead"},
}


def _generated() -> Any:
    path = Path(__file__).with_name("generated_code.py")
    spec = importlib.util.spec_from_file_location("generated_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generated_code"] = module
    spec.loader.exec_module(module)
    return module


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _rows(length: int, heads: int, size: int) -> Tensor:
    """Transposed, as models have it."""
    rows = torch.randn(2, length, heads, size, device="cuda", dtype=torch.bfloat16)
    return rows.transpose(1, 2).requires_grad_()


def _check(actual: Tensor, expected: Tensor, leaves: list[Tensor], double: list[Tensor]) -> None:
    assert _relative_error(actual, expected) < OUTPUT_BUDGET
    grad = torch.randn_like(actual)
    given = torch.autograd.grad(actual, leaves, grad)
    wanted = torch.autograd.grad(expected, double, grad.double())
    assert max(map(_relative_error, given, wanted)) < GRADIENT_BUDGET


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("combine", ["gated", "joint"])
def test_operator_equals_reference(combine, mode):
    config = NSAConfig(combine=combine)

    def attend(query: Tensor, key: Tensor, value: Tensor, logits: Tensor, function: Any, **settings: Any) -> Tensor:
        gates = logits.sigmoid() if combine == "gated" else None
        output = function(query, key, value, gates=gates, **settings)
        return output.transpose(1, 2).flatten(2)

    @torch.compile(backend=NSABackend(), fullgraph=True, **mode)
    def compiled(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
        return attend(query, key, value, logits, nsa_attention, config=config)

    for length in (1000, 777) if mode["dynamic"] else (1000,):  # every block is selected: no near ties
        leaves = [_rows(length, 8, 128), _rows(length, 2, 128), _rows(length, 2, 64), _rows(length, 8, 3)]
        double = [each.detach().double().requires_grad_() for each in leaves]
        expected = attend(*double, reference.attention, **config.operator_arguments())
        used = slice(None) if combine == "gated" else slice(3)
        _check(compiled(*leaves), expected, leaves[used], double[used])


@pytest.mark.parametrize("mode", ["static", "dynamic", "cuda_graphs"])
def test_inference_on_long_inputs_holds_two_outputs_at_a_time(mode, monkeypatch):
    """Beside inputs: two of the branches' outputs, and the partial outputs of one."""
    from nsa_compile.kernels import attention
    from nsa_compile.kernels.gpu import gated

    config, length = NSAConfig(combine="gated"), 8192
    size = length * 32 * 128 * 2
    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", size)
    monkeypatch.setattr(gated, "PARTIAL_BYTES", (size // 4, size // 4))
    query, key, value, logits = (
        torch.randn(1, length, heads, last, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads, last in ((32, 128), (2, 128), (2, 128), (32, 3))
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
        return nsa_attention(query, key, value, gates=logits.sigmoid(), config=config).transpose(1, 2).flatten(2)

    compiled = torch.compile(attend, backend=NSABackend(), fullgraph=True, **MODES[mode])
    compiled(query, key, value, logits)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = compiled(query, key, value, logits)
    if mode == "static":
        assert torch.cuda.max_memory_allocated() - held < 2.6 * size
    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", size + 1)
    assert _relative_error(output, attend(query, key, value, logits).double()) < OUTPUT_BUDGET


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_joint_attention_over_few_blocks_equals_reference(mode):
    function, blocks = torch.ops.nsa.joint_attention, {"selection_block": 64, "window": 512}
    compression = {"block_length": 32, "block_stride": 16}
    forced = {"num_initial": 1, "num_local": 2}

    @torch.compile(backend=NSABackend(), fullgraph=True, **mode)
    def compiled(query: Tensor, key: Tensor, value: Tensor, lists: Tensor) -> Tensor:
        output, _ = function(
            query, key, value, lists, None, None, None, is_causal=True, scale=0.125, **blocks, **forced
        )
        # Smooth: where a bfloat16 output has another sign than the reference's, so has the slope of a kink.
        return output.transpose(1, 2).flatten(2).tanh()

    for length in (3000, 2111) if mode["dynamic"] else (3000,):
        leaves = [_rows(length, 6, 64), _rows(length, 2, 64), _rows(length, 2, 80)]
        double = [each.detach().double().requires_grad_() for each in leaves]
        compressed = reference.compress_mean(leaves[1].detach(), **compression)
        lists = reference.select_blocks(
            leaves[0].detach(),
            compressed,
            num_keys=length,
            **compression,
            selection_block=64,
            num_selected=16,
            **forced,
        )
        expected, _ = reference.joint_attention(*double, lists, scale=0.125, **blocks)
        _check(compiled(*leaves, lists), expected.transpose(1, 2).flatten(2).tanh(), leaves, double)


@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("combine", ["gated", "joint"])
def test_what_follows_the_attention_is_in_its_kernel(combine, mode, is_training):
    from torch._inductor.utils import run_and_get_code

    generated, config = _generated(), NSAConfig(combine=combine, min_keys=1)
    layer = generated.Attention(width=256, size=64).to("cuda", torch.bfloat16)
    # Rows of a multiple of 8: others Inductor may pad for the projection, if that is faster in a trial of its own.
    inputs = [
        torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((2, 1108, 256), (1108, 64), (1108, 64))
    ]
    if combine == "gated":
        attach(layer, config, tuple(inputs))
    layer.requires_grad_(is_training)
    compiled = torch.compile(layer, backend=NSABackend(config), fullgraph=True, **MODES[mode])
    output, codes = run_and_get_code(compiled, *inputs)
    generated.check_fused(codes[0], combine)
    with torch.no_grad():
        assert (
            _relative_error(output.detach(), layer(*inputs).double() if combine == "gated" else output.double()) < 2e-2
        )
    if is_training:
        output.float().square().sum().backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in layer.parameters())


def test_max_autotune_times_every_tile_on_intervals_and_remembers_the_choice(monkeypatch, tmp_path):
    from torch._inductor import select_algorithm

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    timed = []
    benchmark = select_algorithm.AlgorithmSelectorCache.benchmark_choice

    def remember(choice: Any, *arguments: Any, **settings: Any) -> Any:
        timing = benchmark(choice, *arguments, **settings)
        timed.append((choice, timing))
        return timing

    monkeypatch.setattr(select_algorithm.AlgorithmSelectorCache, "benchmark_choice", staticmethod(remember))
    function = torch.ops.nsa.window_attention
    query, key = _rows(2000, 8, 128).detach(), _rows(2000, 2, 128).detach()
    last = torch.arange(2000, device="cuda", dtype=torch.int32).expand(2, -1).contiguous()
    sight = (torch.zeros_like(last), last, torch.ones(2, 2000, device="cuda", dtype=torch.bool))

    def attend(query: Tensor, key: Tensor, *sight: Tensor) -> Tensor:
        return function(query, key, key, *sight, is_causal=True, scale=0.125, window=512)[0].relu()

    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend=NSABackend(), fullgraph=True, options={"max_autotune": True})
        output = compiled(query, key, *sight)
        assert torch.allclose(output, attend(query, key, *sight), atol=2e-2)
    assert len({str(choice) for choice, _ in timed}) == len(timed) >= 5
    assert sum(timing < float("inf") for _, timing in timed) >= 4


def test_no_private_part_is_missing():
    with torch.device("cuda"):
        assert compat.template_tools() is not None
