"""flex_attention: its mask_mod is proved, its score_mod read; what else they do, and other blocks, are declined."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

from nsa_compile.passes.sites import Reason
from nsa_compile.rewriting import rewrite

# flex_attention wants a block of keys at least.
B, H, G, T, D = 2, 4, 2, 130, 16
NEG = -float("inf")


def heads(*names: str) -> list[Tensor]:
    """Tensors [B, H, T, D], or [B, H/G, T, D] for a name in capitals, with gradients."""
    torch.manual_seed(0)
    return [torch.randn(B, H // G if name.isupper() else H, T, D) for name in names]


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def blocks(mask_mod=causal, batch: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, batch, None, T, T, device="cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return flex_attention(q, k, v, enable_gqa=True, **options)


def outside(mask_mod, batch: int | None = None):
    """Attention under a block mask that is made before the function is compiled."""
    block_mask = blocks(mask_mod, batch)
    return lambda q, k, v: attend(q, k, v, block_mask=block_mask)


def inside(mask_mod, batch: int | None = None):
    """Attention under a block mask that the compiled function makes."""
    return lambda q, k, v: attend(q, k, v, block_mask=blocks(mask_mod, batch))


def scored(score_mod, **options):
    return lambda q, k, v: attend(q, k, v, score_mod=score_mod, **options)


VALID = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) > 0.2
LENGTHS = torch.tensor([100, T])
IDS = torch.arange(T) // 40
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.05])


def ordered_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = torch.zeros(T, dtype=torch.long)
    starts[40] = 1
    ids = starts.cumsum(0)
    return inside(lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv]))(q, k, v)


ACCEPTED = {
    "mask": (outside(causal), "causal"),
    "mask-made-inside": (inside(causal), "causal"),
    "window": (outside(lambda b, h, q, kv: (q >= kv) & (q - kv < 30)), "causal, window 30"),
    "window-made-inside": (
        inside(and_masks(causal, lambda b, h, q, kv: q - kv < 30)),
        "causal, window 30",
    ),
    "padding": (outside(lambda b, h, q, kv: (q >= kv) & VALID[b, kv]), "causal, padding"),
    "lengths": (outside(lambda b, h, q, kv: (q >= kv) & (kv < LENGTHS[b])), "causal from a position"),
    "lengths-made-inside": (
        inside(lambda b, h, q, kv: (q >= kv) & (kv < LENGTHS[b]), B),
        "causal from a position",
    ),
    "documents": (ordered_documents, "causal, documents"),
    "score": (scored(lambda s, b, h, q, kv: torch.where(q >= kv, s, NEG)), "causal"),
    "score-scaled": (scored(lambda s, b, h, q, kv: torch.where(q >= kv, 2 * s, NEG), scale=0.3), "causal"),
    "score-and-mask": (
        lambda q, k, v: attend(
            q, k, v, block_mask=blocks(), score_mod=lambda s, b, h, q, kv: torch.where(q - kv < 9, s, NEG)
        ),
        "causal, window 9",
    ),
    "score-added": (
        scored(lambda s, b, h, q, kv: s + torch.where(q >= kv, 0.0, NEG)),
        "causal",
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_modifications_are_read(rewriting, case):
    function, mask = ACCEPTED[case]
    outcome = rewriting.rewrite(function, *heads("q", "K", "V"))
    outcome.assert_rewritten()
    (decision,) = outcome.decisions
    assert decision.mask == mask
    assert decision.place.spelling == "flex_attention"
    assert decision.site.key.shape == (B, H // G, T, D)
    assert torch.ops.higher_order.flex_attention not in outcome.targets


@pytest.mark.parametrize("case", ["mask", "padding", "window-made-inside", "documents", "score-scaled"])
def test_symbolic_sizes_are_read(rewriting, case):
    rewriting.rewrite(ACCEPTED[case][0], *heads("q", "K", "V"), dynamic=True).assert_rewritten()


def test_rewritten_attention_has_gradients(rewriting):
    """flex_attention itself has none on a CPU; they are those of the same attention as SDPA."""
    (graph,) = rewriting.rewrite(ACCEPTED["score"][0], *heads("q", "K", "V")).graphs
    inputs = [each.requires_grad_() for each in heads("q", "K", "V")]
    dense = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    weight = torch.linspace(-1, 1, dense.numel()).view_as(dense)
    gradients = (torch.autograd.grad((output * weight).sum(), inputs) for output in (graph(*inputs)[0], dense))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)


def test_scores_may_be_masked_by_data_from_the_graph(rewriting):
    def model(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        keys = valid & (k.mean((1, 3)) < 10)
        return scored(lambda s, b, h, q, kv: torch.where((q >= kv) & keys[b, kv], s, NEG))(q, k, v)

    outcome = rewriting.rewrite(model, *heads("q", "K", "V"), VALID)
    outcome.assert_rewritten()
    assert outcome.decisions[0].mask == "causal, padding"


class Program(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return inside(lambda b, h, q, kv: (q >= kv) & (kv < lengths[b]), B)(q, k, v)


class Scored(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return ACCEPTED["score-added"][0](q, k, v)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("program", [Program, Scored])
def test_exported_modifications_are_read(rewriting, program, strict):
    inputs = (*heads("q", "K", "V"), LENGTHS)
    exported = torch.export.export(program(), inputs, strict=strict)
    expected = exported.module()(*inputs)
    report = rewrite(exported, rewriting.covering)
    assert [site.reason for site in report.sites] == [""]
    torch.testing.assert_close(exported.module()(*inputs), expected, rtol=1e-4, atol=2e-5)


def with_statistics(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output, lse = attend(q, k, v, block_mask=blocks(), return_lse=True)
    return output * lse.sigmoid()[..., None]


def with_chosen_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One block of keys for each block of queries, chosen by data, under a causal mask_mod."""
    chosen = k[:, :1, :: (T + 1) // 2].mean(-1).argmax(-1).int()
    count = torch.ones(B, 1, 2, dtype=torch.int32)
    index = chosen[:, :, None, None].expand(B, 1, 2, 2).contiguous()
    return attend(q, k, v, block_mask=BlockMask.from_kv_blocks(count, index, mask_mod=causal, seq_lengths=(T, T)))


def with_lists_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block_mask = blocks()
    block_mask.kv_num_blocks.clamp_(max=1)
    return attend(q, k, v, block_mask=block_mask)


def with_blocks_of_another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block_mask = blocks(lambda b, h, q, kv: (q >= kv) & (q - kv < 9))
    block_mask.mask_mod = causal
    return attend(q, k, v, block_mask=block_mask)


def biased(bias):
    return scored(lambda s, b, h, q, kv: torch.where(q >= kv, s + bias(b, h, q, kv), NEG))


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, 2 * T))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return biased(lambda b, h, q, kv: self.table[h, q - kv + T])(q, k, v)


