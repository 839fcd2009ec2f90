"""Attention that is written out: what reads as softmax(scale · Q Kᵀ + masks) V is rewritten, the rest is declined."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile.passes.sites import Reason

B, H, G, T, D = 2, 4, 2, 24, 8


def heads(*names: str) -> list[Tensor]:
    """Tensors [B, H, T, D], or [B, H/G, T, D] for a name in capitals, with gradients."""
    torch.manual_seed(0)
    return [torch.randn(B, H // G if name.isupper() else H, T, D, requires_grad=True) for name in names]


def causal(device: str = "cpu") -> Tensor:
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def hidden() -> Tensor:
    return ~causal()


def additive() -> Tensor:
    return torch.zeros(T, T).masked_fill(hidden(), torch.finfo(torch.float32).min)


def repeat(x: Tensor) -> Tensor:
    return x[:, :, None].expand(B, H // G, G, T, D).reshape(B, H, T, D)


def plain(scores: Tensor, v: Tensor) -> Tensor:
    return scores.masked_fill(hidden(), -torch.inf).softmax(-1) @ v


S = D**-0.5


def refilled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = hidden()
    return (q @ k.mT * S).masked_fill(mask, -torch.inf).softmax(-1).masked_fill(mask, 0.0) @ v


def stabilized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * S).masked_fill(hidden(), -torch.inf)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def stabilized_by_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * S).masked_fill(hidden(), -torch.inf)
    return (scores - scores.max(dim=-1, keepdim=True)[0].detach()).softmax(-1) @ v


def one_head_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([plain(q[:, h] @ k[:, h].mT * S, v[:, h]) for h in range(H)], dim=1)


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * S
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden(), -torch.inf).softmax(-1), v)


SPELLINGS = {
    # How the product of queries and keys is written.
    "matmul": lambda q, k, v: plain(torch.matmul(q, k.transpose(2, 3)) * S, v),
    "at": lambda q, k, v: plain(q @ k.mT * S, v),
    "at-transposed": lambda q, k, v: plain(q @ k.transpose(-1, -2) * S, v),
    "method": lambda q, k, v: plain(q.matmul(k.permute(0, 1, 3, 2)).mul(S), v),
    "einsum": lambda q, k, v: plain(torch.einsum("bhtd,bhsd->bhts", q, k) * S, v),
    "einsum-ellipsis": lambda q, k, v: plain(torch.einsum("...td,...sd->...ts", q, k) * S, v),
    "einsum-implicit": lambda q, k, v: plain(torch.einsum("bhid,bhjd->bhij", [q, k]) * S, v),
    "bmm": lambda q, k, v: torch.bmm(
        (torch.bmm(q.reshape(B * H, T, D), k.reshape(B * H, T, D).transpose(1, 2)) * S)
        .masked_fill(hidden(), -torch.inf)
        .softmax(-1),
        v.reshape(B * H, T, D),
    ).view(B, H, T, D),
    "baddbmm": lambda q, k, v: plain(
        torch.baddbmm(
            torch.empty(B * H, T, T), q.reshape(B * H, T, D), k.reshape(B * H, T, D).mT, beta=0.0, alpha=S
        ).view(B, H, T, T),
        v,
    ),
    "baddbmm-mask": lambda q, k, v: (
        torch.baddbmm(additive().expand(B * H, T, T), q.reshape(B * H, T, D), k.reshape(B * H, T, D).mT, alpha=S)
        .view(B, H, T, T)
        .softmax(-1)
        @ v
    ),
    "three-dimensional": lambda q, k, v: plain(q[0] @ k[0].mT * S, v[0]),
    "two-dimensional": lambda q, k, v: plain(q[0, 0] @ k[0, 0].mT * S, v[0, 0]),
    # Where the scale stands.
    "scale-divisor": lambda q, k, v: plain(q @ k.mT / math.sqrt(D), v),
    "scale-on-q": lambda q, k, v: plain((q * S) @ k.mT, v),
    "scale-on-k": lambda q, k, v: plain(q @ (k / D**0.5).mT, v),
    "scale-on-both": lambda q, k, v: plain((q * D**-0.25) @ (k * D**-0.25).mT, v),
    "scale-twice": lambda q, k, v: plain(q @ k.mT / 2 * (2 * S), v),
    "scale-none": lambda q, k, v: plain(q @ k.mT, v),
    "scale-tensor": lambda q, k, v: plain(q @ k.mT / torch.sqrt(torch.tensor(float(D))), v),
    "scale-size": lambda q, k, v: plain(q @ k.mT / k.size(-1) ** 0.5, v),
    "scale-per-head": lambda q, k, v: plain(q @ k.mT * q.new_tensor([1.0, 2.0, 0.5, 0.1])[:, None, None], v),
    "scale-per-query": lambda q, k, v: plain(q @ k.mT / q.norm(dim=-1, keepdim=True), v),
    "scale-after-mask": lambda q, k, v: ((q @ k.mT).masked_fill(hidden(), -torch.inf) * S).softmax(-1) @ v,
    "scale-after-additive": lambda q, k, v: ((q @ k.mT + additive()) * S).softmax(-1) @ v,
    "scale-inplace": lambda q, k, v: plain((q @ k.mT).mul_(S), v),
    # How the mask is applied.
    "mask-add": lambda q, k, v: (q @ k.mT * S + additive()).softmax(-1) @ v,
    "mask-add-left": lambda q, k, v: (additive() + q @ k.mT * S).softmax(-1) @ v,
    "mask-add-alpha": lambda q, k, v: torch.add(q @ k.mT * S, hidden().float(), alpha=-1e9).softmax(-1) @ v,
    "mask-subtract": lambda q, k, v: (q @ k.mT * S - 1e10 * hidden().float()).softmax(-1) @ v,
    "mask-add-inplace": lambda q, k, v: (q @ k.mT).mul(S).add_(additive()).softmax(-1) @ v,
    "mask-fill-finite": lambda q, k, v: (q @ k.mT * S).masked_fill(causal() == 0, -1e9).softmax(-1) @ v,
    "mask-fill-min": lambda q, k, v: (
        (q @ k.mT * S).masked_fill(causal().logical_not(), torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
    "mask-fill-inplace": lambda q, k, v: (q @ k.mT).mul(S).masked_fill_(hidden(), -torch.inf).softmax(-1) @ v,
    "mask-where": lambda q, k, v: torch.where(causal(), q @ k.mT * S, -torch.inf).softmax(-1) @ v,
    "mask-where-tensor": lambda q, k, v: (
        torch.where(causal(), q @ k.mT * S, torch.tensor(torch.finfo(torch.float32).min)).softmax(-1) @ v
    ),
    "mask-where-blocked": lambda q, k, v: torch.where(hidden(), -1e30, q @ k.mT * S).softmax(-1) @ v,
    "mask-triu": lambda q, k, v: (q @ k.mT * S + torch.full((T, T), -torch.inf).triu(diagonal=1)).softmax(-1) @ v,
    "mask-heads": lambda q, k, v: (q @ k.mT * S + additive().expand(B, H, T, T)).softmax(-1) @ v,
    "mask-twice": lambda q, k, v: (
        (q @ k.mT * S).masked_fill(hidden(), -torch.inf).masked_fill(hidden().tril(-9).bool(), -torch.inf).softmax(-1)
        @ v
    ),
    "mask-refilled": refilled,
    "mask-clamped": lambda q, k, v: (
        torch.max(q @ k.mT * S + additive(), torch.tensor(torch.finfo(torch.float32).min)).softmax(-1) @ v
    ),
    # The softmax itself and what follows it.
    "softmax-function": lambda q, k, v: (
        functional.softmax((q @ k.mT * S).masked_fill(hidden(), -torch.inf), dim=-1, dtype=torch.float32).to(q.dtype)
        @ v
    ),
    "softmax-torch": lambda q, k, v: torch.softmax((q @ k.mT * S).masked_fill(hidden(), -torch.inf), -1) @ v,
    "softmax-module": lambda q, k, v: nn.Softmax(dim=-1)((q @ k.mT * S).masked_fill(hidden(), -torch.inf)) @ v,
    "softmax-dim-3": lambda q, k, v: (q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(3) @ v,
    "softmax-over-rows": lambda q, k, v: ((k @ q.mT * S).masked_fill(hidden().mT, -torch.inf).softmax(-2)).mT @ v,
    "softmax-stabilized": stabilized,
    "softmax-stabilized-by-max": stabilized_by_max,
    "product-transposed": lambda q, k, v: (v.mT @ (q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1).mT).mT,
    "keys-transposed-early": lambda q, k, v: plain(q @ k.permute(1, 0, 3, 2).contiguous().transpose(0, 1) * S, v),
    "dropout-p-0": lambda q, k, v: (
        functional.dropout((q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1), p=0.0, training=True) @ v
    ),
    "dropout-eval": lambda q, k, v: (
        functional.dropout((q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1), 0.1, False) @ v
    ),
    "nan-to-num": lambda q, k, v: torch.nan_to_num((q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1)) @ v,
    "upcast-scores": lambda q, k, v: (
        (q.bfloat16() @ k.bfloat16().mT).float().mul(S).masked_fill(hidden(), -torch.inf).softmax(-1).bfloat16()
        @ v.bfloat16()
    ).float(),
    "product-einsum": lambda q, k, v: torch.einsum(
        "bhts,bhsd->bthd", (q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1), v
    ),
    # Layouts.
    "sequence-first": sequence_first,
    "scores-heads-last": lambda q, k, v: torch.einsum(
        "btsh,bhsd->bhtd",
        (torch.einsum("bhtd,bhsd->btsh", q, k) * S).masked_fill(hidden()[None, :, :, None], -torch.inf).softmax(2),
        v,
    ),
    "mask-3d-batch": lambda q, k, v: (
        (q @ k.mT * S).masked_fill(hidden().expand(B, T, T)[:, None], -torch.inf).softmax(-1) @ v
    ),
}
GROUPED = {
    "expand-reshape": lambda q, k, v: plain(q @ repeat(k).mT * S, repeat(v)),
    "repeat-interleave": lambda q, k, v: plain(
        q @ k.repeat_interleave(G, dim=1).mT * S, torch.repeat_interleave(v, G, 1)
    ),
    "grouped-einsum": lambda q, k, v: torch.einsum(
        "bkgts,bksd->bkgtd",
        (torch.einsum("bkgtd,bksd->bkgts", q.view(B, H // G, G, T, D), k) * S)
        .masked_fill(hidden(), -torch.inf)
        .softmax(-1),
        v,
    ).reshape(B, H, T, D),
    "grouped-matmul": lambda q, k, v: plain(q.view(B, H // G, G, T, D) @ k[:, :, None].mT * S, v[:, :, None]).reshape(
        B, H, T, D
    ),
    "rows-of-a-group": lambda q, k, v: (
        (q.reshape(B, H // G, G * T, D) @ k.mT * S)
        .view(B, H // G, G, T, T)
        .masked_fill(hidden(), -torch.inf)
        .softmax(-1)
        .view(B, H // G, G * T, T)
        @ v
    ).view(B, H, T, D),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_is_rewritten(rewriting, spelling):
    outcome = rewriting.rewrite(SPELLINGS[spelling], *heads("q", "k", "v"), gradients=True)
    if spelling == "upcast-scores":
        (output, _), (expected, _) = outcome.output, outcome.expected
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
        return
    outcome.assert_rewritten()
    assert not {torch.softmax, functional.softmax, "softmax", "masked_fill_", "mul_", "add_"} & set(outcome.targets)


@pytest.mark.parametrize("spelling", GROUPED)
def test_grouped_spelling_is_rewritten_with_the_keys_as_they_were(rewriting, spelling):
    outcome = rewriting.rewrite(GROUPED[spelling], *heads("q", "K", "V"), gradients=True)
    outcome.assert_rewritten()
    (decision,) = outcome.decisions
    assert decision.site.key.shape == (B, H // G, T, D)
    assert decision.site.query.shape == (B, H, T, D)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", ["matmul", "scale-size", "sequence-first"])
def test_spelling_is_rewritten_for_symbolic_sizes(rewriting, spelling, dynamic):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SPELLINGS[spelling](q, k, v)

    rewriting.rewrite(attend, *heads("q", "k", "v"), dynamic=dynamic).assert_rewritten()


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * S).masked_fill(hidden(), -torch.inf)
    joined = torch.cat([scores, torch.zeros(B, H, T, 1)], dim=-1)
    return joined.softmax(-1)[..., :-1] @ v


def with_partial_write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * S
    scores[:, 0] = 0.0
    return plain(scores, v)


def with_late_write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    weights = probabilities(q, k)
    k.zero_()
    return weights @ v + k.sum()


def with_late_mask_write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = hidden()
    scores = (q @ k.mT * S).masked_fill(mask, -torch.inf)
    mask.zero_()
    return scores.softmax(-1) @ v + mask.sum()


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = probabilities(q, k)
    return torch.cat([weights @ v, weights], -1)


def weights_used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = probabilities(q, k)
    return weights @ v + weights @ k


def with_mask_in_a_filled_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(T, T)
    bias.masked_fill_(hidden(), -torch.inf)
    return (q @ k.mT * S + bias).softmax(-1) @ v


DECLINED = {
    "softcap": (Reason.SOFTCAP, lambda q, k, v: plain(torch.tanh(q @ k.mT * S / 30) * 30, v)),
    "sinks": (Reason.ATTENTION_SINKS, with_sinks),
    "dropout": (Reason.DROPOUT, lambda q, k, v: functional.dropout(probabilities(q, k), 0.1, True) @ v),
    "dropout-of-scores": (Reason.DROPOUT, lambda q, k, v: plain(functional.dropout(q @ k.mT, 0.1), v)),
    "weights-returned": (
        Reason.ATTENTION_WEIGHTS_USED,
        weights_returned,
    ),
    "weights-used-twice": (
        Reason.ATTENTION_WEIGHTS_USED,
        weights_used_twice,
    ),
    "head-mask": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: (probabilities(q, k) * q.new_tensor([1.0, 1, 0, 1])[:, None, None]) @ v,
    ),
    "another-refill": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: probabilities(q, k).masked_fill(causal().tril(-3), 0.0) @ v,
    ),
    "differential": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: (probabilities(q, k) - 0.5) @ v,
    ),
    "multiplied-by-mask": (Reason.MULTIPLIED_SCORES, lambda q, k, v: (q @ k.mT * causal()).softmax(-1) @ v),
    "multiplied-by-keys": (Reason.MULTIPLIED_SCORES, lambda q, k, v: plain(q @ k.mT * k.norm(dim=-1)[:, :, None], v)),
    "weak-mask": (Reason.ADDITIVE_BIAS, lambda q, k, v: (q @ k.mT).masked_fill(hidden(), -5.0).softmax(-1) @ v),
    "weakened-mask": (
        Reason.ADDITIVE_BIAS,
        lambda q, k, v: ((q @ k.mT).masked_fill(hidden(), -1e4) * 0.1).softmax(-1) @ v,
    ),
    "two-products": (
        Reason.LEARNED_BIAS,
        lambda q, k, v: plain(q @ k.mT + q @ torch.arange(T * D).view(T, D).float().mT, v),
    ),
    "keys-in-two-parts": (
        Reason.UNKNOWN_SPELLING,
        lambda q, k, v: plain((q @ k.mT + q[..., :2] @ k[:, :1, :, 2:4].mT) * S, v),
    ),
    "keys-in-two-parts-and-a-mask-like-scores": (
        Reason.UNKNOWN_SPELLING,
        lambda q, k, v: (
            (torch.cat([torch.zeros(B, H, T, 1), torch.full((B, H, T, T - 1), -torch.inf).triu()], -1)
             + (q @ k.mT + (q * 2) @ (k * 3).mT)).softmax(-1)
            @ v
        ),
    ),
    "lower-triangle": (
        Reason.UNKNOWN_SPELLING,
        lambda q, k, v: (scores := (q @ k.mT).tril()).masked_fill(scores == 0, -torch.inf).softmax(-1) @ v,
    ),
    "powers": (Reason.UNKNOWN_SPELLING, lambda q, k, v: plain((q @ k.mT).pow(3), v)),
    "partial-write": (Reason.UNKNOWN_SPELLING, with_partial_write),
    "late-write": (Reason.UNKNOWN_SPELLING, with_late_write),
    "late-mask-write": (Reason.MUTATED_MASK, with_late_mask_write),
    "negative-scale-of-mask": (
        Reason.ADDITIVE_BIAS,
        lambda q, k, v: (-1.0 * (q @ k.mT).masked_fill(hidden(), -torch.inf)).softmax(-1) @ v,
    ),
    "not-causal": (Reason.BIDIRECTIONAL, lambda q, k, v: (q @ k.mT * S).softmax(-1) @ v),
    "distance-bias": (
        Reason.ALIBI,
        lambda q, k, v: plain(q @ k.mT + (torch.arange(T)[:, None] - torch.arange(T)).abs() * -0.5, v),
    ),
    "mask-per-head": (
        Reason.MASK_DEPENDS_ON_HEAD,
        lambda q, k, v: (
            (q @ k.mT)
            .masked_fill(torch.arange(T)[None, None] > torch.arange(T)[None, :, None] - torch.arange(H)[:, None, None],
                         -torch.inf)
            .softmax(-1)
            @ v
        ),
    ),
    "values-of-queries": (
        Reason.UNKNOWN_SPELLING,
        lambda q, k, v: (q @ k.mT).masked_fill(hidden(), -torch.inf).softmax(-2) @ v,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", DECLINED)
def test_other_mathematics_is_declined_and_left_alone(rewriting, spelling):
    reason, attend = DECLINED[spelling]
    rewriting.rewrite(attend, *heads("q", "k", "v")).assert_declined(reason)


NO_ATTENTION = {
    "router": lambda q, k, v: torch.einsum("bht,bhtd->bhd", v.mean(-1).softmax(-1), v),
    "gate": lambda q, k, v: q.softmax(-1) * v,
    "linear-attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "similarities": lambda q, k, v: (q @ k.mT).softmax(-1).amax(-1),
    "mixture": lambda q, k, v: functional.linear(q.softmax(-1), v[0, 0]),
}


@pytest.mark.parametrize("function", NO_ATTENTION)
def test_softmax_that_is_no_attention_is_passed_over(rewriting, function):
    outcome = rewriting.rewrite(NO_ATTENTION[function], *heads("q", "k", "v"))
    assert outcome.decisions == []


def test_heads_one_at_a_time_are_rewritten_one_at_a_time(rewriting):
    rewriting.rewrite(one_head_at_a_time, *heads("q", "k", "v"), gradients=True).assert_rewritten(H)


def test_a_tensor_that_was_filled_and_written_is_no_constant(rewriting):
    outcome = rewriting.rewrite(with_mask_in_a_filled_tensor, *heads("q", "k", "v"))
    outcome.assert_rewritten()
    assert outcome.decisions[0].mask == "causal"


def test_scores_that_are_used_elsewhere_stay(rewriting):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * S
        return torch.cat([plain(scores, v), scores], -1)

    rewriting.rewrite(attend, *heads("q", "k", "v"), gradients=True).assert_rewritten()


def test_in_place_scores_that_are_used_elsewhere_stay(rewriting):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).mul_(S)
        return plain(scores, v) + scores.diagonal(dim1=-2, dim2=-1)[..., None]

    outcome = rewriting.rewrite(attend, *heads("q", "k", "v"))
    outcome.assert_rewritten()
    assert "mul_" in outcome.targets


@pytest.mark.parametrize("queries", [1, 5])
def test_decoding_against_a_longer_cache_is_rewritten(rewriting, queries):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(T) > torch.arange(T - queries, T)[:, None]
        return (q[:, :, -queries:] @ k.mT * S).masked_fill(mask, -torch.inf).softmax(-1) @ v

    rewriting.rewrite(attend, *heads("q", "k", "v")).assert_rewritten()


def test_padding_may_hide_every_key_of_a_query(rewriting):
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = causal() & padding[:, None, None, :].bool()
        return (q @ k.mT * S).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v

    padding = torch.ones(B, T, dtype=torch.long)
    padding[0, :5] = 0
    # Queries among the padding see nothing: what they give is nobody's business.
    rewriting.rewrite(attend, *heads("q", "k", "v"), padding, seen=lambda y: y[:, :, 5:]).assert_rewritten()


@pytest.mark.parametrize("inplace", [False, True])
def test_graphs_of_autocast_are_rewritten(rewriting, inplace):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = q @ k.mT * S
            scores = scores.masked_fill_(hidden(), -torch.inf) if inplace else scores.masked_fill(hidden(), -torch.inf)
            return functional.softmax(scores, -1, dtype=torch.float32) @ v

    outcome = rewriting.rewrite(attend, *heads("q", "k", "v"), compiled=True)
    assert outcome.reasons == [""]
    assert outcome.output.dtype == outcome.expected.dtype == torch.bfloat16
    torch.testing.assert_close(outcome.output, outcome.expected, rtol=3e-2, atol=3e-2)
