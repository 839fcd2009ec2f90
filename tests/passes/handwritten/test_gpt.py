"""Decoders in the style of GPT: fused and separate projections, masks in buffers and made in the graph."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

B, T, E, H = 2, 20, 16, 4
D = E // H


class Attention(nn.Module):
    """Projections; subclasses say what becomes of queries, keys and values `[B, H, T, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.out = nn.Linear(E, E)
        self.dropout = nn.Dropout(0.1)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part.view(*x.shape[:2], H, D).transpose(1, 2) for part in self.qkv(x).split(E, dim=2)]

    def joined(self, y: Tensor) -> Tensor:
        b, _, t, _ = y.shape
        return self.out(y.transpose(1, 2).contiguous().view(b, t, E))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self.attend(*self.heads(x)))


def visible(t: int) -> Tensor:
    return torch.tril(torch.ones(t, t))


class NanoGPT(Attention):
    def attend(self, q, k, v):
        p = self.dropout.p if self.training else 0
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)


class MinGPT(Attention):
    """The mask is a buffer: what it holds is not in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", visible(32).view(1, 1, 32, 32))

    def attend(self, q, k, v):
        t = q.size(2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        return self.dropout(functional.softmax(scores, dim=-1)) @ v


class MadeMask(Attention):
    """A mask that the forward makes, used in one of many ways."""

    def __init__(self, apply, **options) -> None:
        super().__init__()
        self.apply_mask = apply
        self.options = SimpleNamespace(**{"softmax": lambda s: s.softmax(-1), "scale": D**-0.5, **options})

    def attend(self, q, k, v):
        scores = self.apply_mask(q @ k.transpose(-2, -1) * self.options.scale)
        return self.options.softmax(scores) @ v


class NumberKept(Attention):
    """Masks by a number that the module keeps: an input of the graph under dynamic shapes."""

    def __init__(self, apply) -> None:
        super().__init__()
        self.apply_mask = apply
        self.minimum = -1e9

    def attend(self, q, k, v):
        return self.apply_mask(q @ k.mT * D**-0.5, self.minimum).softmax(-1) @ v


class GPT2(Attention):
    def attend(self, q, k, v):
        w = torch.matmul(q, k.transpose(-1, -2)) / (v.size(-1) ** 0.5)
        nd, ns = w.size(-2), w.size(-1)
        b = torch.ones(ns, ns, dtype=torch.bool).tril()[ns - nd : ns, :ns]
        w = torch.where(b, w, torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype))
        return torch.matmul(functional.softmax(w, dim=-1).type(v.dtype), v)


class OpenAIGPT(Attention):
    """Scores are multiplied by the mask before what hides is added."""

    def attend(self, q, k, v):
        w = q @ k.transpose(-1, -2) / math.sqrt(D)
        b = visible(w.size(-1))[: w.size(-2)]
        return (w * b + -1e4 * (1 - b)).softmax(-1) @ v


class OpenAIGPTWithoutHiding(OpenAIGPT):
    def attend(self, q, k, v):
        w = q @ k.transpose(-1, -2) / math.sqrt(D)
        b = visible(w.size(-1))
        return (w * b + -1e4 * (1 - torch.ones_like(b).triu(-4))).softmax(-1) @ v


class GPTJ(Attention):
    """Rotary embedding of interleaved pairs, scores in float32, scale by a tensor."""

    def rotated(self, x: Tensor) -> Tensor:
        t = x.shape[2]
        angle = torch.outer(torch.arange(t).float(), 1.0 / 100 ** (torch.arange(0, D, 2) / D))
        sin, cos = (f(angle).repeat_interleave(2, dim=-1)[None, None] for f in (torch.sin, torch.cos))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    def attend(self, q, k, v):
        q, k = self.rotated(q).to(torch.float32), self.rotated(k).to(torch.float32)
        scores = torch.matmul(q, k.transpose(-1, -2))
        mask = torch.tril(torch.ones((q.size(2), q.size(2)), dtype=torch.bool)).view(1, 1, q.size(2), q.size(2))
        scores = torch.where(mask, scores, torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype))
        scores = scores / torch.sqrt(torch.tensor(float(D)))
        return torch.matmul(nn.Softmax(dim=-1)(scores).to(v.dtype), v)


class NeoX(Attention):
    """Queries, keys and values of a head lie side by side; scores by baddbmm."""

    def heads(self, x):
        b, t, _ = x.shape
        return self.qkv(x).view(b, t, H, 3 * D).permute(0, 2, 1, 3).chunk(3, dim=-1)

    def attend(self, q, k, v):
        b, h, t, d = q.shape
        q, k = q.reshape(b * h, t, d), k.reshape(b * h, t, d)
        scores = torch.zeros(b * h, t, t, dtype=q.dtype)
        scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=1.0, alpha=1.0 / math.sqrt(d)).view(b, h, t, t)
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v


class Unbound(Attention):
    """One permute for all three, in the manner of vision transformers."""

    def heads(self, x):
        b, t, _ = x.shape
        return list(self.qkv(x).reshape(b, t, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0))

    def attend(self, q, k, v):
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        t = scores.shape[-1]
        future = torch.arange(t)[None, :] > torch.arange(t)[:, None]
        return scores.masked_fill(future, -1e9).softmax(dim=-1) @ v


class Indexed(Unbound):
    def heads(self, x):
        qkv = self.qkv(x).view(x.size(0), x.size(1), 3, H, D).permute(2, 0, 3, 1, 4)
        return [qkv[0], qkv[1], qkv[2]]


class QueryKeyNorm(Attention):
    """Normed queries and keys, with a learned scale for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(D), nn.RMSNorm(D)
        self.scale = nn.Parameter(torch.rand(H, 1, 1) + 0.5)

    def attend(self, q, k, v):
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


class Cosine(Attention):
    """Cosine similarity with a learned temperature, clamped as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(H, 1, 1)))

    def attend(self, q, k, v):
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        return (scores + torch.full((q.size(2),) * 2, -torch.inf).triu(1)).softmax(-1) @ v


class Temperature(Attention):
    """One learned temperature divides the scores before the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def attend(self, q, k, v):
        scores = (q @ k.mT) / self.temperature
        return scores.masked_fill(visible(q.size(2)).logical_not(), -torch.inf).softmax(-1) @ v


class TemperatureAfterMask(Temperature):
    """As above, after the mask: a negative temperature would turn the mask around."""

    def attend(self, q, k, v):
        scores = (q @ k.mT).masked_fill(visible(q.size(2)).logical_not(), -torch.inf)
        return (scores / self.temperature).softmax(-1) @ v


class MultiQuery(Attention):
    """One head of keys and values for all, left to broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, E + 2 * D)

    def heads(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split([E, D, D], dim=-1)
        return [q.view(b, t, H, D).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)]

    def attend(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
        return torch.matmul(scores.masked_fill(~visible(q.size(2)).bool(), -torch.inf).softmax(-1), v)


class MultiQueryRows(MultiQuery):
    """As in StarCoder: the heads of a query are rows of one product."""

    def attend(self, q, k, v):
        b, h, t, d = q.shape
        rows = q.transpose(1, 2).reshape(b, t * h, d)
        scores = torch.bmm(rows, k[:, 0].transpose(1, 2)).view(b, t, h, t) * d**-0.5
        mask = visible(t).bool().view(1, t, 1, t)
        weights = torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(-1)
        return torch.bmm(weights.view(b, t * h, t), v[:, 0]).view(b, t, h, d).transpose(1, 2)


class OneHeadAtATime(Attention):
    def attend(self, q, k, v):
        mask = visible(q.size(2)) == 0
        outputs = [
            (q[:, i] @ k[:, i].transpose(-2, -1) * D**-0.5).masked_fill(mask, -torch.inf).softmax(-1) @ v[:, i]
            for i in range(H)
        ]
        return torch.stack(outputs, dim=1)


def full(s: Tensor) -> Tensor:
    return torch.ones(s.size(-2), s.size(-1))


def assigned(s: Tensor) -> Tensor:
    mask = torch.zeros(s.shape[-2:])
    mask[torch.triu(torch.ones(s.shape[-2:], dtype=torch.bool), 1)] = float("-inf")
    return s + mask


WAYS = {
    "tril-equals-0": lambda s: s.masked_fill(full(s).tril() == 0, float("-inf")),
    "tril-not": lambda s: s.masked_fill(full(s).tril().logical_not(), -1e9),
    "tilde": lambda s: s.masked_fill(~full(s).tril().bool(), torch.finfo(s.dtype).min),
    "triu-equals-1": lambda s: s.masked_fill(full(s).triu(1) == 1, -torch.inf),
    "triu-bool-inplace": lambda s: s.masked_fill_(full(s).triu(1).bool(), -torch.inf),
    "added-triu": lambda s: s + (full(s) * float("-inf")).triu(1),
    "added-full": lambda s: s + torch.full((s.size(-1),) * 2, float("-inf")).triu(diagonal=1),
    "added-square": lambda s: s + nn.Transformer.generate_square_subsequent_mask(s.size(-1)),
    "added-1e4": lambda s: s + (1.0 - full(s).tril()) * -10000.0,
    "added-minus": lambda s: s - 1e9 * (1 - full(s).tril()),
    "chunks-by-distance": lambda s: s.masked_fill(
        (full(s).tril() == 0) | (((c := torch.arange(s.size(-1)) // 8) - c[:, None]).abs() != 0), -torch.inf
    ),
    "where-scalars": lambda s: s + torch.where(full(s).tril() > 0, 0.0, -1e30),
    "where": lambda s: torch.where(full(s).tril().bool(), s, float("-inf")),
    "where-not": lambda s: torch.where(full(s).triu(1) != 0, torch.tensor(-1e9), s),
    "compared": lambda s: s.masked_fill(torch.arange(s.size(-1)) > torch.arange(s.size(-2)).unsqueeze(1), -torch.inf),
    "cumsum": lambda s: s.masked_fill(full(s).long().cumsum(0) < full(s).long().cumsum(1), -torch.inf),
    "eye-cumsum": lambda s: s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(0)[None, None], -torch.inf),
    "window-of-two-trils": lambda s: s.masked_fill((full(s).tril() - full(s).tril(-5)) == 0, -torch.inf),
    "window-tril-triu": lambda s: s.masked_fill(~(full(s).tril().bool() & full(s).triu(-4).bool()), -torch.inf),
    "window-difference": lambda s: s.masked_fill(
        ((d := torch.arange(s.size(-2))[:, None] - torch.arange(s.size(-1))) < 0) | (d >= 6), -torch.inf
    ),
    "logarithm": lambda s: s + full(s).tril().log(),
    "expanded": lambda s: s.masked_fill(full(s).tril().expand(s.size(0), 1, -1, -1) == 0, -torch.inf),
    "assigned": assigned,
    "clamped-below": lambda s: torch.max(
        s + (full(s) * torch.finfo(s.dtype).min).triu(1), torch.tensor(torch.finfo(s.dtype).min)
    ),
}


# Ways to hide that are something else: (reason, way).
OTHER_WAYS = {
    "weak": ("ADDITIVE_BIAS", lambda s: s.masked_fill(full(s).tril() == 0, -100.0)),
    "off-by-one": ("BIDIRECTIONAL", lambda s: s.masked_fill(full(s).tril(1) == 0, -torch.inf)),
    "upside-down": ("BIDIRECTIONAL", lambda s: s.masked_fill(full(s).tril() == 1, -torch.inf)),
    "above-the-kth-largest": (
        "ALREADY_SPARSE",
        lambda s: (c := causal(s)).masked_fill(c < c.topk(4, dim=-1).values[..., -1:], -torch.inf),
    ),
    "dilated": (
        "MASK_NOT_INTERVAL",
        lambda s: s.masked_fill(
            ((d := torch.arange(s.size(-2))[:, None] - torch.arange(s.size(-1))) < 0) | (d % 3 != 0), -torch.inf
        ),
    ),
    "strided-and-local": (
        "MASK_NOT_INTERVAL",
        lambda s: s.masked_fill(
            ((d := torch.arange(s.size(-2))[:, None] - torch.arange(s.size(-1))) < 0) | ((d > 4) & (d % 4 != 0)),
            -torch.inf,
        ),
    ),
    "prefix": (
        "BIDIRECTIONAL",
        lambda s: s.masked_fill((full(s).tril() == 0) & (torch.arange(s.size(-1)) >= 5), -torch.inf),
    ),
    "but-not-itself": (
        "MASK_NOT_INTERVAL",
        lambda s: s.masked_fill((full(s).tril() - full(s).tril(-1).triu(-1)) == 0, -torch.inf),
    ),
    "first-and-window": (
        "MASK_NOT_INTERVAL",
        lambda s: s.masked_fill(
            ((d := torch.arange(s.size(-2))[:, None] - torch.arange(s.size(-1))) < 0)
            | ((d > 6) & (torch.arange(s.size(-1)) > 1)),
            -torch.inf,
        ),
    ),
    "random": ("MASK_NOT_PROVED", lambda s: s.masked_fill(torch.rand(s.shape[-2:]).tril() == 0, -torch.inf)),
    "multiplied": ("MULTIPLIED_SCORES", lambda s: s * full(s).tril()),
    "multiplied-after-mask": (
        "MULTIPLIED_SCORES",
        lambda s: (s.masked_fill(full(s).tril() == 0, -1e9) * full(s).tril()).masked_fill(
            torch.arange(s.size(-1)) > torch.arange(s.size(-2))[:, None] + 4, -torch.inf
        ),
    ),
    "softcap": ("SOFTCAP", lambda s: (20 * torch.tanh(s / 20)).masked_fill(full(s).tril() == 0, -torch.inf)),
    "clamped": ("UNKNOWN_SPELLING", lambda s: s.clamp(-5, 5).masked_fill(full(s).tril() == 0, -torch.inf)),
    "squared": ("UNKNOWN_SPELLING", lambda s: s.square().masked_fill(full(s).tril() == 0, -torch.inf)),
    "distance": (
        "ALIBI",
        lambda s: (
            s.masked_fill(full(s).tril() == 0, -torch.inf)
            - 0.1 * (torch.arange(s.size(-2))[:, None] - torch.arange(s.size(-1))).abs()
        ),
    ),
    "alibi": (
        "ALIBI",
        lambda s: (
            s
            + torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, H, 1, 1)
            * (torch.arange(s.size(-1)) - torch.arange(s.size(-2))[:, None]).masked_fill(full(s).tril() == 0, -(10**9))
        ),
    ),
}
# The softmax itself: ("" or reason, softmax).
SOFTMAXES = {
    "float32": ("", lambda s: functional.softmax(s.float(), dim=-1).type_as(s)),
    "dtype": ("", lambda s: functional.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype)),
    "safe": ("", lambda s: torch.nan_to_num(s.softmax(-1), 0.0)),
    "made-by-hand": ("", lambda s: (e := torch.exp(s - s.max(-1, keepdim=True)[0])) / e.sum(-1, keepdim=True)),
    "over-queries": ("UNKNOWN_SPELLING", lambda s: s.softmax(-2)),
    "sharpened": ("PROBABILITIES_CHANGED", lambda s: s.softmax(-1) ** 2),
    "averaged-over-heads": ("PROBABILITIES_CHANGED", lambda s: s.softmax(-1).mean(1, keepdim=True)),
    "one-sink": ("ATTENTION_SINKS", lambda s: torch.cat([s, s.new_zeros(*s.shape[:-1], 1)], -1).softmax(-1)[..., :-1]),
    "padded-sink": ("ATTENTION_SINKS", lambda s: functional.pad(s, (1, 0)).softmax(-1)[..., 1:]),
}


def causal(s: Tensor) -> Tensor:
    return s.masked_fill(full(s).tril() == 0, float("-inf"))


class Chunked(Attention):
    """A few queries at a time, each under its rows of the mask."""

    def attend(self, q, k, v):
        mask = visible(k.size(2)) == 0
        outputs = []
        for number, some in enumerate(q.split(5, dim=2)):
            scores = (some @ k.mT * D**-0.5).masked_fill(mask[5 * number : 5 * number + 5], -torch.inf)
            outputs.append(scores.softmax(-1) @ v)
        return torch.cat(outputs, dim=2)


class HiddenTwice(Attention):
    """As CPM-Ant does: what was hidden before the softmax is set to 0 after it, by a mask that is made anew."""

    def __init__(self, second) -> None:
        super().__init__()
        self.second = second

    def attend(self, q, k, v):
        mask, t = visible(q.size(2)).bool(), q.size(2)
        scores = (q @ k.mT * D**-0.5).masked_fill(mask.view(1, 1, t, t) == torch.tensor(False), -torch.inf)
        return scores.softmax(-1).masked_fill(self.second(mask, t), 0.0) @ v


def written(mask: Tensor, t: int) -> Tensor:
    mask.logical_not_()
    return mask.view(1, 1, t, t) == torch.tensor(False)


class KeysFirst(Attention):
    """Scores of keys by queries, a softmax over rows."""

    def attend(self, q, k, v):
        scores = (k @ q.mT / math.sqrt(D)).masked_fill(torch.ones(k.size(2), k.size(2)).tril(-1) == 1, -torch.inf)
        return scores.softmax(2).transpose(2, 3) @ v


class RowBias(Attention):
    """What is added is the same for all keys of a query: the softmax does not see it."""

    def attend(self, q, k, v):
        return causal(q @ k.mT + q.mean(-1, keepdim=True)).softmax(-1) @ v


class ColumnBias(Attention):
    def attend(self, q, k, v):
        return causal(q @ k.mT + k.mean(-1)[:, :, None]).softmax(-1) @ v


class TalkingHeads(Attention):
    """Heads are mixed before or after the softmax."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(H) + 0.1)
        self.before = before

    def attend(self, q, k, v):
        scores = causal(q @ k.mT * D**-0.5)
        if self.before:
            scores = causal(torch.einsum("bhts,hg->bgts", q @ k.mT * D**-0.5, self.mix))
        weights = scores.softmax(-1)
        return (weights if self.before else torch.einsum("bhts,hg->bgts", weights, self.mix)) @ v


class UsedTwice(Attention):
    def attend(self, q, k, v):
        weights = causal(q @ k.mT * D**-0.5).softmax(-1)
        return weights @ (weights @ v)


class Returned(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        weights = causal(q @ k.mT * D**-0.5).softmax(-1)
        return self.joined(weights @ v), weights


class Dropped(Attention):
    """Dropout of weights in one of the ways that it is written."""

    def __init__(self, dropped) -> None:
        super().__init__()
        self.dropped = dropped

    def attend(self, q, k, v):
        return self.dropped(self, causal(q @ k.mT * D**-0.5).softmax(-1)) @ v


HIDDEN_AGAIN = {
    "alike": ("", lambda mask, t: mask.view(1, 1, t, t) == torch.tensor(False)),
    "otherwise": ("PROBABILITIES_CHANGED", lambda mask, t: mask.view(1, 1, t, t) == torch.tensor(True)),
    "in-other-rows": ("PROBABILITIES_CHANGED", lambda mask, t: mask.flip(0).view(1, 1, t, t) == torch.tensor(False)),
    "written": ("PROBABILITIES_CHANGED", written),
}
MODULES = {
    "nanogpt": (NanoGPT, ("",), ("DROPOUT",)),
    "mingpt": (MinGPT, ("MASK_IS_INPUT",), ("DROPOUT",)),
    "number-filled": (lambda: NumberKept(lambda s, n: s.masked_fill(full(s).tril() == 0, n)), ("",), None),
    "number-multiplied": (lambda: NumberKept(lambda s, n: s + (1.0 - full(s).tril()) * n), ("",), None),
    "gpt2": (GPT2, ("",), None),
    "openai-gpt": (OpenAIGPT, ("",), None),
    "openai-gpt-half-hidden": (OpenAIGPTWithoutHiding, ("MULTIPLIED_SCORES",), None),
    "gptj": (GPTJ, ("",), None),
    "neox": (NeoX, ("",), None),
    "unbound": (Unbound, ("",), None),
    "indexed": (Indexed, ("",), None),
    "query-key-norm": (QueryKeyNorm, ("",), None),
    "cosine": (Cosine, ("",), None),
    "temperature": (Temperature, ("",), None),
    "temperature-after-mask": (TemperatureAfterMask, ("UNKNOWN_SPELLING",), None),
    "multi-query": (MultiQuery, ("",), None),
    "multi-query-rows": (MultiQueryRows, ("",), None),
    "one-head-at-a-time": (OneHeadAtATime, ("",) * H, None),
    "chunked": (Chunked, ("",) * 4, None),
    **{
        f"hidden-twice-{name}": (lambda second=second: HiddenTwice(second), (reason,), None)
        for name, (reason, second) in HIDDEN_AGAIN.items()
    },
    "keys-first": (KeysFirst, ("",), None),
    "row-bias": (RowBias, ("",), None),
    "column-bias": (ColumnBias, ("LEARNED_BIAS",), None),
    "talking-before": (lambda: TalkingHeads(True), ("MULTIPLIED_SCORES",), None),
    "talking-after": (lambda: TalkingHeads(False), ("PROBABILITIES_CHANGED",), None),
    "used-twice": (UsedTwice, ("ATTENTION_WEIGHTS_USED",), None),
    "dropout-function": (
        lambda: Dropped(lambda self, w: functional.dropout(w, p=0.1, training=self.training)), ("",), ("DROPOUT",)
    ),
    "dropout-module": (lambda: Dropped(lambda self, w: self.dropout(w)), ("",), ("DROPOUT",)),
    "dropout-of-zero": (lambda: Dropped(lambda self, w: functional.dropout(w, 0.0)), ("",), None),
    "dropout-by-hand": (
        lambda: Dropped(lambda self, w: w * (torch.rand_like(w) > 0.1) / 0.9), ("DROPOUT",), None
    ),
}  # fmt: skip
TABLE = {
    **MODULES,
    **{f"way-{name}": (lambda way=way: MadeMask(way), ("",), None) for name, way in WAYS.items()},
    **{f"way-{name}": (lambda way=way: MadeMask(way), (reason,), None) for name, (reason, way) in OTHER_WAYS.items()},
    **{
        f"softmax-{name}": (lambda softmax=softmax: MadeMask(causal, softmax=softmax), (reason,), None)
        for name, (reason, softmax) in SOFTMAXES.items()
    },
}


def case_of(handwritten, name: str):
    make, expected, training = TABLE[name]
    return handwritten.case(make, expected, training)


@pytest.mark.parametrize("name", TABLE)
def test_training(handwritten, name):
    handwritten.check_training(case_of(handwritten, name))


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "gptj", "neox", "multi-query-rows", "openai-gpt", "way-window-difference"),
        *("number-filled", "number-multiplied"),
    ],
)
def test_evaluation(handwritten, name):
    handwritten.check_evaluation(case_of(handwritten, name))


@pytest.mark.parametrize("name", TABLE)
def test_export(handwritten, name):
    handwritten.check_export(case_of(handwritten, name), False)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "way-assigned", "way-clamped-below", "softmax-made-by-hand"])
def test_strict_export(handwritten, name):
    handwritten.check_export(case_of(handwritten, name), True)


@pytest.mark.parametrize("name", ["nanogpt", "openai-gpt", "multi-query-rows", "cosine", "way-window-of-two-trils"])
def test_nothing_flows_back_from_the_future(handwritten, name):
    handwritten.check_causality(case_of(handwritten, name))
