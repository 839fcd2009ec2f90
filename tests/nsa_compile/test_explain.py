"""`explain`: the same report as a compilation's, with nothing compiled, run or changed."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from nsa_compile import NSABackend, NSAConfig, collect_reports, compat, explain, rewriting
from nsa_compile.errors import ConfigError, InternalError

SPARSE = NSAConfig(block_length=4, block_stride=4, selection_block=8, num_selected=3, window=8, min_keys=0)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x):
        query, key, value = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.project(x).chunk(3, dim=-1))
        return x + scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)


class Model(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.breaks = breaks
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        x = self.layers[0](x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.layers[1](x)


def tokens(length=40):
    return torch.randn(2, length, 16)


def test_explain_says_what_a_compilation_does(monkeypatch):
    monkeypatch.setattr(compat, "compile_with_inductor", lambda graph_module, *_: graph_module.forward)
    model = Model()
    explained = explain(model, SPARSE)(tokens())
    with collect_reports() as reports:
        torch.compile(model, backend=NSABackend(SPARSE))(tokens())
    (compiled,) = reports
    assert [site.module for site in explained.sites] == ["layers.0", "layers.1"]
    assert str(explained) == str(compiled)
    assert len(explained.graphs) == 1
    assert "nsa.attention" in explained.graphs[0].after


def test_a_model_of_one_graph_is_neither_run_nor_changed():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    explain(model, SPARSE)(tokens())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_graph_breaks_are_reported():
    model = Model(breaks=True)
    report = explain(model, SPARSE)(tokens())
    assert report.summary == "2 of 2 attentions rewritten, in 2 graphs"
    assert [site.graph for site in report.sites] == [0, 1]
    (reason,) = report.break_reasons
    assert reason.startswith(f"Call to `torch._dynamo.graph_break()` at {__file__}:")
    assert f"graph breaks:\n  {reason}" in str(report)
    assert model.runs == 1


def test_a_break_between_functions_is_noted():
    def inner(x):
        sys.stdout.flush()
        return x.sin()

    report = explain(lambda x: inner(x) * 2)(tokens())
    assert len(report.graphs) == 2
    assert report.notes[-1].startswith("Dynamo does not capture the model as one graph: ")


@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "broken"])
def test_dynamo_compiles_afterwards_as_if_nothing_had_been(breaks):
    model = Model(breaks)
    # More often than Dynamo's limit of recompilations.
    for length in range(16, 25):
        explain(model, SPARSE)(tokens(length))
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=recorder)
    compiled(tokens(24))
    assert len(recorder.graphs) == 1 + breaks
    assert all(isinstance(size, int) for graph in recorder.graphs for size in _input_sizes(graph))
    for _ in range(9):
        report = explain(compiled, SPARSE)(tokens(32))
        assert len(report.graphs) == 1 + breaks
        assert report.sites[0].shapes["query"] == "[2, 2, 32, 8]"
    compiled(tokens(24))
    assert len(recorder.graphs) == 1 + breaks
    compiled(tokens(25))
    assert len(recorder.graphs) == 2 * (1 + breaks)


def _input_sizes(graph):
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return [size for node in placeholders for size in node.meta["example_value"].shape]


def test_models_that_were_compiled_are_explained_as_they_were():
    model = Model()
    expected = str(explain(model, SPARSE)(tokens()))
    assert str(explain(torch.compile(model, backend="eager"), SPARSE)(tokens())) == expected
    model.compile(backend="eager")
    assert str(explain(model, SPARSE)(tokens())) == expected


def test_dynamic_shapes_are_explained_with_symbols():
    report = explain(Model(), SPARSE, dynamic=True)(tokens())
    assert "s" in report.sites[0].shapes["query"]
    assert len(report.rewritten) == 2


def test_functions_and_keyword_arguments():
    def attend(x, *, scale):
        return scaled_dot_product_attention(x, x, x, is_causal=True, scale=scale)

    report = explain(attend, SPARSE)(torch.randn(1, 2, 40, 8), scale=0.5)
    assert report.summary == "1 of 1 attention rewritten"


def test_a_function_without_tensors_gives_an_empty_report():
    report = explain(abs)(1)
    assert (report.sites, report.graphs) == ((), ())


def test_errors_of_the_model_are_its_own():
    def wrong(x):
        raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        explain(wrong)(tokens())


def test_a_failing_pass_raises_its_own_error(monkeypatch):
    def fail(*_):
        raise KeyError("lost")

    monkeypatch.setattr(rewriting, "find_sites", fail)
    with pytest.raises(InternalError, match="KeyError: 'lost'"):
        explain(Model())(tokens())


def test_config_must_be_a_config():
    with pytest.raises(ConfigError, match="config is a str"):
        explain(Model(), "joint")


def test_counters_of_the_user_are_left_alone_by_inductor():
    counters.clear()
    explain(Model(), SPARSE)(tokens())
    assert not counters["inductor"]
    assert not counters["aot_autograd"]


def test_modules_keep_their_names_in_a_model_that_counts_its_calls():
    class Counting(Model):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting()
    assert [site.module for site in explain(model, SPARSE)(tokens()).sites] == ["layers.0", "layers.1"]
    assert model.calls == 0
