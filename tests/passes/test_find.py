"""Attentions are found in every kind of graph, and named after the module that owns them."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nsa_compile.passes.find import find_sites
from nsa_compile.passes.metadata import dotted_name, propagate_shapes
from nsa_compile.passes.sites import AttentionSite, Reason, Rejection

B, T, E, H = 2, 24, 16, 4


class Attention(nn.Module):
    """Causal self-attention as models write it."""

    def __init__(self, written_out: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.out = nn.Linear(E, E)
        self.drop = nn.Dropout(0.0)
        self.written_out = written_out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, H, E // H).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.written_out:
            scores = (q @ k.transpose(-2, -1)) * (E // H) ** -0.5
            mask = torch.ones(t, t, dtype=torch.bool).tril() if mask is None else mask
            y = self.drop(scores.masked_fill(mask.logical_not(), float("-inf")).softmax(dim=-1)) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(b, t, E))


class Model(nn.Module):
    """A stack of attentions."""

    def __init__(self, layers: int = 2, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(**options) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, T, E)


def only(found: list) -> AttentionSite:
    (site,) = found
    assert isinstance(site, AttentionSite)
    return site


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_are_read(written_out, strict):
    exported = torch.export.export(Model(written_out=written_out), (inputs(),), strict=strict)
    sites = find_sites(exported.graph_module)
    assert [site.place.module for site in sites] == ["layers.0", "layers.1"]
    assert {site.place.module_class for site in sites} == {"Attention"}
    assert {site.query.shape for site in sites} == {(B, H, T, E // H)}
    assert all("forward" in site.place.stack_trace for site in sites)


class Traceable(nn.Module):
    """Attention whose sizes are constants, as `symbolic_trace` needs them."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))
        self.softmax = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("mask", torch.ones(T, T, dtype=torch.bool).triu(1))
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).view(B, T, H, E // H).transpose(1, 2) for each in (self.q, self.k, self.v))
        if self.written_out:
            return self.drop(self.softmax((q @ k.transpose(-2, -1) / 2).masked_fill(self.mask, -1e9))) @ v
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("written_out", [False, True])
def test_graphs_of_symbolic_trace_are_read_once_shapes_are_recorded(written_out):
    graph_module = fx.symbolic_trace(Traceable(written_out).eval())
    if not written_out:
        (rejection,) = find_sites(graph_module)
        assert isinstance(rejection, Rejection)
        assert rejection.reason is Reason.UNKNOWN_SHAPES
    propagate_shapes(graph_module, [inputs()])
    assert only(find_sites(graph_module)).query.shape == (B, H, T, E // H)


def test_dropout_modules_of_symbolic_trace_drop_out_in_training():
    graph_module = fx.symbolic_trace(Traceable(written_out=True).train())
    propagate_shapes(graph_module, [inputs()])
    (rejection,) = find_sites(graph_module)
    assert rejection.reason is Reason.DROPOUT


def captured(oracle, function, *args, **kwargs) -> list:
    recorder = oracle.capture(function, *args, **kwargs)
    return [site for graph in recorder.graphs for site in find_sites(graph)]


def test_dynamo_graphs_name_the_owning_module(oracle):
    sites = captured(oracle, Model(), inputs())
    assert [site.place.module for site in sites] == ["layers.0", "layers.1"]
    assert {site.place.module_class for site in sites} == {"Attention"}
    assert all("scaled_dot_product_attention" in site.place.stack_trace for site in sites)


def test_attention_of_the_compiled_root_has_no_module(oracle):
    site = only(captured(oracle, Attention(), inputs()))
    assert (site.place.module, site.place.module_class) == ("", "")


PATHS = {
    "L['self'].model.layers.0.self_attn": "model.layers.0.self_attn",
    "L['self'].model.layers[0].self_attn": "model.layers.0.self_attn",
    "L['self']._modules['model']._modules['layers']": "model.layers",
    "G['m'].blocks[3]": "blocks.3",
    "L['self']": "",
    "model.layers.0": "model.layers.0",
    "": "",
}


@pytest.mark.parametrize("path", PATHS)
def test_paths_become_dotted_names(path):
    assert dotted_name(path) == PATHS[path]


def test_checkpointed_bodies_are_entered(oracle):
    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(T, T, dtype=torch.bool).tril()
            for layer in self.layers:
                x = x + checkpoint(layer, x, mask, use_reentrant=False)
            return x

    sites = captured(oracle, Checkpointed().train(), inputs().requires_grad_())
    assert [site.scope.path for site in sites] == ["wrap_body_0", "wrap_body_1"]
    for site in sites:
        (mask,) = site.masks
        assert mask.node.op == "placeholder"
        made, scope = site.scope.resolve(mask.node)
        assert (made.target, scope.path) == ("tril", "")


def test_a_body_that_is_run_twice_is_found_once(oracle):
    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True).sin()

    site = only(captured(oracle, lambda x: region(region(x)), torch.randn(B, H, T, 4)))
    assert len(site.scope.calls) == 2


@pytest.mark.parametrize("branch", [0, 1])
def test_branches_are_entered(oracle, branch):
    def attend(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    def model(x: Tensor) -> Tensor:
        branches = (attend, torch.sin) if branch == 0 else (torch.sin, attend)
        return torch.cond(x.sum() > 0, *branches, (x,))

    site = only(captured(oracle, model, torch.randn(B, H, T, 4)))
    assert site.scope.path == ("cond_true_0", "cond_false_0")[branch]


class Handwritten(torch.autograd.Function):
    """Attention whose gradient is that of something else."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_attention_with_a_gradient_of_its_own_is_declined(rewriting):
    outcome = rewriting.rewrite(Handwritten.apply, torch.randn(B, H, T, 4, requires_grad=True), gradients=True)
    outcome.assert_declined(Reason.CUSTOM_GRADIENT)


def test_graphs_without_attention_have_no_sites(oracle):
    assert captured(oracle, nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.LayerNorm(E)), inputs()) == []


def test_weird_calls_are_declined_not_raised():
    graph = fx.Graph()
    x = graph.placeholder("x")
    causal = graph.call_method("item", (x,))
    calls = [
        graph.call_function(functional.scaled_dot_product_attention, (x, x)),
        graph.call_function(functional.scaled_dot_product_attention, (x, x, x), {"unknown": 1}),
        graph.call_function(functional.scaled_dot_product_attention, (x, x, x, 1.0)),
        graph.call_function(functional.scaled_dot_product_attention, (x, x, x), {"is_causal": causal}),
        graph.call_function(functional.scaled_dot_product_attention, (x, x, x, x), {"is_causal": True}),
        graph.call_function(functional.multi_head_attention_forward, (x,)),
    ]
    graph.output([*calls, graph.call_function(torch.softmax, (x, -1))])
    x.meta["val"] = torch.empty(B, H, T, 4, device="meta")
    found = find_sites(fx.GraphModule(nn.Module(), graph))
    assert [rejection.reason for rejection in found] == [Reason.UNSUPPORTED_CALL] * 5


@pytest.mark.parametrize("written_out", [False, True])
def test_attention_is_read_after_decomposition_into_core_operators(written_out):
    exported = torch.export.export(Model(written_out=written_out), (inputs(),)).run_decompositions()
    sites = find_sites(exported.graph_module)
    assert [site.place.spelling for site in sites] == ["softmax(Q Kᵀ) V"] * 2
    assert {site.query.shape for site in sites} == {(B, H, T, E // H)}


def test_modules_that_symbolic_trace_leaves_whole_are_named():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    (rejection,) = find_sites(fx.symbolic_trace(Root()))
    assert rejection.reason is Reason.FUSED_ATTENTION
    assert rejection.place.spelling == "MultiheadAttention"
