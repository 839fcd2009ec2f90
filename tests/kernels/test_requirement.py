"""The operator that stops a graph where a mask does not hold 0 and 1 alone."""

import subprocess
import sys

import pytest
import torch

from nsa_compile.errors import NSAError, RequirementError
from nsa_compile.kernels import operators

assert operators.LIBRARY  # registers the operator
require_binary = torch.ops.nsa.require_binary.default

BINARY = {
    "integers": torch.tensor([[0, 1, 1], [1, 1, 0]]),
    "floats": torch.tensor([[0.0, 1.0], [-0.0, 1.0]]),
    "halves": torch.tensor([1.0, 0.0], dtype=torch.float16),
    "bools": torch.tensor([True, False]),
    "of rank 0": torch.tensor(1),
    "empty": torch.empty(0, 4),
    "transposed": torch.eye(3, 3)[:, 1:].T,
    "expanded": torch.tensor([[0.0], [1.0]]).expand(2, 5),
}
OTHERS = [2, -1, 0.5, 1e-40, float("nan"), float("inf")]


@pytest.mark.parametrize("name", BINARY)
def test_opcheck(name):
    torch.library.opcheck(require_binary, (BINARY[name], "not binary"))


@pytest.mark.parametrize("name", BINARY)
def test_zero_and_one_give_true(name):
    result = require_binary(BINARY[name], "not binary")
    assert (result.shape, result.dtype, result.item()) == ((), torch.bool, True)


@pytest.mark.parametrize("value", OTHERS)
def test_any_other_value_is_an_error_of_this_package_and_of_the_run(value):
    values = torch.ones(3, 4, dtype=torch.long if isinstance(value, int) else torch.float32)
    values[2, 1] = value
    with pytest.raises(RequirementError, match="not binary") as caught:
        require_binary(values, "not binary")
    assert isinstance(caught.value, NSAError)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_makes_no_loop_of_it(dynamic):
    @torch.compile(dynamic=dynamic, fullgraph=True)
    def function(x, values):
        return (x.sin() * require_binary(values, "not binary")).cos()

    x, values = torch.randn(64, 512), torch.ones(64, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(function(x, values), x.sin().cos())
        values[63, 500] = 3
        with pytest.raises(RuntimeError, match="not binary"):
            function(x, values)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_cuda_graph_records_it():
    values = torch.ones(4, 100, device="cuda")
    require_binary(values, "not binary")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = require_binary(values, "not binary")
    values[2] = 0
    graph.replay()
    assert result.item() is True


@pytest.mark.gpu
def test_cuda_asserts_on_the_device():
    """In a process of its own: nothing works on the device after an assertion has failed."""
    script = (
        "import torch; from nsa_compile.kernels import operators; "
        "torch.ops.nsa.require_binary(torch.full((3,), 2, device='cuda'), 'not binary'); "
        "print('launched', flush=True); torch.cuda.synchronize()"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "launched" in process.stdout
    assert process.returncode != 0
    assert "device-side assert" in process.stderr
