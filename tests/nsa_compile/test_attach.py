"""Attaching learned parts to models, and what models with learned parts do: run, copy, save, load, export, refuse."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional

from nsa_compile import (
    NSAConfig,
    attach,
    collect_reports,
    detach,
    explain,
    learned_parts,
    load_learned,
    nsa_backend,
    rewrite,
    save_learned,
)
from nsa_compile.errors import AttachError, ConfigError, NotRewrittenError

WIDTH, HEADS = 32, 4
CONFIG = NSAConfig(
    block_length=8, block_stride=4, selection_block=8, num_selected=3, window=8, combine="gated", compression="mlp"
)
INDEPENDENT = CONFIG.replace(branch_kv="independent")
# The selected branch sees every key.
COVERING = CONFIG.replace(num_selected=64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = [p(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        attended = functional.scaled_dot_product_attention(*heads, mask, is_causal=mask is None)
        return self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers; a mask is built outside of them where there is padding."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        states, mask = self.embed(tokens), None
        if padding is not None:
            position = torch.arange(tokens.shape[1])
            mask = (position <= position[:, None]) & padding[:, None, None, :].bool()
        for layer in self.layers:
            states = states + layer(states, mask)
        return states


def make(config: NSAConfig = CONFIG, start: str = "scratch", layers: int = 2) -> nn.Module:
    made = Model(layers)
    attach(made, config, tokens(), start=start)
    return made


def tokens(length: int = 45) -> Tensor:
    return torch.randint(50, (2, length))


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_every_attention_gets_parts_of_its_own(llama):
    before = dict(llama.named_parameters())
    assert attach(llama, INDEPENDENT) == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    added = {name: p for name, p in llama.named_parameters() if name not in before}
    assert {name.split(".nsa.")[0] for name in added} == {f"model.layers.{i}.self_attn" for i in range(2)}
    assert {name.split(".nsa.")[1] for name in added} == {
        *(f"gates.{layer}.{kind}" for layer in ("hidden", "output") for kind in ("weight", "bias")),
        *(f"compress_{name}.position" for name in ("key", "value")),
        *(
            f"compress_{name}.{layer}.{kind}"
            for name in ("key", "value")
            for layer in ("hidden", "output")
            for kind in ("weight", "bias")
        ),
        *(f"{branch}.{name}_proj.weight" for branch in ("compressed", "window") for name in "kv"),
    }
    assert len({id(p) for p in added.values()}) == len(added)


@pytest.mark.parametrize(
    ("compression", "branch_kv"), [("mean", "shared"), ("linear", "independent"), ("mlp", "independent")]
)
def test_a_dense_start_is_near_the_dense_model(compression, branch_kv):
    model, ids = Model(), tokens()
    dense = model(ids)
    attach(model, COVERING.replace(compression=compression, branch_kv=branch_kv), ids)
    error = (model(ids) - dense).norm() / dense.norm()
    assert error < 0.02
    # Only the gates, 0.02 and 0.98, differ from dense attention.
    for parts in learned_parts(model).values():
        with torch.no_grad():
            parts.gates.output.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]).repeat(HEADS))
    torch.testing.assert_close(model(ids), dense)


@pytest.mark.parametrize("start", ["dense", "scratch"])
@pytest.mark.parametrize("compression", ["linear", "mlp"])
def test_compression_starts_as_the_mean_and_from_scratch_that_of_keys_as_the_sum(compression, start):
    keys = torch.randn(2, 3, 45, WIDTH // HEADS)
    parts = learned_parts(make(CONFIG.replace(compression=compression), start=start))["layers.0"]
    blocks = keys.unfold(2, 8, 4)
    expected = blocks.sum(-1) if start == "scratch" else blocks.mean(-1)
    torch.testing.assert_close(parts.compress_key(keys), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.compress_value(keys), blocks.mean(-1), rtol=1e-5, atol=1e-6)


def test_a_start_from_scratch_opens_all_branches_halfway():
    torch.manual_seed(0)
    parts = learned_parts(make(INDEPENDENT))["layers.0"]
    gates = parts.gates(torch.randn(2, 9, WIDTH))
    assert gates.mean().item() == pytest.approx(0.5, abs=0.05)
    own = parts.get_parameter("compressed.k.weight")
    assert not torch.equal(own, parts.get_parameter("window.k.weight"))


def test_detaching_gives_the_dense_model_back(llama):
    ids = tokens()
    dense, kind, names = llama(ids).logits, type(llama), list(llama.state_dict())
    attach(llama, CONFIG, start="scratch")
    assert not torch.allclose(llama(ids).logits, dense)
    assert detach(llama) == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert torch.equal(llama(ids).logits, dense)
    assert type(llama) is kind
    assert list(llama.state_dict()) == names


def compiled_ahead(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """The backend, with AOTAutograd and without Inductor."""
    assert len(rewrite(graph_module).rewritten) == 2
    return aot_eager(graph_module, inputs)


@pytest.mark.parametrize("backend", [compiled_ahead, pytest.param(nsa_backend, marks=pytest.mark.slow)])
def test_compiled_and_not_compiled_are_one_function(llama, backend):
    attach(llama, INDEPENDENT, start="scratch")
    ids = tokens()
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    expected = llama(ids, attention_mask=padding).logits[padding.bool()]
    llama.compile(backend=backend)
    torch.testing.assert_close(llama(ids, attention_mask=padding).logits[padding.bool()], expected)


def test_the_backend_uses_the_configuration_of_the_parts():
    model, ids = make(INDEPENDENT, layers=1), tokens()
    with torch.no_grad():
        expected = model(ids)
        model.compile(backend=nsa_backend, fullgraph=True)
        with collect_reports() as reports:
            torch.testing.assert_close(model(ids), expected)
    assert len(reports[0].rewritten) == 1
    assert "1 with learned parts, by their own configuration: gates; mlp compression" in str(reports[0])


def test_a_report_names_the_learned_parts():
    report = explain(make(INDEPENDENT))(tokens())
    assert {site.learned for site in report.sites} == {"gates; mlp compression; keys and values for each branch"}
    assert report.unused_parts == ()


def test_lengths_may_change():
    model = make(INDEPENDENT)
    ids = tokens(120)
    whole = model(ids)
    for length in (1, 3, 8, 9, 64, 65, 111):
        torch.testing.assert_close(model(ids[:, :length]), whole[:, :length], rtol=1e-4, atol=1e-5)


def test_calls_may_differ_as_often_as_they_like():
    model = make(layers=1)
    frames = torch._dynamo.utils.counters["frames"]
    with torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False):
        for length in (20, 21, 22, 23, 24):
            assert model(tokens(length)).shape == (2, length, WIDTH)
        captured = frames["ok"]
        for length in (20, 21, 22, 23, 24):
            model(tokens(length))
    assert frames["ok"] == captured


def test_copies_are_independent():
    model, ids = make(INDEPENDENT), tokens()
    before, duplicate = model(ids), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.5)
    changed = duplicate(ids)
    assert not torch.allclose(changed, before)
    assert torch.equal(model(ids), before)
    changed.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in duplicate.parameters())


def test_pickled_whole_and_by_state(tmp_path):
    model, ids = make(INDEPENDENT), tokens()
    expected = model(ids)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(ids), expected)
    other = make(INDEPENDENT)
    assert not torch.allclose(other(ids), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), expected)


def test_saved_and_loaded_without_an_example(tmp_path):
    pytest.importorskip("safetensors")
    model, ids = make(INDEPENDENT), tokens()
    for parts in learned_parts(model).values():
        parts.config = parts.config.replace(num_selected=4)
    save_learned(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nsa.safetensors", "nsa_config.json"]
    other = Model()
    other.load_state_dict({name: p for name, p in model.state_dict().items() if ".nsa." not in name})
    assert load_learned(other, tmp_path) == ("layers.0", "layers.1")
    assert torch.equal(other(ids), model(ids))
    assert [parts.config.num_selected for parts in learned_parts(other).values()] == [4, 4]
    with torch.no_grad():
        for parameter in learned_parts(other)["layers.1"].parameters():
            parameter.zero_()
    load_learned(other, tmp_path)
    assert torch.equal(other(ids), model(ids))


def test_loading_refuses_what_does_not_fit(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(AttachError, match=r"has no nsa_config\.json and nsa\.safetensors"):
        load_learned(Model(), tmp_path)
    with pytest.raises(AttachError, match="has no learned parts to save"):
        save_learned(Model(), tmp_path)
    save_learned(make(), tmp_path)
    with pytest.raises(AttachError, match=r"has learned parts for 'layers\.0', which this model lacks"):
        load_learned(Attention(), tmp_path)
    with pytest.raises(AttachError, match=r"do not fit this model"):
        load_learned(make(CONFIG.replace(compression="linear")), tmp_path)


def test_a_class_keeps_its_name_and_signature(llama):
    kind, signature = type(llama), inspect.signature(llama.forward)
    attach(llama, CONFIG)
    assert isinstance(llama, kind)
    assert type(llama).__name__ == kind.__name__
    assert inspect.signature(llama.forward) == signature


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported(strict):
    model, ids = make(INDEPENDENT).eval(), tokens()
    length = torch.export.Dim("length", min=16, max=512)
    program = torch.export.export(model, (ids,), strict=strict, dynamic_shapes={"tokens": {1: length}})
    with pytest.raises(NotRewrittenError, match="was not rewritten"):
        program.module()(ids)
    assert len(rewrite(program).rewritten) == 2
    for length in (45, 33):
        torch.testing.assert_close(program.module()(ids[:, :length]), model(ids[:, :length]))


def test_other_backends_do_not_run_it_dense():
    for model in (make().eval().requires_grad_(requires_grad=False), make()):
        for backend in ("eager", "aot_eager"):
            with pytest.raises(NotRewrittenError, match="compile the model with backend='nsa'"):
                torch.compile(model, backend=backend)(tokens())


@pytest.mark.slow
def test_inductor_does_not_run_it_dense():
    with pytest.raises(NotRewrittenError), torch.no_grad():
        torch.compile(make())(tokens())


def test_an_attention_alone_runs_where_its_mask_is_known():
    model = make()
    states = torch.randn(2, 20, WIDTH)
    assert model.layers[0](states).shape == states.shape
    with pytest.raises(NotRewrittenError, match="comes from outside the graph"):
        model.layers[0](states, torch.ones(20, 20, dtype=torch.bool).tril())


def test_learned_parts_that_nothing_uses_are_reported():
    model, ids = make(), tokens()

    def forward(states: Tensor) -> Tensor:
        return model(ids) + model.layers[0](states, torch.zeros(45, 45))

    report = explain(forward)(torch.randn(2, 45, WIDTH))
    assert [site.decision for site in report.sites] == ["rewritten", "rewritten", "declined"]
    (unused,) = report.unused_parts
    assert unused.reason == report.declined[0].reason
    assert f"the learned parts of {unused.module or 'the model'} are not used" in str(report)


def test_generation_with_a_cache_and_shared_keys(llama):
    attach(llama, CONFIG, start="scratch")
    prompt = tokens()[:1]
    generated = llama.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, llama.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False))


def test_a_cache_has_no_keys_of_branches_of_their_own(llama):
    attach(llama, INDEPENDENT)
    prompt = tokens()[:1]
    with pytest.raises(NotRewrittenError, match="a cache"):
        llama.generate(prompt, max_new_tokens=3, do_sample=False)
    assert llama.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=False).shape == (1, 48)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, states: Tensor) -> Tensor:
        heads = [p(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.projections]
        first, second = (functional.scaled_dot_product_attention(*heads[i : i + 3], is_causal=True) for i in (0, 3))
        return (first - second).transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        heads = self.project(states).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(*heads)


def test_refusals():
    states = torch.randn(2, 20, WIDTH)
    with pytest.raises(ConfigError, match="combine='joint' has no learned parts"):
        attach(Attention(), NSAConfig(), states)
    with pytest.raises(AttachError, match="does not say what it takes; give inputs"):
        attach(Attention(), CONFIG)
    with pytest.raises(AttachError, match="no attention was found that can be rewritten: the model: BIDIRECTIONAL"):
        attach(Encoder(), CONFIG, states)
    with pytest.raises(AttachError, match="none that is recognised"):
        attach(nn.Linear(WIDTH, WIDTH), CONFIG, states)
    with pytest.raises(AttachError, match="has 2 attentions with different projections"):
        attach(Twice(), CONFIG, states)
    with pytest.raises(AttachError, match=r"no attention was found in layers\.7"):
        attach(Model(), CONFIG, tokens(), modules=["layers.7"])
    with pytest.raises(AttachError, match="has learned parts already"):
        attach(make(), CONFIG, tokens())
    with pytest.raises(AttachError, match="not for a function"):
        attach(lambda x: x, CONFIG, states)
    with pytest.raises(ConfigError, match="block_length cannot change"):
        learned_parts(make())["layers.0"].config = CONFIG.replace(block_length=4)


def test_some_modules_only():
    model, ids = Model(), tokens()
    assert attach(model, CONFIG, ids, modules=["layers.1"]) == ("layers.1",)
    assert list(learned_parts(model)) == ["layers.1"]
    assert [site.decision for site in explain(model, CONFIG)(ids).sites] == ["declined", "rewritten"]
    assert model(ids).shape == (2, 45, WIDTH)
