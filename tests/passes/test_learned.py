"""Learned parts in graphs: markers are paired and erased, hidden states found, paths copied, and what is declined."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nsa_compile import NSAConfig, rewrite
from nsa_compile.kernels import reference
from nsa_compile.passes.find import find_sites
from nsa_compile.passes.hidden import HiddenStates
from nsa_compile.passes.scopes import walk_scopes
from nsa_compile.passes.sites import Operand, Rejection
from nsa_compile.report import RewriteReport

B, T, C, H, D = 2, 21, 8, 2, 4
CONFIG = NSAConfig(
    block_length=4, block_stride=2, selection_block=4, num_selected=2, num_initial=1, num_local=1, window=4,
    combine="gated", branch_kv="independent",
)  # fmt: skip
GATES = ("gates.hidden.weight", "gates.hidden.bias", "gates.output.weight", "gates.output.bias")
ATTENTIONS = (functional.scaled_dot_product_attention, torch.ops.nsa.attention.default)


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = {
        "gates.hidden.weight": (5, C),
        "gates.hidden.bias": (5,),
        "gates.output.weight": (3 * H, 5),
        "gates.output.bias": (3 * H,),
        **{f"{branch}.{name}": (C, C) for branch in ("compressed", "window") for name in ("k", "v")},
        **dict.fromkeys(("q", "k", "v"), (C, C)),
    }
    return {name: torch.nn.Parameter(torch.randn(size, generator=generator) / 2) for name, size in sizes.items()}


OWN = {CONFIG: ("k", "v"), CONFIG.replace(branch_kv="shared"): ()}
PARTS = {
    config: (*GATES, *(f"{branch}.{name}" for branch in ("compressed", "window") for name in own))
    for config, own in OWN.items()
}
DESCRIPTIONS = {
    config.branch_kv: json.dumps({"config": config.to_dict(), "parts": PARTS[config], "originals": own})
    for config, own in OWN.items()
}
SHARED_PARTS, INDEPENDENT_PARTS = PARTS[CONFIG.replace(branch_kv="shared")], PARTS[CONFIG]


def bind(p: dict[str, Tensor], branch_kv: str = "independent") -> None:
    names, own = (SHARED_PARTS, ()) if branch_kv == "shared" else (INDEPENDENT_PARTS, ("k", "v"))
    torch.ops.nsa.bind([p[name] for name in names], [p[name] for name in own], DESCRIPTIONS[branch_kv])


def split(states: Tensor) -> Tensor:
    return states.unflatten(-1, (H, D)).transpose(1, 2)


def attend(p: dict[str, Tensor], x: Tensor, prefix: str = "") -> tuple[Tensor, ...]:
    return tuple(split(functional.linear(x, p[prefix + n if n != "q" else n])) for n in ("q", "k", "v"))


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=not options, **options)


def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    return sdpa(*attend(p, x))


def expected(p: dict[str, Tensor], x: Tensor, config: NSAConfig = CONFIG) -> Tensor:
    x, p = x.double(), {name: value.double() for name, value in p.items()}
    units = functional.silu(functional.linear(x, p[GATES[0]], p[GATES[1]]))
    gates = functional.linear(units, p[GATES[2]], p[GATES[3]]).sigmoid().view(B, -1, H, 3).transpose(1, 2)
    query, key, value = attend(p, x)
    compressed, window = ((key, value), (key, value))
    if config.branch_kv == "independent":
        compressed, window = (attend(p, x, f"{branch}.")[1:] for branch in ("compressed", "window"))
    means = [reference.compress_mean(each, block_length=4, block_stride=2) for each in compressed]
    return reference.attention(
        query,
        key,
        value,
        gates=gates,
        compressed_key=means[0],
        compressed_value=means[1],
        window_key=window[0],
        window_value=window[1],
        **config.operator_arguments(),
    )


class Run:
    """A function compiled with a backend that rewrites, and what became of its graphs."""

    def __init__(self, function: Callable[..., Tensor], dynamic: bool | None = None) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.reports: list[RewriteReport] = []
        self._call = torch.compile(function, backend=self._rewrite, fullgraph=True, dynamic=dynamic)

    def _rewrite(self, graph_module: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        self.reports.append(rewrite(graph_module, NSAConfig(min_keys=0)))
        return graph_module.forward

    def __call__(self, *args: Any) -> Tensor:
        return self._call(*args)

    @property
    def targets(self) -> list[Any]:
        return [node.target for scope in walk_scopes(self.graphs[-1]) for node in scope.graph_module.graph.nodes]

    @property
    def reasons(self) -> list[str]:
        return [site.reason for site in self.reports[-1].sites]


def declined(function: Callable[..., Tensor], *args: Any) -> tuple[list[str], str]:
    """Reasons of a function all of whose attentions stay as they are, and why its parts are not used."""
    run = Run(function)
    torch.testing.assert_close(run(*args), dense(function, *args))
    assert torch.ops.nsa.bind.default not in run.targets
    assert torch.ops.nsa.bind not in run.targets
    assert torch.ops.nsa.attention.default not in run.targets
    (unused,) = run.reports[-1].unused_parts
    assert unused.reason in (*run.reasons, "")
    return run.reasons, unused.sentence


def dense(function: Callable[..., Tensor], *args: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "bind", lambda *_: None)
        return function(*args)


@pytest.fixture
def x():
    return torch.randn(B, T, C)


def through_a_transpose(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Sequence first: `[T, B, C]`."""
    bind(p)
    states = x.transpose(0, 1) * 1.0
    heads = [functional.linear(states, p[name]).view(T, B, H, D).permute(1, 2, 0, 3) for name in ("q", "k", "v")]
    return sdpa(*heads)


