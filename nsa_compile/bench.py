"""Times Native Sparse Attention and dense attention side by side, stage by stage, after checking that it is right.

NSA's whole time is that of a function compiled by the backend, as a model would call it: tokens before heads in memory,
gates as logits, the output laid out for the next projection.  Its stages are the operators, called eagerly.  A speedup
is reported only when the check passed.  All times of one `Benchmark` come from one run on one device.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nsa_compile.backend import NSABackend
from nsa_compile.bench_result import Benchmark, Kind, Shape, Stage
from nsa_compile.config import NSAConfig
from nsa_compile.kernels import reference
from nsa_compile.kernels.compression import count_compressed, mean_compress
from nsa_compile.operator import nsa_attention

# Relative error of an output against float64; a few roundings of the inputs' dtype.
_BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Share of queries whose list equals the reference's: scores nearer to each other than float32 rounding may swap.
_EQUAL_LISTS = 0.99
_DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_CHECKED_TOKENS = 1536
# Milliseconds that a stage is timed for, or longer: until it has run so often.
_TIMED, _FEWEST_RUNS = 200, 3


def draw_inputs(shape: Shape, kind: Kind, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws query, key, value, gate logits; "correlated" tokens resemble their neighbours, as in trained models."""

    def rows(heads: int, size: int) -> Tensor:
        def noise(length: int) -> Tensor:
            return torch.randn(shape.batch, length, heads, size, device=device, dtype=dtype)

        tokens = noise(shape.tokens)
        if kind == "correlated":
            slow, quick = (
                noise(shape.tokens // span + 1).repeat_interleave(span, 1)[:, : shape.tokens] for span in (64, 8)
            )
            tokens = 0.8 * slow + 0.5 * quick + 0.33 * tokens
        return tokens.transpose(1, 2)

    gates = torch.randn(shape.batch, shape.heads, shape.tokens, 3, device=device, dtype=dtype)
    return (
        rows(shape.heads, shape.head_size),
        rows(shape.kv_heads, shape.head_size),
        rows(shape.kv_heads, shape.value_size),
        gates,
    )


def run_benchmark(
    shape: Shape,
    config: NSAConfig,
    *,
    kind: Kind = "random",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = True,
    compiled: bool = True,
    progress: Callable[[str], object] = str,
) -> Benchmark:
    """Checks, then times.

    Args:
        shape: sizes.
        config: configuration with mean compression.
        kind: "random" or "correlated" inputs.
        device: where to run.
        dtype: of the inputs.
        backward: whether to time forward+backward too.
        compiled: whether NSA's whole time is that of compiled code; else of the operators called eagerly.
        progress: called with a line before each step.
    """
    progress("checking against float64")
    checked = dataclasses.replace(shape, tokens=min(shape.tokens, _CHECKED_TOKENS), batch=1)
    errors, correct = _check(checked, config, kind, device, dtype)
    progress("measuring the device's ceilings")
    ceilings = _ceilings(device, dtype)
    query, key, value, gates = draw_inputs(shape, kind, device, dtype)
    stages: list[Stage] = []

    def add(name: str, call: Callable[[], Any], flops: float | None = None) -> Any:
        progress(f"timing {name}")
        result = call()
        milliseconds = _time(call, device)
        stages.append(Stage(name, milliseconds, flops / milliseconds / 1e9 if flops else None))
        return result

    def add_counted(name: str, call: Callable[[], Any]) -> Any:
        share = seen if name in ("compressed_attention", "select_blocks") else 1.0
        counted[name] = share * _flops(call)
        return add(name, call, counted[name])

    @torch.enable_grad()
    def eager() -> Tensor:
        # As for a gradient, for which long inputs too go through one operator for each branch.
        trained = gates.detach().requires_grad_()
        return _as_in_a_model(query, key, value, trained, config, is_rewritten=False).detach()

    def nsa() -> Tensor:
        return attend(query, key, value, gates, config, is_rewritten=compiled)

    def dense() -> Tensor:
        return _dense(query, key, value)

    counted: dict[str, float] = {}
    seen = _seen_share(shape, config)
    attend = _as_in_a_model
    if compiled:
        attend = torch.compile(attend, backend=NSABackend(config.replace(min_keys=0)), dynamic=False)
    with torch.no_grad():
        _time_stages(query, key, value, config, add_counted)
        progress("compiling" if compiled else "comparing operators")
        errors["as timed against eager"] = _relative_error(nsa(), eager())
        correct = correct and errors["as timed against eager"] < _BUDGET[dtype]
        extra = _extra_bytes(nsa, device)
        add("nsa forward", nsa, sum(counted.values()))
    leaves = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    trained = [*leaves, gates.requires_grad_()] if config.combine == "gated" else leaves
    grad = torch.randn(shape.batch, shape.tokens, shape.heads * shape.value_size, device=device, dtype=dtype)
    # Two products forward, five backward.
    backward_products = (3 * shape.head_size + 2 * shape.value_size) / (shape.head_size + shape.value_size)
    if backward:
        if compiled:
            progress("compiling with the backward pass")
        attention = sum(counted.values()) - counted["select_blocks"]
        add(
            "nsa forward+backward",
            lambda: torch.autograd.grad(nsa(), trained, grad),
            sum(counted.values()) + backward_products * attention,
        )
    # Of products over visible pairs of a query and a key.
    pairs = shape.batch * shape.heads * shape.tokens * (shape.tokens + 1) // 2
    flops = 2 * pairs * (shape.head_size + shape.value_size)
    dense_grad = grad.unflatten(-1, (shape.heads, shape.value_size)).transpose(1, 2)
    for name, backend in _dense_backends(leaves):
        with backend():
            with torch.no_grad():
                add(f"dense {name} forward", dense, flops)
            if backward:
                add(
                    f"dense {name} forward+backward",
                    lambda: torch.autograd.grad(dense(), leaves, dense_grad),
                    (1 + backward_products) * flops,
                )
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return Benchmark(name, shape, config, kind, errors, correct, ceilings, tuple(stages), extra)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _as_in_a_model(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, config: NSAConfig, is_rewritten: bool
) -> Tensor:
    """NSA as in a layer, [B, T, H · D_v]; with `is_rewritten` joint attention is dense, for the backend to rewrite."""
    if config.combine == "gated":
        output = nsa_attention(query, key, value, config=config, gates=gates.sigmoid())
    elif is_rewritten:
        output = _dense(query, key, value)
    else:
        output = nsa_attention(query, key, value, config=config)
    return output.transpose(1, 2).flatten(2)


def _flops(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _seen_share(shape: Shape, config: NSAConfig) -> float:
    """Of all pairs of a query and a compressed key, which FLOP counters take, those that causal attention sees."""
    count = count_compressed(shape.tokens, config.block_length, config.block_stride)
    tokens = torch.arange(shape.tokens)
    seen = ((tokens - config.block_length + 1 + config.block_stride) // config.block_stride).clamp(0, count)
    return seen.double().mean().item() / max(count, 1)


def _stage_arguments(
    query: Tensor, key: Tensor, config: NSAConfig
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    causal = {"is_causal": True, "scale": query.shape[-1] ** -0.5}
    compression = {"block_length": config.block_length, "block_stride": config.block_stride}
    blocks = {
        "selection_block": config.selection_block,
        "num_initial": config.num_initial,
        "num_local": config.num_local,
    }
    return causal, {**compression, "num_keys": key.shape[2]}, blocks


def _time_stages(query: Tensor, key: Tensor, value: Tensor, config: NSAConfig, add: Callable[..., Any]) -> None:
    """Times the parts of a forward pass, as kernels/attention.py calls them."""
    causal, numbers, blocks = _stage_arguments(query, key, config)
    compression = {"block_length": config.block_length, "block_stride": config.block_stride}
    nothing = (None, None, None)
    compressed_key = add("compress keys", lambda: mean_compress(key, **compression))
    lse = None
    if config.combine == "gated":
        compressed_value = mean_compress(value, **compression)
        _, lse = add(
            "compressed_attention",
            lambda: torch.ops.nsa.compressed_attention(
                query, compressed_key, compressed_value, *nothing, **causal, **numbers
            ),
        )
    lists = add(
        "select_blocks",
        lambda: torch.ops.nsa.select_blocks(
            query, compressed_key, lse, *nothing, None, **causal, **numbers, **blocks, num_selected=config.num_selected
        ),
    )
    if config.combine == "joint":
        add(
            "joint_attention",
            lambda: torch.ops.nsa.joint_attention(
                query, key, value, lists, *nothing, **causal, **blocks, window=config.window
            ),
        )
        return
    add(
        "selected_attention",
        lambda: torch.ops.nsa.selected_attention(query, key, value, lists, *nothing, **causal, **blocks),
    )
    add(
        "window_attention",
        lambda: torch.ops.nsa.window_attention(query, key, value, *nothing, **causal, window=config.window),
    )


@torch.no_grad()
def _check(
    shape: Shape, config: NSAConfig, kind: Kind, device: str, dtype: torch.dtype
) -> tuple[dict[str, float], bool]:
    """Compares lists and output with the float64 reference, the output given the operator's own lists."""
    query, key, value, gates = draw_inputs(shape, kind, device, dtype)
    causal, numbers, blocks = _stage_arguments(query, key, config)
    compression = {"block_length": config.block_length, "block_stride": config.block_stride}
    compressed_key, compressed_value = mean_compress(key, **compression), mean_compress(value, **compression)
    lse = None
    if config.combine == "gated":
        _, lse = torch.ops.nsa.compressed_attention(
            query, compressed_key, compressed_value, None, None, None, **causal, **numbers
        )
    chosen = torch.ops.nsa.select_blocks(
        query,
        compressed_key,
        lse,
        None,
        None,
        None,
        None,
        **causal,
        **numbers,
        **blocks,
        num_selected=config.num_selected,
    )
    wanted = reference.select_blocks(query, compressed_key, **numbers, **blocks, num_selected=config.num_selected)
    block: dict[str, Any] = {"selection_block": config.selection_block}
    if config.combine == "joint":
        expected, _ = reference.joint_attention(query, key, value, chosen, **block, window=config.window)
        output = nsa_attention(query, key, value, config=config)
    else:
        parts = (
            reference.compressed_attention(query, compressed_key, compressed_value, **numbers)[0],
            reference.selected_attention(query, key, value, chosen, **block)[0],
            reference.window_attention(query, key, value, window=config.window)[0],
        )
        gates = gates.sigmoid()
        expected = (gates.double().unsqueeze(-2) * torch.stack(parts, -1)).sum(-1)
        output = nsa_attention(query, key, value, config=config, gates=gates)
    error = _relative_error(output, expected)
    equal = (chosen == wanted).all(-1).float().mean().item()
    return {"output error": error, "equal lists": equal}, error < _BUDGET[dtype] and equal > _EQUAL_LISTS


def _relative_error(output: Tensor, expected: Tensor) -> float:
    return ((output.double() - expected).norm() / expected.norm()).item()


def _time(call: Callable[[], Any], device: str) -> float:
    """Median time in ms; on CUDA the L2 cache is flushed between runs."""
    if device == "cuda":
        from triton.testing import do_bench

        def median(milliseconds: float) -> float:
            return float(do_bench(call, warmup=50, rep=milliseconds, return_mode="median"))  # type: ignore[arg-type]

        # As many runs as fit into a time: one, where one fills it.  A first run may be slower than those after it.
        once = median(_TIMED)
        return once if _FEWEST_RUNS * once < _TIMED else median((_FEWEST_RUNS + 0.5) * once)
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Rates of a large matrix product and of a large copy."""
    size, length = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 26)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(length, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    product = _time(lambda: matrix @ matrix, device)
    copy = _time(lambda: target.copy_(source), device)
    return {"tflops": 2 * size**3 / product / 1e9, "gigabytes": 2 * length / copy / 1e6}


def _extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _dense_backends(leaves: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Dense attentions that take these inputs: on CUDA cuDNN's and FlashAttention, elsewhere torch's own."""
    if leaves[0].device.type != "cuda":
        yield "sdpa", contextlib.nullcontext
        return
    query, key, value = (each[:, :, :256].detach() for each in leaves)
    for name, backend in _DENSE.items():
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        except RuntimeError:
            continue
        yield name, lambda backend=backend: sdpa_kernel(backend)
