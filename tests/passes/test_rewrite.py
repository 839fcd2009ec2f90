"""The rewritten graph: right, changed only where it must be, and in the order of the writes it was in."""

import time

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nsa_compile.passes.find import find_sites
from nsa_compile.passes.metadata import propagate_shapes
from nsa_compile.passes.plan import plan_rewrite
from nsa_compile.passes.rewrite import apply_plan
from nsa_compile.passes.scopes import walk_scopes

B, T, E, H, D = 2, 24, 16, 4, 4
sdpa = functional.scaled_dot_product_attention
ATTENTION = torch.ops.nsa.attention.default


def heads(*lengths: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, length, D, requires_grad=True) for length in lengths or (T, T, T)]


def rewrite(graph_module, config):
    apply_plan(graph_module, plan_rewrite(find_sites(graph_module), config))


class Layer(nn.Module):
    """Self-attention and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up = nn.Linear(E, 3 * E), nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (y.view(B, -1, H, D).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = sdpa(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.up(x).relu()


class Model(nn.Module):
    """Layers that share a mask of causality and padding."""

    def __init__(self, layers: int = 3, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = mask & padding[:, None, None, :].bool()
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointed else layer(x, mask)
        return x


def padded() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    padding = torch.ones(B, T, dtype=torch.long)
    padding[0, 20:] = 0
    return torch.randn(B, T, E, requires_grad=True), padding


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_model_with_full_coverage_equals_the_dense_model(rewriting, checkpointed, dynamic):
    model = Model(checkpointed=checkpointed)
    outcome = rewriting.rewrite(
        model, *padded(), gradients=True, compiled=True, dynamic=dynamic, seen=lambda output: output[:, :20]
    )
    outcome.assert_rewritten(3)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shared_mask_is_computed_once_and_the_dense_one_goes(rewriting, checkpointed):
    outcome = rewriting.rewrite(Model(checkpointed=checkpointed), *padded(), seen=lambda output: output[:, :20])
    outcome.assert_rewritten(3)
    (graph_module,) = outcome.graphs
    valid = [node for node in graph_module.graph.nodes if getattr(node.target, "__name__", "") in ("ne", "ne.Scalar")]
    assert len(valid) <= 1
    for scope in walk_scopes(graph_module):
        for node in scope.graph_module.graph.nodes:
            shape = getattr(node.meta.get("example_value"), "shape", ())
            assert list(shape[-2:]) != [T, T], node


def test_bodies_take_what_they_need_and_nothing_else(rewriting):
    outcome = rewriting.rewrite(Model(checkpointed=True), *padded(), seen=lambda output: output[:, :20])
    (graph_module,) = outcome.graphs
    for scope in walk_scopes(graph_module):
        if scope.parent is not None:
            placeholders = [node for node in scope.graph_module.graph.nodes if node.op == "placeholder"]
            assert all(node.users for node in placeholders)
            assert len(scope.calls[0].args) == len(placeholders) + 1
            (brought,) = [node for node in placeholders if node.meta["example_value"].dtype == torch.bool]
            assert brought.meta["example_value"].shape == (B, T)


def test_root_inputs_stay_as_dynamo_gave_them(rewriting):
    outcome = rewriting.rewrite(Model(), *padded(), seen=lambda output: output[:, :20])
    before = outcome.before[0].count('"f32[') + outcome.before[0].count('"i64[')
    assert before
    (graph_module,) = outcome.graphs
    header = outcome.before[0].split("def forward(")[1].split("):")[0]
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert [name for name in names if name in header] == names


def test_rewriting_again_changes_nothing(rewriting):
    outcome = rewriting.rewrite(Model(), *padded(), seen=lambda output: output[:, :20])
    (graph_module,) = outcome.graphs
    once = graph_module.print_readable(print_output=False)
    assert find_sites(graph_module) == []
    rewrite(graph_module, rewriting.covering)
    assert graph_module.print_readable(print_output=False) == once


def test_new_nodes_carry_what_a_tracer_records(rewriting):
    outcome = rewriting.rewrite(Model(), *padded(), seen=lambda output: output[:, :20])
    (graph_module,) = outcome.graphs
    found = [node for node in graph_module.graph.nodes if node.target is ATTENTION]
    assert [list(node.meta["nn_module_stack"].values())[-1][0] for node in found] == [
        f"L['self'].layers.{number}" for number in range(3)
    ]
    for node in found:
        value = node.meta["example_value"]
        assert value.fake_mode is node.args[0].meta["example_value"].fake_mode
        assert value.shape == (B, H, T, D)
        assert value.is_contiguous()
        assert "y = sdpa(q, k, v, mask" in node.meta["stack_trace"]


def test_declined_and_rewritten_sites_share_a_graph(rewriting):
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v) + sdpa(q, k, v, is_causal=True)

    outcome = rewriting.rewrite(model, *heads())
    assert outcome.reasons == ["BIDIRECTIONAL", ""]
    torch.testing.assert_close(outcome.output, outcome.expected)


def test_a_mask_that_is_used_elsewhere_stays(rewriting):
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        return sdpa(q, k, v, mask) * mask.sum()

    rewriting.rewrite(model, *heads()).assert_rewritten()


def test_an_attention_may_read_another_ones_output(rewriting):
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = sdpa(q, k, v, is_causal=True)
        return sdpa(y, y, y, is_causal=True)

    rewriting.rewrite(model, *heads(), gradients=True).assert_rewritten(2)


def attend_then_write(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
    cache[:, :, :T].copy_(k)
    y = sdpa(q, cache[:, :, :T], v, is_causal=True)
    cache.mul_(2.0)
    return y + cache.sum()


def write_then_attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
    cache.index_copy_(2, torch.arange(T), k)
    return sdpa(q, cache[:, :, :T], v, is_causal=True)


def keys_made_in_parts(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
    keys = k.new_empty(k.shape)
    keys[..., :2].copy_(k[..., :2])
    keys[..., 2:].copy_(cache[:, :, :T, 2:])
    return sdpa(q, keys, v, is_causal=True)


def rolling_cache(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
    cache.copy_(cache.roll(-1, 2))
    cache[:, :, -1:] = k[:, :, :1]
    return sdpa(q[:, :, :1], cache, cache)


def counted_position(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    mask = torch.arange(T) <= torch.arange(4)[:, None] + position
    position.add_(4)
    return sdpa(q[:, :, :4], k, v, mask) + position


WRITERS = {
    "attend-then-write": (attend_then_write, lambda: torch.randn(B, H, T + 3, D)),
    "write-then-attend": (write_then_attend, lambda: torch.randn(B, H, T + 3, D)),
    "keys-made-in-parts": (keys_made_in_parts, lambda: torch.randn(B, H, T + 3, D)),
    "rolling-cache": (rolling_cache, lambda: torch.randn(B, H, T, D)),
    "counted-position": (counted_position, lambda: torch.tensor(7)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", WRITERS)
def test_writes_keep_their_order(rewriting, case, compiled):
    function, make = WRITERS[case]
    states = []

    def model(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        states.append(state)
        return function(q, k, v, state)

    torch.manual_seed(2)
    outcome = rewriting.rewrite(model, *heads(), make(), compiled=compiled)
    outcome.assert_rewritten()
    torch.testing.assert_close(states[0], states[-1])


def test_exported_programs_still_run_and_lower(rewriting):
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(2)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.model(x, padding)

    program, example = Program(), (padded()[0].detach(), padded()[1])
    length = torch.export.Dim("length", min=4, max=64)
    exported = torch.export.export(program, example, dynamic_shapes={"x": {1: length}, "padding": {1: length}})
    rewrite(exported.graph_module, rewriting.covering)
    exported.validate()
    for size in (T, 13, 40):
        x, padding = torch.randn(B, size, E), torch.ones(B, size, dtype=torch.long)
        expected = program(x, padding)
        torch.testing.assert_close(exported.module()(x, padding), expected, rtol=1e-4, atol=2e-5)
    lowered = exported.run_decompositions()
    torch.testing.assert_close(lowered.module()(x, padding), expected, rtol=1e-4, atol=2e-5)


def test_exported_attention_that_is_the_output_keeps_its_name(rewriting):
    class Program(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, is_causal=True)

    example = tuple(x.detach() for x in heads())
    exported = torch.export.export(Program(), example)
    outputs = [spec.arg.name for spec in exported.graph_signature.output_specs]
    rewrite(exported.graph_module, rewriting.covering)
    exported.validate()
    assert [node.name for node in exported.graph.output_node().all_input_nodes] == outputs
    torch.testing.assert_close(exported.module()(*example), Program()(*example), rtol=1e-4, atol=2e-5)


def test_a_region_that_runs_twice_is_rewritten_once(rewriting):
    @torch.compiler.nested_compile_region
    def region(x: Tensor, mask: Tensor) -> Tensor:
        return sdpa(x, x, x, attn_mask=mask).sin()

    def model(x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).tril() & padding[:, None, None].bool()
        return region(region(x, mask), mask)

    outcome = rewriting.rewrite(
        model, heads(T)[0], padded()[1], gradients=True, compiled=True, seen=lambda output: output[:, :, :20]
    )
    outcome.assert_rewritten()


def test_nothing_flows_back_from_the_future(rewriting):
    model = Model(2)
    config = rewriting.covering.replace(num_selected=3)
    x, padding = padded()
    changed = x.detach().clone()
    changed[:, 15:] += 1.0
    results = [rewriting.rewrite(model, each.detach(), padding, config=config).output for each in (x, changed)]
    torch.testing.assert_close(results[0][:, :15], results[1][:, :15], rtol=0, atol=0)
    assert not torch.equal(results[0][:, 15:], results[1][:, 15:])


class Traceable(nn.Module):
    """A hundred written-out attentions, which `symbolic_trace` traces faster than Dynamo."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.ModuleList(nn.Linear(E, E) for _ in range(3)) for _ in range(100))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mask = x.new_ones(T, T).tril().bool() & padding[:, None, None, :].bool()
        for projections in self.projections:
            q, k, v = (each(x).view(B, T, H, D).transpose(1, 2) for each in projections)
            scores = (q @ k.transpose(2, 3) / 2).masked_fill(mask.logical_not(), -1e9)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, E)
        return x


def test_a_hundred_layers_are_rewritten_within_two_seconds(rewriting):
    times = []
    for _ in range(3):  # the best of some: on a busy machine the same work takes more processor time
        graph_module = fx.symbolic_trace(Traceable())
        propagate_shapes(graph_module, padded())
        start = time.process_time()
        rewrite(graph_module, rewriting.covering)
        times.append(time.process_time() - start)
        assert sum(node.target is ATTENTION for node in graph_module.graph.nodes) == 100
        if times[-1] < 2:
            break
    assert min(times) < 2
