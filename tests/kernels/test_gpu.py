"""Triton kernels on a GPU, through the operators, against the float64 reference on fresh random inputs."""

import pytest
import torch
from torch import Tensor

from nsa_compile import NSAConfig, nsa_attention
from nsa_compile.kernels import reference
from nsa_compile.kernels.compression import mean_compress

pytestmark = pytest.mark.gpu

COMPRESSION = {"block_length": 32, "block_stride": 16}
SELECTION = {"selection_block": 64, "num_selected": 16, "num_initial": 1, "num_local": 2}
FORCED = {"num_initial": 1, "num_local": 2}
# Relative error in the Frobenius norm: float32 sums; one rounding of inputs to the matrix unit and one of the output.
BUDGET = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

# H, H_kv, T, S, D, D_v, dtype, visibility
CASES = {
    "grouped": (8, 2, 1111, 1111, 128, 128, torch.bfloat16, "causal"),
    "one_kv_head": (16, 1, 777, 777, 64, 64, torch.float16, "intervals"),
    "smollm2": (9, 3, 1000, 1000, 64, 64, torch.bfloat16, "padded"),
    "narrow_head": (8, 1, 1500, 1500, 64, 64, torch.bfloat16, "causal"),
    "multi_head_wide_query": (4, 4, 600, 600, 192, 128, torch.bfloat16, "causal"),
    "float32": (4, 2, 500, 700, 64, 64, torch.float32, "intervals"),
    "odd_head_size": (6, 2, 2000, 2000, 80, 96, torch.bfloat16, "causal"),
    "wide_head": (2, 1, 400, 400, 256, 256, torch.float16, "padded"),
    "one_query": (8, 2, 1, 5000, 128, 128, torch.bfloat16, "intervals"),
    "more_queries_than_keys": (4, 2, 1500, 63, 64, 64, torch.float16, "causal"),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Whatever a kernel forgets to write is NaN."""
    torch.seed()
    poison = torch.full((1 << 28,), float("nan"), device="cuda")
    del poison


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def draw(
    H: int, H_kv: int, T: int, S: int, D: int, DV: int, dtype: torch.dtype, visibility: str, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, dict]:
    def rows(length: int, heads: int, size: int) -> Tensor:  # as models have it: a transposed view
        return torch.randn(batch, length, heads, size, device="cuda", dtype=dtype).transpose(1, 2)

    sight: dict = {}
    if visibility != "causal":
        last = torch.randint(0, S, (batch, T), device="cuda", dtype=torch.int32)
        sight = {
            "first_key": last - torch.randint(-3, S, (batch, T), device="cuda", dtype=torch.int32),
            "last_key": last,
        }
    if visibility == "padded":
        sight = {"key_valid": torch.arange(S, device="cuda") >= torch.tensor([[S // 5], [0]], device="cuda")}
        sight["key_valid"] &= torch.rand(batch, S, device="cuda") > 0.02
    return rows(T, H, D), rows(S, H_kv, D), rows(S, H_kv, DV), sight


def branch_arguments(name: str, sight: dict, S: int, scale: float, tensors: tuple[Tensor, ...]) -> tuple[tuple, dict]:
    """Positional and keyword arguments of a branch operator."""
    valid = sight.get("key_valid")
    if name == "compressed_attention" and valid is not None:
        valid = valid.unfold(1, 32, 16).all(-1)
    attributes: dict = {"is_causal": True, "scale": scale}
    if name == "compressed_attention":
        attributes |= {**COMPRESSION, "num_keys": S}
    if name in ("selected_attention", "joint_attention"):
        attributes |= {"selection_block": 64, **FORCED}
    if name in ("window_attention", "joint_attention"):
        attributes["window"] = 512
    return (*tensors, sight.get("first_key"), sight.get("last_key"), valid), attributes


@pytest.mark.parametrize("name", ["compressed_attention", "window_attention", "selected_attention", "joint_attention"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_branch_equals_reference(name: str, case: tuple) -> None:
    query, key, value, sight = draw(*case)
    S, scale = key.shape[2], query.shape[-1] ** -0.5
    lists: tuple[Tensor, ...] = ()
    extra: dict = {}
    if name == "compressed_attention":
        key, value = mean_compress(key, **COMPRESSION), mean_compress(value, **COMPRESSION)
        extra = {**COMPRESSION, "num_keys": S}
    elif name != "window_attention":
        chosen = reference.select_blocks(
            query, mean_compress(key, **COMPRESSION), num_keys=S, **COMPRESSION, **SELECTION, **sight
        )
        lists = (chosen,)
        extra = {"selection_block": 64}
    if name in ("window_attention", "joint_attention"):
        extra["window"] = 512
    arguments, attributes = branch_arguments(name, sight, S, scale, (query, key, value, *lists))
    output, lse = getattr(torch.ops.nsa, name)(*arguments, **attributes)
    double = [each.detach().double().requires_grad_() for each in (query, key, value)]
    expected, expected_lse = getattr(reference, name)(*double, *lists, scale=scale, **extra, **sight)
    budget = BUDGET[query.dtype]
    assert relative_error(output, expected) < budget
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse.double() - expected_lse)[finite].abs().max() < 1e-4
    if not key.numel():
        return
    grad = torch.randn_like(output)
    expected_gradients = torch.autograd.grad(expected, double, grad.double())
    backward = getattr(torch.ops.nsa, f"{name}_backward")
    delta = torch.ops.nsa.output_dot_gradient(output, grad)
    gradients = backward(grad, *arguments, delta, lse, **attributes)
    # Where almost nothing is visible a gradient is a difference of equal numbers.
    factor = 1.5 if key.shape[2] > 16 else 4
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, wanted) < factor * budget or (gradient.double() - wanted).abs().max() < 1e-5
    again = backward(grad, *arguments, delta, lse, **attributes)
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gated_attention_equals_reference(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu import gated

    monkeypatch.setattr(gated, "PARTIAL_BYTES", (1 << 22, 1 << 22))  # several chunks
    query, key, value, sight = draw(*case)
    S, scale = key.shape[2], query.shape[-1] ** -0.5
    lists = reference.select_blocks(
        query, mean_compress(key, **COMPRESSION), num_keys=S, **COMPRESSION, **SELECTION, **sight
    )
    tensors = (query, key, value, lists, torch.randn_like(key), torch.randn_like(value))
    arguments, attributes = branch_arguments("joint_attention", sight, S, scale, tensors)
    other = torch.randn(2, query.shape[2], query.shape[1], value.shape[3], device="cuda", dtype=query.dtype)
    other = other.transpose(1, 2)
    gates = torch.rand(2, query.shape[2], query.shape[1], 3, device="cuda", dtype=query.dtype).transpose(1, 2)
    output = torch.ops.nsa.gated_attention(*arguments, other, gates, **attributes)
    expected = reference.gated_attention(*tensors, other, gates, scale=scale, selection_block=64, window=512, **sight)
    assert relative_error(output, expected) < BUDGET[query.dtype]


@pytest.mark.parametrize("compression", [COMPRESSION, {"block_length": 4, "block_stride": 4}], ids=["overlap", "apart"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["gated", "joint"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lists_equal_reference(case: tuple, with_lse: bool, compression: dict[str, int]) -> None:
    query, key, _, sight = draw(*case)
    config = NSAConfig(combine="joint")
    S, scale = key.shape[2], query.shape[-1] ** -0.5
    compressed_key = mean_compress(key, **compression)
    wanted = reference.select_blocks(query, compressed_key, num_keys=S, **compression, **SELECTION, **sight)
    first, last, valid, block_valid = sight.get("first_key"), sight.get("last_key"), sight.get("key_valid"), None
    if valid is not None:
        from nsa_compile.kernels.intervals import (
            blocks_with_valid_key,
            tighten_intervals,
            valid_compressed_tokens,
        )

        block_valid = blocks_with_valid_key(valid, config.selection_block)
        first, last = tighten_intervals(None, None, valid, is_causal=True, query=query)
        valid = valid_compressed_tokens(valid, **compression)
    lse = None
    if with_lse:
        lse = torch.ops.nsa.compressed_attention(
            query, compressed_key, compressed_key, first, last, valid,
            is_causal=True, scale=scale, **compression, num_keys=S,
        )[1]  # fmt: skip
    chosen = torch.ops.nsa.select_blocks(
        query, compressed_key, lse, first, last, valid, block_valid,
        is_causal=True, scale=scale, **compression, **SELECTION, num_keys=S,
    )  # fmt: skip
    # Scores closer than float32 rounding may be ordered either way.
    assert (chosen == wanted).all(-1).float().mean() > 0.999


def test_joint_with_full_coverage_equals_sdpa() -> None:
    query, key, value, _ = draw(8, 2, 3000, 3000, 128, 128, torch.bfloat16, "causal")
    config = NSAConfig(num_selected=64)
    output = nsa_attention(query, key, value, config=config)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    assert relative_error(output, expected) < BUDGET[torch.bfloat16]


@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_whole_operator_trains_and_repeats(combine: str) -> None:
    query, key, value, _ = draw(8, 2, 2500, 2500, 64, 64, torch.bfloat16, "causal")
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    gates = torch.rand(2, 8, 2500, 3, device="cuda", requires_grad=True) if combine == "gated" else None
    config = NSAConfig(combine=combine)
    inputs = leaves if gates is None else [*leaves, gates]

    def run() -> list[Tensor]:
        output = nsa_attention(*leaves, config=config, gates=gates)
        return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]

    first, second = run(), run()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(each.isfinite().all() for each in first)


def test_results_do_not_depend_on_the_batch() -> None:
    query, key, value, _ = draw(8, 2, 1500, 1500, 64, 64, torch.bfloat16, "causal")
    together = nsa_attention(query, key, value)
    alone = nsa_attention(query[1:], key[1:], value[1:])
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("combine", ["joint", "gated"])
@pytest.mark.parametrize("compression", [COMPRESSION, {"block_length": 8, "block_stride": 8}], ids=["overlap", "apart"])
def test_long_inputs_do_not_depend_on_the_batch(combine: str, compression: dict[str, int]) -> None:
    """As long as the kernels for long inputs want them, and in several chunks together, in one alone."""
    query, key, value, _ = draw(9, 3, 8192, 8192, 64, 64, torch.bfloat16, "causal", batch=4)
    gates = torch.rand(4, 9, 8192, 3, device="cuda") if combine == "gated" else None
    config = NSAConfig(combine=combine, num_selected=32, **compression)
    together = nsa_attention(query, key, value, config=config, gates=gates)
    for index in range(4):
        one = slice(index, index + 1)
        alone = nsa_attention(
            query[one], key[one], value[one], config=config, gates=None if gates is None else gates[one]
        )
        assert torch.equal(together[one], alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_tensors_on_a_gpu_that_is_not_the_current_one(combine: str) -> None:
    query, key, value, _ = draw(8, 2, 1500, 1500, 64, 64, torch.bfloat16, "causal")
    gates = torch.rand(2, 8, 1500, 3, device="cuda") if combine == "gated" else None
    config = NSAConfig(combine=combine)

    def run(device: str) -> list[Tensor]:
        leaves = [each.to(device).detach().requires_grad_() for each in (query, key, value)]
        output = nsa_attention(*leaves, config=config, gates=None if gates is None else gates.to(device))
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    assert torch.cuda.current_device() == 0
    assert all(torch.equal(one, other.to("cuda:0")) for one, other in zip(run("cuda:0"), run("cuda:1"), strict=True))


@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_cuda_graph_captures_forward_and_backward(combine: str, capture) -> None:
    query, key, value, _ = draw(4, 2, 2048, 2048, 64, 64, torch.bfloat16, "causal")
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    gates = torch.rand(2, 4, 2048, 3, device="cuda") if combine == "gated" else None
    config = NSAConfig(combine=combine)

    def run() -> list[Tensor]:
        output = nsa_attention(*leaves, config=config, gates=gates)
        return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    graph, captured = capture(run)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    replayed = [each.clone() for each in captured]
    assert all(torch.equal(one, other) for one, other in zip(replayed, run(), strict=True))


def test_offsets_beyond_32_bits() -> None:
    """128k tokens, 64 heads of 320 numbers in memory: the last rows lie more than 2^31 elements from the first."""
    T, H, D = 131_072, 64, 128
    storage = torch.randn(1, T, H + 2 * 48, D, device="cuda", dtype=torch.bfloat16)
    query, key, value = (
        storage[:, :, :H].transpose(1, 2),
        storage[:, :, H : H + 4].transpose(1, 2),
        storage[:, :, -4:].transpose(1, 2),
    )
    assert query.stride(2) * T > 2**31
    output = nsa_attention(query, key, value)
    tokens = torch.tensor([[0, 63, 5000, 70_001, T - 129, T - 1]], device="cuda")
    compressed_key = mean_compress(key, **COMPRESSION)
    part = query[:, :, tokens[0]]
    lists = reference.select_blocks(part, compressed_key, num_keys=T, last_key=tokens, **COMPRESSION, **SELECTION)
    expected, _ = reference.joint_attention(part, key, value, lists, last_key=tokens, selection_block=64, window=512)
    assert relative_error(output[:, :, tokens[0]], expected) < BUDGET[torch.bfloat16]
