"""Masks that are no interval, or are not proved to be one: each is declined, for its own reason."""

import pytest
import torch

from nsa_compile import NSAConfig, explain
from nsa_compile.passes.sites import MaskKind, Reason, Rejection

NEG = float("-inf")


def places(query, key, offset=0):
    return torch.arange(query.shape[2])[:, None] + offset, torch.arange(key.shape[2])[None, :]


def causal(query, key, diagonal=0):
    i, j = places(query, key)
    return j <= i + diagonal


def additive(allowed):
    return torch.where(allowed, 0.0, NEG)


PAD = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]])
IDS = torch.tensor([[0, 0, 1, 1, 0, 0, 2], [3, 1, 1, 2, 2, 3, 3]])
SLOPES = torch.tensor([0.5, 0.25, 0.125])
SQUARE = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()


def same(documents):
    return documents[:, None, :, None] == documents[:, None, None, :]


def selected(q, k, scores):
    best = scores.topk(3, dim=-1).indices
    return torch.zeros(2, 1, 7, 7, dtype=torch.bool).scatter(-1, best, True)


def overwritten(q, k):
    mask = causal(q, k).clone()
    mask.view(-1)[::2].fill_(True)
    return mask & causal(q, k)


def additive_overwritten(q, k):
    mask = additive(causal(q, k))
    mask.view(-1)[5:9].fill_(0.0)
    return mask


def overwritten_by_numpy(q, k):
    mask = causal(q, k)
    mask.numpy()[2:4].fill(True)
    return mask


