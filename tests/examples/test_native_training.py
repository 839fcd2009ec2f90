"""The training experiments: their data, their outcomes on a toy, and what is left of a run that is stopped."""

import importlib.util
import json
import random
import re
from importlib import import_module as load
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_compile import attach


def test_facts_are_planted_twice_and_asked_for_at_their_depth() -> None:
    pytest.importorskip("tokenizers")
    facts: Any = load("native_training.facts")
    digits, plant, question, retrieval_rates = facts.DIGITS, facts.plant, facts.question, facts.retrieval_rates

    def encode(text: str) -> list[int]:
        return list(text.encode())

    draw = random.Random(0)
    text = torch.full((400,), ord("."))
    planted = bytes(plant(text, encode, 3, draw).tolist()).decode()
    statements = re.findall(r"\n# the key of [a-z]{3} is [0-9]{5}\n", planted)
    assert len(planted) == 400
    assert len(statements) == 6
    assert all(statements.count(statement) == 2 for statement in statements)

    asked, position = question(text, encode, 0.5, 300, draw)
    prompt = bytes(asked[: position + digits].tolist()).decode()
    assert len(asked) == 400
    assert position + digits + 1 == 300
    (stated, again) = re.finditer(r"the key of ([a-z]{3}) is ([0-9]{5})", prompt)
    assert stated.groups() == again.groups()
    assert stated.start() == pytest.approx(135, abs=15)

    def recall(tokens: torch.Tensor) -> torch.Tensor:
        """Predicts, wherever a name was followed by a key before, the same key again; but never the first digit 7."""
        predicted = torch.zeros_like(tokens)
        for row, sequence in enumerate(tokens):
            written = bytes(sequence.tolist()).decode()
            first = re.search(r"the key of ([a-z]{3}) is ([0-9]{5})", written)
            assert first is not None
            place = written.index(f"the key of {first[1]} is ", first.end()) + len(f"the key of {first[1]} is ")
            if first[2][0] != "7":
                predicted[row, place - 1 : place - 1 + digits] = torch.tensor(encode(first[2]))
        return predicted

    rates = retrieval_rates(
        recall, text, encode, tokens=400, lengths=[200, 400], depths=[0.0, 0.5, 1.0], samples=25, batch=4
    )
    assert [len(row) for row in rates] == [3, 3]
    mean = torch.tensor(rates).mean().item()
    assert 0.8 < mean < 1.0


def from_scratch(folder: Path, *arguments: str) -> Any:
    """Runs the example's toy with few steps."""
    pytest.importorskip("tokenizers")
    sizes = ["--device", "cpu", "--log", "2", "--tokens", "256", "--batch", "1", "--eager", "--out", str(folder)]
    return load("train_from_scratch").main([*sizes, *arguments])


def test_train_from_scratch_compares_two_runs_on_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = from_scratch(tmp_path, "--steps", "8", "--time-at", "256")
    dense, sparse = outcomes["dense"], outcomes["NSA"]
    assert sparse.parameters > dense.parameters
    for outcome in (dense, sparse):
        assert len(outcome.losses) == 4
        assert outcome.losses[-1] < outcome.losses[0] - 0.05
        assert len(outcome.retrieved) == 4
    # Both begin at the same weights and see the same text.
    assert sparse.losses[0] == pytest.approx(dense.losses[0], abs=0.05)
    assert sparse.losses != dense.losses
    written = json.loads((tmp_path / "train_from_scratch.json").read_text())
    assert written["outcomes"]["NSA"]["losses"] == sparse.losses
    assert "loss on held-out files" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "train_from_scratch.png").stat().st_size > 10_000


def test_train_from_scratch_joins_the_runs_of_two_processes(tmp_path: Path) -> None:
    options = ["--steps", "2", "--time-at", "32", "64"]
    sparse = from_scratch(tmp_path, *options, "--only", "NSA")
    both = from_scratch(tmp_path, *options, "--only", "dense")
    assert list(both) == ["dense", "NSA"]
    assert both["NSA"] == sparse["NSA"]
    # The longest first.
    assert list(both["NSA"].step_times) == [64, 32]
    with pytest.raises(ValueError, match="steps") as raised:
        from_scratch(tmp_path, "--steps", "3", "--only", "NSA")
    assert "--out" in str(raised.value)


def test_train_from_scratch_takes_other_sizes() -> None:
    pytest.importorskip("tokenizers")
    example = load("train_from_scratch")
    gpu = ["--device", "cuda"]  # the toy's blocks are too small for it
    given = ["--block-length", "32", "--block-stride", "16", "--window", "256", "--branch-kv", "independent"]
    config = example.parse([*gpu, *given]).config
    assert (config.block_length, config.block_stride, config.window, config.branch_kv) == (32, 16, 256, "independent")
    config = example.parse([*gpu, "--block-length", "8"]).config
    assert (config.block_length, config.block_stride, config.branch_kv) == (8, 8, "shared")
    options = example.parse([*gpu, "--num-selected", "16", "--key-heads", "4", "--head-size", "128", "--eager"])
    model = options.model
    assert (options.config.num_selected, model.heads, model.key_heads, model.head_size) == (16, 16, 4, 128)
    assert options.mode is None
    defaults = example.parse(gpu)
    assert (defaults.config.num_selected, defaults.model.key_heads, defaults.mode) == (20, 8, "reduce-overhead")
    assert (defaults.retrieve_with, example.parse([*gpu, "--retrieve-with"]).retrieve_with) == ([32], [])


