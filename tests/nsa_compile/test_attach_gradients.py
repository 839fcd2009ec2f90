"""Every learned part's output and gradient, against an independent float64 implementation."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.func import functional_call
from torch.nn import functional

from nsa_compile import NSABackend, NSAConfig, attach, learned_parts, rewrite
from nsa_compile.kernels import reference

WIDTH, HEADS, KV_HEADS, SIZE = 24, 4, 2, 6
CONFIG = NSAConfig(
    block_length=8,
    block_stride=4,
    selection_block=8,
    num_selected=4,
    window=10,
    combine="gated",
    compression="mlp",
    branch_kv="independent",
)
PARTS = [
    {"compression": compression, "branch_kv": branch_kv}
    for compression, branch_kv in itertools.product(("mean", "linear", "mlp"), ("shared", "independent"))
]


def split(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(states: Tensor) -> Tensor:
    size, length = states.shape[-1], states.shape[-2]
    angles = torch.arange(length).double()[:, None] / 100 ** (torch.arange(0, size, 2).double() / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


class Grouped(nn.Module):
    """Separate projections with biases, grouped heads, rotary positions and normed keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * SIZE)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * SIZE) for _ in range(2))
        self.k_norm = nn.LayerNorm(SIZE)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = rotate(self.k_norm(split(self.k(states), KV_HEADS)))
        return rotate(split(self.q(states), HEADS)), key, split(self.v(states), KV_HEADS)


class Fused(nn.Module):
    """One projection for queries, keys and values, as in GPT-2: a transposed weight, flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3 * HEADS * SIZE) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(3 * HEADS * SIZE))

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        projected = torch.addmm(self.bias, states.view(-1, states.size(-1)), self.weight)
        parts = projected.view(*states.shape[:2], -1).split(HEADS * SIZE, dim=-1)
        return tuple(split(part, HEADS) for part in parts)


class Latent(nn.Module):
    """Keys and values from a narrow tensor that both share; values of another size than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(WIDTH, 5, bias=False)
        self.up = nn.Linear(5, HEADS * (SIZE + 4), bias=False)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = split(self.up(torch.tanh(self.down(states))), HEADS).split([SIZE, 4], dim=-1)
        return split(self.q(states), HEADS), key, value


