"""The table of results: one line for each model and outcome, in a file that people read and the test compares."""

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path

TABLE = Path(__file__).parents[1] / "results.md"
_MARK = "Transformers "
_HEAD = """# Every model of transformers, rewritten

{mark}{version}.  Made by `python tests/models/regenerate.py`; `pytest tests/models` walks a part again and compares,
with `--slow` all of it.  Models are built small, with random weights, captured in each scenario and rewritten; the
rewritten graph runs, and equals the dense model where every key is selected.  An outcome counts the attentions: those
rewritten under the mask that was proved, and those declined with the reason.

| model | attention | scenarios | outcome |
| --- | --- | --- | --- |
"""

# (model, attention implementation, scenario)
Key = tuple[str, str, str]


def read_table() -> dict[Key, str]:
    """Reads the outcomes that the table holds; none where there is no table."""
    results: dict[Key, str] = {}
    if not TABLE.exists():
        return results
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 4 or cells[0] in ("model", "---"):
            continue
        model, implementations, scenarios, outcome = cells
        for implementation in implementations.split(", "):
            results |= {(model, implementation, scenario): outcome for scenario in scenarios.split("; ")}
    return results


def table_version() -> str:
    """Returns the version of transformers that the table is of; "" where there is no table."""
    if not TABLE.exists():
        return ""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(_MARK).split(".  ")[0] for line in lines if line.startswith(_MARK)), "")


def write_table(results: Mapping[Key, str], scenarios: Iterable[str], version: str) -> None:
    """Writes the table, sorted by model; scenarios with the same outcome share a line.

    Args:
        results: all outcomes.
        scenarios: all names of scenarios, in the order of the table.
        version: of transformers.
    """
    order = list(scenarios)
    head = _HEAD.format(mark=_MARK, version=version)
    TABLE.write_text(head + "".join(f"{line}\n" for line in _lines(results, order)), encoding="utf-8")


def _lines(results: Mapping[Key, str], order: list[str]) -> Iterable[str]:
    outcomes: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for (model, implementation, scenario), outcome in results.items():
        outcomes[model, scenario][implementation] = outcome
    # Implementations with the same outcome in a scenario share its line, and then scenarios theirs.
    lines: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for (model, scenario), by_implementation in outcomes.items():
        for outcome in dict.fromkeys(by_implementation.values()):
            same = [each for each in ("sdpa", "eager") if by_implementation.get(each) == outcome]
            lines[model, ", ".join(same), outcome].append(scenario)
    for (model, implementations, outcome), found in sorted(lines.items(), key=lambda line: _place(line, order)):
        yield f"| {model} | {implementations} | {'; '.join(sorted(found, key=order.index))} | {outcome} |"


def _place(line: "tuple[tuple[str, str, str], list[str]]", order: list[str]) -> tuple[str, int, str]:
    (model, implementations, _), scenarios = line
    return model, min(map(order.index, scenarios)), implementations
