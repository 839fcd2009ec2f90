"""What Inductor generates for a GPU: the last kernel of an attention takes in what follows it.  No GPU needed."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU suite runs what is generated here", allow_module_level=True)

import importlib.util

from nsa_compile import NSABackend, NSAConfig, attach, compat
from nsa_compile.kernels.gpu import tiles
from nsa_compile.lowering import register_templates

INTERPRETED = ("gated dynamic training", "window padded", "joint dynamic", "joint training")


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fake_cuda = _load("fake_cuda", Path(__file__).with_name("fake_cuda.py"))
generated = _load("generated_code", Path(__file__).with_name("generated_code.py"))


def _attention_code(combine: str, *, is_dynamic: bool = False, is_training: bool = False, size: int = 32) -> str:
    """Generated code of the rewritten layer's forward pass."""
    config = NSAConfig(combine=combine, min_keys=1)  # type: ignore[arg-type]
    layer = generated.Attention(size=size)
    inputs = [torch.randn(2, 80, 96), torch.randn(80, size), torch.randn(80, size)]
    if combine == "gated":
        attach(layer, config, tuple(inputs))
    layer = layer.bfloat16().requires_grad_(is_training)
    compiled = torch.compile(layer, backend=NSABackend(config), dynamic=is_dynamic, fullgraph=True)

    def run() -> None:
        output = compiled(*(each.bfloat16() for each in inputs))
        if is_training:
            output.float().square().sum().backward()

    return fake_cuda.generate_code(fake_cuda.capture_graphs(run)[0])


@pytest.mark.parametrize(
    ("combine", "is_dynamic", "is_training"),
    [("gated", False, False), ("gated", True, True), ("joint", True, False), ("joint", False, True)],
)
def test_what_follows_the_attention_is_in_its_kernel(combine, is_dynamic, is_training):
    code = _attention_code(combine, is_dynamic=is_dynamic, is_training=is_training)
    assert ("ks0" in generated.template_kernel(code)) == is_dynamic
    generated.check_fused(code, combine)


def test_what_gradients_need_of_outputs_is_computed_with_the_gates_gradients():
    config = NSAConfig(combine="gated", min_keys=1)
    layer, inputs = generated.Attention(size=32), [torch.randn(2, 80, 96), torch.randn(80, 32), torch.randn(80, 32)]
    attach(layer, config, tuple(inputs))
    compiled = torch.compile(layer.bfloat16(), backend=NSABackend(config), dynamic=False, fullgraph=True)

    def run() -> None:
        compiled(*(each.bfloat16() for each in inputs)).float().square().sum().backward()

    backward = fake_cuda.generate_code(fake_cuda.capture_graphs(run)[1])
    assert not re.search(r"^[^#\n]*torch\.ops\.nsa\.output_dot_gradient", backward, re.MULTILINE)
    assert re.search(r"^[^#\n]*torch\.ops\.nsa\.window_attention_backward", backward, re.MULTILINE)
    kernels = re.findall(r"^ *(triton_\w*output_dot_gradient\w*)\.run\(", backward, re.MULTILINE)
    assert len(kernels) == 1
    assert "sigmoid" in kernels[0]


@pytest.mark.slow
@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("combine", ["gated", "joint"])
def test_what_follows_the_attention_is_in_its_kernel_in_transformers_llama(combine, is_dynamic, is_training):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = transformers.LlamaModel(transformers.LlamaConfig(**sizes, head_dim=32, vocab_size=50, num_hidden_layers=1))
    config = NSAConfig(combine=combine, min_keys=1)
    if combine == "gated":
        attach(llama, config)
    llama = llama.bfloat16().requires_grad_(is_training)
    compiled = torch.compile(llama, backend=NSABackend(config), dynamic=is_dynamic, fullgraph=True)

    def run():
        hidden = torch.randn(2, 80, 96, dtype=torch.bfloat16)
        output = compiled(inputs_embeds=hidden, use_cache=False).last_hidden_state
        if is_training:
            output.float().square().sum().backward()

    generated.check_fused(fake_cuda.generate_code(fake_cuda.capture_graphs(run)[0]), combine)


