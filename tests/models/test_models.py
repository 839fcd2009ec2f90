"""Walks transformers' models again: what the table of results says still holds, and rewritten models are right.

A rewritten model equals its dense self where every key is selected, in outputs and gradients; where few are, no output
depends on a later token.
"""

import importlib.metadata
import logging
import zlib

import pytest
import torch
from model_walk.table import TABLE, read_table, table_version, write_table

transformers = pytest.importorskip("transformers")
EXPECTED = read_table()
MODELS = sorted({model for model, _, _ in EXPECTED})
# What CI walks each decoder through: masks that the models build, with padding.
PADDED = "padded"
DECODERS = sorted({model for model, _, scenario in EXPECTED if scenario == PADDED})
# And those whose gradients it compares.
TRAINED = ("deepseek_v3", "gptj", "qwen3")

pytestmark = [
    pytest.mark.skipif(
        transformers.__version__ != table_version() or not torch.__version__.startswith("2.13."),
        reason=f"{TABLE.name} is of transformers {table_version()} and torch 2.13",
    ),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(verbosity)


def check(name, scenarios, implementations):
    """Walks a model, and compares with the table."""
    from model_walk.changes import BLIND, NOISY
    from model_walk.models import all_models
    from model_walk.walk import walk

    (entry,) = [each for each in all_models() if each.name == name]
    keys = [(name, *each) for each in entry.walks if each[0] in implementations and each[1] in scenarios]
    found = {key: walk(entry, *key[1:]) for key in keys}
    assert {key: result.outcome for key, result in found.items()} == {key: EXPECTED[key] for key in found}
    assert {key: each.complaint for key, each in found.items() if each.complaint and key not in BLIND | NOISY} == {}
    return found


def implementation_of(name):
    """One for each model, so that both get their share."""
    return ("sdpa", "eager")[zlib.crc32(name.encode()) % 2]


@pytest.mark.parametrize("name", DECODERS)
def test_padded_decoders(name):
    assert check(name, [PADDED], [implementation_of(name)])


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    found = check(name, ["training"], ["sdpa", "eager"]).values()
    built = [result for result in found if not result.outcome.startswith("not built")]
    assert built
    assert all(result.error is not None for result in built)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_scenario(name):
    from model_walk.scenarios import SCENARIOS

    assert check(name, SCENARIOS, ["sdpa", "eager"])


def test_the_table_holds_every_model():
    from model_walk.models import all_models

    assert set(EXPECTED) == {(entry.name, *each) for entry in all_models() for each in entry.walks}


def test_the_table_is_as_it_would_be_written(tmp_path, monkeypatch):
    from model_walk import table
    from model_walk.scenarios import SCENARIOS

    monkeypatch.setattr(table, "TABLE", tmp_path / "results.md")
    write_table(EXPECTED, SCENARIOS, importlib.metadata.version("transformers"))
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == TABLE.read_text(encoding="utf-8")
