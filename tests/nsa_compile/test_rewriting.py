"""`rewrite` on graphs of every tracer."""

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention

from nsa_compile import NSAConfig, rewrite
from nsa_compile.errors import ConfigError, UnsupportedGraphError

COVERING = NSAConfig(block_length=4, block_stride=4, selection_block=8, num_selected=64, window=8, min_keys=0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 64)

    def forward(self, x):
        query, key, value = self.project(x).split([32, 16, 16], dim=-1)
        query, key, value = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (query, key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.fixture
def model():
    return Attention().eval()


@pytest.fixture
def x():
    return torch.randn(2, 40, 32)


def operators(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if "nsa" in str(node.target)]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_program(model, x, strict):
    program = torch.export.export(model, (x,), strict=strict)
    report = rewrite(program, COVERING)
    assert [(site.decision, site.module) for site in report.sites] == [("rewritten", "")]
    assert operators(program.graph_module) == ["nsa.attention.default"]
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    decomposed = program.run_decompositions()
    assert "nsa.joint_attention.default" in operators(decomposed.graph_module)
    torch.testing.assert_close(decomposed.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_exported_program_with_dynamic_length(model, x):
    length = torch.export.Dim("length", min=8, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    rewrite(program.graph_module, COVERING)
    longer = torch.randn(2, 77, 32)
    torch.testing.assert_close(program.module()(longer), model(longer), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_aot_inductor(model, x, tmp_path):
    program = torch.export.export(model, (x,))
    rewrite(program, COVERING)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x), rtol=1e-4, atol=1e-5)


class SelfAttention(nn.Module):
    """Free of control flow, for symbolic_trace."""

    def forward(self, x):
        return scaled_dot_product_attention(x, x, x, is_causal=True)


def test_symbolic_trace_with_example_inputs():
    x = torch.randn(1, 2, 40, 8)
    graph_module = fx.symbolic_trace(SelfAttention())
    report = rewrite(graph_module, COVERING, example_inputs=(x,))
    assert report.summary == "1 of 1 attention rewritten"
    assert operators(graph_module) == ["nsa.attention.default"]
    torch.testing.assert_close(graph_module(x), SelfAttention()(x), rtol=1e-4, atol=1e-5)


def test_symbolic_trace_without_shapes_is_declined():
    graph_module = fx.symbolic_trace(SelfAttention())
    report = rewrite(graph_module, COVERING)
    assert [site.reason for site in report.sites] == ["UNKNOWN_SHAPES"]
    assert operators(graph_module) == []


def test_report_has_the_graph_before_and_after(model, x):
    report = rewrite(torch.export.export(model, (x,)), COVERING)
    (graph,) = report.graphs
    assert "scaled_dot_product_attention" in graph.before
    assert "nsa.attention" in graph.after
    assert "nsa.attention" not in graph.before
    (site,) = report.sites
    assert site.shapes["query"] == "[2, 4, 40, 8]"
    assert site.shapes["key"] == "[2, 2, 40, 8]"
    assert "scaled_dot_product_attention(query, key, value" in site.stack_trace
    assert "n·l' = 512" in report.notes[0]


def test_rewriting_twice_changes_nothing(model, x):
    program = torch.export.export(model, (x,))
    rewrite(program, COVERING)
    code = program.graph_module.code
    report = rewrite(program, COVERING)
    assert report.sites == ()
    assert report.graphs[0].before == report.graphs[0].after
    assert program.graph_module.code == code


def test_default_config_keeps_short_attention_dense(model, x):
    report = rewrite(torch.export.export(model, (x,)))
    (site,) = report.sites
    assert (report.config, site.decision, site.reason) == (NSAConfig(), "declined", "TOO_SHORT")
    assert site.sentence == "40 keys are fewer than min_keys=1024."
    assert report.notes == ()


@pytest.mark.parametrize("given", [Attention(), lambda x: x, None], ids=["module", "function", "None"])
def test_what_is_no_graph_is_refused(given):
    with pytest.raises(UnsupportedGraphError, match=r"takes a torch\.fx.GraphModule or an ExportedProgram, not "):
        rewrite(given)


def test_config_must_be_a_config():
    with pytest.raises(ConfigError, match="config is a int; give an NSAConfig"):
        rewrite(fx.symbolic_trace(SelfAttention()), 64)