def test_train_from_scratch_keeps_each_stage_of_a_run_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: Any = load("native_training.facts")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "question", stop)
    with pytest.raises(KeyboardInterrupt):
        from_scratch(tmp_path, "--steps", "2")
    (outcome,) = json.loads((tmp_path / "train_from_scratch.json").read_text())["outcomes"].values()
    assert list(outcome["validation"]) == ["2"]
    assert outcome["tokens_per_second"] == 0
    assert outcome["retrieved"] == []
    assert (tmp_path / "train_from_scratch.png").exists() == bool(importlib.util.find_spec("matplotlib"))


def test_train_from_scratch_asks_for_keys_with_the_graph_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("train_from_scratch")
    backend_for, compiled = example.backend_for, []

    def counting_backend_for(*arguments: Any) -> Any:
        backend = backend_for(*arguments)

        def count(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
            function = backend(graph_module, inputs)
            nodes = [node for node in graph_module.graph.nodes if node.target is torch.ops.nsa.attention.default]
            compiled.append(*(node.kwargs["num_selected"] for node in nodes))
            return function

        return count

    monkeypatch.setattr(example, "backend_for", counting_backend_for)
    outcomes = from_scratch(tmp_path, "--steps", "2", "--time-at", "--only", "NSA", "--retrieve-with", "4", "16")
    assert compiled == [6, 6, 4, 16]  # the toy's n in training and in validation
    assert {number: len(rates) for number, rates in outcomes["NSA"].retrieved_with.items()} == {4: 4, 16: 4}
    assert "16 blocks selected" in capsys.readouterr().out


def test_what_follows_a_question_does_not_change_what_is_predicted() -> None:
    pytest.importorskip("tokenizers")
    example = load("train_from_scratch")
    sizes: Any = load("native_training.model")
    training: Any = load("native_training.training")
    torch.manual_seed(0)
    model = sizes.Decoder(sizes.ModelConfig(128, 64, layers=2, heads=4, key_heads=2, head_size=16))
    tokens = torch.randint(128, (2, 256))
    dense = model(tokens)
    attach(model, example.TOY, tokens, start="scratch")
    model.compile(backend=training.backend_for(example.TOY, True), dynamic=False)
    with torch.no_grad():
        padded = model(tokens)
        for length in (64, 111, 192):
            alone = model(tokens[:, :length].contiguous())
            torch.testing.assert_close(padded[:, :length], alone, rtol=1e-4, atol=1e-5)
    assert (padded - dense).abs().max() > 1e-3


def test_dense_to_native_evaluates_trains_and_compares(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = ["--tokens", "600", "--steps", "3", "--num-selected", "4", "--eager", "--out", str(tmp_path / "results")]
    results = load("dense_to_native").main(["--device", "cpu", "--model", str(tiny_checkpoint), *sizes])
    assert list(results) == ["dense", "joint, no training", "gated, no training", "gated, 3 steps", "dense, 3 steps"]
    assert results["joint, no training"] == pytest.approx(results["dense"], abs=0.05)
    assert results["gated, no training"] == pytest.approx(results["dense"], abs=0.2)
    assert results["gated, 3 steps"] < results["gated, no training"]
    assert results["dense, 3 steps"] < results["dense"]
    written = (tmp_path / "results" / "dense_to_native.txt").read_text()
    for name, value in results.items():
        trained_as_long = "dense, 3 steps" if "3 steps" in name else "dense"
        (line,) = (line for line in written.splitlines() if line.startswith(f"{name}  "))
        assert line.split()[-2:] == [f"{value:.4f}", f"{value - results[trained_as_long]:.4f}"]


def test_dense_to_native_trains_what_is_new_faster() -> None:
    import transformers

    from nsa_compile import attach

    example = load("dense_to_native")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    before = dict(model.named_parameters())
    attach(model.base_model, example.parse(["--device", "cpu", "--model", "."]).config, torch.zeros(1, 80).long())
    own, learned = (set(parameters) for parameters in example.split_parameters(model))
    names = {name.split(".nsa.")[-1].split(".")[0] for name, each in model.named_parameters() if each in learned}
    assert names == {"gates", "compress_key", "compress_value"}
    copies = {each for name, each in model.named_parameters() if ".nsa." in name} - learned
    assert len(copies) == 2 * 2  # keys and values of two branches; the selected one has the model's own
    assert own == {*before.values(), *copies}
    assert example.parse(["--device", "cpu", "--model", ".", "--block-length", "8"]).config.block_stride == 8


def test_dense_to_native_shows_what_it_has_when_it_is_stopped(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("dense_to_native")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "train", stop)
    arguments = ["--device", "cpu", "--model", str(tiny_checkpoint), "--tokens", "200", "--eager"]
    with pytest.raises(KeyboardInterrupt):
        example.main([*arguments, "--out", str(tmp_path)])
    written = (tmp_path / "dense_to_native.txt").read_text()
    assert "gated, no training" in written
    assert "steps" not in written