def in_a_checkpoint(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return checkpoint(lambda states: plain(p, states), x, use_reentrant=False)


def with_an_empty_cache(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    query, key, value = attend(p, x)
    empty = torch.empty(B, H, 0, D)
    return sdpa(query, torch.cat([empty, key], 2), torch.cat([empty, value], 2))


def behind_others_of_its_shape(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Neither the residual stream before the norm, nor a mixed-in earlier value."""
    bind(p)
    earlier = torch.tanh(x)
    states = earlier.exp().log()  # what is projected
    query, key, value = attend(p, states)
    return sdpa(query, key, value) + 0 * split(earlier)


@pytest.mark.parametrize(
    "function", [plain, through_a_transpose, in_a_checkpoint, with_an_empty_cache], ids=lambda f: f.__name__
)
def test_rewritten(function, x):
    p = parameters()
    run = Run(function)
    torch.testing.assert_close(run(p, x).double(), expected(p, x), rtol=1e-4, atol=1e-5)
    assert run.reasons == [""]
    assert torch.ops.nsa.gates.default in run.targets
    assert not {torch.ops.nsa.bind, torch.ops.nsa.bind.default, ATTENTIONS[0]} & set(run.targets)


def test_hidden_states_are_the_last_ones_before_the_projections(x):
    p = parameters()
    run = Run(behind_others_of_its_shape)
    torch.testing.assert_close(run(p, x).double(), expected(p, torch.tanh(x)), rtol=1e-4, atol=1e-5)


def test_weights_may_be_computed_from_parameters(x):
    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        bind(p)
        query, key, _ = attend(p, x)
        return sdpa(query, key, split(functional.linear(x, p["v"] / p["v"].norm() * 3)))

    p = parameters()
    normed = {name: value / value.norm() * 3 if name.split(".")[-1] == "v" else value for name, value in p.items()}
    torch.testing.assert_close(Run(function)(p, x).double(), expected(normed, x), rtol=1e-4, atol=1e-5)


def test_lengths_are_symbols(x):
    p = parameters()
    run = Run(plain, dynamic=True)
    for length in (T, 3, 33, 4, 5):
        states = torch.randn(B, length, C)
        if length >= CONFIG.block_length:
            torch.testing.assert_close(run(p, states).double(), expected(p, states), rtol=1e-4, atol=1e-5)
        else:
            assert run(p, states).shape == (B, H, length, D)
    # One for blocks that fit, one for shorter sequences.
    assert len(run.graphs) <= 3


def test_shared_keys_are_used_by_all_branches(x):
    p, config = parameters(), CONFIG.replace(branch_kv="shared")

    def function(x: Tensor) -> Tensor:
        bind(p, "shared")
        return sdpa(*attend(p, x))

    run = Run(function)
    torch.testing.assert_close(run(x).double(), expected(p, x, config), rtol=1e-4, atol=1e-5)
    (node,) = [node for node in run.graphs[0].graph.nodes if node.target is torch.ops.nsa.attention.default]
    assert {"window_key", "compressed_key"}.isdisjoint(node.kwargs)


def test_an_attention_belongs_to_the_last_marker_before_it(x):
    first, second = parameters(), {name: torch.nn.Parameter(2 * value) for name, value in parameters().items()}

    def function(x: Tensor) -> Tensor:
        return plain(first, x) + plain(second, x)

    output = Run(function)(x).double()
    torch.testing.assert_close(output, expected(first, x) + expected(second, x), rtol=1e-4, atol=1e-5)


def test_copies_run_under_the_modes_of_their_originals(x):
    p = parameters()

    def function(x: Tensor) -> Tensor:
        bind(p)
        query, key, _ = attend(p, x)
        with torch.no_grad():
            value = split(functional.linear(x, p["v"]))
        return sdpa(query, key, value)

    Run(function)(x).sum().backward()
    assert p["compressed.v"].grad is None
    assert p["window.v"].grad is None
    assert p["compressed.k"].grad is not None


def no_projection(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    return sdpa(split(x), split(x), split(x))


def square(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return plain(p, x.repeat(T, 1, 1)[:T])


def written_in_place(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    states = x * 2
    heads = attend(p, states)
    states.add_(1)
    return sdpa(*heads) + 0 * split(states)


def cached(p: dict[str, Tensor], x: Tensor, past: Tensor) -> Tensor:
    bind(p)
    query, key, value = attend(p, x)
    mask = torch.ones(T, T + 3, dtype=torch.bool).tril(3)
    return sdpa(query, torch.cat([past, key], 2), torch.cat([past, value], 2), attn_mask=mask)


def filled(p: dict[str, Tensor], x: Tensor, past: Tensor) -> Tensor:
    bind(p)
    query, key, value = attend(p, x)
    places = torch.arange(T)
    return sdpa(query, torch.index_copy(past, 2, places, key), torch.index_copy(past, 2, places, value))


def worked_on_in_place(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    query, key, value = attend(p, x)
    return sdpa(query, key.mul_(2), value)


def not_projected_by_originals(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    query, key, _ = attend(p, x)
    return sdpa(query, key, split(functional.linear(x, p["q"])))


def bidirectional(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    return sdpa(*attend(p, x), attn_mask=torch.ones(T, T, dtype=torch.bool))


def none_at_all(p: dict[str, Tensor], x: Tensor) -> Tensor:
    bind(p)
    return split(x)


DECLINED = {
    "no projection": (no_projection, 0, "NO_HIDDEN_STATES", "No tensor [B, T, 8] was found"),
    "batch as long as the sequence": (square, 0, "NO_HIDDEN_STATES", "Batch and length are both 21"),
    "written": (written_in_place, 0, "NO_HIDDEN_STATES", "writes the layer's input"),
    "cache": (cached, 3, "BRANCH_NOT_COPIED", "joins the layer's keys with others"),
    "static cache": (filled, T, "BRANCH_NOT_COPIED", "joins the layer's keys with others"),
    "in place": (worked_on_in_place, 0, "BRANCH_NOT_COPIED", "works in place"),
    "other projection": (not_projected_by_originals, 0, "BRANCH_NOT_COPIED", "are not computed from the projection"),
    "bidirectional": (bidirectional, 0, "BIDIRECTIONAL", "nothing in the mask"),
    "none": (none_at_all, 0, None, "No attention of this module was found"),
}


@pytest.mark.parametrize(("function", "past", "reason", "sentence"), DECLINED.values(), ids=DECLINED)
def test_declined(function, past, reason, sentence, x):
    arguments = (parameters(), x, *([torch.randn(B, H, past, D)] if past else []))
    reasons, why = declined(function, *arguments)
    assert reasons == ([reason] if reason else [])
    assert sentence in why


def test_parts_for_one_attention_are_not_shared_by_two(x):
    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        bind(p)
        return sdpa(*attend(p, x)) - sdpa(*attend(p, x.flip(-1)))

    reasons, why = declined(function, parameters(), x)
    assert reasons == ["SHARED_LEARNED_PARTS"] * 2
    assert "several attentions" in why


def test_parts_outside_the_body_of_an_attention_are_not_its_own(x):
    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        bind(p)
        return checkpoint(sdpa, *attend(p, x), use_reentrant=False)

    run = Run(function)
    run(parameters(), x)
    # The attention has no marker in its graph, so the backend's own configuration holds.
    assert run.reasons == [""]
    assert run.reports[0].sites[0].learned == ""
    assert len(run.reports[0].unused_parts) == 1


def test_channels_are_not_needed_to_find_hidden_states(x):
    found: list[Operand | Rejection] = []

    def look(graph_module: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.extend(HiddenStates().find(site) for site in find_sites(graph_module))
        return graph_module.forward

    weight = torch.nn.Parameter(torch.randn(3 * C, C))

    def fused(x: Tensor) -> Tensor:
        return sdpa(*(split(part) for part in functional.linear(x * 2, weight).chunk(3, -1)))

    torch.compile(fused, backend=look)(x)
    (operand,) = found
    assert operand.node.name == "mul"
    assert operand.shape == (B, T, C)
