"""Where a mask is made and read: in place, in bodies, in exported graphs, in buffers, for one query."""

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from nsa_compile.passes.predicate.constants import abstract_constant
from nsa_compile.passes.sites import Reason, Rejection

NEG = float("-inf")
PAD = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]])


def places(query, key, offset=0):
    return torch.arange(query.shape[2])[:, None] + offset, torch.arange(key.shape[2])[None, :]


def causal(query, key, diagonal=0):
    i, j = places(query, key)
    return j <= i + diagonal


def set_columns(q, k, m):
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    mask[:, :4] = True
    mask[:, 4:] = causal(q, k)[:, 4:]
    mask &= causal(q, k)
    return mask & m.bool()[:, None, None]


def filled_by_mask(q, k, m):
    mask = torch.full((q.shape[2], k.shape[2]), NEG)
    mask[causal(q, k)] = 0.0
    return mask


def added_after_reading(q, k, n):
    mask = places(q, k)[1] <= places(q, k, n)[0]
    n.add_(5)
    return mask


def added_before_reading(q, k, n):
    n.add_(1)
    return places(q, k)[1] <= places(q, k, n - 1)[0]


def old_name_of_a_written_tensor(q, k, m):
    mask = causal(q, k).float()
    alias = mask.view(mask.shape)
    mask.mul_(0.0)
    mask.masked_fill_(~causal(q, k), NEG)
    return alias


def padding_overwritten_later(q, k, m):
    mask = causal(q, k) & m[:, None, None, :].bool()
    m.zero_()
    return mask


