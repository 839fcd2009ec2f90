"""The command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_compile
from nsa_compile import NSAConfig
from nsa_compile.cli import doctor, models
from nsa_compile.cli.main import COMMANDS, build_parser, main
from nsa_compile.cli.settings import config_of
from nsa_compile.errors import ModelLoadError

ROOT = Path(nsa_compile.__file__).parents[1]
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def llama(tmp_path):
    """A folder with the configuration of a small Llama."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
    assert "--num-selected" in capsys.readouterr().out


def test_explain_prints_the_table(llama, capsys):
    assert main(["explain", "--model", str(llama)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 of 2 attentions rewritten (joint; blocks of 64, 16 selected, window 512")
    assert "model.layers.{0-1}.self_attn (2)  F.scaled_dot_product_attention  causal" in out
    assert "query [1, 4, 2048, 16]  key,value [1, 2, 2048, 16]" in out
    assert err.splitlines() == ["building LlamaForCausalLM without weights", "capturing the graph"]


def test_explain_writes_json_and_a_page(llama, tmp_path, capsys):
    page = tmp_path / "report.html"
    words = ["explain", "--model", str(llama / "config.json"), "--json", "--html", str(page), "--padded", "--tiny"]
    assert main([*words, "--window", "128", "--batch", "3", "--dtype", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["window"] == 128
    assert [site["mask"] for site in report["sites"]] == ["causal, padding"] * 2
    assert report["sites"][0]["shapes"]["query"] == "[3, 4, 2048, 16]"
    assert "nsa.attention" in page.read_text(encoding="utf-8")


def test_explain_of_a_dynamic_training_step(llama, capsys):
    assert main(["explain", "--model", str(llama), "--train", "--dynamic", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rewritten"] == 2
    assert "s" in report["sites"][0]["shapes"]["query"]


def test_explain_exits_with_1_if_nothing_is_rewritten(llama, capsys):
    assert main(["explain", "--model", str(llama), "--tokens", "512"]) == 1
    assert "TOO_SHORT: 512 keys are fewer than min_keys=1024." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("show", "expected", "absent"),
    [
        ("diff", ["+++ after", "= torch.ops.nsa.attention", "-        attn_output: "], ["embed_tokens"]),
        ("before", ["torch._C._nn.scaled_dot_product_attention"], ["torch.ops.nsa"]),
        ("after", ["torch.ops.nsa.attention", "embed_tokens"], ["torch._C._nn.scaled_dot_product_attention"]),
        ("both", ["torch.ops.nsa.attention", "torch._C._nn.scaled_dot_product_attention"], []),
    ],
)
def test_rewrite_prints_graphs(llama, capsys, show, expected, absent):
    assert main(["rewrite", "--model", str(llama), "--show", show]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# graph 0: 2 of 2 attentions rewritten\n")
    assert all(text in out for text in expected)
    assert not any(text in out for text in absent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere' does not exist; give a folder with config.json"),
        (["--model", "{folder}/nothing"], "does not exist"),
        (["--model", "{folder}", "--tokens", "0"], "--tokens 0 is not accepted; give at least 1."),
        (["--model", "{folder}", "--num-selected", "2"], "raise num_selected to at least 3"),
        (["--model", "{folder}", "--min-keys", "soon"], "min_keys='soon' is not accepted; give an integer"),
        (["--model", "{folder}", "--attn", "eager", "--batch", "-1"], "--batch -1 is not accepted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_a_sentence_and_status_2(llama, capsys, words, message):
    assert main(["explain", *(word.format(folder=llama) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_folders_without_a_model_are_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ModelLoadError, match=r"holds neither a config\.json nor a \.gguf file"):
        models.load_configuration(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"cannot be loaded: .*model_type"):
        models.load_configuration(str(tmp_path))


def test_a_model_type_stands_for_its_default_configuration():
    pytest.importorskip("transformers")
    assert models.load_configuration("gpt2").n_positions == 1024


def test_missing_transformers_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match=r"pip install 'nsa-compile\[models\]'"):
        models.load_configuration("llama")


def test_more_tokens_than_the_model_is_made_for_get_a_note(tmp_path, capsys):
    pytest.importorskip("transformers")
    positions = {"model_type": "gpt2", "n_positions": 32, "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**positions, "architectures": ["GPT2Model"]}))
    assert main(["explain", "--model", str(tmp_path), "--batch", "2", "--tokens", "64", "--min-keys", "0"]) == 0
    assert "note: the model is made for 32 tokens; --tokens 64 is more" in capsys.readouterr().err


def test_a_model_that_cannot_run_on_the_inputs_is_an_error(tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 32, **sizes}))
    assert main(["explain", "--model", str(tmp_path), "--tokens", "64"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: BertLMHeadModel does not run on input_ids [1, 64]: ")
    assert "expand" in error


def test_config_of_the_command_line_has_every_field():
    parser = build_parser()
    default = parser.parse_args(["explain", "--model", "llama"])
    assert config_of(default) == NSAConfig()
    words = ["--block-length", "8", "--block-stride", "8", "--selection-block", "16", "--num-selected", "9"]
    words += ["--num-initial", "2", "--num-local", "3", "--window", "33", "--combine", "gated"]
    words += ["--compression", "mlp", "--branch-kv", "independent", "--min-keys", "7"]
    given = config_of(parser.parse_args(["explain", "--model", "llama", *words]))
    assert given == NSAConfig(8, 8, 16, 9, 2, 3, 33, "gated", "mlp", "independent", 7)


def test_doctor_in_a_process():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nsa_compile", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "NSA works here."
    assert f"ok  torch          {torch.__version__}" in done.stdout


@pytest.mark.parametrize("fails", [False, True])
def test_doctor_says_what_is_broken(monkeypatch, capsys, fails):
    def some_check():
        if fails:
            raise OSError("disk on fire")
        return doctor.Finding("some check", "broken", "it is bad", "mend it")

    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, some_check))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "1 broken: some check"
    assert ("OSError: disk on fire" if fails else "-> mend it") in out
    assert main(["doctor", "--json"]) == 1
    assert [finding["status"] for finding in json.loads(capsys.readouterr().out)] == ["ok", "broken"]


@pytest.mark.parametrize(
    ("check", "attribute", "value", "status"),
    [
        (doctor.torch_version, "torch.__version__", "2.10.1+cpu", "broken"),
        (doctor.torch_version, "torch.__version__", "2.11.0a0+git1", "ok"),
        (doctor.compiler, "shutil.which", {}.get, "broken"),
        (doctor.gguf, "importlib.metadata.version", None, "absent"),
    ],
)
def test_doctor_checks(monkeypatch, check, attribute, value, status):
    def not_installed(package):
        raise doctor.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(f"nsa_compile.cli.doctor.{attribute}", value or not_installed)
    finding = check()
    assert finding.status == status
    assert bool(finding.advice) == (status != "ok")
