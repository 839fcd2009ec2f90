"""A small decoder as people write one today, which knows no NSA.

RMS norms, of queries and keys too, rotary embedding, grouped queries, SwiGLU.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder.

    Attributes:
        vocabulary: number of tokens.
        width: C, of the hidden states.
        layers: number of layers.
        heads: H, query heads.
        key_heads: H_kv.
        head_size: D.
        rotary_base: of the rotary embedding.
    """

    vocabulary: int = 8192
    width: int = 512
    layers: int = 8
    heads: int = 16
    key_heads: int = 8
    head_size: int = 64
    rotary_base: float = 100_000.0


class Attention(nn.Module):
    """Causal attention with grouped queries: `[B, T, C]` to `[B, T, C]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.key = nn.Linear(config.width, config.key_heads * config.head_size, bias=False)
        self.value = nn.Linear(config.width, config.key_heads * config.head_size, bias=False)
        self.output = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.query_norm, self.key_norm = nn.RMSNorm(config.head_size), nn.RMSNorm(config.head_size)

    def forward(self, states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Attends; `rotation` are the cosines and sines `[T, D]` of the rotary embedding."""
        size = self.config.head_size
        query, key, value = (
            project(states).unflatten(-1, (-1, size)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        query, key = rotate(self.query_norm(query), rotation), rotate(self.key_norm(key), rotation)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.output(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a SwiGLU, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = -(-config.width * 8 // 3 // 64) * 64
        self.attention = Attention(config)
        self.norms = nn.ModuleList(nn.RMSNorm(config.width) for _ in range(2))
        self.up = nn.Linear(config.width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Maps `[B, T, C]` to `[B, T, C]`."""
        states = states + self.attention(self.norms[0](states), rotation)
        gate, up = self.up(self.norms[1](states)).chunk(2, -1)
        return states + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    """Predicts the next token; the embedding is also the projection to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns hidden states `[B, T, C]` for tokens `[B, T]`; `logits` makes predictions of them."""
        states = self.embedding(tokens)
        rotation = self._rotation(tokens.shape[1], states)
        for layer in self.layers:
            states = layer(states, rotation)
        return self.norm(states)

    def logits(self, states: Tensor) -> Tensor:
        """Projects hidden states to the vocabulary."""
        return functional.linear(states, self.embedding.weight)

    def _rotation(self, length: int, states: Tensor) -> tuple[Tensor, Tensor]:
        size, device = self.config.head_size, states.device
        frequencies = self.config.rotary_base ** -(torch.arange(0, size, 2, device=device).float() / size)
        angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Applies the rotary embedding to `[B, H, T, D]`."""
    cosine, sine = (each.to(heads.dtype) for each in rotation)
    left, right = heads.chunk(2, -1)
    return heads * cosine + torch.cat([-right, left], -1) * sine