# Name -> (program, data, reason).
DECLINED = {
    "nothing hidden": (lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), (), Reason.BIDIRECTIONAL),
    "padding alone": (lambda q, k, m: m[:, None, None, :].bool(), (PAD,), Reason.BIDIRECTIONAL),
    "lengths alone": (
        lambda _, k, n: (torch.arange(k.shape[2]) < n[:, None])[:, None, None],
        (torch.tensor([4, 7]),),
        Reason.BIDIRECTIONAL,
    ),
    "one key too many": (lambda q, k: causal(q, k, 1), (), Reason.BIDIRECTIONAL),
    "triangle one key too wide": (
        lambda q, k: torch.ones(q.shape[2], k.shape[2]).tril(1).bool(),
        (),
        Reason.BIDIRECTIONAL,
    ),
    "additive triangle one key too wide": (
        lambda q, k: torch.full((q.shape[2], k.shape[2]), NEG).triu(2),
        (),
        Reason.BIDIRECTIONAL,
    ),
    "queries and keys swapped": (lambda q, k: places(q, k)[0] <= places(q, k)[1], (), Reason.BIDIRECTIONAL),
    "polarity swapped": (lambda q, k: torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), (), Reason.BIDIRECTIONAL),
    "additive polarity swapped": (lambda q, k: additive(~causal(q, k)), (), Reason.BIDIRECTIONAL),
    "window to both sides": (
        lambda q, k: (places(q, k)[0] - places(q, k)[1]).abs() <= 2,
        (),
        Reason.BIDIRECTIONAL,
    ),
    "blocks that see their future": (
        lambda q, k: places(q, k)[1] // 2 <= places(q, k)[0] // 2,
        (),
        Reason.BIDIRECTIONAL,
    ),
    "documents in both directions": (
        lambda q, k, m: m.bool().cumsum(-1)[:, None, :, None] == m.bool().cumsum(-1)[:, None, None, :],
        (PAD,),
        Reason.BIDIRECTIONAL,
    ),
    "prefix": (lambda q, k, n: causal(q, k) | (places(q, k)[1] < n), (torch.tensor(3),), Reason.BIDIRECTIONAL),
    "prefix of each sequence": (
        lambda q, k, n: causal(q, k) | (torch.arange(k.shape[2]) < n[:, None])[:, None, None],
        (torch.tensor([2, 3]),),
        Reason.BIDIRECTIONAL,
    ),
    "prefix by a maximum": (
        lambda q, k, n: places(q, k)[1] <= torch.maximum(places(q, k)[0], n),
        (torch.tensor(3),),
        Reason.BIDIRECTIONAL,
    ),
    "causal or padding": (
        lambda q, k, m: causal(q, k) | m[:, None, None, :].bool(),
        (PAD,),
        Reason.BIDIRECTIONAL,
    ),
    "images see each other": (
        lambda q, k, m: causal(q, k) | (m[:, None, :, None] * m[:, None, None, :]).bool(),
        (PAD,),
        Reason.BIDIRECTIONAL,
    ),
    "a hole": (
        lambda q, k: causal(q, k) & (places(q, k)[1] != places(q, k)[0] - 2),
        (),
        Reason.MASK_NOT_INTERVAL,
    ),
    "dilated": (
        lambda q, k: causal(q, k) & ((places(q, k)[0] - places(q, k)[1]) % 2 == 0),
        (),
        Reason.MASK_NOT_INTERVAL,
    ),
    "window and the first keys": (
        lambda q, k: causal(q, k) & ((places(q, k)[1] > places(q, k)[0] - 3) | (places(q, k)[1] < 2)),
        (),
        Reason.MASK_NOT_INTERVAL,
    ),
    "padding or the diagonal": (
        lambda q, k, m: causal(q, k) & (m[:, None, None, :].bool() | (places(q, k)[0] == places(q, k)[1])),
        (PAD,),
        Reason.MASK_NOT_INTERVAL,
    ),
    "padding that depends on the query": (
        lambda q, k, m: causal(q, k) & (m[:, None, None, :] > m[:, None, :, None] - 1),
        (PAD,),
        Reason.MASK_NOT_INTERVAL,
    ),
    "nothing at all": (
        lambda q, k: causal(q, k) & ~causal(q, k),
        (),
        Reason.MASK_NOT_INTERVAL,
    ),
    "documents by ids": (
        lambda q, k, d: causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]),
        (IDS,),
        Reason.UNSORTED_DOCUMENTS,
    ),
    "documents by a sum of ids": (
        lambda q, k, d: causal(q, k) & (d.cumsum(-1)[:, None, :, None] == d.cumsum(-1)[:, None, None, :]),
        (IDS - 1,),
        Reason.UNSORTED_DOCUMENTS,
    ),
    "documents from sums that begin too high": (
        lambda q, k, t: causal(q, k) & same(torch.nn.functional.pad((t == 0).cumsum(-1)[:, :-1], (1, 0), value=1)),
        (IDS,),
        Reason.MASK_NOT_INTERVAL,
    ),
    "documents from sums less other marks": (
        lambda q, k, t: causal(q, k) & same((t == 0).cumsum(-1) - (t == 1).long()),
        (IDS,),
        Reason.MASK_NOT_INTERVAL,
    ),
    "positions without documents": (
        lambda q, k, p: p[:, None, None, :] <= p[:, None, :, None],
        (IDS,),
        Reason.MASK_NOT_INTERVAL,
    ),
    "heads differ": (
        lambda q, k: causal(q, k) & (places(q, k)[1] > places(q, k)[0] - torch.arange(2, 5)[:, None, None]),
        (),
        Reason.MASK_DEPENDS_ON_HEAD,
    ),
    "padding of each head": (
        lambda q, k, m: causal(q, k) & m[:, :, None].bool(),
        (torch.stack([PAD, PAD, 1 - PAD], 1),),
        Reason.MASK_DEPENDS_ON_HEAD,
    ),
    "slopes": (
        lambda q, k, s: additive(causal(q, k)) + s[:, None, None] * (places(q, k)[1] - places(q, k)[0]),
        (SLOPES,),
        Reason.ALIBI,
    ),
    "slopes made in the graph": (
        lambda q, k: (
            additive(causal(q, k))
            + torch.pow(2.0, -torch.arange(1, 4.0))[:, None, None] * (places(q, k)[1] - places(q, k)[0])
        ),
        (),
        Reason.ALIBI,
    ),
    "one slope": (lambda q, k: additive(causal(q, k)) - 2.0 * (places(q, k)[0] - places(q, k)[1]), (), Reason.ALIBI),
    "hardly hidden": (lambda q, k: torch.where(causal(q, k), 0.0, -100.0), (), Reason.ADDITIVE_BIAS),
    "visible is not 0": (lambda q, k: torch.where(causal(q, k), 1.0, NEG), (), Reason.ADDITIVE_BIAS),
    "hidden to the wrong side": (lambda q, k: torch.where(causal(q, k), 0.0, 1e9), (), Reason.ADDITIVE_BIAS),
    "padding of any numbers, times a small number": (
        lambda q, k, m: additive(causal(q, k)) + (1.0 - m[:, None, None, :]) * -1e3,
        (PAD,),
        Reason.ADDITIVE_BIAS,
    ),
    "a bias of keys": (
        lambda q, k, x: additive(causal(q, k)) + (2 * x)[:, None, None],
        (torch.randn(2, 7),),
        Reason.ADDITIVE_BIAS,
    ),
    "mask from outside": (lambda q, k, m: m & causal(q, k), (SQUARE,), Reason.MASK_IS_INPUT),
    "additive mask from outside": (lambda q, k, m: m * 1, (additive(SQUARE),), Reason.MASK_IS_INPUT),
    "picked by score": (selected, (torch.randn(2, 1, 7, 7),), Reason.ALREADY_SPARSE),
    "picked by score, causal": (
        lambda q, k, s: selected(q, k, s) & causal(q, k),
        (torch.randn(2, 1, 7, 7),),
        Reason.ALREADY_SPARSE,
    ),
    "above a score of each head": (
        lambda q, k, s: causal(q, k) & (s >= s.topk(3, dim=-1).values[..., -1:]),
        (torch.randn(2, 3, 7, 7),),
        Reason.ALREADY_SPARSE,
    ),
    "unknown operation": (
        lambda q, k, m: causal(q, k) & torch.kron(m, m).reshape(4, 49)[0].reshape(7, 7).bool(),
        (PAD,),
        Reason.MASK_NOT_PROVED,
    ),
    "positions in half precision": (
        lambda q, k: places(q, k)[1].half() <= places(q, k)[0].half(),
        (),
        Reason.MASK_NOT_PROVED,
    ),
    "written through a view": (overwritten, (), Reason.MUTATED_MASK),
    "written by NumPy": (overwritten_by_numpy, (), Reason.MUTATED_MASK),
    "additive, written through a view": (additive_overwritten, (), Reason.MUTATED_MASK),
}


