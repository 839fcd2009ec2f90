"""Policy: which sites become NSA, and the reason of every one that does not."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile import NSAConfig
from nsa_compile.passes.find import find_sites
from nsa_compile.passes.plan import plan_rewrite
from nsa_compile.passes.sites import Reason

B, H, T, D, E = 2, 4, 24, 4, 16
sdpa = functional.scaled_dot_product_attention


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def tensors(length: int = T, dtype: torch.dtype = torch.float32, size: int = D) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, length, size).to(dtype) for _ in range(3)]


def config(**changes) -> NSAConfig:
    sizes = {"block_length": 4, "block_stride": 2, "selection_block": 8, "num_selected": 3, "window": 8}
    return NSAConfig(**{**sizes, **changes})


@pytest.mark.parametrize(("min_keys", "reason"), [(T, ""), (T + 1, "TOO_SHORT"), ("auto", ""), (0, "")])
def test_few_keys_stay_dense(rewriting, min_keys, reason):
    # "auto" is n·l' = 24.
    outcome = rewriting.rewrite(causal, *tensors(), config=config(min_keys=min_keys))
    assert outcome.reasons == [reason]


def test_declined_sites_still_say_what_their_mask_is(rewriting):
    outcome = rewriting.rewrite(causal, *tensors(), config=config(min_keys=T + 1))
    outcome.assert_declined(Reason.TOO_SHORT)
    assert outcome.decisions[0].mask == "causal"
    assert str(T + 1) in outcome.decisions[0].rejection.sentence


def test_gated_needs_gates(rewriting):
    rewriting.rewrite(causal, *tensors(), config=config(combine="gated")).assert_declined(Reason.NO_GATES)


class Counter:
    """A backend that plans and counts, and leaves graphs as they are."""

    def __init__(self, settings: NSAConfig) -> None:
        self.settings = settings
        self.reasons: list[str] = []

    def __call__(self, graph_module, example_inputs):
        for decision in plan_rewrite(find_sites(graph_module), self.settings).decisions:
            self.reasons.append(decision.rejection.reason.name if decision.rejection else "")
        return graph_module.forward


def test_symbolic_lengths_compile_anew_when_they_cross_min_keys():
    torch._dynamo.reset()
    counter = Counter(config(min_keys=20))
    compiled = torch.compile(causal, backend=counter, dynamic=True)
    for length, seen in [(12, 1), (16, 1), (30, 2), (20, 2), (40, 2), (19, 2), (5, 2)]:
        compiled(*tensors(length))
        assert len(counter.reasons) == seen, length
    assert counter.reasons == ["TOO_SHORT", ""]


def test_symbolic_lengths_are_not_guarded_where_min_keys_is_never_missed():
    torch._dynamo.reset()
    counter = Counter(config(min_keys=0))
    compiled = torch.compile(causal, backend=counter, dynamic=True)
    for length in (12, 30, 4):
        compiled(*tensors(length))
    assert counter.reasons == [""]


def test_cached_lengths_compile_anew_when_they_cross_min_keys():
    def decode(q: Tensor, past: Tensor, k: Tensor) -> Tensor:
        keys = torch.cat([past, k], dim=2)
        return sdpa(q, keys, keys)

    torch._dynamo.reset()
    counter = Counter(config(min_keys=20))
    compiled = torch.compile(decode, backend=counter, dynamic=True)
    for past, seen in [(8, 1), (18, 1), (19, 2), (30, 2)]:
        q, k, _ = tensors(1)
        compiled(q, torch.randn(B, H, past, D), k)
        assert len(counter.reasons) == seen, past
    assert counter.reasons == ["TOO_SHORT", ""]


@pytest.mark.parametrize(("longest", "reason"), [(64, ""), (10, "TOO_SHORT")])
def test_exported_graphs_serve_all_lengths_of_their_range(longest, reason):
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal(q, k, v)

    length = torch.export.Dim("length", min=4, max=longest)
    shapes = {name: {2: length} for name in "qkv"}
    exported = torch.export.export(Model(), tuple(tensors(8)), dynamic_shapes=shapes)
    (decision,) = plan_rewrite(find_sites(exported.graph_module), config(min_keys=20)).decisions
    assert (decision.rejection.reason.name if decision.rejection else "") == reason


def test_symbolic_head_sizes_become_numbers(rewriting):
    outcome = rewriting.rewrite(causal, *tensors(), dynamic=True)
    outcome.assert_rewritten()


@pytest.mark.parametrize(
    ("device", "dtype", "size", "reason"),
    [
        ("cuda", torch.bfloat16, 256, ""),
        ("cuda", torch.bfloat16, 257, "UNSUPPORTED_HEAD_SIZE"),
        ("cuda", torch.float64, 64, "UNSUPPORTED_DTYPE"),
        ("cpu", torch.float64, 257, ""),
        ("cpu", torch.float8_e4m3fn, 64, "UNSUPPORTED_DTYPE"),
    ],
)
def test_what_the_operator_does_not_take_is_declined(device, dtype, size, reason):
    mode = torch._subclasses.FakeTensorMode()
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    call = graph.call_function(sdpa, tuple(nodes), {"is_causal": True})
    graph.output(call)
    for node in (*nodes, call):
        with mode:
            node.meta["val"] = torch.empty(B, H, T, size, dtype=dtype, device=device)
    graph_module = torch.fx.GraphModule(nn.Module(), graph)
    (decision,) = plan_rewrite(find_sites(graph_module), config()).decisions
    assert (decision.rejection.reason.name if decision.rejection else "") == reason


def test_integers_are_declined():
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    call = graph.call_function(sdpa, tuple(nodes), {"is_causal": True})
    graph.output(call)
    for node in (*nodes, call):
        node.meta["val"] = torch.empty(B, H, T, D, dtype=torch.int64, device="meta")
    (decision,) = plan_rewrite(find_sites(torch.fx.GraphModule(nn.Module(), graph)), config()).decisions
    assert decision.rejection.reason is Reason.UNSUPPORTED_DTYPE


def test_scale_that_is_data_is_declined(rewriting):
    def attend(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return (q @ k.mT * factor.item()).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -1e9).softmax(-1) @ v

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        outcome = rewriting.rewrite(attend, *tensors(), torch.tensor(0.5))
    outcome.assert_declined(Reason.UNSUPPORTED_SCALE)


class Layer(nn.Module):
    """A transformer layer, with cross-attention if it is given a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up, self.down = (nn.Linear(E, E) for _ in range(5))
        self.norm = nn.LayerNorm(E)

    def attend(self, x: Tensor, memory: Tensor, **options) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(B, -1, H, D).transpose(1, 2)

        y = sdpa(heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory)), **options)
        return x + y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, memory: Tensor | None = None, **options) -> Tensor:
        x = self.attend(self.norm(x), self.norm(x) if memory is None else memory, **options)
        return x + self.down(self.up(x).relu())


