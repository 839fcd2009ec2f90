"""Hand-written masks: each is proved to be what it is, or declined for its own reason."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

NEG = float("-inf")


def places(query, key, offset=0):
    return torch.arange(query.shape[2])[:, None] + offset, torch.arange(key.shape[2])[None, :]


def causal(query, key):
    i, j = places(query, key)
    return j <= i


# Programs without data: name -> (program, the proof in words).
STRUCTURAL = {
    "compare": (causal, "causal"),
    "compare reversed": (lambda q, k: places(q, k)[0] >= places(q, k)[1], "causal"),
    "negated": (lambda q, k: ~(places(q, k)[1] > places(q, k)[0]), "causal"),
    "strict": (lambda q, k: places(q, k)[1] < places(q, k)[0] + 1, "causal"),
    "difference": (lambda q, k: (places(q, k)[0] - places(q, k)[1]) >= 0, "causal"),
    "tril": (lambda q, k: torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)), "causal"),
    "tril of numbers": (lambda q, k: torch.ones(q.shape[2], k.shape[2]).tril() == 1, "causal"),
    "triu": (lambda q, k: ~torch.triu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), diagonal=1), "causal"),
    "additive triu": (lambda q, k: torch.triu(torch.full((q.shape[2], k.shape[2]), NEG), diagonal=1), "causal"),
    "of NumPy": (
        lambda q, k: torch.from_numpy(np.triu(np.ones((q.shape[2], k.shape[2])), k=1).astype("uint8")) == 0,
        "causal",
    ),
    "additive where": (lambda q, k: torch.where(causal(q, k), 0.0, torch.finfo(torch.float32).min), "causal"),
    "additive fill": (lambda q, k: torch.zeros(q.shape[2], k.shape[2]).masked_fill(~causal(q, k), -1e9), "causal"),
    "additive product": (lambda q, k: (1.0 - causal(q, k).float()) * torch.finfo(torch.float32).min, "causal"),
    "additive, four dimensions": (
        lambda q, k: torch.full((1, 1, q.shape[2], k.shape[2]), -3e38).triu(1).to(q.dtype),
        "causal",
    ),
    "transposed": (lambda q, k: (places(q, k)[0].transpose(0, 1) >= places(q, k)[1].mT).mT, "causal"),
    "union": (lambda q, k: (places(q, k)[1] < places(q, k)[0]) | torch.eye(q.shape[2], k.shape[2]).bool(), "causal"),
    "strictly before, by exclusion": (
        lambda q, k: causal(q, k) & ~torch.eye(q.shape[2], k.shape[2], dtype=torch.bool),
        "causal from a position",
    ),
    "excluded already": (lambda q, k: causal(q, k) & (places(q, k)[1] != places(q, k)[0] + 2), "causal"),
    "first key set": (
        lambda q, k: torch.where(torch.arange(k.shape[2]) == 0, True, causal(q, k)),
        "causal",
    ),
    "union of limits": (lambda q, k: causal(q, k) | (places(q, k)[1] + 2 < places(q, k)[0]), "causal"),
    "window": (lambda q, k: causal(q, k) & (places(q, k)[1] > places(q, k)[0] - 3), "causal, window 3"),
    "band": (
        lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-2),
        "causal, window 3",
    ),
    "window by distance": (
        lambda q, k: ((places(q, k)[0] - places(q, k)[1]).abs() < 3) & causal(q, k),
        "causal, window 3",
    ),
    "chunks": (lambda q, k: causal(q, k) & (places(q, k)[0] // 3 == places(q, k)[1] // 3), "causal, documents"),
    "chunks by distance": (
        lambda q, k: causal(q, k) & ((places(q, k)[1] // 3 - places(q, k)[0] // 3).abs() == 0),
        "causal, documents",
    ),
    "strictly before": (lambda q, k: places(q, k)[1] < places(q, k)[0], "causal from a position"),
    "expanded": (lambda q, k: causal(q, k)[None, None].expand(q.shape[0], q.shape[1], -1, -1), "causal"),
    "implied twice": (lambda q, k: causal(q, k) & (places(q, k)[1] <= places(q, k)[0] + 2), "causal"),
    "cast back and forth": (lambda q, k: causal(q, k).to(torch.int64).to(q.dtype).bool(), "causal"),
    "sliced": (
        lambda q, k: torch.tril(torch.ones(64, 64, dtype=torch.bool))[: q.shape[2], : k.shape[2]],
        "causal",
    ),
    "sliced where queries end": (
        lambda q, k: torch.tril(torch.ones(1, 1, 64, 64))[
            :, :, k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]
        ].bool(),
        "causal",
    ),
    "joined": (
        lambda q, k: torch.cat([causal(q, k)[:2], causal(q, k)[2:]], dim=0),
        "causal",
    ),
    "in place": (
        lambda q, k: torch.zeros(q.shape[2], k.shape[2]).masked_fill_(~causal(q, k), NEG),
        "causal",
    ),
    "meshgrid": (
        lambda q, k: torch.ge(*torch.meshgrid(torch.arange(q.shape[2]), torch.arange(k.shape[2]), indexing="ij")),
        "causal",
    ),
    "vmap": (
        lambda q, k: torch.vmap(torch.vmap(lambda i, j: j <= i, in_dims=(None, 0)), in_dims=(0, None))(
            torch.arange(q.shape[2]), torch.arange(k.shape[2])
        ),
        "causal",
    ),
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_structural_masks_are_proved_for_all_sizes(oracle, name):
    program, words = STRUCTURAL[name]
    proof = oracle.prove_program(program, dynamic=True)
    assert getattr(proof, "text", proof) == words
    for queries in (1, 2, 5, 9):
        proof.check([torch.randn(5, 3, queries, 4), torch.randn(5, 3, queries, 4)])


@pytest.mark.parametrize("name", ["compare", "additive triu", "window", "sliced", "vmap", "in place"])
def test_structural_masks_are_proved_for_fixed_sizes(oracle, name):
    program, words = STRUCTURAL[name]
    proof = oracle.prove_program(program, dynamic=False)
    assert getattr(proof, "text", proof) == words


PAD = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]])
MARKS = torch.tensor([[1, 0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0]])
LENGTHS = torch.tensor([4, 7])


def packed(q, k, position_ids):
    marks = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    documents = marks.cumsum(-1)
    same = documents[:, :, None] == documents[:, None, :]
    return (same & (position_ids[:, None, :] <= position_ids[:, :, None]))[:, None]


def same(documents):
    return documents[:, None, :, None] == documents[:, None, None, :]


def moved_sums(q, k, tokens):
    ends = tokens == 0
    ends[:, -1] = True
    sums = torch.where(ends, 1, 0).cumsum(1)
    documents = torch.zeros_like(sums, dtype=torch.int32)
    documents[:, 1:] = sums[:, :-1]
    return causal(q, k) & same(documents)


# Programs with data: name -> (program, data, the proof in words).
WITH_DATA = {
    "padding": (lambda q, k, m: causal(q, k) & m.bool()[:, None, None, :], (PAD,), "causal, padding"),
    "padding != 0": (lambda q, k, m: causal(q, k) & (m != 0)[:, None, None, :], (PAD,), "causal, padding"),
    "padding == 1": (lambda q, k, m: causal(q, k) & (m == 1)[:, None, None, :], (2 * PAD - 1,), "causal, padding"),
    "padding > 0": (lambda q, k, m: causal(q, k) & (m > 0)[:, None, None, :], (2 * PAD - 1,), "causal, padding"),
    "padding of floats": (
        lambda q, k, m: causal(q, k) & (m[:, None, None, :].expand(-1, -1, q.shape[2], -1) > 0.5),
        (torch.tensor([[0.5, 0.6, 1, 1, 1, float("nan"), 1], [1, 1, -1, 1, 1, 0, 0]]),),
        "causal, padding",
    ),
    "padding in half precision": (
        lambda q, k, m: causal(q, k) & m[:, None, None, :].to(torch.bfloat16).bool(),
        (PAD,),
        "causal, padding",
    ),
    "padding of bytes": (
        lambda q, k, m: causal(q, k) & (1 - m).logical_not()[:, None, None],
        (PAD.byte(),),
        "causal, padding",
    ),
    "padding, inverted and filled": (
        lambda q, k, m: (
            torch.zeros(q.shape[2], k.shape[2]).masked_fill(~causal(q, k), NEG)
            + (1.0 - m[:, None, None, :].expand(-1, 1, q.shape[2], -1).to(torch.float32)).masked_fill(
                (1.0 - m[:, None, None, :].to(torch.float32)).bool(), -1e9
            )
        ),
        (PAD * 3 - 2,),
        "causal, padding",
    ),
    "padding of bools, additive": (
        lambda q, k, m: (
            torch.triu(torch.full((q.shape[2], k.shape[2]), NEG), 1)
            + (1.0 - m[:, None, None, :].float()) * torch.finfo(torch.float32).min
        ),
        (PAD.bool(),),
        "causal, padding",
    ),
    "padding of any numbers, times a number": (
        lambda q, k, m: (
            torch.where(causal(q, k), 0.0, NEG) + (1.0 - m[:, None, None, :]) * torch.finfo(torch.float32).min
        ),
        (PAD,),
        "causal, checked padding",
    ),
    "padding by a product": (
        lambda q, k, m: (causal(q, k).long() * m[:, None, None, :]).bool(),
        (PAD,),
        "causal, padding",
    ),
    "padding of queries too": (
        lambda q, k, m: causal(q, k) & (m[:, None, None, :] * m[:, None, :, None] != 0),
        (PAD,),
        "causal from a position, padding, padded queries",
    ),
    "padding of queries": (
        lambda q, k, m: causal(q, k) & m[:, None, :, None].bool(),
        (PAD,),
        "causal from a position, padded queries",
    ),
    "lengths": (
        lambda q, k, n: causal(q, k) & (torch.arange(k.shape[2]) < n[:, None])[:, None, None],
        (LENGTHS,),
        "causal from a position",
    ),
    "starts": (
        lambda q, k, n: causal(q, k) & (torch.arange(k.shape[2]) >= n[:, None])[:, None, None],
        (LENGTHS,),
        "causal, from key l_data_0_(b)",
    ),
    "shorter padding": (
        lambda q, k, m: causal(q, k) & pad(m, (0, 2)).bool()[:, None, None, :],
        (PAD[:, :5].clone(),),
        "causal from a position, padding",
    ),
    "longer padding": (
        lambda q, k, m: causal(q, k) & m[:, None, None, : k.shape[2]].bool(),
        (torch.cat([PAD, PAD], 1),),
        "causal, padding",
    ),
    "padding by indexing": (
        lambda q, k, m: (
            causal(q, k) & m.bool()[torch.arange(2)[:, None, None, None], torch.arange(k.shape[2])[None, None, None, :]]
        ),
        (PAD,),
        "causal, padding",
    ),
    "batch-first padding": (
        lambda q, k, m: causal(q, k) & m.bool().t().reshape(7, 2, 1, 1).permute(1, 2, 3, 0),
        (PAD,),
        "causal, padding",
    ),
    "documents from positions": (packed, (PACKED,), "causal, documents"),
    "documents from marks": (
        lambda q, k, m: causal(q, k) & (m.cumsum(-1)[:, None, :, None] == m.cumsum(-1)[:, None, None, :]),
        (MARKS.bool(),),
        "causal, documents",
    ),
    "documents from separators": (
        lambda q, k, t: causal(q, k) & ((t == 0).cumsum(-1)[:, None, :, None] == (t == 0).cumsum(-1)[:, None, None, :]),
        (1 - MARKS,),
        "causal, documents",
    ),
    "documents from lengths": (
        lambda q, k, ends: (
            causal(q, k)
            & (
                torch.bucketize(torch.arange(q.shape[2]), ends, right=True)[:, None]
                == torch.bucketize(torch.arange(k.shape[2]), ends, right=True)[None, :]
            )
        ),
        (torch.tensor([3, 5, 7]),),
        "causal, documents",
    ),
    "documents that end with their separator": (
        lambda q, k, t: causal(q, k) & same((t == 0).cumsum(-1) - (t == 0).long()),
        (1 - MARKS,),
        "causal, documents",
    ),
    "documents from sums moved by one": (moved_sums, (1 - MARKS,), "causal, documents"),
    "documents from padded sums": (
        lambda q, k, t: causal(q, k) & same(pad((t == 0).cumsum(-1)[:, :-1], (1, 0))),
        (1 - MARKS,),
        "causal, documents",
    ),
    "documents from joined sums": (
        lambda q, k, t: (
            causal(q, k) & same(torch.cat([torch.zeros(2, 1, dtype=torch.long), (t == 0).cumsum(-1)[:, :-1]], dim=1))
        ),
        (1 - MARKS,),
        "causal, documents",
    ),
    "documents from repeats": (
        lambda q, k, n: (
            causal(q, k) & same(torch.arange(3).repeat_interleave(n, output_size=q.shape[2])[None].expand(2, -1))
        ),
        (torch.tensor([2, 4, 1]),),
        "causal, documents",
    ),
    "documents of equal length": (
        lambda q, k, n: causal(q, k) & same(n.repeat_interleave(2).cumsum(0)[None, : q.shape[2]].bool().cumsum(-1)),
        (torch.ones(4),),
        "causal, documents",
    ),
    "left-padded chunks": (
        lambda q, k, n: (
            causal(q, k)
            & (
                (torch.arange(q.shape[2])[:, None] - n[:, None, None]) // 3
                == (torch.arange(k.shape[2])[None, :] - n[:, None, None]) // 3
            )[:, None]
        ),
        (torch.tensor([2, 0]),),
        "causal, documents",
    ),
    "query positions": (
        lambda _, k, p: (torch.arange(k.shape[2]) <= p[:, :, None])[:, None],
        (PACKED,),
        "causal from a position",
    ),
    "rows of a triangle": (
        lambda _, k, p: torch.tril(torch.ones(64, 64, dtype=torch.bool))[None, None, p][..., : k.shape[2]],
        (torch.arange(7),),
        "causal from a position",
    ),
    "offset": (lambda q, k, n: places(q, k)[1] <= places(q, k, n)[0], (torch.tensor(2),), "causal from a position"),
    "rolled": (lambda q, k, m: causal(q, k) & m.roll(1, -1).bool()[:, None, None], (PAD,), "causal, padding"),
    "counted padding": (
        lambda q, k, m: causal(q, k) & (torch.arange(k.shape[2]) >= (m == 0).sum(-1)[:, None])[:, None, None],
        (PAD,),
        "causal, from key sum_1(b)",
    ),
}


@pytest.mark.parametrize("name", WITH_DATA)
def test_masks_with_data_are_proved(oracle, name):
    program, data, words = WITH_DATA[name]
    proof = oracle.prove_program(program, *data, dynamic=True)
    assert getattr(proof, "text", proof) == words
