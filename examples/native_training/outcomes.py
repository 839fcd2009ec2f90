"""What runs of `train_from_scratch.py` measured, kept in a file from which runs of several processes are compared."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "train_from_scratch.json"


@dataclasses.dataclass
class Outcome:
    """What one run gives; what it has not measured yet is empty.

    Attributes:
        parameters: their number.
        losses: mean training loss of every `--log` steps, nats per token.
        validation: step -> loss on held-out files, nats per token.
        tokens_per_second: of training, without compilation and validation.
        memory: largest amount allocated on the GPU in training, GiB; 0 on a CPU.
        retrieved: rate of keys retrieved, for each length and depth.
        retrieved_with: n -> the same with n blocks selected, other than in training.
        step_times: T -> median time of a training step of one sequence, ms.
    """

    parameters: int
    losses: list[float] = dataclasses.field(default_factory=list)
    validation: dict[int, float] = dataclasses.field(default_factory=dict)
    tokens_per_second: float = 0.0
    memory: float = 0.0
    retrieved: list[list[float]] = dataclasses.field(default_factory=list)
    retrieved_with: dict[int, list[list[float]]] = dataclasses.field(default_factory=dict)
    step_times: dict[int, float] = dataclasses.field(default_factory=dict)


class OutcomeFile:
    """Outcomes under the same conditions, by the names of their runs, in a folder.

    Those that are there already are kept, so that runs can be made by one process after another.

    Args:
        folder: where the file is, or will be.
        conditions: what has to be the same for outcomes to be compared; JSON.

    Raises:
        ValueError: the folder has outcomes under other conditions.
    """

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        self.path = folder / FILE
        self.outcomes: dict[str, Outcome] = {}
        self._conditions: dict[str, Any] = json.loads(json.dumps(conditions))
        if self.path.exists():
            self._load()

    def write(self, name: str, outcome: Outcome) -> None:
        """Writes the outcome of a run, in place of an earlier one of the same name, beside those of the others."""
        if self.path.exists():
            # Another process may run at the same time.
            self._load()
        self.outcomes[name] = outcome
        # Dense first, whichever run was the first to write.
        self.outcomes = dict(sorted(self.outcomes.items(), key=lambda each: each[0].lower()))
        written = {
            "conditions": self._conditions,
            "outcomes": {name: dataclasses.asdict(each) for name, each in self.outcomes.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A process that is ended while it writes leaves the old file.
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(written, indent=1))
        beside.replace(self.path)

    def _load(self) -> None:
        found = json.loads(self.path.read_text())
        names = {*found["conditions"], *self._conditions}
        changed = sorted(name for name in names if found["conditions"].get(name) != self._conditions.get(name))
        if changed:
            raise ValueError(
                f"{self.path} has outcomes under other conditions ({', '.join(changed)}), which these could not be "
                "compared with: give another --out, or remove the file."
            )
        for name, fields in found["outcomes"].items():
            for numbered in ("validation", "retrieved_with", "step_times"):
                fields[numbered] = {int(number): value for number, value in fields.get(numbered, {}).items()}
            self.outcomes[name] = Outcome(**fields)


def table(outcomes: dict[str, Outcome]) -> str:
    """Lays the outcomes out side by side, with a dash for what was not measured."""
    lengths = sorted({tokens for each in outcomes.values() for tokens in each.step_times})
    others = sorted({number for each in outcomes.values() for number in each.retrieved_with})
    rows: list[tuple[str, Callable[[Outcome], float | None], str]] = [
        ("parameters, millions", lambda each: each.parameters / 1e6, ".1f"),
        ("steps of training", lambda each: max(each.validation, default=None), ",d"),
        ("loss on held-out files", lambda each: next(reversed(each.validation.values()), None), ".4f"),
        ("keys retrieved, all depths", lambda each: _mean(each.retrieved), ".1%"),
        *(
            (
                f"... with {number} blocks selected",
                lambda each, number=number: _mean(each.retrieved_with.get(number)),
                ".1%",
            )
            for number in others
        ),
        ("tokens per second in training", lambda each: each.tokens_per_second or None, ",.0f"),
        ("GPU memory, GiB", lambda each: each.memory or None, ".2f"),
        *(
            (
                f"forward and backward, {tokens:,} tokens, ms",
                lambda each, tokens=tokens: each.step_times.get(tokens),
                ".1f",
            )
            for tokens in lengths
        ),
    ]
    lines = [f"{'':<44}" + "".join(f"{name:>14}" for name in outcomes)]
    for title, read, form in rows:
        values = [read(each) for each in outcomes.values()]
        lines.append(f"{title:<44}" + "".join(f"{'-' if each is None else format(each, form):>14}" for each in values))
    return "\n".join(["", *lines])


def _mean(rates: list[list[float]] | None) -> float | None:
    return statistics.fmean(map(statistics.fmean, rates)) if rates else None