DECLINED = {
    "no-mask": (Reason.BIDIRECTIONAL, attend),
    "no-op": (Reason.BIDIRECTIONAL, outside(noop_mask)),
    "bidirectional-window": (Reason.BIDIRECTIONAL, outside(lambda b, h, q, kv: (q - kv).abs() < 9)),
    "prefix": (Reason.BIDIRECTIONAL, outside(or_masks(causal, lambda b, h, q, kv: kv < 10))),
    "per-head": (Reason.MASK_DEPENDS_ON_HEAD, outside(lambda b, h, q, kv: (q >= kv) & (q - kv < 8 * (h + 1)))),
    "dilated": (Reason.MASK_NOT_INTERVAL, outside(lambda b, h, q, kv: (q >= kv) & ((q - kv) % 2 == 0))),
    "documents-unsorted": (
        Reason.UNSORTED_DOCUMENTS,
        outside(lambda b, h, q, kv: (q >= kv) & (IDS[q] == IDS[kv])),
    ),
    "unknown-operation": (Reason.MASK_NOT_PROVED, outside(lambda b, h, q, kv: (q >= kv) & (torch.sin(kv) > 0))),
    "unknown-of-a-key": (
        Reason.MASK_NOT_PROVED,
        scored(lambda s, b, h, q, kv: torch.where((q >= kv) & (torch.sin(kv) > 0), s, NEG)),
    ),
    "by-score": (
        Reason.MASK_NOT_PROVED,
        scored(lambda s, b, h, q, kv: torch.where((q >= kv) & (s > 0), s, NEG)),
    ),
    "softcap": (Reason.SOFTCAP, scored(lambda s, b, h, q, kv: torch.where(q >= kv, torch.tanh(s / 20) * 20, NEG))),
    "alibi": (Reason.ALIBI, biased(lambda b, h, q, kv: SLOPES[h] * (kv - q))),
    "distance": (Reason.ALIBI, biased(lambda b, h, q, kv: kv - q)),
    "learned-bias": (Reason.LEARNED_BIAS, Learned()),
    "weak-mask": (Reason.ADDITIVE_BIAS, scored(lambda s, b, h, q, kv: torch.where(q >= kv, s, -5.0))),
    "head-scale": (
        Reason.MULTIPLIED_SCORES,
        scored(lambda s, b, h, q, kv: torch.where(q >= kv, s * SLOPES[h], NEG)),
    ),
    "sigmoid": (Reason.UNKNOWN_SPELLING, scored(lambda s, b, h, q, kv: torch.where(q >= kv, s.sigmoid(), NEG))),
    "statistics": (Reason.LOG_SUM_EXP_USED, with_statistics),
    "chosen-blocks": (Reason.ALREADY_SPARSE, with_chosen_blocks),
    "lists-changed": (Reason.ALREADY_SPARSE, with_lists_changed),
    "blocks-of-another-mask": (Reason.MASK_NOT_PROVED, with_blocks_of_another_mask),
    "batch-of-one-block-mask": (
        Reason.MASK_NOT_PROVED,
        inside(lambda b, h, q, kv: (q >= kv) & (kv < LENGTHS[b])),
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_other_modifications_are_declined(rewriting, case):
    reason, function = DECLINED[case]
    rewriting.rewrite(function, *heads("q", "K", "V")).assert_declined(reason)


def test_operations_inside_vmap_that_cannot_be_followed_are_declined(rewriting):
    """There one element stands for all: what is not followed must not pass for a number that is the same for all."""

    def model(q: Tensor) -> Tensor:
        place = torch.arange(T)
        mask = torch.vmap(torch.vmap(lambda i, j: (j <= i) & (torch.sin(j) > 0), (None, 0)), (0, None))(place, place)
        return nn.functional.scaled_dot_product_attention(q, q, q, mask)

    rewriting.rewrite(model, *heads("q")).assert_declined(Reason.MASK_NOT_PROVED)
