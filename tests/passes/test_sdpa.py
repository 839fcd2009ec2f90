"""Calls of scaled_dot_product_attention, in every way they can be written."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nsa_compile.passes.sites import Reason

B, H, T, D = 2, 4, 24, 8
sdpa = functional.scaled_dot_product_attention
aten = torch.ops.aten.scaled_dot_product_attention


def tensors(**shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    whole = {"q": (B, H, T, D), "k": (B, H, T, D), "v": (B, H, T, D), **shapes}
    return [torch.randn(*shape, requires_grad=True) for shape in whole.values()]


def triangle(rows: int = T, columns: int = T, diagonal: int = 0) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril(diagonal)


CALLS = {
    "positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "keywords": lambda q, k, v: sdpa(query=q, key=k, value=v, is_causal=True),
    "private-name": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True),
    "packet": lambda q, k, v: aten(q, k, v, is_causal=True),
    "overload": lambda q, k, v: aten.default(q, k, v, None, 0.0, True, scale=0.3),
    "scale-none": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=None),
    "scale": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3),
    "scale-integer": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=1),
    "mask-positional": lambda q, k, v: sdpa(q, k, v, triangle()),
    "mask-keyword": lambda q, k, v: sdpa(q, k, v, attn_mask=triangle()[None]),
    "mask-four-dimensional": lambda q, k, v: sdpa(q, k, v, triangle().expand(B, 1, T, T)),
    "mask-additive": lambda q, k, v: sdpa(q, k, v, torch.full((T, T), -torch.inf).triu(1)),
    "layout-of-projections": lambda q, k, v: sdpa(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), is_causal=True
    ),
    "last-dimension-strided": lambda q, k, v: sdpa(
        *(x.mT.contiguous().mT for x in (q, k, v)), is_causal=True
    ),
    "three-dimensional": lambda q, k, v: sdpa(q[0], k[0], v[0], is_causal=True),
    "three-dimensional-flat": lambda q, k, v: sdpa(
        *(x.reshape(B * H, T, D) for x in (q, k, v)), is_causal=True
    ),
    "two-dimensional": lambda q, k, v: sdpa(q[0, 0], k[0, 0], v[0, 0], is_causal=True),
    "five-dimensional": lambda q, k, v: sdpa(*(x.view(1, B, H, T, D) for x in (q, k, v)), is_causal=True),
    "longer-keys": lambda q, k, v: sdpa(q[:, :, :10], k, v, is_causal=True),
    "cached-chunk": lambda q, k, v: sdpa(q[:, :, -4:], k, v, triangle(4, T, T - 4)),
    "one-query": lambda q, k, v: sdpa(q[:, :, :1], k, v),
    "one-query-padded": lambda q, k, v: sdpa(q[:, :, :1], k, v, (torch.arange(T) > 3)[None, None, None]),
    "broadcast-heads": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], is_causal=True),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_call_is_rewritten(rewriting, call):
    outcome = rewriting.rewrite(CALLS[call], *tensors(), gradients=True)
    outcome.assert_rewritten()
    assert outcome.decisions[0].place.spelling in (
        "F.scaled_dot_product_attention",
        "aten.scaled_dot_product_attention",
    )


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_enable_gqa_is_taken_as_it_is(rewriting, heads):
    shape = (B, heads, T, D)
    outcome = rewriting.rewrite(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), *tensors(k=shape, v=shape), gradients=True
    )
    outcome.assert_rewritten()
    assert outcome.decisions[0].site.key.shape == shape


def test_values_may_have_another_size(rewriting):
    outcome = rewriting.rewrite(lambda q, k, v: sdpa(q, k, v, is_causal=True), *tensors(v=(B, H, T, 5)), gradients=True)
    outcome.assert_rewritten()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rewritten(rewriting, dtype):
    inputs = [x.detach().to(dtype) for x in tensors()]
    outcome = rewriting.rewrite(lambda q, k, v: sdpa(q, k, v, is_causal=True), *inputs)
    assert outcome.reasons == [""]
    assert outcome.output.dtype == dtype
    torch.testing.assert_close(outcome.output, outcome.expected, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_under_autocast_are_rewritten(rewriting):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sdpa(q, k, v.bfloat16(), is_causal=True)

    outcome = rewriting.rewrite(attend, *tensors(), compiled=True)
    assert outcome.reasons == [""]
    assert outcome.output.dtype == torch.bfloat16
    torch.testing.assert_close(outcome.output, outcome.expected, rtol=3e-2, atol=3e-2)


class Scaled(torch.nn.Module):
    """Attention whose scale is a float attribute, which Dynamo makes symbolic under dynamic=True."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True, scale=self.scale)


def test_symbolic_scale_becomes_a_number(rewriting):
    outcome = rewriting.rewrite(Scaled(0.3), *tensors(), dynamic=True)
    # Dynamo may call a backend more than once for one compilation.
    outcome.assert_rewritten(len(outcome.graphs))
    assert outcome.decisions[-1].replacement.scale == 0.3


class ScaledInProduct(Scaled):
    """Written out, with the scale as baddbmm's alpha."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.flatten(0, 1) for each in (q, k.expand_as(q), v.expand_as(q)))
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0.0, alpha=self.scale)
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class ScaledAfterMask(Scaled):
    """Written out, with a scale that what the mask hides is divided by too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(2, 3)).masked_fill(hidden, torch.finfo(q.dtype).min)
        return (scores / self.scale).softmax(-1) @ v


@pytest.mark.parametrize("model", [ScaledInProduct, ScaledAfterMask])
def test_symbolic_scale_of_written_out_attention_becomes_a_number(rewriting, model):
    scale = 0.3 if model is ScaledInProduct else 1 / 0.3
    outcome = rewriting.rewrite(model(scale), *tensors(), dynamic=True)
    outcome.assert_rewritten(len(outcome.graphs))
    assert outcome.decisions[-1].replacement.scale == pytest.approx(0.3)


def test_negative_symbolic_scale_of_a_mask_is_declined(rewriting):
    outcome = rewriting.rewrite(ScaledAfterMask(-2.0), *tensors(), dynamic=True)
    assert {decision.rejection.reason for decision in outcome.decisions} == {Reason.ADDITIVE_BIAS}


DECLINED = {
    "dropout": (Reason.DROPOUT, lambda q, k, v: sdpa(q, k, v, dropout_p=0.1, is_causal=True)),
    "no-mask": (Reason.BIDIRECTIONAL, sdpa),
    "full-mask": (Reason.BIDIRECTIONAL, lambda q, k, v: sdpa(q, k, v, torch.ones(T, T, dtype=torch.bool))),
    "bias": (Reason.ALIBI, lambda q, k, v: sdpa(q, k, v, torch.arange(T).expand(T, T) * -0.1)),
    "batch-broadcast": (Reason.UNSUPPORTED_SHAPE, lambda q, k, v: sdpa(q, k[:1], v[:1], is_causal=True)),
    "ranks-differ": (Reason.UNSUPPORTED_SHAPE, lambda q, k, v: sdpa(q, k[0], v[0], is_causal=True)),
}


@pytest.mark.parametrize("call", DECLINED)
def test_call_is_declined(rewriting, call):
    reason, attend = DECLINED[call]
    rewriting.rewrite(attend, *tensors()).assert_declined(reason)


def test_mask_from_outside_is_declined(rewriting):
    outcome = rewriting.rewrite(sdpa, *tensors(), triangle())
    outcome.assert_declined(Reason.MASK_IS_INPUT)
