"""Learned parts in two processes: DDP, FSDP2, tensor parallel over heads; state from there in one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("run_distributed.py")


def worker() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("run_distributed", WORKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_distributed"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker's checks return on rank 0."""
    return run(tmp_path_factory.mktemp("distributed"), "data_parallel_compiled", "sharded_compiled", "tensor_parallel")


@pytest.fixture(scope="module")
def results_without_compile(tmp_path_factory):
    return run(tmp_path_factory.mktemp("distributed"), "data_parallel", "sharded")


def run(folder: Path, *checks: str, on_gpus: bool = False) -> dict[str, Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    path = folder / "results.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ON_GPUS": "1" if on_gpus else "",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(path), *checks],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def expected():
    """The same training in one process, on the whole batch."""
    module = worker()
    model = module.make()
    module.train(model, model.parameters(), module.batch())
    return dict(model.state_dict())


def check_trained(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(state) == list(expected)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


def check_loaded(result: dict[str, Any]) -> None:
    module = worker()
    model = module.make()
    assert set(result["sharded"]) == set(dict(model.named_parameters()))
    assert any(".nsa." in name for name in result["sharded"])
    model.load_state_dict(result["state"])
    torch.testing.assert_close(model(module.batch()), result["output"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check", ["data_parallel_compiled", "sharded_compiled"])
def test_two_processes_train_as_one(results, expected, check):
    check_trained(results[check]["state"], expected)


def test_a_state_saved_by_two_processes_loads_in_one(results):
    check_loaded(results["sharded_compiled"])


@pytest.mark.slow
def test_without_compile(results_without_compile, expected):
    for result in results_without_compile.values():
        check_trained(result["state"], expected)
    check_loaded(results_without_compile["sharded"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_process(tmp_path, expected):
    results = run(tmp_path, "data_parallel_compiled", "sharded_compiled", "tensor_parallel", on_gpus=True)
    for check in ("data_parallel_compiled", "sharded_compiled"):
        check_trained(results[check]["state"], expected)
    assert max(results["tensor_parallel"].values()) < 1e-3


def test_heads_and_batches_may_be_spread(results):
    errors = results["tensor_parallel"]
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5, errors
