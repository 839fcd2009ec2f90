"""The Triton kernels, run by Triton's interpreter on the CPU, equal the reference; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = (
    "causal",
    "causal_chunks",
    "intervals",
    "padded",
    "more_queries_than_keys",
    "one_query",
    "negative_scale",
    "no_scale",
    "more_heads_than_rows",
    "long_ranges",
    "float16",
)
LISTS = (
    "lists",
    "lists_in_tiles",
    "lists_in_chunks",
    "lists_of_equal_blocks",
    "lists_of_many_blocks",
    "lists_in_one_tile",
)


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Errors of every kernel in every case, from one process in which the interpreter is on."""
    script = Path(__file__).with_name("interpret_kernels.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        cwd=root,
        env=_environment(root),
        capture_output=True,
        check=False,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line["errors"] for line in lines}


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_reference(errors: dict[str, dict[str, float]], case: str) -> None:
    budget = 1e-3 if case == "float16" else 2e-6
    assert len(errors[case]) >= 20
    assert {name: value for name, value in errors[case].items() if value > budget} == {}


@pytest.mark.parametrize("case", LISTS)
def test_lists_are_inverted_as_a_stable_sort_does(errors: dict[str, dict[str, int]], case: str) -> None:
    assert errors[case].pop("used") > 0
    # Elsewhere many entries name one block, so that it has further shares.
    assert errors[case].pop("shared") > 0 or case in ("lists_of_many_blocks", "lists_in_one_tile")
    assert errors[case] == {"order": 0, "bounds": 0, "further": 0}
