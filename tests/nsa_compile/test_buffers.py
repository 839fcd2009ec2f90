"""Masks kept in buffers are read by value; a buffer that changes later is noticed."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend

from nsa_compile import NSABackend, NSAConfig, collect_reports, compat, explain

LENGTH = 16
# Selects few keys, so that the rewritten model differs from the dense one where it runs.
SPARSE = NSAConfig(
    block_length=2, block_stride=2, selection_block=2, num_selected=3, num_initial=1, num_local=1, window=3, min_keys=0
)
COVERING = SPARSE.replace(num_selected=16)


class BufferedAttention(nn.Module):
    """As in nanoGPT: the mask is a triangle of the longest length, of which a corner is used.

    With `fill`, what is filled in stands in a buffer too, as in older copies of GPT-2.
    """

    def __init__(self, mask, is_written=False, fill=None):
        super().__init__()
        self.register_buffer("masked_bias", None if fill is None else torch.tensor(fill))
        self.project = nn.Linear(8, 24)
        self.register_buffer("bias", mask.view(1, 1, *mask.shape))
        self.is_written = is_written

    def forward(self, x):
        if self.is_written:
            self.bias[..., -1] = True
        length = x.shape[1]
        query, key, value = self.project(x).view(2, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * 0.5
        visible = self.bias[:, :, :length, :length] != 0
        if self.masked_bias is None:
            scores = scores.masked_fill(~visible, float("-inf"))
        else:
            scores = torch.where(visible, scores, self.masked_bias.to(scores.dtype))
        return scores.softmax(-1) @ value


def triangle(shift=0, size=32):
    return torch.ones(size, size, dtype=torch.bool).tril(shift)


@pytest.fixture
def without_inductor(monkeypatch):
    monkeypatch.setattr(
        compat, "compile_with_inductor", lambda graph, inputs, _: lookup_backend("eager")(graph, inputs)
    )


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def compiled(model, config=COVERING, **options):
    return torch.compile(model, backend=NSABackend(config), **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_triangle_in_a_buffer_is_causal(without_inductor, dtype, dynamic):
    model, x = BufferedAttention(triangle().to(dtype)), torch.randn(2, LENGTH, 8)
    with collect_reports() as reports:
        actual = compiled(model, fullgraph=True, dynamic=dynamic)(x)
    assert {(site.decision, site.mask) for report in reports for site in report.sites} == {("rewritten", "causal")}
    torch.testing.assert_close(actual, model(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_filled_in_may_stand_in_a_buffer(without_inductor, caplog, dynamic):
    model, x = BufferedAttention(triangle(), fill=-1e4), torch.randn(2, LENGTH, 8)
    function = compiled(model, SPARSE, fullgraph=True, dynamic=dynamic)
    with collect_reports() as reports:
        sparse = function(x)
    assert [(site.decision, site.mask) for site in reports[-1].sites] == [("rewritten", "causal")]
    assert not torch.allclose(sparse, model(x))
    model.masked_bias.fill_(-1.0)
    torch.testing.assert_close(function(x), model(x))
    assert len(warnings_in(caplog)) == 1
    model.masked_bias.fill_(-1e4)
    torch.testing.assert_close(function(x), sparse)


def test_a_triangle_may_be_a_plain_attribute(without_inductor, caplog):
    """As in fairseq: a square tensor that the module holds, but did not register."""
    model, x = BufferedAttention(triangle()), torch.randn(2, LENGTH, 8)
    del model.bias
    model.bias = triangle().view(1, 1, 32, 32)
    assert not list(model.buffers())
    function = compiled(model, SPARSE, fullgraph=True)
    with collect_reports() as reports:
        sparse = function(x)
    assert [(site.decision, site.mask) for site in reports[-1].sites] == [("rewritten", "causal")]
    model.bias.fill_(True)
    torch.testing.assert_close(function(x), model(x))
    assert len(warnings_in(caplog)) == 1
    model.bias = triangle().view(1, 1, 32, 32)
    torch.testing.assert_close(function(x), sparse)


def test_an_attribute_that_is_not_square_is_data(without_inductor):
    class PaddedAttention(nn.Module):
        def forward(self, query):
            visible = self.valid[:, None, None, :] & triangle(size=LENGTH)
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=visible)

    model, query = PaddedAttention(), torch.randn(2, 2, LENGTH, 4)
    function = compiled(model, fullgraph=True)
    for length in (LENGTH, LENGTH - 3):
        model.valid = (torch.arange(LENGTH) < length).expand(2, -1).contiguous()
        with collect_reports() as reports:
            actual = function(query)
        torch.testing.assert_close(actual, model(query))
        assert len(reports) == (length == LENGTH)
        assert all(site.mask == "causal, padding" for report in reports for site in report.sites)


def written_itself(fill):
    fill.add_(1e4)
    return fill


def written_under_another_name(fill):
    alias = fill.to(torch.float32)
    fill.add_(1e4)
    return alias


def written_as_a_copy(fill):
    copy = fill.half()
    copy.add_(1e4)
    return copy.float()


@pytest.mark.parametrize("write", [written_itself, written_under_another_name, written_as_a_copy])
def test_what_is_filled_in_and_written_in_the_graph_is_not_read(write):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("masked_bias", torch.tensor(-1e4))

        def forward(self, query):
            fill = write(self.masked_bias)
            return torch.where(triangle(size=LENGTH), query @ query.mT, fill).softmax(-1) @ query

    (site,) = explain(Attention(), COVERING)(torch.randn(2, 2, LENGTH, 4)).sites
    assert (site.decision, site.reason) == ("declined", "UNKNOWN_SPELLING")


@pytest.mark.parametrize("fill", [-1.0, 0.0])
def test_what_is_filled_in_and_hides_nothing_is_a_bias(without_inductor, fill):
    model, x = BufferedAttention(triangle(), fill=fill), torch.randn(2, LENGTH, 8)
    with collect_reports() as reports:
        actual = compiled(model, fullgraph=True)(x)
    assert [site.reason for report in reports for site in report.sites] == ["ADDITIVE_BIAS"]
    torch.testing.assert_close(actual, model(x))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (triangle(1), "BIDIRECTIONAL"),
        (triangle().logical_and(torch.arange(32) != 5), "MASK_IS_INPUT"),
        (triangle().triu(-3).logical_not(), "BIDIRECTIONAL"),
    ],
    ids=["one key of the future", "a hole", "all but a band"],
)
def test_other_buffers_are_declined(mask, reason):
    (site,) = explain(BufferedAttention(mask), COVERING)(torch.randn(2, LENGTH, 8)).sites
    assert (site.decision, site.reason) == ("declined", reason)


def test_a_buffer_that_the_graph_writes_is_not_read():
    (site,) = explain(BufferedAttention(triangle(), is_written=True), COVERING)(torch.randn(2, LENGTH, 8)).sites
    assert site.decision == "declined"


def test_a_parameter_is_not_read():
    model = BufferedAttention(triangle())
    mask = model.bias.float()
    del model.bias
    model.bias = nn.Parameter(mask, requires_grad=False)
    (site,) = explain(model, COVERING)(torch.randn(2, LENGTH, 8)).sites
    assert (site.decision, site.reason) == ("declined", "MASK_IS_INPUT")


def test_a_changed_buffer_is_noticed(without_inductor, caplog):
    """From then on the graph runs dense, with the buffer as it is now."""
    model, x = BufferedAttention(triangle()), torch.randn(2, LENGTH, 8)
    run = compiled(model, SPARSE)
    assert not torch.allclose(run(x), model(x))
    model.bias.logical_and_(triangle(-1) | torch.eye(32, dtype=torch.bool)[:1])
    for _ in range(2):
        torch.testing.assert_close(run(x), model(x))
    assert [record.message[:8] for record in warnings_in(caplog)] == ["A tensor"]


def test_a_buffer_that_is_loaded_with_the_same_mask_stays(without_inductor, caplog):
    model, x = BufferedAttention(triangle()), torch.randn(2, LENGTH, 8)
    run = compiled(model, SPARSE)
    before = run(x)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(run(x), before)
    assert not warnings_in(caplog)


def test_gradients_through_a_watched_graph(without_inductor):
    model, x = BufferedAttention(triangle()), torch.randn(2, LENGTH, 8)
    model(x).square().sum().backward()
    expected, model.project.weight.grad = model.project.weight.grad, None
    compiled(model)(x).square().sum().backward()
    torch.testing.assert_close(model.project.weight.grad, expected)


def test_through_inductor():
    model, x = BufferedAttention(triangle()), torch.randn(2, LENGTH, 8)
    run = compiled(model)
    torch.testing.assert_close(run(x), model(x))
    model.bias.copy_(triangle().triu(-4))
    torch.testing.assert_close(run(x), model(x))
