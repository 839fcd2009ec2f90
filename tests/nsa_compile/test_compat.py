"""What happens on a torch that lacks a private part."""

import logging

import pytest
import torch

from nsa_compile import compat, explain
from nsa_compile.errors import UnknownOptionError


def test_options_work_without_the_wrapper_of_inductor(monkeypatch, caplog):
    expected = compat.inductor_patches("max-autotune", {"triton.cudagraphs": False})
    monkeypatch.delattr(torch, "_TorchCompileInductorWrapper")
    with caplog.at_level(logging.WARNING):
        assert compat.inductor_patches("max-autotune", {"triton.cudagraphs": False}) == expected
    assert f"torch {torch.__version__} has no torch._TorchCompileInductorWrapper: options" in caplog.text
    assert compat.inductor_patches(None, None) == {}


@pytest.mark.parametrize(
    "missing",
    [
        "torch._C._dynamo.eval_frame.reset_code",
        "torch._dynamo.convert_frame.register_bytecode_hook",
    ],
)
def test_explain_works_without_what_cleans_up_after_it(monkeypatch, caplog, missing):
    monkeypatch.delattr(missing)
    with caplog.at_level(logging.WARNING):
        report = explain(torch.nn.Linear(4, 4))(torch.ones(2, 4))
    assert len(report.graphs) == 1
    assert f"has no {missing}: explain" in caplog.text


def test_errors_reach_the_caller_in_a_torch_without_the_class_that_passes(monkeypatch):
    def backend(graph_module, example_inputs):
        with compat.users_errors():
            raise UnknownOptionError("nsa.wrong is unknown")

    with pytest.raises(UnknownOptionError, match=r"nsa\.wrong is unknown"):
        torch.compile(torch.sin, backend=backend)(torch.ones(2))
    torch._dynamo.reset()
    monkeypatch.delattr(torch._dynamo.exc, "ShortenTraceback")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"UnknownOptionError: nsa\.wrong is unknown"):
        torch.compile(torch.sin, backend=backend)(torch.ones(2))


def test_other_errors_are_left_to_dynamo():
    with pytest.raises(KeyError, match="lost"), compat.users_errors():
        raise KeyError("lost")
