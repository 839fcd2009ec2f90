"""Training a model with learned parts as users train: optimizers, precision, accumulation, checkpoints, trainers."""

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nsa_compile import NSAConfig, attach, learned_parts, nsa_backend, rewrite

WIDTH, HEADS, VOCABULARY = 32, 4, 20
CONFIG = NSAConfig(
    block_length=8,
    block_stride=4,
    selection_block=8,
    num_selected=3,
    window=8,
    combine="gated",
    compression="mlp",
    branch_kv="independent",
)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        normed = self.norm(states)
        heads = [p(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return states + self.out(attended.transpose(1, 2).flatten(2))


class LanguageModel(nn.Module):
    """Predicts tokens; the embedding and the head are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.checkpoints = False

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embed(tokens)
        for layer in self.layers:
            states = checkpoint(layer, states, use_reentrant=False) if self.checkpoints else layer(states)
        return functional.cross_entropy(self.head(states[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def make() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel()
    attach(model, CONFIG, batch(0), start="scratch")
    return model


def batch(step: int) -> Tensor:
    """Sequences that repeat: what comes next stands earlier."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (4, 24), generator=generator).repeat(1, 2)


def compiled_ahead(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """The backend, with AOTAutograd and without Inductor."""
    rewrite(graph_module)
    return aot_eager(graph_module, inputs)


def train(
    model: nn.Module,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
    scaler: Any = None,
) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for step in steps:
        total = 0.0
        for half in batch(step).chunk(2):
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                loss = model(half) / 2
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{module}.{name}": parameter.detach().clone()
        for module, parts in learned_parts(model).items()
        for name, parameter in parts.named_parameters()
    }


@pytest.mark.parametrize("backend", [None, compiled_ahead, pytest.param(nsa_backend, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast bfloat16"])
def test_every_learned_part_is_trained(backend, dtype):
    model = make()
    before = learned_state(model)
    if backend is not None:
        model.compile(backend=backend, fullgraph=True)
    losses = train(model, range(8), dtype=dtype)
    assert losses[-1] < losses[0] - 0.05
    after = learned_state(model)
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []
    assert all(parameter.dtype == torch.float32 for parameter in after.values())


def test_autocast_changes_little():
    model = make()
    plain = model(batch(0))
    plain.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        lower = model(batch(0))
    lower.backward()
    assert lower.item() == pytest.approx(plain.item(), rel=0.01)
    for name, parameter in model.named_parameters():
        # What is added to every key changes no softmax: the gradient is rounding.  So it is for positions while the
        # compression is the mean.
        if not name.endswith(("k.bias", "compress_key.output.bias", "compress_key.position")):
            similarity = functional.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
            assert similarity > 0.9, name


def test_gradient_scaling_in_float16():
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = train(model, range(8), dtype=torch.float16, scaler=scaler)
    assert losses[-1] < losses[0] - 0.05
    assert scaler.get_scale() == 1024.0
    before = learned_state(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    train(model, range(1), dtype=torch.float16, scaler=scaler)
    # Gradients overflow: the step is left out, and the scale lowered.
    assert scaler.get_scale() == 2.0**99
    assert all(torch.equal(value, before[name]) for name, value in learned_state(model).items())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = make()
    model(batch(0)).backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for half in batch(0).chunk(2):
        (model(half) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", [None, compiled_ahead])
def test_checkpointed_gradients_are_the_same(backend):
    model = make()
    model(batch(0)).backward()
    checkpointed = make()
    checkpointed.checkpoints = True
    if backend is not None:
        checkpointed.compile(backend=backend, fullgraph=True)
    checkpointed(batch(0)).backward()
    for (name, one), two in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=lambda m, n=name: n + m)


def test_tied_weights_stay_tied():
    model = make()
    train(model, range(2))
    assert model.head.weight is model.embed.weight
    assert copy.deepcopy(model).head.weight.data_ptr() != model.embed.weight.data_ptr()
    duplicate = copy.deepcopy(model)
    assert duplicate.head.weight is duplicate.embed.weight


def test_resumed_training_has_the_same_losses():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, range(3), optimizer)
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    expected = train(model, range(3, 6), optimizer)
    stored.seek(0)
    state = torch.load(stored)
    torch.manual_seed(99)
    resumed = LanguageModel()
    attach(resumed, CONFIG, batch(0))
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=3e-3)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(resumed, range(3, 6), optimizer) == expected


def test_frozen_base_parameters():
    model = make().requires_grad_(requires_grad=False)
    for parts in learned_parts(model).values():
        parts.requires_grad_()
    base = {name: p.clone() for name, p in model.named_parameters() if ".nsa." not in name}
    before = learned_state(model)
    train(model, range(2), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert not any(torch.equal(value, before[name]) for name, value in learned_state(model).items())


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    model = transformers.LlamaForCausalLM(config)
    attach(model, CONFIG, start="scratch")
    return model


def test_trainer_of_transformers(llama, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    before = learned_state(llama)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in batch(0).repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        remove_unused_columns=True,
    )
    llama.config.use_cache = False
    trainer = Trainer(model=llama, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = learned_state(llama)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The checkpoint of step 2 holds the learned parts, and training goes on from it to the same losses.
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert resumed == pytest.approx(trained)


def test_accelerate(llama):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    before = learned_state(llama)
    prepared, optimizer = accelerator.prepare(llama, optimizer)
    losses = []
    for _ in range(4):
        loss = prepared(batch(0), labels=batch(0)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = learned_state(accelerator.unwrap_model(prepared))
    assert [name for name in before if torch.equal(before[name], after[name])] == []
