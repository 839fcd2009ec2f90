"""Modules of torch's own, and models around attention: encoders, decoders, memory, biases in buffers, reused parts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

B, T, S, E, H = 2, 20, 9, 16, 4
D = E // H


def states(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, E)), generator=torch.Generator().manual_seed(1))


def hidden(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).triu(1)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention, called in one of many ways."""

    def __init__(self, call, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **{"batch_first": True, **options})
        self.call = call

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.call(self.attention, x, *others)


def plain(attention: nn.Module, x: Tensor) -> Tensor:
    return attention(x, x, x, attn_mask=hidden(x.size(1)), need_weights=False)[0]


def sequence_first(attention: nn.Module, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(x.size(0))
    return attention(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0].transpose(0, 1)


def both_masks(attention: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
    return attention(x, x, x, key_padding_mask=padding, attn_mask=hidden(x.size(1)))[0]


def averaged(attention: nn.Module, x: Tensor) -> Tensor:
    y, weights = attention(x, x, x, attn_mask=hidden(x.size(1)), average_attn_weights=True)
    return y + weights.sum()


def unmasked(attention: nn.Module, x: Tensor) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


def mask_from_outside(attention: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def crossed(attention: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    return attention(x, memory, memory, need_weights=False)[0]


class DecoderLayer(nn.Module):
    """Self-attention under a causal mask, then attention to an encoder's output."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.layer(x, memory, tgt_mask=mask)


class Seq2Seq(nn.Module):
    """nn.Transformer: an encoder, and a decoder of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.model(memory, x, tgt_mask=mask, tgt_is_causal=True)


class GPT(nn.Module):
    """A decoder made of encoder layers, as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, mask=hidden(x.size(1)), is_causal=True)


class Projected(nn.Module):
    """One projection; subclasses attend."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def heads(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4))


class AlibiBuffer(Projected):
    """ALiBi in a buffer, cut to length: what it holds is not in the graph."""

    def __init__(self) -> None:
        super().__init__()
        place = torch.arange(32)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(H, 1, 1)
        self.register_buffer("alibi", slopes * (place[None] - place[:, None]).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        t = x.size(1)
        bias = self.alibi[:, :t, :t].masked_fill(hidden(t), -torch.inf)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Alibi(Projected):
    """ALiBi computed by the forward."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        t = x.size(1)
        slopes = 2.0 ** (-2.0 * torch.arange(1, H + 1))
        place = torch.arange(t)
        bias = slopes[:, None, None] * (place[None, :] - place[:, None])[None]
        scores = q @ k.mT * D**-0.5 + bias
        return (scores.masked_fill(hidden(t), -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Padded(Projected):
    """Left or right padding, as many ways of masking as there are."""

    def __init__(self, masked) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.masked(q @ k.mT * D**-0.5, keep, hidden(x.size(1)))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


PADDINGS = {
    "and": lambda s, keep, h: s.masked_fill(~(keep[:, None, None].bool() & ~h), -torch.inf),
    "or": lambda s, keep, h: s.masked_fill((keep == 0)[:, None, None] | h, -1e9),
    "twice": lambda s, keep, h: s.masked_fill(h, -torch.inf).masked_fill(keep[:, None, None, :] == 0, -torch.inf),
    "product": lambda s, keep, h: s + (1 - keep[:, None, None].float().ne(0).float() * (~h).float()) * -1e9,
    "subtracted": lambda s, keep, h: s - 1e9 * (keep[:, None, None] == 0).float() - 1e9 * h.float(),
    "where": lambda s, keep, h: torch.where(
        (keep != 0)[:, None, None], s.masked_fill(h, -torch.inf), torch.finfo(s.dtype).min
    ),
    "inverted": lambda s, keep, h: (
        s.masked_fill(h, -torch.inf) + torch.zeros(B, 1, 1, T).masked_fill(~keep[:, None, None].bool(), -torch.inf)
    ),
    "multiplied": lambda s, keep, h: s.masked_fill(h, -1e9) + (1 - keep[:, None, None]) * -10000,
    "multiplied-floats": lambda s, keep, h: (
        s.masked_fill(h, -torch.inf) + (1.0 - keep[:, None, None].to(s.dtype)) * torch.finfo(s.dtype).min
    ),
    "multiplied-after-causal": lambda s, keep, h: s + (1.0 - (~h).to(s.dtype) * keep[:, None, None]) * -10000.0,
    "multiplied-minus-one": lambda s, keep, h: s + (keep[:, None, None] - 1) * 1e9 - h.float() * 1e9,
    "bert": lambda s, keep, h: s + torch.where(keep[:, None, None] > 0, 0.0, -10000.0) + h * -10000.0,
}


def with_padding() -> tuple[Tensor, Tensor]:
    keep = torch.ones(B, T, dtype=torch.long)
    keep[0, 15:] = 0
    return states(), keep


class Encoder(Projected):
    """Padding alone hides keys."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = keep[:, None, None, :].bool()
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class TwoMasks(Projected):
    """One SDPA under a causal mask, and one under none, share queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (a + functional.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)


class Indexer(Projected):
    """Each query sees its best few keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (q @ k.mT).masked_fill(hidden(x.size(1)), -torch.inf)
        best = scores.mean(1, keepdim=True).topk(4, dim=-1).indices
        mask = torch.full((B, 1, T, T), -torch.inf).scatter(-1, best, 0.0)
        return ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Memory(Projected):
    """Learned keys and values before all others."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, H, 3, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (torch.cat([m.expand(B, -1, -1, -1), part], 2) for m, part in zip(self.memory, (k, v), strict=True))
        t = x.size(1)
        mask = torch.cat([torch.ones(t, 3, dtype=torch.bool), ~hidden(t)], 1)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class LinearAttention(Projected):
    """Feature maps, no softmax over keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        scores = (q @ k.mT).tril()
        return (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


class Router(nn.Module):
    """A softmax over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(E, 3), nn.Parameter(torch.randn(3, E, E))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bte,bteo->bto", self.gate(x).softmax(-1), torch.einsum("bti,eio->bteo", x, self.experts))


TABLE = {
    "mha": (lambda: SelfAttention(plain), ("",), None),
    "mha-sequence-first": (lambda: SelfAttention(sequence_first, batch_first=False), ("",), None),
    "mha-both-masks": (lambda: SelfAttention(both_masks), ("",), lambda: (states(), with_padding()[1] == 0)),
    "mha-weights": (lambda: SelfAttention(averaged), ("ATTENTION_WEIGHTS_USED",), None),
    "mha-unmasked": (lambda: SelfAttention(unmasked), ("BIDIRECTIONAL",), None),
    "mha-mask-from-outside": (
        lambda: SelfAttention(mask_from_outside), ("MASK_IS_INPUT",), lambda: (states(), hidden(T))
    ),
    "mha-crossed": (lambda: SelfAttention(crossed), ("CROSS_ATTENTION",), lambda: (states(), states(B, S, E))),
    "decoder-layer": (DecoderLayer, ("", "CROSS_ATTENTION"), lambda: (states(), states(B, S, E))),
    "decoder-layer-norm-first": (
        lambda: DecoderLayer(norm_first=True), ("", "CROSS_ATTENTION"), lambda: (states(), states(B, S, E))
    ),
    "seq2seq": (Seq2Seq, ("BIDIRECTIONAL", "", "CROSS_ATTENTION"), lambda: (states(), states(B, S, E))),
    "gpt-of-encoder-layers": (GPT, ("", ""), None),
    "alibi": (Alibi, ("ALIBI",), None),
    "alibi-buffer": (AlibiBuffer, ("MASK_IS_INPUT",), None),
    "encoder": (Encoder, ("BIDIRECTIONAL",), with_padding),
    "two-masks": (TwoMasks, ("", "BIDIRECTIONAL"), None),
    "indexer": (Indexer, ("ALREADY_SPARSE",), None),
    "memory": (Memory, ("",), None),
    "linear-attention": (LinearAttention, (), None),
    "router": (Router, (), None),
    **{f"padding-{n}": (lambda masked=masked: Padded(masked), ("",), with_padding) for n, masked in PADDINGS.items()},
}  # fmt: skip


def case_of(handwritten, name: str):
    make, expected, inputs = TABLE[name]
    return handwritten.case(make, expected, inputs=inputs)


@pytest.mark.parametrize("name", TABLE)
def test_training(handwritten, name):
    handwritten.check_training(case_of(handwritten, name))


@pytest.mark.parametrize("name", TABLE)
def test_export(handwritten, name):
    handwritten.check_export(case_of(handwritten, name), False)