# Name -> (program, data, proof in words).
IN_PLACE = {
    "assigned in parts": (set_columns, (PAD,), "causal, padding"),
    "assigned through a mask": (filled_by_mask, (PAD,), "causal"),
    "position written after it is read": (added_after_reading, (torch.tensor(1),), "causal from a position"),
    "position written before it is read": (added_before_reading, (torch.tensor(1),), "causal from a position"),
    "read under an old name": (old_name_of_a_written_tensor, (PAD,), "causal"),
    "padding overwritten after it is read": (padding_overwritten_later, (PAD,), "causal, padding"),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writes_in_place_count_in_program_order(oracle, name):
    program, data, words = IN_PLACE[name]
    proof = oracle.prove_program(program, *(tensor.clone() for tensor in data), dynamic=False)
    assert getattr(proof, "text", proof) == words


def through_views(q, k, m):
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    mask.transpose(0, 1)[:, :].copy_(causal(q, k).T)
    mask[:, 0].fill_(True)
    return mask & m.bool()[:, None, None]


@pytest.mark.parametrize("strict", [None, False, True])
def test_writes_through_views_count(oracle, strict):
    if strict is None:
        proof = oracle.prove_program(through_views, PAD)
    else:
        inputs = (torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD)
        exported = torch.export.export(Masked(through_views), inputs, strict=strict).graph_module
        proof = oracle.prove(exported, oracle.sites(exported)[0])
    assert getattr(proof, "text", proof) == "causal, padding"
    if strict is not None:
        proof.check(inputs)


def reshaped_in_place(q, k):
    return causal(q, k).unsqueeze_(0)


def written_with_a_step(q, k):
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    mask[::2].fill_(True)
    return mask & causal(q, k)


@pytest.mark.parametrize("program", [reshaped_in_place, written_with_a_step])
def test_writes_that_are_not_followed_are_declined(oracle, program):
    oracle.assert_declined(oracle.prove_program(program), Reason.MUTATED_MASK)


def test_one_proof_serves_all_attentions_that_share_a_mask(oracle):
    def two_layers(q, k, m):
        mask = causal(q, k) & m[:, None, None, :].bool()
        return scaled_dot_product_attention(scaled_dot_product_attention(q, k, k, mask), k, k, mask)

    graph = oracle.capture(two_layers, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD).graphs[0]
    first, second = (oracle.prove(graph, site).visible for site in oracle.sites(graph))
    assert first is second


def test_equal_intervals_of_different_masks_have_equal_keys(oracle):
    def two_masks(q, k, m):
        first = causal(q, k) & (m != 0)[:, None, None, :]
        second = m[:, None, None, :].bool() & ~(places(q, k)[1] > places(q, k)[0])
        return scaled_dot_product_attention(scaled_dot_product_attention(q, k, k, first), k, k, second)

    graph = oracle.capture(two_masks, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD).graphs[0]
    first, second = (oracle.prove(graph, site).visible for site in oracle.sites(graph))
    assert first is not second
    assert first.key() == second.key()


def test_data_overwritten_between_two_attentions_keeps_its_first_value(oracle):
    def program(q, k, m):
        mask = causal(q, k) & m[:, None, None, :]
        first = scaled_dot_product_attention(q, k, k, mask)
        m.zero_()
        return scaled_dot_product_attention(first, k, k, mask)

    recorder = oracle.capture(program, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD.bool())
    graph = recorder.graphs[0]
    before, after = oracle.sites(graph)
    proof = oracle.prove(graph, before)
    # The attention after the write reads the nodes that were made for the one before it.
    proof.site = after
    proof.check(recorder.inputs[0])


def checkpointed(q, k, m):
    mask = causal(q, k) & m[:, None, None, :].bool()
    return checkpoint(lambda a, b, c: scaled_dot_product_attention(a, b, b, c), q, k, mask, use_reentrant=False)


def test_a_mask_is_followed_into_a_checkpointed_body(oracle):
    recorder = oracle.capture(checkpointed, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD)
    (graph,) = recorder.graphs
    (site,) = oracle.sites(graph)
    assert site.scope.parent is not None
    proof = oracle.prove(graph, site)
    assert proof.text == "causal, padding"
    assert proof.visible.scope.graph_module is graph
    assert proof.emitted.key_valid.graph is graph.graph


def test_a_mask_made_inside_a_body_is_computed_there(oracle):
    def inside(q, k, m):
        def attend(q, k, m):
            return scaled_dot_product_attention(q, k, k, causal(q, k) & (m.cumsum(-1) > 0)[:, None, None, :])

        return checkpoint(attend, q, k, m, use_reentrant=False)

    (graph,) = oracle.capture(inside, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD).graphs
    (site,) = oracle.sites(graph)
    proof = oracle.prove(graph, site)
    assert proof.text == "causal, padding"
    assert proof.emitted.key_valid.graph is site.scope.graph_module.graph


class Masked(torch.nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, q, k, *data):
        return scaled_dot_product_attention(q, k, k, self.program(q, k, *data))


EXPORTED = {
    "padding": (lambda q, k, m: causal(q, k) & m[:, None, None, :].bool(), (PAD,), "causal, padding"),
    "window": (
        lambda q, k: (causal(q, k) & (places(q, k)[1] > places(q, k)[0] - 3)).expand(q.shape[0], 1, -1, -1),
        (),
        "causal, window 3",
    ),
    "additive": (lambda q, k: torch.full((q.shape[2], k.shape[2]), NEG).triu(1), (), "causal"),
    "documents": (
        lambda q, k, m: causal(q, k) & (m.cumsum(-1)[:, None, :, None] == m.cumsum(-1)[:, None, None, :]),
        (PAD.bool(),),
        "causal, documents",
    ),
    "shorter padding": (
        lambda q, k, m: causal(q, k) & pad(m, (0, 2)).bool()[:, None, None, :],
        (PAD[:, :5].clone(),),
        "causal from a position, padding",
    ),
    "indexed": (
        lambda q, k, m: causal(q, k) & m.bool()[torch.arange(2)[:, None, None, None], places(q, k)[1]],
        (PAD,),
        "causal, padding",
    ),
    "in place": (
        lambda q, k: torch.zeros(q.shape[2], k.shape[2]).masked_fill_(~causal(q, k), NEG).mul_(2),
        (),
        "causal",
    ),
    "half of the keys": (
        lambda q, k, n: causal(q, k) & (places(q, k)[1] >= k.shape[2] // 2 - n),
        (torch.tensor(2),),
        "causal, from key 3 - data_0",
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_masks_of_exported_graphs_are_proved(oracle, name, strict):
    program, data, words = EXPORTED[name]
    inputs = (torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), *data)
    exported = torch.export.export(Masked(program), inputs, strict=strict).graph_module
    (site,) = oracle.sites(exported)
    proof = oracle.prove(exported, site)
    assert getattr(proof, "text", proof) == words
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert all(isinstance(target, torch._ops.OpOverload) for target in targets)
    proof.check(inputs)


def test_exported_masks_are_proved_for_all_sizes(oracle):
    program, data, words = EXPORTED["documents"]
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("length")}
    shapes = {"q": sizes, "k": sizes, "data": ({0: sizes[0], 1: sizes[2]},)}
    inputs = (torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), *data)
    exported = torch.export.export(Masked(program), inputs, dynamic_shapes=shapes).graph_module
    proof = oracle.prove(exported, oracle.sites(exported)[0])
    assert getattr(proof, "text", proof) == words
    for batch, length in ((2, 7), (3, 5), (4, 12)):
        query = torch.randn(batch, 3, length, 4)
        proof.check([query, query, torch.rand(batch, length) > 0.6])


# One query: mask -> the proof in words.
DECODING = {
    "every key": (lambda q, k, m: torch.ones(1, k.shape[2], dtype=torch.bool), "all keys"),
    "mask from outside": (lambda q, k, m: m, "all keys, padding"),
    "position": (lambda q, k, m: places(q, k)[1] <= 3, "causal from a position"),
    "bottom right": (lambda q, k, m: causal(q, k, k.shape[2] - 1), "all keys"),
    "padding and window": (
        lambda q, k, m: m & (places(q, k)[1] > 2) & (places(q, k)[1] <= 5),
        "causal from a position, window 3, padding",
    ),
}


@pytest.mark.parametrize("name", DECODING)
def test_one_query_may_see_every_key(oracle, name):
    program, words = DECODING[name]
    allowed = PAD.bool()[:, None, None, :]
    proof = oracle.prove_program(program, allowed, shape=(2, 3, 1, 7), dynamic=False)
    assert getattr(proof, "text", proof) == words


def test_one_query_with_additive_numbers_from_outside_is_declined(oracle):
    bias = torch.zeros(2, 1, 1, 7)
    result = oracle.prove_program(lambda q, k, m: m * 1, bias, shape=(2, 3, 1, 7), dynamic=False)
    oracle.assert_declined(result, Reason.MASK_IS_INPUT)


def test_one_query_with_a_mask_for_each_head_is_declined(oracle):
    mask = torch.ones(2, 3, 1, 7, dtype=torch.bool)
    result = oracle.prove_program(lambda q, k, m: m, mask, shape=(2, 3, 1, 7), dynamic=False)
    oracle.assert_declined(result, Reason.MASK_DEPENDS_ON_HEAD)


@pytest.mark.parametrize(("is_causal", "queries", "trivial"), [(True, 7, True), (False, 1, True), (False, 7, False)])
def test_without_a_mask(oracle, is_causal, queries, trivial):
    def attend(q, k):
        return scaled_dot_product_attention(q, k, k, is_causal=is_causal)

    graph = oracle.capture(attend, torch.randn(2, 3, queries, 4), torch.randn(2, 3, 7, 4)).graphs[0]
    result = oracle.prove(graph, oracle.sites(graph)[0])
    if not trivial:
        assert isinstance(result, Rejection)
        assert result.reason is Reason.BIDIRECTIONAL
        return
    assert result.visible.is_trivial
    assert result.visible.is_causal is is_causal
    assert (result.emitted.first_key, result.emitted.last_key, result.emitted.key_valid) == (None, None, None)


def band(size, low, high):
    difference = torch.arange(size)[None, :] - torch.arange(size)[:, None]
    return (difference >= low) & (difference <= high)


def with_one_element_changed(mask):
    changed = mask.clone()
    changed[5, 3] = ~changed[5, 3]
    return changed


# Name -> (buffer, program, proof in words, or the reason of the refusal).
BUFFERS = {
    "triangle": (band(16, -16, 0), lambda q, k, b: b[: q.shape[2], : k.shape[2]], "causal"),
    "four dimensions": (band(16, -16, 0)[None, None], lambda q, k, b: b[:, :, : q.shape[2], : k.shape[2]], "causal"),
    "numbers": (band(16, -16, 0).float(), lambda q, k, b: b[: q.shape[2], : k.shape[2]] != 0, "causal"),
    "additive": (
        torch.full((16, 16), NEG).triu(1),
        lambda q, k, b: b[: q.shape[2], : k.shape[2]].to(q.dtype),
        "causal",
    ),
    "window": (band(16, -2, 0), lambda q, k, b: b[: q.shape[2], : k.shape[2]], "causal, window 3"),
    "rows at the end": (
        band(16, -16, 0),
        lambda q, k, b: b[k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]],
        "causal",
    ),
    "places": (torch.arange(16), lambda q, k, b: b[None, : k.shape[2]] <= b[: q.shape[2], None], "causal"),
    "future": (band(16, -16, 1), lambda q, k, b: b[: q.shape[2], : k.shape[2]], Reason.BIDIRECTIONAL),
    "a hole": (
        with_one_element_changed(band(16, -16, 0)),
        lambda q, k, b: b[: q.shape[2], : k.shape[2]],
        Reason.MASK_IS_INPUT,
    ),
    "three values": (
        torch.full((16, 16), NEG).triu(1) + band(16, 0, 0),
        lambda q, k, b: b[: q.shape[2], : k.shape[2]],
        Reason.MASK_IS_INPUT,
    ),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_read_by_value(oracle, name):
    buffer, program, expected = BUFFERS[name]

    def read(node, scope):
        return buffer if node.name == "l_data_0_" else None

    result = oracle.prove_program(program, buffer.clone(), read_constant=read)
    if isinstance(expected, Reason):
        oracle.assert_declined(result, expected)
    else:
        assert getattr(result, "text", result) == expected


def test_a_buffer_that_may_not_be_read_is_declined(oracle):
    buffer, program, _ = BUFFERS["triangle"]
    oracle.assert_declined(oracle.prove_program(program, buffer), Reason.MASK_IS_INPUT)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([0, 1, 3]),
        torch.rand(4, 4),
        torch.ones(2, 2, 2).cumsum(0),
        torch.ones(0),
    ],
    ids=["NaN", "no progression", "no band", "three dimensions", "empty"],
)
def test_constants_without_a_formula_stay_data(values):
    assert abstract_constant(values) is None


def test_a_body_that_writes_its_operand_counts_as_a_writer(oracle):
    """Of two operands of a checkpointed region, only the one that it writes is written for those who read later."""

    def program(q, k, written, read):
        def region(written, read):
            written.add_(1)
            return written + read

        total = checkpoint(region, written, read, use_reentrant=False)
        padding = causal(q, k) & (read != 0)[:, None, None, :]
        lengths = causal(q, k) & (written != 0)[:, None, None, :]
        first = scaled_dot_product_attention(q, k, k, padding)
        return scaled_dot_product_attention(first, k, k, lengths) + total.sum()

    (graph,) = oracle.capture(program, torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), PAD.clone(), PAD).graphs
    padding, lengths = oracle.sites(graph)
    assert oracle.prove(graph, padding).text == "causal, padding"
    oracle.assert_declined(oracle.prove(graph, lengths), Reason.MUTATED_MASK)
