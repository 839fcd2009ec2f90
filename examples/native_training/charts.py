"""Pictures of what the examples measured, drawn from the JSON files that they write."""

import importlib.util
import json
from pathlib import Path
from typing import Any


def draw_comparison(path: Path) -> Path | None:
    """Draws loss curves, and for each run that has asked for keys a map of those retrieved.

    Args:
        path: the JSON file that `train_from_scratch.py` wrote.

    Returns:
        The picture, beside the file; None where matplotlib is not installed.
    """
    plt = _pyplot()
    if plt is None:
        return None
    written = json.loads(path.read_text())
    conditions, outcomes = written["conditions"], written["outcomes"]
    asked = {name: outcome["retrieved"] for name, outcome in outcomes.items() if outcome["retrieved"]}
    figure, grid = plt.subplots(1, 1 + len(asked), figsize=(6 + 4 * len(asked), 4), layout="constrained", squeeze=False)
    axes = grid[0]
    for name, outcome in outcomes.items():
        steps = [conditions["log"] * (i + 1) for i in range(len(outcome["losses"]))]
        (line,) = axes[0].plot(steps, outcome["losses"], alpha=0.4, label=f"{name}, training")
        validation = {int(step): loss for step, loss in outcome["validation"].items()}
        axes[0].plot(list(validation), list(validation.values()), color=line.get_color(), label=f"{name}, held out")
    axes[0].set(xlabel="step", ylabel="loss, nats per token", title=f"{conditions['tokens']:,} tokens of context")
    axes[0].legend()
    for place, (name, rates) in zip(axes[1:], asked.items(), strict=True):
        lengths = [conditions["tokens"] * (i + 1) // len(rates) for i in range(len(rates))]
        image = place.imshow(list(zip(*rates, strict=True)), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        place.set(xlabel="context, tokens", ylabel="depth of the key", title=f"{name}: keys retrieved")
        place.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        depths = len(rates[0])
        place.set_yticks(range(depths), [f"{100 * i / (depths - 1):.0f} %" for i in range(depths)])
        figure.colorbar(image, ax=place)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


def draw_speed(path: Path) -> Path | None:
    """Draws the time of dense attention and of NSA over the length.

    Args:
        path: the JSON file that `speed_by_length.py` wrote.

    Returns:
        The picture, beside the file; None where matplotlib is not installed.
    """
    plt = _pyplot()
    if plt is None:
        return None
    measured = json.loads(path.read_text())
    lengths = [each["shape"]["tokens"] for each in measured]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for place, direction in zip(axes, ("forward", "forward+backward"), strict=True):
        times = [{stage["name"]: stage["milliseconds"] for stage in each["stages"]} for each in measured]
        names = [name for name in times[0] if name.endswith(f" {direction}")]
        for name in names:
            style = "o-" if name.startswith("nsa") else "s--"
            place.plot(lengths, [each.get(name) for each in times], style, label=name.removesuffix(f" {direction}"))
        place.set(
            xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"{measured[0]['device']}: {direction}"
        )
        place.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        place.minorticks_off()
        place.grid(alpha=0.3)
        place.legend()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


def _pyplot() -> Any:
    """Returns matplotlib's pyplot, which draws into files; None where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