@pytest.mark.parametrize("name", DECLINED)
def test_masks_that_are_no_interval_are_declined(oracle, name):
    program, data, reason = DECLINED[name]
    oracle.assert_declined(oracle.prove_program(program, *data), reason)


def test_learned_bias_is_declined(oracle):
    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(32, 3)

        def forward(self, q, k):
            i, j = places(q, k)
            bias = self.table((i - j).clamp(0, 31)).permute(2, 0, 1)
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, bias + additive(causal(q, k)))

    graph = oracle.capture(Biased(), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)).graphs[0]
    oracle.assert_declined(oracle.prove(graph, oracle.sites(graph)[0]), Reason.LEARNED_BIAS)


def test_a_graph_without_shapes_is_declined(oracle):
    def attend(q, k, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)

    captured = oracle.capture(attend, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), SQUARE).graphs[0]
    (site,) = oracle.sites(captured)
    del site.mask.node.meta["example_value"]
    oracle.assert_declined(oracle.prove(captured, site), Reason.UNKNOWN_SHAPES)


def test_a_mask_of_five_dimensions_is_declined(oracle):
    def attend(q, k):
        mask = torch.ones(1, 1, 1, 7, 7).tril().bool()
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)

    captured = oracle.capture(attend, torch.randn(1, 2, 3, 7, 4), torch.randn(1, 2, 3, 7, 4)).graphs[0]
    oracle.assert_declined(oracle.prove(captured, oracle.sites(captured)[0]), Reason.MASK_NOT_PROVED)


def test_the_reason_names_the_operation_that_stopped_the_proof(oracle):
    program, data, _ = DECLINED["unknown operation"]
    result = oracle.prove_program(program, *data)
    assert isinstance(result, Rejection)
    assert "kron" in result.sentence
    assert [node.target for node in result.nodes] == [torch.kron]


def test_a_boolean_mask_that_is_added_is_a_bias(oracle):
    oracle.assert_declined(oracle.prove_program(causal, kind=MaskKind.ADDITIVE), Reason.ADDITIVE_BIAS)


def test_a_mask_that_is_to_be_read_the_other_way_round_is_declined(oracle):
    result = oracle.prove_program(causal, kind=MaskKind.BLOCKED)
    oracle.assert_declined(result, Reason.BIDIRECTIONAL)


@pytest.mark.parametrize("order", [1, -1])
def test_a_bias_by_position_is_named_before_a_mask_of_unknown_values(order):
    """Whichever of the two is added first: the bias is there whatever the mask holds."""
    positions = torch.nn.Embedding(16, 3)

    def attend(query, key, value, mask):
        i, j = places(query, key)
        bias = positions((j - i).clamp(-7, 7) + 7).permute(2, 0, 1)[None]
        unknown = (1.0 - mask[:, None, None, :]) * torch.finfo(torch.float32).min
        first, second = (bias, unknown)[::order]
        return (query @ key.mT + first + second).softmax(-1) @ value

    tensors = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    (site,) = explain(attend, NSAConfig(min_keys=0))(*tensors, PAD).sites
    assert site.reason == "LEARNED_BIAS"


