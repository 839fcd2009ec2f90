"""What README.md says is so: its first example gives the output shown, and its tables match the sources."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from nsa_compile import NSAConfig
from nsa_compile.passes.sites import Reason

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def table_below(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_code_comes_within_the_first_twenty_lines() -> None:
    assert README[: README.index("```python")].count("\n") < 20


def test_first_example_gives_the_output_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    assert capsys.readouterr().out.strip() == blocks("text")[0].strip()
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.isfinite().all()


@pytest.mark.parametrize("code", blocks("python"))
def test_code_is_python(code: str) -> None:
    ast.parse(code)


def test_every_option_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table_below("Options"), re.MULTILINE))))
    assert described - {"NSAConfig"} == {field.name for field in dataclasses.fields(NSAConfig)}


@pytest.mark.parametrize("field", dataclasses.fields(NSAConfig), ids=lambda field: field.name)
def test_defaults_are_the_ones_described(field: dataclasses.Field) -> None:
    (row,) = re.findall(rf"^\| ([^|]*`{field.name}`[^|]*) \| ([^|]*) \|", table_below("Options"), re.MULTILINE)
    defaults = dict(zip(re.findall(r"`(\w+)`", row[0]), row[1].split(", "), strict=True))
    assert ast.literal_eval(defaults[field.name].strip("`")) == field.default


def test_every_reason_that_passes_give_is_described() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "passes").rglob("*.py") if path.name != "sites.py")
    described = set(re.findall(r"`([A-Z_]{3,})`", table_below("What is recognised")))
    assert described == set(re.findall(r"\bReason\.([A-Z_]+)\b", sources))
    assert described <= {reason.name for reason in Reason}


def test_links_lead_to_files() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_every_example_is_listed() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(re.findall(r"examples/(\w+\.py)\)", README))