class EncoderDecoder(nn.Module):
    """Two sequences from one embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, E)
        self.encoder, self.own, self.cross = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(3))

    def forward(self, source: Tensor, target: Tensor, **options) -> Tensor:
        memory, x = self.embedding(source), self.embedding(target)
        for layer in self.encoder:
            memory = layer(memory)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = cross(own(x, is_causal=True), memory)
        return x


@pytest.mark.parametrize("queries", [1, 7, T])
def test_encoders_and_cross_attention_are_told_apart(rewriting, queries):
    source, target = torch.randint(32, (B, T)), torch.randint(32, (B, queries))
    outcome = rewriting.rewrite(EncoderDecoder(), source, target)
    assert outcome.reasons == ["BIDIRECTIONAL"] * 2 + ["", "CROSS_ATTENTION"] * 2
    torch.testing.assert_close(outcome.output, outcome.expected)


def test_a_cache_is_followed_to_what_is_written_into_it(rewriting):
    class Decoder(Layer):
        def forward(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
            def heads(y: Tensor) -> Tensor:
                return y.view(B, -1, H, D).transpose(1, 2)

            keys.index_copy_(2, position, heads(self.k(x)))
            values.index_copy_(2, position, heads(self.v(x)))
            mask = torch.arange(T) <= position[:, None]
            return sdpa(heads(self.q(x)), keys, values, mask)

    cache = [torch.randn(B, H, T, D) for _ in range(2)]
    outcome = rewriting.rewrite(Decoder(), torch.randn(B, 1, E), *cache, torch.tensor([9]))
    outcome.assert_rewritten()


def test_one_query_over_a_finished_cache_is_cross_attention(rewriting):
    class Decoder(Layer):
        def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return sdpa(self.q(x).view(B, 1, H, D).transpose(1, 2), keys, values)

    cache = [torch.randn(B, H, T, D) for _ in range(2)]
    outcome = rewriting.rewrite(Decoder(), torch.randn(B, 1, E), *cache)
    outcome.assert_declined(Reason.CROSS_ATTENTION)


def test_a_body_that_needs_several_masks_is_declined(rewriting):
    @torch.compiler.nested_compile_region
    def region(x: Tensor, mask: Tensor) -> Tensor:
        return sdpa(x, x, x, attn_mask=mask).sin()

    def model(x: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        return region(region(x, mask), mask.triu(-3))

    rewriting.rewrite(model, tensors()[0]).assert_declined(Reason.SHARED_BODY)


def test_every_reason_is_a_sentence():
    sentences = [reason.value for reason in Reason]
    assert len(set(sentences)) == len(list(Reason))
    assert all(re.fullmatch(r"\S.*\.", sentence) for sentence in sentences)
