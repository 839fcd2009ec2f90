"""Attention that is written out: what reads as softmax(scale · Q Kᵀ + masks) V is rewritten, the rest keeps its reason."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    "mask-refilled": lambda q, k, v: (
        lambda m: (q @ k.mT * S).masked_fill(m, -torch.inf).softmax(-1).masked_fill(m, 0.0) @ v
    )(hidden()),
    "mask-clamped": lambda q, k, v: (
        torch.max(q @ k.mT * S + additive(), torch.tensor(torch.finfo(torch.float32).min)).softmax(-1) @ v
    ),
    # The softmax itself and what follows it.
    "softmax-function": lambda q, k, v: (
        F.softmax((q @ k.mT * S).masked_fill(hidden(), -torch.inf), dim=-1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "softmax-torch": lambda q, k, v: torch.softmax((q @ k.mT * S).masked_fill(hidden(), -torch.inf), -1) @ v,
    "softmax-module": lambda q, k, v: nn.Softmax(dim=-1)((q @ k.mT * S).masked_fill(hidden(), -torch.inf)) @ v,
    "softmax-dim-3": lambda q, k, v: (q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(3) @ v,
    "softmax-over-rows": lambda q, k, v: ((k @ q.mT * S).masked_fill(hidden().mT, -torch.inf).softmax(-2)).mT @ v,
    "softmax-stabilized": lambda q, k, v: (
        (lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1))((q @ k.mT * S).masked_fill(hidden(), -torch.inf)) @ v
    ),
    "dropout-p-0": lambda q, k, v: (
        F.dropout((q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1), p=0.0, training=True) @ v
    ),
    "dropout-eval": lambda q, k, v: (
        F.dropout((q @ k.mT * S).masked_fill(hidden(), -torch.inf).softmax(-1), 0.1, False) @ v
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
    "sequence-first": lambda q, k, v: (
        lambda q, k, v: torch.einsum(
            "bhts,bshd->bthd",
            (torch.einsum("bthd,bshd->bhts", q, k) * S).masked_fill(hidden(), -torch.inf).softmax(-1),
            v,
        )
    )(*(x.transpose(1, 2) for x in (q, k, v))),
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
    assert not {torch.softmax, F.softmax, "softmax", "masked_fill_", "mul_", "add_"} & set(outcome.targets)


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
