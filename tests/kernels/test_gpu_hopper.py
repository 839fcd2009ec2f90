"""The Hopper kernels on a GPU, against the float64 reference on fresh random inputs."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from nsa_compile import NSAConfig, nsa_attention
from nsa_compile.kernels import reference
from nsa_compile.kernels.compression import count_compressed

pytestmark = pytest.mark.gpu

BUDGET = {torch.float16: 6e-4, torch.bfloat16: 5e-3}

# B, H, H_kv, T, D, D_v, l, d, dtype, causal
CASES = {
    "grouped": (2, 8, 2, 1111, 128, 128, 32, 16, torch.bfloat16, True),
    "narrow_head": (1, 8, 1, 1500, 64, 64, 4, 4, torch.bfloat16, True),
    "multi_head": (1, 3, 3, 777, 64, 128, 16, 16, torch.float16, True),
    "wide_key": (2, 6, 2, 640, 128, 64, 8, 4, torch.float16, True),
    "everything": (1, 4, 2, 515, 128, 128, 32, 16, torch.bfloat16, False),
    "one_key": (1, 4, 1, 40, 128, 128, 32, 16, torch.bfloat16, True),
    "many_queries": (1, 4, 1, 9000, 64, 64, 32, 16, torch.float16, True),
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch):
    """The launches, for short inputs too; whatever a kernel forgets to write is NaN."""
    launch = pytest.importorskip("nsa_compile.kernels.gpu.hopper.launch")
    if not launch.is_hopper(torch.device("cuda")):
        pytest.skip("no Hopper GPU")
    monkeypatch.setattr(launch, "FEWEST_QUERIES", 1)
    torch.seed()
    poison = torch.full((1 << 28,), float("nan"), device="cuda")
    del poison
    return launch


def in_poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random rows [B, heads, rows, D], between the heads of which memory is NaN."""
    memory = torch.full((*shape[:-2], shape[-2] + 130, shape[-1]), float("nan"), device="cuda", dtype=dtype)
    return memory[..., : shape[-2], :].copy_(torch.randn(shape, device="cuda"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def count_launches(hopper, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each launch is called from now on."""
    used: Counter = Counter()
    for name in ("flash_forward", "flash_query_gradient", "flash_key_gradient", "listed_gradient", "gated_end"):
        function = getattr(hopper, name)

        def counted(*args, name: str = name, function=function):
            used[name] += 1
            return function(*args)

        monkeypatch.setattr(hopper, name, counted)
    return used


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compressed_attention_equals_reference(case: tuple, hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    B, H, H_kv, T, D, DV, length, stride, dtype, is_causal = case
    N = count_compressed(T, length, stride)
    query = torch.randn(B, T, H, D, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = in_poison(B, H_kv, N, D, dtype=dtype), in_poison(B, H_kv, N, DV, dtype=dtype)
    used = count_launches(hopper, monkeypatch)
    attributes = {"scale": D**-0.5, "block_length": length, "block_stride": stride, "num_keys": T}
    causal = {**attributes, "is_causal": is_causal}
    output, lse = torch.ops.nsa.compressed_attention(query, key, value, None, None, None, **causal)
    sight = {} if is_causal else {"last_key": torch.full((B, T), T - 1, device="cuda")}
    double = [each.double().requires_grad_() for each in (query, key, value)]
    expected, expected_lse = reference.compressed_attention(*double, **attributes, **sight)
    finite = expected_lse.isfinite()
    assert relative_error(output, expected) < BUDGET[dtype]
    assert torch.equal(lse.isfinite(), finite)
    assert (lse.double() - expected_lse)[finite].abs().max() < 1e-4

    grad = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, double, grad.double())
    delta = torch.ops.nsa.output_dot_gradient(output, grad)
    arguments = (grad, query, key, value, None, None, None, delta, lse)
    gradients = torch.ops.nsa.compressed_attention_backward(*arguments, **causal)
    for gradient, each in zip(gradients, wanted, strict=True):
        # Among one key a gradient is a difference of equal numbers.
        assert relative_error(gradient, each) < 1.5 * BUDGET[dtype] or (gradient.double() - each).abs().max() < 1e-5
    again = torch.ops.nsa.compressed_attention_backward(*arguments, **causal)
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
    assert used == {"flash_forward": 1, "flash_query_gradient": 2, "flash_key_gradient": 2}


@pytest.mark.parametrize(("T", "window"), [(1500, 512), (700, 100), (300, 1), (500, 4000)])
@pytest.mark.parametrize("size", [64, 128])
def test_window_gradients_equal_reference(
    T: int, window: int, size: int, hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = (
        torch.randn(2, T, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (6, 2, 2)
    )
    used = count_launches(hopper, monkeypatch)
    attributes = {"scale": size**-0.5, "window": window}
    output, lse = torch.ops.nsa.window_attention(query, key, value, None, None, None, is_causal=True, **attributes)
    double = [each.double().requires_grad_() for each in (query, key, value)]
    expected, _ = reference.window_attention(*double, **attributes)
    # Rows that no copy to shared memory could take.
    grad = torch.randn(2, 6, T, size + 1, device="cuda", dtype=torch.bfloat16)[..., 1:]
    wanted = torch.autograd.grad(expected, double, grad.double())
    delta = torch.ops.nsa.output_dot_gradient(output, grad)
    arguments = (grad, query, key, value, None, None, None, delta, lse)
    gradients = torch.ops.nsa.window_attention_backward(*arguments, is_causal=True, **attributes)
    for gradient, each in zip(gradients, wanted, strict=True):
        # In a window of one key the gradients of queries and keys are 0.
        error = (gradient.double() - each).abs().max()
        assert relative_error(gradient, each) < 1.5 * BUDGET[torch.bfloat16] or (window == 1 and error < 1e-3)
    assert used == {"flash_key_gradient": 1}


@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_whole_operator_repeats_under_a_cuda_graph_and_ignores_the_batch(combine: str, capture) -> None:
    query, key, value = (
        torch.randn(2, 2048, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2)
    )
    query[0, :, 1000:], key[0, :, 900:], value[0, :, 900:] = float("nan"), float("nan"), float("nan")
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    gates = torch.rand(2, 8, 2048, 3, device="cuda") if combine == "gated" else None
    config = NSAConfig(combine=combine)

    def run() -> list[Tensor]:
        output = nsa_attention(*leaves, config=config, gates=gates)
        return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    graph, captured = capture(run)
    graph.replay()
    replayed = [each[1].clone() for each in captured]
    assert all(torch.equal(one, other[1]) for one, other in zip(replayed, run(), strict=True))
    assert all(each.isfinite().all() for each in replayed)
    alone = nsa_attention(*(each[1:] for each in leaves), config=config, gates=None if gates is None else gates[1:])
    assert torch.equal(replayed[0], alone[0])


# B, H, H_kv, T, D, l', n, initial and local blocks, dtype
LISTS = {
    "pairs_of_heads": (2, 8, 4, 1500, 64, 64, 12, 1, 2, torch.bfloat16),
    "three_heads": (1, 9, 3, 1111, 64, 64, 9, 1, 2, torch.bfloat16),
    "multi_head": (1, 4, 4, 900, 64, 64, 8, 0, 1, torch.float16),
    "one_group": (1, 64, 1, 700, 64, 64, 6, 1, 2, torch.bfloat16),
    "long_blocks": (1, 8, 2, 2000, 64, 128, 6, 1, 2, torch.float16),
    "everything_listed": (1, 4, 2, 640, 64, 64, 32, 2, 3, torch.bfloat16),
    "wide_heads": (2, 16, 2, 1500, 128, 64, 12, 1, 2, torch.bfloat16),
    "wide_heads_in_threes": (1, 6, 2, 1111, 128, 64, 9, 1, 2, torch.float16),
    "wide_heads_alone": (1, 2, 2, 900, 128, 128, 5, 0, 1, torch.bfloat16),
}


@pytest.mark.parametrize("chunks", ["one_chunk", "several_chunks"])
@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS)
def test_gradients_through_lists_equal_reference(
    case: tuple, chunks: str, hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_compile.kernels.gpu import selected

    B, H, H_kv, T, D, block, n, num_initial, num_local, dtype = case
    if chunks == "several_chunks":
        monkeypatch.setattr(selected, "BACKWARD_PARTIAL_BYTES", 1 << 20)
        monkeypatch.setattr(selected, "PAIRS_FIRST", 0)
    query = torch.randn(B, T, H, D, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = in_poison(B, H_kv, T, D, dtype=dtype), in_poison(B, H_kv, T, D, dtype=dtype)
    compression, forced = {"block_length": 16, "block_stride": 16}, {"num_initial": num_initial, "num_local": num_local}
    lists = reference.select_blocks(
        query, reference.compress_mean(key, **compression), num_keys=T, **compression, selection_block=block,
        num_selected=n, **forced,
    )  # fmt: skip
    double = [each.double().requires_grad_() for each in (query, key, value)]
    expected, expected_lse = reference.selected_attention(*double, lists, selection_block=block, scale=0.125)
    grad = in_poison(B, H, T, D, dtype=dtype)
    wanted = torch.autograd.grad(expected, double, grad.double())
    delta = (expected.detach() * grad.double()).sum(-1).float()
    used = count_launches(hopper, monkeypatch)

    def gradients(batch: slice = slice(None), grad: Tensor = grad) -> tuple[Tensor, ...]:
        tensors = (grad, query, key, value, lists, None, None, None, delta, expected_lse.float())
        return torch.ops.nsa.selected_attention_backward(
            *(each if each is None else each[batch] for each in tensors), is_causal=True, scale=0.125,
            selection_block=block, **forced,
        )  # fmt: skip

    given = gradients()
    assert used["listed_gradient"] >= (2 if chunks == "several_chunks" else 1)
    for gradient, each in zip(given, wanted, strict=True):
        assert relative_error(gradient, each) < 1.5 * BUDGET[dtype]
    assert all(torch.equal(one, other) for one, other in zip(given, gradients(), strict=True))
    alone = gradients(slice(B - 1, B))
    assert all(torch.equal(one[-1:], other) for one, other in zip(given, alone, strict=True))
    # Rows that no copy of 16 bytes could take go through Triton's kernel, the same function.
    used.clear()
    odd = torch.empty(B, H, T, D + 1, device="cuda", dtype=dtype)[..., 1:].copy_(grad)
    for gradient, each in zip(gradients(grad=odd), wanted, strict=True):
        assert relative_error(gradient, each) < 1.5 * BUDGET[dtype]
    assert used["listed_gradient"] == 0


# B, H, H_kv, T, D, D_v, w, initial and local blocks, dtype
ENDS = {
    "usual": (2, 8, 2, 1111, 128, 128, 512, 1, 2, torch.bfloat16),
    "narrow_head": (1, 16, 1, 1500, 64, 64, 512, 1, 2, torch.float16),
    "no_initial_block": (1, 4, 2, 700, 128, 64, 300, 0, 1, torch.bfloat16),
    "many_forced_blocks": (2, 2, 1, 900, 64, 128, 200, 3, 3, torch.bfloat16),
    "window_of_the_local_blocks": (1, 4, 1, 640, 128, 128, 128, 2, 2, torch.float16),
    "window_of_everything": (1, 2, 1, 333, 128, 128, 4096, 1, 2, torch.bfloat16),
    "one_block": (3, 2, 1, 50, 128, 128, 512, 1, 2, torch.bfloat16),
}


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_end_of_gated_attention_equals_reference(case: tuple, hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu import gated

    B, H, H_kv, T, D, DV, window, num_initial, num_local, dtype = case
    monkeypatch.setattr(gated, "PARTIAL_BYTES", (1 << 22, 1 << 22))  # several chunks
    query = torch.randn(B, T, H, D, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = in_poison(B, H_kv, T, D, dtype=dtype), in_poison(B, H_kv, T, DV, dtype=dtype)
    scale, compression = D**-0.5, {"block_length": 16, "block_stride": 16}
    lists = reference.select_blocks(
        query, reference.compress_mean(key, **compression), num_keys=T, **compression, selection_block=64,
        num_selected=8, num_initial=num_initial, num_local=num_local,
    )  # fmt: skip
    compressed = torch.randn(B, T, H, DV, device="cuda", dtype=dtype).transpose(1, 2)
    gates = torch.rand(B, T, 3, H, device="cuda", dtype=dtype).permute(0, 3, 1, 2)
    used = count_launches(hopper, monkeypatch)

    def attend(batch: slice = slice(None), **given: Tensor) -> Tensor:
        heads = {"key": key, "value": value, "window_key": key, "window_value": value} | given
        tensors = [query, heads["key"], heads["value"], lists, heads["window_key"], heads["window_value"]]
        attributes = {"selection_block": 64, "window": window, "num_initial": num_initial, "num_local": num_local}
        return torch.ops.nsa.gated_attention(
            *(each[batch] for each in tensors), None, None, None, compressed[batch], gates[batch], is_causal=True,
            scale=scale, **attributes,
        )  # fmt: skip

    output = attend()
    assert used == {"gated_end": 1}
    expected = reference.gated_attention(
        query, key, value, lists, key, value, compressed, gates, selection_block=64, window=window, scale=scale
    )
    assert relative_error(output, expected) < BUDGET[dtype]
    for part in (slice(0, T // 64 * 64), slice(T // 64 * 64, T)):
        assert relative_error(output[:, :, part], expected[:, :, part]) < 2 * BUDGET[dtype]  # 0 of no rows
    assert torch.equal(output, attend())
    assert torch.equal(output[-1:], attend(slice(B - 1, B)))
    # Keys of its own for the window: by Triton's kernels, the same function.
    used.clear()
    assert relative_error(attend(window_key=key.clone()), expected) < BUDGET[dtype]
    assert used == {}


def test_gated_inference_in_one_operator_follows_the_layout_of_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels import attention

    query, key, value = (
        torch.randn(2, 2048, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2)
    )
    gates = torch.rand(2, 8, 2048, 3, device="cuda")
    config = NSAConfig(combine="gated")
    apart = nsa_attention(query, key, value, config=config, gates=gates)
    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", 1)
    for queries, is_transposed in ((query, True), (query.contiguous(), False)):
        output = nsa_attention(queries, key, value, config=config, gates=gates)
        assert output.transpose(1, 2).is_contiguous() == is_transposed
        assert output.is_contiguous() != is_transposed
        assert relative_error(output, apart.double()) < BUDGET[torch.bfloat16]
