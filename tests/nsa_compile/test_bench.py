import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsa_compile import NSAConfig, bench
from nsa_compile.cli.main import main
from nsa_compile.kernels import attention
from nsa_compile.kernels.blockwise import branches

SHAPE = bench.Shape(heads=4, kv_heads=2, tokens=300, head_size=16, value_size=16)
CONFIG = NSAConfig(block_length=8, block_stride=4, selection_block=16, num_selected=4, window=32)


@pytest.mark.parametrize("kind", ["random", "correlated"])
@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_benchmark_checks_and_times(combine: str, kind: bench.Kind) -> None:
    config = CONFIG.replace(combine=combine)
    compiled = kind == "random"
    result = bench.run_benchmark(SHAPE, config, kind=kind, device="cpu", dtype=torch.float32, compiled=compiled)
    assert result.correct
    names = {stage.name for stage in result.stages}
    assert {"select_blocks", f"{'joint' if combine == 'joint' else 'window'}_attention"} <= names
    assert {f"{which} {way}" for which in ("nsa", "dense sdpa") for way in ("forward", "forward+backward")} <= names
    assert all(stage.milliseconds > 0 for stage in result.stages)
    speedup = result.speedup("forward")
    assert speedup is not None
    assert f"{speedup:.2f} times" in str(result)


def test_no_speedup_when_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.nsa_attention

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        return right(*arguments, **options) * 1.01  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "nsa_attention", wrong)
    settings = {"device": "cpu", "dtype": torch.float32, "backward": False}
    result = bench.run_benchmark(SHAPE, CONFIG, compiled=False, **settings)
    assert not result.correct
    assert result.speedup("forward") is None
    assert "FAILED" in str(result)
    assert "times the fastest" not in str(result)


def test_no_speedup_for_an_attention_that_stayed_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "NSABackend", lambda config: "eager")
    result = bench.run_benchmark(SHAPE, CONFIG, device="cpu", dtype=torch.float32, backward=False)
    assert result.errors["output error"] < 1e-5
    assert not result.correct
    assert result.speedup("forward") is None


@pytest.mark.parametrize("compiled", [True, False])
def test_no_speedup_when_an_operator_for_long_inputs_alone_is_wrong(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dataclasses.replace(SHAPE, tokens=310)  # no other test's: its code may be in Inductor's cache
    right = branches.gated_attention
    monkeypatch.setattr(branches, "gated_attention", lambda *tensors, **options: right(*tensors, **options) * 1.01)
    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", shape.heads * shape.tokens * shape.value_size * 4)
    monkeypatch.setattr(bench, "_CHECKED_TOKENS", 100)
    settings = {"device": "cpu", "dtype": torch.float32, "backward": False, "compiled": compiled}
    result = bench.run_benchmark(shape, CONFIG.replace(combine="gated"), **settings)
    assert result.errors["output error"] < 1e-5
    assert not result.correct
    assert result.speedup("forward") is None


def test_dense_work_is_counted_by_visible_pairs() -> None:
    result = bench.run_benchmark(SHAPE, CONFIG, device="cpu", dtype=torch.float32, compiled=False)
    stages = {stage.name: stage for stage in result.stages}
    pairs = 4 * 300 * 301 / 2
    for way, products in (("forward", 2), ("forward+backward", 7)):
        stage = stages[f"dense sdpa {way}"]
        assert stage.tflops is not None
        assert stage.tflops * stage.milliseconds * 1e9 == pytest.approx(2 * pairs * 16 * products)


def test_work_of_the_stages_is_that_of_what_is_seen() -> None:
    config = CONFIG.replace(combine="gated")
    result = bench.run_benchmark(SHAPE, config, device="cpu", dtype=torch.float32, compiled=False)
    work = {stage.name: (stage.tflops or 0.0) * stage.milliseconds * 1e9 for stage in result.stages}
    seen = sum(max(0, min(74, (token - 8 + 1 + 4) // 4)) for token in range(300))
    assert work["compressed_attention"] == pytest.approx(2 * 2 * 4 * seen * 16)
    parts = [work[f"{name}_attention"] for name in ("compressed", "selected", "window")]
    assert work["nsa forward"] == pytest.approx(sum(parts) + work["select_blocks"])
    assert work["nsa forward+backward"] == pytest.approx(3.5 * sum(parts) + work["select_blocks"])


def test_speedup_is_against_the_fastest_dense_attention() -> None:
    stages = (
        bench.Stage("nsa forward", 2.0),
        bench.Stage("dense one forward", 10.0),
        bench.Stage("dense two forward", 6.0),
        bench.Stage("dense two forward+backward", 1.0),
    )
    ceilings = {"tflops": 1.0, "gigabytes": 1.0}
    result = bench.Benchmark("device", SHAPE, CONFIG, "random", {}, True, ceilings, stages, None)
    assert result.speedup("forward") == 3.0
    assert result.speedup("forward+backward") is None
    assert dataclasses.replace(result, correct=False).speedup("forward") is None


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    sizes = ["--heads", "2", "--kv-heads", "1", "--tokens", "200", "--head-size", "16"]
    assert (
        main(["bench", *sizes, "--device", "cpu", "--dtype", "float32", "--forward-only", "--json", str(target)]) == 0
    )
    assert "check: passed" in capsys.readouterr().out
    figures = json.loads(target.read_text())
    assert figures["shape"]["tokens"] == 200
    assert figures["correct"] is True


@pytest.mark.parametrize("cost", [1.0, 80.0, 450.0, 2200.0])
def test_what_takes_long_is_timed_several_times_too(cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    runs: list[int] = []

    def fake(_call: Callable[[], object], *, rep: float, **_: object) -> float:
        runs.append(max(1, int(rep / cost)))  # as Triton counts them
        return cost if runs[-1] > 1 else 1.06 * cost

    monkeypatch.setattr(testing, "do_bench", fake)
    assert bench._time(lambda: None, "cuda") == cost
    assert runs[-1] >= 3
    assert len(runs) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_benchmark_of_grouped_heads_on_a_gpu(combine: str) -> None:
    shape = bench.Shape(heads=8, kv_heads=2, tokens=4096, head_size=64, value_size=64)
    result = bench.run_benchmark(shape, NSAConfig(combine=combine), backward=False)
    assert result.correct
    assert result.speedup("forward") is not None
    assert result.extra_bytes
