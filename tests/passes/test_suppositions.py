"""Padding computed as `(1 - mask) * -large`: taken for padding, and checked, when the graph runs, to be 0 and 1."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa_compile import NSABackend, NSAConfig, explain, rewrite

B, H, T, D = 2, 4, 40, 8
COVERING = NSAConfig(min_keys=0, num_selected=4, selection_block=16, block_length=8, block_stride=4, window=16)
NEG = torch.finfo(torch.float32).min
KEEP = torch.ones(B, T, dtype=torch.long)
KEEP[0, 33:], KEEP[1, :5] = 0, 0


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    """With several, an error inside of a loop that Inductor generates would end the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def hidden(scores):
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


def causal(scores):
    return scores.masked_fill(hidden(scores), NEG)


def order(scores):
    return (~hidden(scores)).to(scores.dtype)


# Name -> how scores `[B, H, T, T]` are masked by `m` `[B, T]`, 1 where a key is visible.
PADDINGS = {
    "one less": lambda s, m: causal(s) + (1 - m[:, None, None]) * -10000,
    "one less, of floats": lambda s, m: causal(s) + (1.0 - m[:, None, None].float()) * NEG,
    "minus one": lambda s, m: causal(s) + ((m - 1) * 1e9)[:, None, None],
    "minus one, of floats": lambda s, m: causal(s) + (m[:, None, None].float() - 1) * 10000.0,
    "subtracted": lambda s, m: causal(s) - 1e9 * (1 - m)[:, None, None],
    "turned, times": lambda s, m: causal(s) + (-m + 1)[:, None, None] * NEG,
    "rsub": lambda s, m: causal(s) + torch.rsub(m[:, None, None], 1.0) * -1e9,
    "cast at last": lambda s, m: causal(s) + ((1 - m[:, None, None]) * -1e4).to(s.dtype),
    "cast to half": lambda s, m: causal(s) + (1.0 - m[:, None, None].half()) * torch.finfo(torch.float16).min,
    "after a sum": lambda s, m: s + (1.0 - order(s)) * NEG + (1.0 - m[:, None, None]) * NEG,
    "after a product": lambda s, m: s + (1.0 - order(s) * m[:, None, None]) * -10000.0,
    "multiplied, then added": lambda s, m: s * order(s) + (1 - order(s)) * -1e9 + (1 - m[:, None, None]) * -1e9,
    "of keys and queries": lambda s, m: causal(s) + (1.0 - (m[:, None, :, None] * m[:, None, None]).float()) * -1e9,
    "hidden where it is 1": lambda s, m: causal(s) + (1 - m)[:, None, None] * -1e9,
    "stretched": lambda s, m: causal(s) + (1.0 - m[:, None, None].expand(-1, -1, T, -1).to(s.dtype)) * NEG,
    "kept for a product": lambda s, m: (causal(s) + (1.0 - m[:, None, None]) * NEG) * 1.0,
}  # fmt: skip

# Likewise with a mask of floats, of which a product or a sum is compared.
COMPARED = {
    "a product is 0": lambda s, m: s.masked_fill(order(s) * m[:, None, None] == 0, NEG),
    "a product is small": lambda s, m: s.masked_fill(order(s) * m[:, None, None] < 0.5, -torch.inf),
    "a product is false": lambda s, m: s.masked_fill(~(m[:, None, None] * order(s)).bool(), NEG),
    "a product is 1": lambda s, m: s.where(m[:, None, None] * order(s) == 1, NEG),
    "keys times queries": lambda s, m: causal(s).masked_fill(m[:, None, None] * m[:, None, :, None] == 0, NEG),
    "a sum is 2": lambda s, m: s.masked_fill(m[:, None, None].long() + order(s).long() != 2, NEG),
}


