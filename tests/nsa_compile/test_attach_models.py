"""Learned parts in models of other spellings: those of transformers, nn.MultiheadAttention, layers that are shared."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile import NSAConfig, attach, learned_parts

WIDTH, HEADS = 32, 4
# The selected branch sees every key.
COVERING = NSAConfig(
    block_length=8, block_stride=4, selection_block=8, num_selected=64, window=8, combine="gated", compression="mlp"
)
INDEPENDENT = COVERING.replace(branch_kv="independent")
_OTHERS = ("Mistral", "GPTNeoX", "Qwen2", "Gemma3Text", "Olmo2", "Phi3", "StableLm", "Cohere", "DeepseekV3")


def tokens() -> Tensor:
    return torch.randint(50, (2, 45))


@pytest.mark.parametrize("name", ["Qwen3", "GPT2", *(pytest.param(each, marks=pytest.mark.slow) for each in _OTHERS)])
def test_other_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16, "max_position_embeddings": 128}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    own = {
        "Phi3": {"pad_token_id": 0},
        "DeepseekV3": {**latent, "first_k_dense_replace": 1, "head_dim": 8, "num_key_value_heads": 4},
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **own.get(name, {})})
    if name == "GPT2":
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=128)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = tokens()
    dense = model(ids).logits
    # Keys that are written in place, piece by piece, cannot be copied for branches.
    branch_kv = "shared" if name == "DeepseekV3" else "independent"
    assert len(attach(model, COVERING.replace(branch_kv=branch_kv), {"input_ids": ids})) == 1
    output = model(ids).logits
    assert 0 < (output - dense).norm() / dense.norm() < 0.03


class MultiHead(nn.Module):
    """nn.MultiheadAttention, opened by the pass; sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(50, WIDTH), nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embed(tokens).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.attention(states, states, states, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Inner(nn.Module):
    """Attention proper is a module of its own, without projections."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.inner = Inner()

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embed(tokens)
        heads = [p(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        return self.inner(*heads).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        heads = [p(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)


class SharedLayers(nn.Module):
    """One layer run twice, as ALBERT does it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList([Attention()] * 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embed(tokens)
        for layer in self.layers:
            states = states + layer(states)
        return states


@pytest.mark.parametrize(
    ("kind", "names"),
    [(MultiHead, ("attention",)), (Wrapping, ("",)), (SharedLayers, ("layers.0",))],
    ids=["multihead", "inner", "shared"],
)
def test_other_ways_to_write_attention(kind, names):
    model, ids = kind().eval(), tokens()
    dense = model(ids)
    assert attach(model, INDEPENDENT, ids) == names
    output = model(ids)
    assert 0 < (output - dense).norm() / dense.norm() < 0.03
    output.sum().backward()
    assert all(p.grad is not None for parts in learned_parts(model).values() for p in parts.parameters())