class Attention(nn.Module):
    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project
        self.out = nn.Linear(HEADS * (4 if isinstance(project, Latent) else SIZE), WIDTH)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def forward(self, states: Tensor) -> Tensor:
        return self.out(self.attend(*self.project(states)).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """The hidden states are the normed input: neither the residual stream nor the fused projection."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(project)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.attention(self.norm(states))


def make(project: type[nn.Module], config: NSAConfig) -> nn.Module:
    torch.manual_seed(1)
    model = Layer(project()).double()
    states = torch.randn(2, 37, WIDTH, dtype=torch.float64)
    assert attach(model, config, states, start="scratch") == ("attention",)
    with torch.no_grad():
        # At its start the compression is the mean: linear, and without positions.
        for parameter in learned_parts(model)["attention"].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def compress(parts: nn.Module, name: str, tokens: Tensor, config: NSAConfig) -> Tensor:
    """φ written down block by block."""
    length, stride = config.block_length, config.block_stride
    phi = getattr(parts, f"compress_{name}", None)
    blocks = [tokens[:, :, i : i + length] for i in range(0, tokens.shape[2] - length + 1, stride)]
    if phi is None:
        return torch.stack([block.mean(2) for block in blocks], 2)
    if config.compression == "linear":
        return torch.stack([block.flatten(2) @ phi.weight.T for block in blocks], 2)
    flat = [(block + phi.position).flatten(2) for block in blocks]
    units = [functional.silu(block @ phi.hidden.weight.T + phi.hidden.bias) for block in flat]
    return torch.stack([each @ phi.output.weight.T + phi.output.bias for each in units], 2)


def expected(model: nn.Module, states: Tensor, config: NSAConfig) -> Tensor:
    """The layer with native NSA, from the specification and the model's projections as functions of parameters."""
    attention, hidden = model.attention, model.norm(states)
    parts = attention.nsa
    query, key, value = attention.project(hidden)
    branches = {"compressed": (key, value), "window": (key, value)}
    if config.branch_kv == "independent":
        for branch in branches:
            own = {name.removeprefix("project."): p for name, p in getattr(parts, branch).named_parameters()}
            branches[branch] = functional_call(attention.project, own, hidden)[1:]
    units = functional.silu(hidden @ parts.gates.hidden.weight.T + parts.gates.hidden.bias)
    gates = torch.sigmoid(units @ parts.gates.output.weight.T + parts.gates.output.bias)
    attended = reference.attention(
        query,
        key,
        value,
        gates=gates.view(*states.shape[:2], HEADS, 3).permute(0, 2, 1, 3),
        compressed_key=compress(parts, "key", branches["compressed"][0], config),
        compressed_value=compress(parts, "value", branches["compressed"][1], config),
        window_key=branches["window"][0],
        window_value=branches["window"][1],
        **config.operator_arguments(),
    )
    return states + attention.out(attended.transpose(1, 2).flatten(2))


def gradients(model: nn.Module, output: Tensor, weights: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    values = torch.autograd.grad((output * weights).sum(), list(named.values()), allow_unused=True)
    assert [name for name, value in zip(named, values, strict=True) if value is None] == []
    return dict(zip(named, values, strict=True))


def check(run: Any, model: nn.Module, config: NSAConfig, length: int = 61) -> None:
    states, weights = torch.randn(2, 2, length, WIDTH, dtype=torch.float64)
    wanted, output = expected(model, states, config), run(states)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    wanted_gradients = gradients(model, wanted, weights)
    for name, value in gradients(model, output, weights).items():
        torch.testing.assert_close(value, wanted_gradients[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)
        # What is added to every key changes no softmax.
        assert value.abs().max() > 1e-6 or name.endswith("compress_key.output.bias"), name


# Every kind of part in one layer; in the others the kinds that differ by how they are projected.
LAYERS = [(Grouped, parts) for parts in PARTS] + [(project, PARTS[i]) for project in (Fused, Latent) for i in (2, 5)]


@pytest.mark.parametrize(
    ("project", "parts"), LAYERS, ids=["-".join((project.__name__, *parts.values())) for project, parts in LAYERS]
)
def test_without_compile(project, parts):
    config = CONFIG.replace(**parts)
    model = make(project, config)
    check(model, model, config)


def rewritten_and_differentiated_ahead(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    rewrite(graph_module, CONFIG)
    return aot_eager(graph_module, inputs)


def test_joint_graph_of_dynamic_shapes():
    model = make(Grouped, CONFIG)
    compiled = torch.compile(model, backend=rewritten_and_differentiated_ahead, fullgraph=True, dynamic=True)
    check(compiled, model, CONFIG)
    check(compiled, model, CONFIG, length=83)


@pytest.mark.slow
@pytest.mark.parametrize("project", [Grouped, Fused, Latent])
def test_inductor_with_dynamic_shapes(project):
    model = make(project, CONFIG)
    compiled = torch.compile(model, backend=NSABackend(CONFIG), fullgraph=True, dynamic=True)
    check(compiled, model, CONFIG)
    check(compiled, model, CONFIG, length=83)


def test_parts_called_by_hand_compute_what_the_graph_computes():
    parts = learned_parts(make(Latent, CONFIG))["attention"]
    tokens, states = torch.randn(2, 3, 37, SIZE).double(), torch.randn(2, 5, WIDTH).double()
    torch.testing.assert_close(parts.compress_key(tokens), compress(parts, "key", tokens, CONFIG))
    tokens = tokens[..., :4]
    torch.testing.assert_close(parts.compress_value(tokens), compress(parts, "value", tokens, CONFIG))
    gates = parts.gates(states)
    assert gates.shape == (2, HEADS, 5, 3)
    assert 0 < gates.min() < gates.max() < 1
