"""Softmaxes made by hand: powers of the scores divided by their sum, and what only looks like that."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nsa_compile.passes.sites import Reason

B, H, T, D = 2, 4, 24, 8
S = D**-0.5


def heads() -> list[Tensor]:
    """Queries, keys and values `[B, H, T, D]`."""
    torch.manual_seed(0)
    return [torch.randn(B, H, T, D, requires_grad=True) for _ in range(3)]


def visible() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def raw(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * S


def scores(q: Tensor, k: Tensor) -> Tensor:
    return raw(q, k).masked_fill(~visible(), -torch.inf)


def stable(x: Tensor) -> Tensor:
    return (x - x.amax(-1, keepdim=True)).exp()


def divided(weights: Tensor, v: Tensor) -> Tensor:
    return (weights / weights.sum(-1, keepdim=True)) @ v


def with_logsumexp(x: Tensor, v: Tensor, total: Tensor) -> Tensor:
    return torch.exp(x - total) @ v


def added(weights: Tensor, v: Tensor, number: float | Tensor) -> Tensor:
    return (weights / (weights.sum(-1, keepdim=True) + number)) @ v


def in_another_layout(weights: Tensor, v: Tensor) -> Tensor:
    total = weights.sum(-1).transpose(1, 2).unsqueeze(-1)
    return ((weights @ v).transpose(1, 2).contiguous() / total).flatten(2)


ACCEPTED = {
    "plain": lambda q, k, v: divided(scores(q, k).exp(), v),
    "amax": lambda q, k, v: divided(stable(scores(q, k)), v),
    "max": lambda q, k, v: divided((x := scores(q, k)).sub(x.max(-1, keepdim=True).values).exp(), v),
    "max-detached": lambda q, k, v: divided(torch.exp((x := scores(q, k)) - x.max(-1, True)[0].detach()), v),
    "max-of-all": lambda q, k, v: divided(torch.exp((x := scores(q, k)) - x.amax((-2, -1), keepdim=True)), v),
    "powers-of-2": lambda q, k, v: divided(torch.exp2(scores(q, k) * math.log2(math.e)), v),
    "logsumexp": lambda q, k, v: with_logsumexp(x := scores(q, k), v, x.logsumexp(-1, keepdim=True)),
    "logsumexp-unsqueezed": lambda q, k, v: with_logsumexp(x := scores(q, k), v, torch.logsumexp(x, -1).unsqueeze(-1)),
    "log-softmax": lambda q, k, v: functional.log_softmax(scores(q, k), -1).exp() @ v,
    "normalized": lambda q, k, v: functional.normalize(stable(scores(q, k)), p=1, dim=-1) @ v,
    "normalized-by-position": lambda q, k, v: functional.normalize(stable(scores(q, k)), 1.0, 3) @ v,
    "normalized-softmax": lambda q, k, v: functional.normalize(scores(q, k).softmax(-1), p=1, dim=-1) @ v,
    "sum-by-einsum": lambda q, k, v: ((e := stable(scores(q, k))) / torch.einsum("bhqk->bhq", e)[..., None]) @ v,
    "sum-by-einsum-after": lambda q, k, v: (
        ((e := scores(q, k).exp()) @ v) / torch.einsum("...k -> ...", e).unsqueeze(-1)
    ),
    "sum-by-norm": lambda q, k, v: ((e := stable(scores(q, k))) / e.norm(p=1, dim=-1, keepdim=True)) @ v,
    "sum-by-vector-norm": lambda q, k, v: (
        ((e := scores(q, k).exp()) / torch.linalg.vector_norm(e, ord=1, dim=-1, keepdim=True)) @ v
    ),
    "divided-after": lambda q, k, v: ((e := stable(scores(q, k))) @ v) / e.sum(-1, keepdim=True),
    "divided-in-another-layout": lambda q, k, v: in_another_layout(stable(scores(q, k)), v),
    "reciprocal": lambda q, k, v: ((e := stable(scores(q, k))) * (1.0 / e.sum(-1, keepdim=True))) @ v,
    "reciprocal-after": lambda q, k, v: ((e := stable(scores(q, k))) @ v) * e.sum(-1, keepdim=True).reciprocal(),
    "masked-powers": lambda q, k, v: divided(raw(q, k).exp() * visible(), v),
    "masked-powers-by-numbers": lambda q, k, v: divided(visible().float() * raw(q, k).exp(), v),
    "masked-powers-after-max": lambda q, k, v: divided(stable(raw(q, k)) * torch.ones(T, T).tril(), v),
    "filled-powers": lambda q, k, v: divided(raw(q, k).exp().masked_fill(~visible(), 0.0), v),
    "softmax-masked-and-divided": lambda q, k, v: divided(raw(q, k).softmax(-1) * visible(), v),
    "softmax-filled-and-divided": lambda q, k, v: divided(raw(q, k).softmax(-1).masked_fill(~visible(), 0.0), v),
    # The largest power is 1, so the sum is at least 1.
    "limit-that-is-never-reached": lambda q, k, v: (
        ((e := stable(scores(q, k))) / e.sum(-1, keepdim=True).clamp(min=1e-6)) @ v
    ),
    "number-that-is-lost": lambda q, k, v: added(stable(scores(q, k)), v, 1e-9),
    "double-precision": lambda q, k, v: divided(stable(scores(q, k).double()).float(), v),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_handmade_softmax_is_rewritten(rewriting, case):
    outcome = rewriting.rewrite(ACCEPTED[case], *heads(), gradients=True)
    outcome.assert_rewritten()
    assert outcome.decisions[0].mask == "causal"
    assert not {torch.exp, torch.exp2, "exp", "sum", "amax", "max", "logsumexp"} & set(outcome.targets)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = raw(q, k).exp()
    weights.mul_(visible())
    weights /= weights.sum(-1, keepdim=True)
    return weights @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", [in_place, ACCEPTED["amax"], ACCEPTED["divided-in-another-layout"]])
def test_handmade_softmax_is_rewritten_without_gradients(rewriting, attend, dynamic):
    outcome = rewriting.rewrite(attend, *(each.detach() for each in heads()), dynamic=dynamic)
    outcome.assert_rewritten()


def test_padding_may_multiply_powers(rewriting):
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return divided(stable(raw(q, k)) * (visible() & padding[:, None, None, :]), v)

    padding = torch.ones(B, T, dtype=torch.bool)
    padding[0, 15:] = False
    outcome = rewriting.rewrite(attend, *heads(), padding, gradients=True)
    outcome.assert_rewritten()
    assert outcome.decisions[0].mask == "causal, padding"


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    largest = x.amax(-1, keepdim=True)
    return added((x - largest).exp(), v, torch.exp(q.new_tensor([0.1, 0.2, 0.3, 0.4])[:, None, None] - largest))


def sum_used_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total + total


def sum_before_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = raw(q, k).exp()
    return (weights * visible()) / weights.sum(-1, keepdim=True) @ v


def with_late_write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    weights = scores(q, k).exp()
    product = weights @ v
    v.zero_()
    return product / weights.sum(-1, keepdim=True) + v


def written_and_read_under_two_names(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = raw(q, k).exp()
    masked = weights.mul_(visible())
    return divided(masked, v) + weights.sum(-1, keepdim=True)


def decay() -> Tensor:
    return 0.9 ** (torch.arange(T)[:, None] - torch.arange(T)).abs()


DECLINED = {
    "normalized-small-sum": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: functional.normalize(scores(q, k).exp(), p=1, dim=-1) @ v,
    ),
    "normalized-masked-softmax": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: functional.normalize(raw(q, k).softmax(-1) * visible(), p=1, dim=-1) @ v,
    ),
    "normalized-with-a-limit": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: functional.normalize(stable(scores(q, k)), p=1, dim=-1, eps=5.0) @ v,
    ),
    "bidirectional": (Reason.BIDIRECTIONAL, lambda q, k, v: divided(raw(q, k).exp(), v)),
    "number-in-the-sum": (Reason.PROBABILITIES_CHANGED, lambda q, k, v: added(stable(scores(q, k)), v, 1e-3)),
    "number-in-a-small-sum": (Reason.PROBABILITIES_CHANGED, lambda q, k, v: added(scores(q, k).exp(), v, 1e-9)),
    "number-in-a-sum-after-softmax": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: added(raw(q, k).softmax(-1) * visible(), v, 1e-9),
    ),
    "limit-of-a-small-sum": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: ((e := scores(q, k).exp()) / e.sum(-1, keepdim=True).clamp(min=1e-6)) @ v,
    ),
    "number-in-the-reciprocal": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: ((e := stable(scores(q, k))) * (1 / e.sum(-1, keepdim=True) + 1e-9)).relu() @ v,
    ),
    "softmax-off-by-one": (Reason.ATTENTION_SINKS, lambda q, k, v: added(scores(q, k).exp(), v, 1.0)),
    "sink": (Reason.ATTENTION_SINKS, with_sink),
    "sum-over-heads-by-einsum": (
        Reason.UNKNOWN_SPELLING,
        lambda q, k, v: ((e := scores(q, k).exp()) / torch.einsum("bhqk->bqk", e)[:, None]) @ v,
    ),
    "sum-over-queries": (
        Reason.UNKNOWN_SPELLING,
        lambda q, k, v: (e := scores(q, k).exp()) / e.sum(-2, keepdim=True) @ v,
    ),
    "sums-of-other-queries": (
        Reason.PROBABILITIES_CHANGED,
        lambda q, k, v: (e := scores(q, k).exp()) / e.sum(-1)[:, :, None, :] @ v,
    ),
    "sum-before-mask": (Reason.PROBABILITIES_CHANGED, sum_before_mask),
    "sum-used-elsewhere": (Reason.ATTENTION_WEIGHTS_USED, sum_used_elsewhere),
    "halves": (Reason.PROBABILITIES_CHANGED, lambda q, k, v: divided(raw(q, k).exp() * (visible() * 0.5), v)),
    "decay": (Reason.PROBABILITIES_CHANGED, lambda q, k, v: divided(scores(q, k).exp() * decay(), v)),
    "late-write": (Reason.UNKNOWN_SPELLING, with_late_write),
    "two-names": (Reason.ATTENTION_WEIGHTS_USED, written_and_read_under_two_names),
    "softcap": (Reason.SOFTCAP, lambda q, k, v: divided(stable(torch.tanh(raw(q, k))) * visible(), v)),
    "dropout": (
        Reason.DROPOUT,
        lambda q, k, v: functional.dropout((e := scores(q, k).exp()) / e.sum(-1, keepdim=True), 0.1) @ v,
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_almost_a_softmax_is_declined(rewriting, case):
    reason, attend = DECLINED[case]
    rewriting.rewrite(attend, *(each.detach() for each in heads())).assert_declined(reason)


NO_ATTENTION = {
    "normalized-by-squares": lambda q, k, v: functional.normalize(stable(scores(q, k)), dim=-1) @ v,
    "norm-of-squares": lambda q, k, v: (e := scores(q, k).exp()) / e.norm(dim=-1, keepdim=True) @ v,
    "not-divided": lambda q, k, v: scores(q, k).exp() @ v,
    "logsumexp-without-gradient": lambda q, k, v: with_logsumexp(
        x := scores(q, k), v, x.logsumexp(-1, keepdim=True).detach()
    ),
    "logsumexp-of-others": lambda q, k, v: with_logsumexp(scores(q, k), v, raw(q, k).logsumexp(-1, keepdim=True)),
    "root-of-squares": lambda q, k, v: (e := scores(q, k).exp()) / e.pow(2).sum(-1, keepdim=True).sqrt() @ v,
    "relu": lambda q, k, v: divided(raw(q, k).relu() * visible(), v),
    "linear-attention": lambda q, k, v: q @ ((e := k.exp()) / e.sum(-2, keepdim=True)).mT @ v,
}


@pytest.mark.parametrize("case", NO_ATTENTION)
def test_powers_that_are_no_softmax_are_passed_over(rewriting, case):
    assert rewriting.rewrite(NO_ATTENTION[case], *heads()).decisions == []
