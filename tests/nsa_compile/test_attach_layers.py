"""Models with learned parts whose layers are compiled one by one: they run compiled, one graph for all layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional

from nsa_compile import NSAConfig, attach, rewrite
from nsa_compile.learned import eager

WIDTH, HEADS, LAYERS = 32, 4, 3
CONFIG = NSAConfig(
    block_length=8,
    block_stride=4,
    selection_block=8,
    num_selected=3,
    window=8,
    combine="gated",
    compression="mlp",
    branch_kv="independent",
)


class Layer(nn.Module):
    """Attention beside a linear layer: the module that is compiled holds the one with learned parts."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, states: Tensor) -> Tensor:
            heads = [p(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
            return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = self.Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.linear(self.attention(states))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


class CountingBackend:
    """Rewrites, differentiates ahead, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        report = rewrite(graph_module, CONFIG)
        assert len(report.rewritten) == 1
        self.graphs += 1
        return aot_eager(graph_module, inputs)


def _gradients(model: nn.Module, states: Tensor) -> tuple[Tensor, list[Tensor]]:
    output = model(states)
    return output.detach(), list(torch.autograd.grad(output.square().sum(), list(model.parameters())))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    attach(model, CONFIG, torch.randn(1, 40, WIDTH), start="scratch")
    return model


@pytest.mark.parametrize("in_place", [True, False], ids=["layer.compile()", "torch.compile(layer)"])
def test_layers_compiled_one_by_one(model: nn.Module, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As what an embedding gives; else the first layer would be another graph.
    states = torch.randn(2, 61, WIDTH, requires_grad=True)
    output, gradients = _gradients(model, states)
    layers, backend = model.get_submodule("layers"), CountingBackend()
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        if in_place:
            layer.compile(backend=backend, fullgraph=True)
        else:
            layers[index] = torch.compile(layer, backend=backend, fullgraph=True)
    # Nothing is run operator by operator any more.
    monkeypatch.delattr(eager, "run_rewritten")
    compiled_output, compiled_gradients = _gradients(model, states)
    assert backend.graphs == 1
    torch.testing.assert_close(compiled_output, output)
    torch.testing.assert_close(compiled_gradients, gradients)


def test_layers_that_are_not_compiled_run_rewritten(model: nn.Module) -> None:
    states = torch.randn(2, 61, WIDTH)
    expected = model(states)
    layers, backend = model.get_submodule("layers"), CountingBackend()
    assert isinstance(layers, nn.ModuleList)
    layers[0].compile(backend=backend)
    torch.testing.assert_close(model(states), expected)
    for layer in layers:
        assert isinstance(layer, Layer)
        layer.linear.compile(backend=aot_eager)
    torch.testing.assert_close(model(states), expected)