@pytest.fixture(scope="module")
def interpreted():
    """What became of each case of interpret_generated.py, from one process in which the interpreter is on."""
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("interpret_generated.py")
    path = os.pathsep.join([str(root), str(script.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", INTERPRETED)
def test_generated_code_computes_what_the_graph_says(interpreted, case):
    assert interpreted[case]["kernels"] == 1
    assert interpreted[case]["error"] < 1e-5


def _window_code(dtype: torch.dtype, size: int, *, is_dynamic: bool = False, **options: Any) -> str:
    """Generated code of the window branch alone, over given intervals and valid keys."""
    function = torch.ops.nsa.window_attention

    def attend(query: Tensor, key: Tensor, *sight: Tensor) -> Tensor:
        return function(query, key, key, *sight, is_causal=True, scale=0.2, window=16)[0].relu()

    last = torch.arange(80, dtype=torch.int32).expand(2, -1).contiguous()
    sight = (torch.zeros_like(last), last, torch.ones(2, 80, dtype=torch.bool))
    query, key = (torch.randn(2, heads, 80, size).to(dtype) for heads in (4, 2))
    compiled = torch.compile(attend, backend=NSABackend(), dynamic=is_dynamic, options=options or None)
    (graph,) = fake_cuda.capture_graphs(lambda: compiled(query, key, *sight))
    return fake_cuda.generate_code(graph)


@pytest.mark.parametrize(
    "kind", ["gated", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("joint", "window"))]
)
def test_generated_kernel_compiles_for_hopper(kind, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget

    code = _window_code(torch.bfloat16, 64) if kind == "window" else _attention_code(kind, size=64)
    start = code.index("import triton\n", code.index("async_compile.triton('triton_tem"))
    path = tmp_path / "generated.py"
    path.write_text(code[start : code.index("'''", start)])
    (name,) = re.findall(r"def (triton_tem\w+)\(", code)
    settings = {}

    def keep(**given):
        settings.update(given)
        return lambda kernel: kernel

    with mock.patch("torch._inductor.runtime.triton_heuristics.template", keep):
        module = _load("generated", path)
    source = triton.compiler.ASTSource(getattr(module, name), settings["triton_meta"]["signature"])
    options = {option: settings[option] for option in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    assert compiled.metadata.shared < 232_448


@pytest.mark.parametrize(
    ("dtype", "size", "is_template"),
    [(torch.bfloat16, 72, True), (torch.float64, 32, False), (torch.float16, 320, False)],
)
def test_operator_is_called_where_the_template_does_not_apply(dtype, size, is_template):
    code = _window_code(dtype, size)
    assert ("torch.ops.nsa.window_attention.default(" not in code) == is_template
    assert ("triton_tem" in code) == is_template


@pytest.mark.parametrize(("value_size", "by_rows"), [(24, 2), (1, 0)])
def test_one_number_a_row_is_read_once_a_row(value_size, by_rows):
    """Where a row has several elements; one for a token and a head, one for a head."""

    def attend(query: Tensor, value: Tensor, gate: Tensor, factor: Tensor) -> Tensor:
        function = torch.ops.nsa.window_attention
        output, _ = function(query, query, value, None, None, None, is_causal=True, scale=0.2, window=16)
        return (output * gate.sigmoid() * factor).transpose(1, 2).flatten(2)

    query, value, gate = (torch.randn(2, 80, 4, size).bfloat16().transpose(1, 2) for size in (32, value_size, 1))
    compiled = torch.compile(attend, backend=NSABackend(), dynamic=False)
    (graph,) = fake_cuda.capture_graphs(lambda: compiled(query, value, gate, torch.randn(4, 1, 1).bfloat16()))
    kernel = generated.template_kernel(fake_cuda.generate_code(graph))
    assert "tl.sigmoid(" in kernel
    assert len(re.findall(r"= tl\.load\(.*, row_stored\b", kernel)) == by_rows


def test_torch_with_narrow_symbolic_sizes_keeps_large_tensors_opaque(monkeypatch):
    with fake_cuda.fake_cuda():
        assert register_templates()
    tools_class = compat.TemplateTools
    fits = []

    def can_index(tools, inputs, layout):
        monkeypatch.setattr(tools, "_has_wide_sizes", False)
        monkeypatch.setattr(tools, "_fits_in_32_bits", lambda numel, buffers: fits.append((numel, len(buffers))))
        return original(tools, inputs, layout)

    original = tools_class.can_index
    monkeypatch.setattr(tools_class, "can_index", can_index)
    assert "triton_tem" in _window_code(torch.bfloat16, 32)
    assert not fits
    assert "torch.ops.nsa.window_attention.default(" in _window_code(torch.bfloat16, 32, is_dynamic=True)
    assert len(fits) == 1


def test_max_autotune_chooses_among_our_tiles_on_valid_inputs(monkeypatch):
    seen = []

    def choose(tools, name, choices, inputs, layout, fills):
        seen.append((name, choices, fills))
        return choices[-1].output_node()

    monkeypatch.setattr(compat.TemplateTools, "chosen", choose)
    code = _window_code(torch.bfloat16, 64, max_autotune=True)
    ((name, choices, fills),) = seen
    monkeypatch.setattr(tiles, "is_hopper", lambda device: True)
    candidates = tiles.forward_candidates(tiles.width(64, 64), 2, torch.device("cuda"))
    assert name == "nsa_range_interval_valid"
    assert len(choices) == len(candidates) > 3
    assert f"BLOCK_M : tl.constexpr = {candidates[-1]['BLOCK_M']}" in generated.template_kernel(code)
    # Query, key, value, first, last, valid, lse: random numbers will not do for three of them.
    assert list(fills) == [3, 4, 5]
    tensors = [torch.full((2, 80), 7, dtype=torch.int32) for _ in fills]
    for fill, tensor in zip(fills.values(), tensors, strict=True):
        fill(tensor)
    assert [each.tolist() for each in tensors] == [[[0] * 80] * 2, [[*range(80)]] * 2, [[1] * 80] * 2]


def test_torch_without_a_private_part_keeps_the_operators_opaque(monkeypatch, caplog):
    from torch._inductor import select_algorithm

    monkeypatch.delattr(select_algorithm, "SymbolicGridFn")
    with caplog.at_level(logging.WARNING):
        assert compat.template_tools() is None
    assert "SymbolicGridFn" in caplog.text
    assert "not fused" in caplog.text


def test_cpu_tensors_keep_the_operators_in_a_process_with_templates():
    with fake_cuda.fake_cuda():
        assert register_templates()
    query, key = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        settings = {"is_causal": True, "scale": 0.2, "window": 16}
        return torch.ops.nsa.window_attention(query, key, key, None, None, None, **settings)[0]

    compiled = torch.compile(attend, backend=NSABackend(), fullgraph=True)
    assert torch.equal(compiled(query, key), attend(query, key))


def test_nothing_is_registered_without_a_gpu():
    assert not register_templates()
