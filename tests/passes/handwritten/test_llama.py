"""Decoders in the style of Llama, and other layouts: rotary, grouped heads, caches, sequence first, documents."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

B, T, E, H, G = 2, 20, 16, 4, 2
D = E // H
PAST = 7


def states(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, E)), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Projections to H heads of queries and H/G of keys and values."""

    def __init__(self, kv_heads: int = H // G) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(E, E, bias=False), nn.Linear(E, E, bias=False)
        self.wk, self.wv = (nn.Linear(E, kv_heads * D, bias=False) for _ in range(2))

    def projected(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values `[B, T, heads, D]`."""
        return [w(x).view(x.size(0), x.size(1), -1, D) for w in (self.wq, self.wk, self.wv)]

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part.transpose(1, 2) for part in self.projected(x)]

    def joined(self, y: Tensor) -> Tensor:
        return self.wo(y.transpose(1, 2).reshape(y.size(0), y.size(2), E))


def repeated(x: Tensor) -> Tensor:
    """`[B, T, heads, D]` as Llama's repeat_kv does it."""
    b, t, h, d = x.shape
    return x[:, :, :, None, :].expand(b, t, h, G, d).reshape(b, t, h * G, d)


def future(t: int, start: int = 0) -> Tensor:
    mask = torch.full((t, t), float("-inf"))
    return torch.hstack([torch.zeros((t, start)), torch.triu(mask, diagonal=1)])


class Reference(Attention):
    """Llama's reference: complex rotary, and a cache that is written by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache_k", torch.zeros(B, 32, H // G, D), persistent=False)
        self.register_buffer("cache_v", torch.zeros(B, 32, H // G, D), persistent=False)

    def turned(self, x: Tensor, start: int) -> Tensor:
        angle = torch.outer(torch.arange(start, start + x.size(1)).float(), 1 / 100 ** (torch.arange(0, D, 2) / D))
        turn = torch.polar(torch.ones_like(angle), angle).view(1, x.size(1), 1, D // 2)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3).type_as(x)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.projected(x)
        self.cache_k[:b, start : start + t] = self.turned(k, start)
        self.cache_v[:b, start : start + t] = v
        k, v = (repeated(cache[:b, : start + t]) for cache in (self.cache_k, self.cache_v))
        q, k, v = (part.transpose(1, 2) for part in (self.turned(q, start), k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(D)
        scores = scores + future(t, start)
        return self.joined(torch.matmul(functional.softmax(scores.float(), dim=-1).type_as(q), v))


class ReferenceLater(Reference):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, PAST)


class Grouped(Attention):
    """Keys and values repeated in one of several ways, before SDPA."""

    def __init__(self, repeat) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = functional.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), is_causal=True)
        return self.joined(y)


class SplitGroups(Attention):
    """Queries are split into groups, in an einsum with letters of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        q = q.unflatten(2, (H // G, G)) * D**-0.5
        scores = torch.einsum("zqKgx,zkKx->zKgqk", q, k) + future(x.size(1))
        y = torch.einsum("zKgqk,zkKx->zqKgx", scores.softmax(-1), v)
        return self.wo(y.reshape(*x.shape))


class Einsum(Attention):
    """Equations with an ellipsis, spaces and any order of dimensions."""

    def __init__(self, scores: str, output: str, joined) -> None:
        super().__init__(H)
        self.scores, self.output, self.join = scores, output, joined

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        s = torch.einsum(self.scores, q, k) / D**0.5
        t = x.size(1)
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = s.masked_fill(hidden, -torch.finfo(s.dtype).max).softmax(dim=-1)
        return self.wo(self.join(torch.einsum(self.output, weights, v)).reshape(*x.shape))


class SequenceFirst(Attention):
    """As in fairseq: batch and heads in one dimension, masks by add and by masked_fill."""

    def __init__(self) -> None:
        super().__init__(H)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        t, b, _ = x.shape
        q, k, v = self.wq(x) * D**-0.5, self.wk(x), self.wv(x)
        q, k, v = (part.contiguous().view(t, b * H, D).transpose(0, 1) for part in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)) + future(t).unsqueeze(0)
        weights = weights.view(b, H, t, t)
        weights = weights.masked_fill(padding.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
        weights = functional.softmax(weights.view(b * H, t, t), dim=-1, dtype=torch.float32).type_as(weights)
        y = torch.bmm(weights, v).transpose(0, 1).contiguous().view(t, b, E)
        return self.wo(y).transpose(0, 1)


class Biased(Attention):
    """As in T5X: a bias of 0 and -1e10, made of a product of masks."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        q, k, v = (repeated(part) if part.size(2) != H else part for part in self.projected(x))
        place = torch.arange(x.size(1))
        mask = (weights > 0)[:, None, None, :] * (place[:, None] >= place)[None, None]
        bias = torch.where(mask > 0, torch.full(mask.shape, 0.0), torch.full(mask.shape, -1e10))
        scores = torch.einsum("bqhd,bkhd->bhqk", q / math.sqrt(D), k) + bias
        return self.wo(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class RelativeBias(Attention):
    """T5: a learned bias for each bucket of distances."""

    def __init__(self, causal: bool) -> None:
        super().__init__(H)
        self.bias = nn.Embedding(8, H)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        t = x.size(1)
        distance = torch.arange(t)[None] - torch.arange(t)[:, None]
        bias = self.bias(distance.clamp(-3, 4) + 3).permute(2, 0, 1).unsqueeze(0)
        if self.causal:
            bias = bias + future(t)
        return self.joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0))


class Documents(Attention):
    """Block-diagonal: documents end after the token 0."""

    def __init__(self, ordered: bool = True) -> None:
        super().__init__(H)
        self.ordered = ordered

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        ids = (tokens == 0).cumsum(-1) if self.ordered else tokens
        same = ids.unsqueeze(1) == ids.unsqueeze(2)
        t = x.size(1)
        mask = (same & torch.ones(t, t, dtype=torch.bool).tril())[:, None]
        return self.joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Bias(Attention):
    """The biases of torch.nn.attention.bias."""

    def __init__(self, make, queries: int | None = None) -> None:
        super().__init__(H)
        self.make, self.queries = make, queries

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q = q if self.queries is None else q[:, :, -self.queries :]
        mask = self.make(q.size(2), k.size(2))
        return self.joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Cached(Attention):
    """Keys and values of the past come first."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        place = torch.arange(k.size(2))
        mask = place <= torch.arange(past_k.size(2), k.size(2))[:, None]
        return self.joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


class CachedOffByOne(Cached):
    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        mask = torch.arange(k.size(2)) <= torch.arange(past_k.size(2), k.size(2))[:, None] + 1
        return self.joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


class CopiedIn(Attention):
    """A cache of fixed length, written by position: as gpt-fast does it, with the mask made of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(B, H // G, 32, D))
        self.register_buffer("v", torch.zeros(B, H // G, 32, D))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        keys, values = self.k.index_copy_(2, places, k), self.v.index_copy_(2, places, v)
        mask = torch.arange(32)[None, None, None, :] <= places[None, None, :, None]
        return self.joined(functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True))


class Checkpointed(Attention):
    """A checkpoint in a checkpoint; the mask is made outside of both."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()

        def inner(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        def outer(x: Tensor, mask: Tensor) -> Tensor:
            return self.joined(checkpoint(inner, *self.heads(x), mask, use_reentrant=False))

        return checkpoint(outer, x, mask, use_reentrant=False)


class MappedHeads(Attention):
    """torch.vmap over heads: an operator inside of it would have to know about vmap."""

    def __init__(self, written_out: bool) -> None:
        super().__init__(H)
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.written_out:
                return (q @ k.mT / 2 + future(q.size(-2))).softmax(-1) @ v
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return self.joined(torch.vmap(one, in_dims=1, out_dims=1)(*self.heads(x)))


class OneSequence(Attention):
    """No batch: `[T, E]`, and heads first."""

    def __init__(self, written_out: bool) -> None:
        super().__init__(H)
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(-1, H, D).transpose(0, 1) for w in (self.wq, self.wk, self.wv))
        if self.written_out:
            y = (q @ k.transpose(1, 2) / 2 + future(x.size(0))).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(0, 1).reshape(-1, E))


class Flattened(Attention):
    """Batch and heads in one dimension, as 3-D SDPA takes it."""

    def __init__(self) -> None:
        super().__init__(H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.heads(x))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.joined(y.unflatten(0, (-1, H)))


class Viewed(Attention):
    """The output is viewed without a copy, which its order in memory allows."""

    def __init__(self) -> None:
        super().__init__(H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).contiguous().view(*x.shape))


class Differential(Attention):
    """The difference of two softmaxes."""

    def __init__(self) -> None:
        super().__init__(H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a, b = ((q[..., s] @ k[..., s].mT + future(x.size(1))).softmax(-1) for s in (slice(0, 2), slice(2, 4)))
        return self.joined((a - 0.3 * b) @ v)


class Cross(Attention):
    def __init__(self) -> None:
        super().__init__(H)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, _, _ = self.heads(x)
        _, k, v = self.heads(memory)
        return self.joined(functional.scaled_dot_product_attention(q, k, v))


class Double(Attention):
    """float64, and an autocast region."""

    def __init__(self, dtype) -> None:
        super().__init__(H)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.to(self.dtype) for part in self.heads(x))
        scores = torch.baddbmm(
            future(x.size(1)).to(self.dtype).expand(x.size(0) * H, -1, -1), q.flatten(0, 1), k.flatten(0, 1).mT
        )
        return self.joined((scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (-1, H)).float())


def padded() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 15:] = True
    return states(), padding


def weighed() -> tuple[Tensor, Tensor]:
    return states(), padded()[1].logical_not().long()


def with_past() -> tuple[Tensor, ...]:
    return states(), states(B, H // G, PAST, D), states(B, H // G, PAST, D)


def packed() -> tuple[Tensor, Tensor]:
    return states(), torch.randint(0, 4, (B, T), generator=torch.Generator().manual_seed(2))


# Name -> module, reasons, inputs.
TABLE = {
    "reference": (Reference, ("",), None),
    "reference-later": (ReferenceLater, ("",), None),
    "repeat-interleave": (lambda: Grouped(lambda x: x.repeat_interleave(G, dim=1)), ("",), None),
    "repeat-expand": (lambda: Grouped(lambda x: x[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2)), ("",), None),
    "repeat-stack": (lambda: Grouped(lambda x: torch.stack([x] * G, dim=2).flatten(1, 2)), ("",), None),
    "repeat-whole": (lambda: Grouped(lambda x: x.repeat(1, G, 1, 1)), ("",), None),
    "repeat-cat": (lambda: Grouped(lambda x: torch.cat([x, x], dim=1)), ("",), None),
    "split-groups": (SplitGroups, ("",), None),
    "einsum": (lambda: Einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", lambda y: y), ("",), None),
    "einsum-odd": (
        lambda: Einsum("x i Y w , x j Y w -> x Y i j", "xYij,xjYw->Yixw", lambda y: y.permute(2, 1, 0, 3)), ("",), None
    ),
    "einsum-ellipsis": (lambda: Einsum("...qhd,...khd->...hqk", "...hqk,...khd->...qhd", lambda y: y), ("",), None),
    "sequence-first": (SequenceFirst, ("",), padded),
    "t5x": (Biased, ("",), weighed),
    "relative-bias": (lambda: RelativeBias(True), ("LEARNED_BIAS",), None),
    "relative-bias-of-an-encoder": (lambda: RelativeBias(False), ("LEARNED_BIAS",), None),
    "documents": (Documents, ("",), packed),
    "documents-unordered": (lambda: Documents(False), ("UNSORTED_DOCUMENTS",), packed),
    "upper-left": (lambda: Bias(causal_upper_left), ("",), None),
    "lower-right": (lambda: Bias(causal_lower_right, 5), ("",), None),
    "cached": (Cached, ("",), with_past),
    "cached-off-by-one": (CachedOffByOne, ("BIDIRECTIONAL",), with_past),
    "copied-in": (CopiedIn, ("",), lambda: (states(), torch.arange(T) + 3)),
    "checkpointed": (Checkpointed, ("",), None),
    "one-sequence": (lambda: OneSequence(False), ("",), lambda: (states(T, E),)),
    "one-sequence-written-out": (lambda: OneSequence(True), ("",), lambda: (states(T, E),)),
    "flattened": (Flattened, ("",), None),
    "viewed": (Viewed, ("",), None),
    "differential": (Differential, ("PROBABILITIES_CHANGED", "PROBABILITIES_CHANGED"), None),
    "cross": (Cross, ("CROSS_ATTENTION",), lambda: (states(), states(B, 9, E))),
    "double": (lambda: Double(torch.float64), ("",), None),
    "single": (lambda: Double(torch.float32), ("",), None),
}  # fmt: skip


# A cache keeps the graph of one run for the next.
WITHOUT_TRAINING = {"reference", "reference-later", "copied-in"}
# torch.export does not take CausalBias.
WITHOUT_EXPORT = {"upper-left", "lower-right"}
SYMBOLIC = {
    "reference-later",
    "split-groups",
    "einsum-odd",
    "sequence-first",
    "documents",
    "cached",
    "copied-in",
    "viewed",
}


@pytest.mark.parametrize("name", sorted(TABLE.keys() - WITHOUT_TRAINING))
def test_training(handwritten, name):
    make, expected, inputs = TABLE[name]
    handwritten.check_training(handwritten.case(make, expected, inputs=inputs))


@pytest.mark.parametrize("name", sorted(SYMBOLIC))
def test_evaluation(handwritten, name):
    make, expected, inputs = TABLE[name]
    handwritten.check_evaluation(handwritten.case(make, expected, inputs=inputs))


@pytest.mark.parametrize("name", sorted(TABLE.keys() - WITHOUT_EXPORT))
def test_export(handwritten, name):
    make, expected, inputs = TABLE[name]
    handwritten.check_export(handwritten.case(make, expected, inputs=inputs), False)


@pytest.mark.parametrize("written_out", [False, True])
def test_attention_inside_vmap_is_left_alone(handwritten, written_out):
    case = handwritten.case(lambda: MappedHeads(written_out), ("FUNCTION_TRANSFORM",))
    handwritten.check_training(case)