class Attention(nn.Module):
    """Softmax attention under a mask."""

    def __init__(self, masked) -> None:
        super().__init__()
        self.masked = masked
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        scores = self.masked(q @ k.mT * D**-0.5, mask)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """The attention as a part of a model; it may be run under a checkpoint."""

    def __init__(self, masked, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.attention, self.is_checkpointed = Attention(masked), is_checkpointed

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.is_checkpointed:
            return x + checkpoint(self.attention, x, mask, use_reentrant=False)
        return x + self.attention(x, mask)


def made(masked, **options) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(masked, **options), torch.randn(B, T, H * D)


def seen(output: Tensor, mask: Tensor = KEEP) -> Tensor:
    """The rows of tokens that are no padding: what the others give is nobody's concern."""
    return output[mask.bool()]


def spoilt(mask: Tensor, value: float) -> Tensor:
    mask = mask.clone()
    mask[0, 20] = value
    return mask


@pytest.mark.parametrize("dtype", [torch.long, torch.float32], ids=["integers", "floats"])
@pytest.mark.parametrize("name", PADDINGS)
def test_padding_equals_dense_and_other_values_are_an_error(name, dtype):
    model, x = made(PADDINGS[name])
    mask = KEEP.to(dtype)
    expected = model(x, mask)
    (site,) = explain(model, COVERING)(x, mask).sites
    assert (site.decision, site.reason) == ("rewritten", "")
    assert site.mask.split(", ")[1] == "checked padding"
    assert any("holds 0 and 1 alone, which is checked" in sentence for sentence in site.proof)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=NSABackend(COVERING))
    torch.testing.assert_close(seen(compiled(x, mask)), seen(expected), rtol=1e-4, atol=2e-5)
    for value in (2, -1) if dtype == torch.long else (0.5, float("nan"), 2.0):
        with pytest.raises(RuntimeError, match=r"the attention in attention.*0 and 1 alone"):
            compiled(x, spoilt(mask, value))
    torch.testing.assert_close(seen(compiled(x, mask)), seen(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", COMPARED)
def test_padding_of_floats_that_is_compared_equals_dense_and_other_values_are_an_error(name):
    model, x = made(COMPARED[name])
    mask = KEEP.float()
    compiled = torch.compile(model, backend=NSABackend(COVERING))
    (site,) = explain(model, COVERING)(x, mask).sites
    assert site.decision == "rewritten", site.sentence
    assert "checked padding" in site.mask
    torch.testing.assert_close(seen(compiled(x, mask)), seen(model(x, mask)), rtol=1e-4, atol=2e-5)
    for value in (0.5, float("nan"), 2.0):
        with pytest.raises(RuntimeError, match=r"the attention in attention.*0 and 1 alone"):
            compiled(x, spoilt(mask, value))


def test_data_that_hides_no_key_where_it_is_0_or_1_is_not_supposed_to_be():
    """Times of events are no padding: that none are far apart if all are 0 or 1 proves nothing."""
    model, x = made(lambda s, m: causal(s).masked_fill((m[:, None, :, None] - m[:, None, None]).abs() > 5, NEG))
    (site,) = explain(model, COVERING)(x, KEEP.cumsum(1).float()).sites
    assert site.reason == "MASK_NOT_PROVED"


def test_the_mask_of_a_check_may_change_from_call_to_call():
    model, x = made(PADDINGS["one less, of floats"])
    compiled = torch.compile(model, backend=NSABackend(COVERING))
    for mask in (KEEP, torch.ones_like(KEEP), KEEP.flip(0)):
        torch.testing.assert_close(seen(compiled(x, mask), mask), seen(model(x, mask), mask), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_training_keeps_the_check(dynamic, is_checkpointed):
    model, x = made(PADDINGS["after a sum"], is_checkpointed=is_checkpointed)
    compiled = torch.compile(model, backend=NSABackend(COVERING), dynamic=dynamic)
    results = []
    for each in (model, compiled):
        output = seen(each(x, KEEP))
        results.append((output, torch.autograd.grad(output.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="0 and 1 alone"):
        compiled(x, spoilt(KEEP, 3))


def test_dynamic_lengths_keep_the_check(threads):
    model, x = made(PADDINGS["one less"])
    compiled = torch.compile(model, backend=NSABackend(COVERING), dynamic=True, fullgraph=True)
    for length in (T, 29):
        inputs = x[:, :length], KEEP[:, :length]
        torch.testing.assert_close(
            seen(compiled(*inputs), inputs[1]), seen(model(*inputs), inputs[1]), rtol=1e-4, atol=2e-5
        )
    with pytest.raises(RuntimeError, match="0 and 1 alone"):
        compiled(x[:, :25], spoilt(KEEP, 2)[:, :25])


@pytest.mark.parametrize("is_decomposed", [False, True], ids=["as rewritten", "decomposed"])
def test_exported_programs_keep_the_check(is_decomposed):
    model, x = made(PADDINGS["one less, of floats"])
    program = torch.export.export(model.eval(), (x, KEEP))
    assert len(rewrite(program, COVERING).rewritten) == 1
    program = program.run_decompositions() if is_decomposed else program
    torch.testing.assert_close(seen(program.module()(x, KEEP)), seen(model(x, KEEP)), rtol=1e-4, atol=2e-5)
    with pytest.raises(RuntimeError, match="0 and 1 alone"):
        program.module()(x, spoilt(KEEP, 2))


def test_layers_that_share_a_mask_share_its_check():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention(lambda s, bias: s + bias) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            bias = torch.full((T, T), NEG).triu(1) + (1.0 - mask[:, None, None].float()) * NEG
            for layer in self.layers:
                x = x + layer(x, bias)
            return x

    program = torch.export.export(Layers().eval(), (torch.randn(B, T, H * D), KEEP))
    assert len(rewrite(program, COVERING).rewritten) == 3
    checks = [node for node in program.graph.nodes if node.target is torch.ops.nsa.require_binary.default]
    assert len(checks) == 1


def test_a_check_of_the_model_itself_stays():
    """What it checks is the mask that the rewrite leaves dead."""

    def masked(scores, mask):
        allowed = mask[:, None, None].bool()
        torch._assert_async(allowed.any(), "a batch without tokens")
        return causal(scores).masked_fill(~allowed, NEG)

    model, x = made(masked)
    program = torch.export.export(model.eval(), (x, KEEP))
    assert len(rewrite(program, COVERING).rewritten) == 1
    with pytest.raises(RuntimeError, match="a batch without tokens"):
        program.module()(x, torch.zeros_like(KEEP))


BIASES = {
    "too small": (lambda s, m: causal(s) + (1.0 - m[:, None, None]) * -100.0, "ADDITIVE_BIAS"),
    "to the wrong side": (lambda s, m: causal(s) + (1.0 - m[:, None, None]) * 1e9, "ADDITIVE_BIAS"),
    "not a number": (lambda s, m: causal(s) + (1.0 - m[:, None, None]) * float("-inf"), "ADDITIVE_BIAS"),
    "of weights": (lambda s, m: causal(s) + m[:, None, None].float().log(), "ADDITIVE_BIAS"),
    "the mask itself": (lambda s, m: causal(s) + m[:, None, None], "ADDITIVE_BIAS"),
    "visible nowhere": (lambda s, m: causal(s) + (2.0 - m[:, None, None]) * -1e9, "ADDITIVE_BIAS"),
    "computed": (lambda s, m: causal(s) + (1.0 - m.float().sin()[:, None, None]) * -1e9, "ADDITIVE_BIAS"),
    "weights beside it": (
        lambda s, m: (causal(s) + (1.0 - m[:, None, None]) * -1e9) * (1 + m[:, None, None]), "MULTIPLIED_SCORES"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_biases_that_would_be_no_mask_of_0_and_1_stay_dense(name):
    masked, reason = BIASES[name]
    model, x = made(masked)
    (site,) = explain(model, COVERING)(x, KEEP).sites
    assert site.reason == reason


def test_what_is_learned_is_no_padding():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(1, 1, 1, T))

        def forward(self, x: Tensor) -> Tensor:
            return (causal(x @ x.mT) + (1.0 - self.gate) * -10000.0).softmax(-1) @ x

    x = torch.randn(B, H, T, D)
    assert [site.reason for site in explain(Gated(), COVERING)(x).sites] == ["LEARNED_BIAS"]
    with_gradient = torch.ones(B, T, requires_grad=True)
    model, x = made(PADDINGS["one less, of floats"])
    assert [site.reason for site in explain(model, COVERING)(x, with_gradient).sites] == ["ADDITIVE_BIAS"]


def test_a_mask_over_queries_and_keys_is_still_an_input():
    model, x = made(lambda s, m: s + (1 - m[:, None]) * -10000.0)
    mask = torch.ones(B, T, T, dtype=torch.long).tril()
    assert [site.reason for site in explain(model, COVERING)(x, mask).sites] == ["MASK_IS_INPUT"]


def test_a_check_that_nothing_of_the_mask_depends_on_is_made_all_the_same():
    """For 0 and 1, what is hidden by either of two biases is what the causal mask hides anyway."""
    model, x = made(lambda s, m: causal(s) + (1.0 - m[:, None, None]) * m[:, None, None] * -1e9)
    compiled = torch.compile(model, backend=NSABackend(COVERING))
    (site,) = explain(model, COVERING)(x, KEEP).sites
    assert (site.decision, site.mask) == ("rewritten", "causal")
    torch.testing.assert_close(compiled(x, KEEP), model(x, KEEP), rtol=1e-4, atol=2e-5)
    with pytest.raises(RuntimeError, match="0 and 1 alone"):
        compiled(x, spoilt(KEEP.float(), 0.5))


def test_two_paddings_are_both_checked():
    def both(scores, masks):
        biases = ((1.0 - mask[:, None, None]) * NEG for mask in masks)
        return sum(biases, causal(scores))

    model, x = made(both)
    first, second = KEEP, KEEP.flip(0).float()
    compiled = torch.compile(model, backend=NSABackend(COVERING))
    rows = first * second
    torch.testing.assert_close(
        seen(compiled(x, (first, second)), rows), seen(model(x, (first, second)), rows), rtol=1e-4, atol=2e-5
    )
    for masks in ((spoilt(first, 2), second), (first, spoilt(second, 0.5))):
        with pytest.raises(RuntimeError, match="0 and 1 alone"):
            compiled(x, masks)
