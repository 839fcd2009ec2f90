"""Keys and values are taken as they were before a model repeated them for grouped queries, where that is certain."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

B, H, G, T, D = 2, 6, 3, 20, 8
KV = H // G


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, heads, T, D, requires_grad=True) for heads in (H, KV, KV)]


REPETITIONS = {
    "expand-reshape": lambda x: x[:, :, None, :, :].expand(B, KV, G, T, D).reshape(B, H, T, D),
    "unsqueeze-expand-flatten": lambda x: x.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(1, 2),
    "expand-contiguous-view": lambda x: x.unsqueeze(2).expand(-1, -1, G, -1, -1).contiguous().view(B, H, T, D),
    "broadcast-to": lambda x: torch.broadcast_to(x[:, :, None], (B, KV, G, T, D)).reshape(B, -1, T, D),
    "repeat": lambda x: x[:, :, None].repeat(1, 1, G, 1, 1).view(B, H, T, D),
    "repeat-interleave": lambda x: x.repeat_interleave(G, dim=1),
    "repeat-interleave-function": lambda x: torch.repeat_interleave(x, G, 1),
    "repeat-interleave-dim--3": lambda x: x.repeat_interleave(repeats=G, dim=-3),
    "stack": lambda x: torch.stack([x, x, x], dim=2).flatten(1, 2),
    "cat": lambda x: torch.cat([x[:, :, None]] * G, dim=2).view(B, H, T, D),
    "sequence-first": lambda x: (
        x.transpose(1, 2)[:, :, :, None].expand(B, T, KV, G, D).reshape(B, T, H, D).transpose(1, 2)
    ),
    "sequence-first-interleaved": lambda x: x.transpose(1, 2).repeat_interleave(G, dim=2).transpose(1, 2),
    "einsum-free-permute": lambda x: (
        x.permute(1, 0, 2, 3)[:, None].expand(KV, G, B, T, D).flatten(0, 1).transpose(0, 1)
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("repetition", REPETITIONS)
def test_repetition_is_undone(rewriting, repetition, dynamic):
    if dynamic and repetition in ("stack", "cat"):
        pytest.skip("their shapes are written out above")
    repeat = REPETITIONS[repetition]
    outcome = rewriting.rewrite(lambda q, k, v: attend(q, repeat(k), repeat(v)), *tensors(), gradients=not dynamic)
    outcome.assert_rewritten()
    (decision,) = outcome.decisions
    assert decision.site.key.shape[1] == decision.site.value.shape[1] == KV
    assert not {"expand", "repeat", "repeat_interleave", torch.stack, torch.cat} & set(outcome.targets)


NOT_GROUPED = {
    "heads-in-turn": (lambda x: x.repeat(1, G, 1, 1), lambda x: x.repeat(1, G, 1, 1)),
    "heads-in-turn-cat": (lambda x: torch.cat([x] * G, 1), lambda x: torch.cat([x] * G, 1)),
    "keys-alone": (lambda x: x.repeat_interleave(G, 1), lambda x: x.repeat(1, G, 1, 1)),
    "reversed": (lambda x: x.repeat_interleave(G, 1).flip(1), lambda x: x.repeat_interleave(G, 1)),
}


@pytest.mark.parametrize("repetition", NOT_GROUPED)
def test_other_repetition_is_left_and_the_attention_is_rewritten(rewriting, repetition):
    repeat_keys, repeat_values = NOT_GROUPED[repetition]
    outcome = rewriting.rewrite(lambda q, k, v: attend(q, repeat_keys(k), repeat_values(v)), *tensors(), gradients=True)
    outcome.assert_rewritten()
    assert outcome.decisions[0].site.key.shape[1] == H


@pytest.mark.parametrize("heads", [(KV, H), (H, KV), (1, KV), (KV, 1)])
def test_keys_and_values_may_have_different_numbers_of_heads(rewriting, heads):
    """`enable_gqa` repeats each for itself."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    query, *_ = tensors()
    keys, values = (torch.randn(B, number, T, D, requires_grad=True) for number in heads)
    outcome = rewriting.rewrite(model, query, keys, values, gradients=True)
    outcome.assert_rewritten()
    assert outcome.decisions[0].site.key.shape[1] == outcome.decisions[0].site.value.shape[1] == max(heads)


def test_gradient_that_is_stopped_stays_stopped(rewriting):
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeated = k.detach().repeat_interleave(G, 1)
        return attend(q, repeated, v.repeat_interleave(G, 1)) + k.sum() * 0

    rewriting.rewrite(model, *tensors(), gradients=True).assert_rewritten()


def test_repetition_is_kept_where_the_source_is_written_in_between(rewriting):
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        repeated = k.repeat_interleave(G, 1)
        k.add_(1.0)
        return attend(q, repeated, v.repeat_interleave(G, 1)) + k.sum()

    outcome = rewriting.rewrite(model, *tensors())
    outcome.assert_rewritten()
    assert "repeat_interleave" in outcome.targets
