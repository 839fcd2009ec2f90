"""Runs code that Inductor generates for a GPU on the CPU, its kernels in Triton's interpreter, and prints the errors.

A process of its own: TRITON_INTERPRET must be set before a kernel is defined.  Run by test_lowering.py.  The functions
here leave nothing but the template's kernel to Triton: what else they compute are operators.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from fake_cuda import CapturedGraph, capture_graphs, generate_code
from torch import Tensor

from nsa_compile import NSABackend, NSAConfig, nsa_attention

SIZES = {"block_length": 8, "block_stride": 4, "selection_block": 16, "num_selected": 4, "window": 20}
# name: combine, lengths (more than one: dynamic), what queries see, whether a gradient is wanted, head sizes
CASES = {
    "gated dynamic training": ("gated", (70, 45), "causal", True, 16, 16),
    "window padded": ("window", (50,), "padded", False, 24, 40),
    "joint dynamic": ("joint", (75, 41), "causal", False, 16, 16),
    "joint training": ("joint", (70,), "intervals", True, 16, 24),
}


def _as_it_is(**_: Any) -> Callable[[Any], Any]:
    return lambda kernel: kernel


class _Interpreted:
    """Stands for a kernel that Inductor has compiled."""

    def __init__(self, name: str, source: str) -> None:
        path = Path(tempfile.mkdtemp(), "kernel.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch("torch._inductor.runtime.triton_heuristics.template", _as_it_is):
            spec.loader.exec_module(module)
        self._kernel = getattr(module, name)

    def run(self, *arguments: Any, stream: int) -> None:
        *tensors, x, y, z = arguments
        self._kernel[x, y, z](*tensors)


def run_generated(graph: CapturedGraph, code: str) -> float:
    """Runs the code with the arguments of each call; returns the largest error of any output, relative to its norm."""
    from torch._inductor.async_compile import AsyncCompile

    def compiled(_: Any, name: str, source: str, **__: Any) -> _Interpreted:
        return _Interpreted(name, source)

    scope: dict[str, Any] = {"__name__": "generated"}
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda._DeviceGuard": lambda _: contextlib.nullcontext(),
            "torch.cuda.set_device": lambda _: None,
            "torch._C._cuda_getCurrentRawStream": lambda _: 0,
        }.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.enter_context(mock.patch.object(AsyncCompile, "triton", compiled))
        stack.enter_context(mock.patch.object(AsyncCompile, "wait"))
        exec(code, scope)
        scope["empty_strided_cuda"] = _poisoned
        errors = [0.0]
        for arguments, expected in graph.calls:
            for given, wanted in zip(scope["call"](list(arguments)), expected, strict=True):
                if isinstance(wanted, Tensor) and wanted.is_floating_point():
                    difference = given.exp() - wanted.exp() if wanted.isinf().any() else given - wanted
                    assert given.shape == wanted.shape
                    value = (difference.norm() / wanted.nan_to_num(neginf=0.0).norm()).item()
                    errors.append(value if value == value else float("inf"))
    return max(errors)


def _poisoned(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else -1)


def capture(
    combine: str, lengths: tuple[int, ...], visibility: str, is_training: bool, size: int, value_size: int
) -> CapturedGraph:
    """Captures the forward pass of gated or joint attention, or of the window branch, with a transposed output."""
    nsa_config = NSAConfig(combine="joint" if combine == "joint" else "gated", **SIZES)

    def attend(query: Tensor, key: Tensor, value: Tensor, logits: Tensor, *compressed: Tensor, **sight: Any) -> Tensor:
        compressed_key, compressed_value = compressed
        if combine == "joint":
            output = nsa_attention(query, key, value, config=nsa_config, compressed_key=compressed_key, **sight)
        elif combine == "gated":
            output = nsa_attention(
                query, key, value, config=nsa_config, gates=logits.sigmoid(), compressed_key=compressed_key,
                compressed_value=compressed_value, **sight,
            )  # fmt: skip
        else:
            visible = (None, None, sight["key_valid"])
            output, _ = torch.ops.nsa.window_attention(
                query, key, value, *visible, is_causal=True, scale=0.3, window=20
            )
            output = output * logits[..., 2:].sigmoid()
        return output.transpose(1, 2).reshape(output.shape[0], output.shape[2], -1) * 2

    compiled = torch.compile(attend, backend=NSABackend(nsa_config), dynamic=len(lengths) > 1, fullgraph=True)

    def run() -> None:
        for length in lengths:
            arguments, sight = _draw(length, visibility, is_training, size, value_size)
            output = compiled(*arguments, **sight)
            if is_training:
                output.sum().backward()

    return capture_graphs(run)[0]


def _draw(
    length: int, visibility: str, is_training: bool, size: int, value_size: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    B, H, H_kv = 2, 4, 2
    num_compressed = (length - 8) // 4 + 1

    def rows(number: int, heads: int, width: int) -> Tensor:
        return torch.randn(B, number, heads, width).transpose(1, 2).requires_grad_(is_training)

    arguments = [rows(length, H, size), rows(length, H_kv, size), rows(length, H_kv, value_size), rows(length, H, 3)]
    arguments += [rows(num_compressed, H_kv, size), rows(num_compressed, H_kv, value_size)]
    last = torch.randint(0, length, (B, length), dtype=torch.int32)
    sight = {
        "causal": {},
        "padded": {"key_valid": torch.rand(B, length) > 0.1},
        "intervals": {"first_key": last - torch.randint(-3, length, (B, length), dtype=torch.int32), "last_key": last},
    }
    return arguments, sight[visibility]


if __name__ == "__main__":
    for name, settings in CASES.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        graph = capture(*settings)
        code = generate_code(graph)
        result = {"case": name, "error": run_generated(graph, code), "kernels": code.count("@triton.jit")}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