def test_a_learned_bias_is_named_where_masks_have_another_layout():
    """As in ProphetNet's second stream: the mask tells the streams apart, which no batch and no head does."""

    class Streams(torch.nn.Module):
        def __init__(self, is_biased: bool) -> None:
            super().__init__()
            self.positions = torch.nn.Embedding(7, 7) if is_biased else None

        def forward(self, x):
            streams = torch.arange(7) <= torch.arange(7)[:, None] + torch.arange(2)[:, None, None]
            scores = torch.einsum("bnhtc,bnhsc->bnhts", x, x) + additive(streams)[None, :, None]
            if self.positions is not None:
                scores = scores + self.positions(torch.arange(7))
            return torch.einsum("bnhts,bnhsc->bnhtc", scores.softmax(-1), x)

    for is_biased, reason in ((True, "LEARNED_BIAS"), (False, "MASK_NOT_PROVED")):
        (site,) = explain(Streams(is_biased), NSAConfig(min_keys=0))(torch.randn(2, 2, 3, 7, 4)).sites
        assert site.reason == reason


@pytest.mark.parametrize("is_repeated", [False, True], ids=["one for all heads", "repeated for the heads"])
@pytest.mark.parametrize("has_order", [False, True], ids=["alone", "beside a causal mask"])
def test_a_padding_bias_of_unknown_values_hides_the_future_from_nobody(has_order, is_repeated):
    """Alone it makes an encoder, whatever it holds; beside a causal mask it is what stops the proof."""

    def attend(query, key, value, mask):
        unknown = (1.0 - mask[:, None, None, :].repeat(1, 3 if is_repeated else 1, 1, 1)) * -1000.0
        scores = query @ key.mT + unknown
        return (scores + additive(causal(query, key)) if has_order else scores).softmax(-1) @ value

    tensors = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    (site,) = explain(attend, NSAConfig(min_keys=0))(*tensors, PAD).sites
    assert site.reason == ("ADDITIVE_BIAS" if has_order else "BIDIRECTIONAL")


def test_a_second_cross_attention_is_told_from_an_encoder():
    """What the first one returns comes from its values; its weights went through a dropout that does nothing."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))

        def forward(self, x, memory):
            for query, key, value in (self.layers[:3], self.layers[3:]):
                weights = (query(x) @ key(memory).mT).softmax(-1)
                x = x + torch.nn.functional.dropout(weights, 0.1, training=False) @ value(memory)
            return x

    report = explain(Decoder(), NSAConfig(min_keys=0))(torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4))
    assert [site.reason for site in report.sites] == ["CROSS_ATTENTION"] * 2


NOISES = {
    "added": lambda scores: scores + 0.1 * torch.randn_like(scores),
    "uniform, of one row": lambda scores: scores + torch.rand(scores.shape[-1]),
    "of Gumbel": lambda scores: scores - torch.empty_like(scores).exponential_().log(),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_no_bias_by_position_and_not_learned(name):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(12, 36)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            return (NOISES[name](query @ key.mT) + additive(causal(query, key))).softmax(-1) @ value

    (site,) = explain(Noisy(), NSAConfig(min_keys=0))(torch.randn(2, 7, 12)).sites
    assert site.reason == "ADDITIVE_BIAS"


SUBSAMPLED = {
    "nothing hidden": (lambda i, j: i + j >= 0, "BIDIRECTIONAL"),
    "in order of the tokens": (lambda i, j: 2 * j <= i, "CROSS_ATTENTION"),
    "in order of the keys": (lambda i, j: j <= i, "CROSS_ATTENTION"),
}


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_keys_of_every_second_token_are_no_keys_of_the_queries_own(name):
    """Where key j stands among the queries is not told by the mask; that all are seen is."""
    allowed, reason = SUBSAMPLED[name]

    def attend(query, key, value):
        key, value = key[:, :, ::2], value[:, :, ::2]
        mask = allowed(*places(query, key))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)

    (site,) = explain(attend, NSAConfig(min_keys=0))(*torch.randn(3, 2, 3, 8, 4)).sites
    assert site.reason == reason
