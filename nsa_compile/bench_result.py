"""What a benchmark measured: sizes, times by stage, the speedup, and their table; bench.py makes it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from nsa_compile.config import NSAConfig

Kind = Literal["random", "correlated"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one attention: B, H, H_kv, T = S, D, D_v."""

    batch: int = 1
    heads: int = 64
    kv_heads: int = 4
    tokens: int = 65_536
    head_size: int = 128
    value_size: int = 128


@dataclasses.dataclass(frozen=True)
class Stage:
    """One timed thing.

    Attributes:
        name: such as "select_blocks" or "dense cudnn forward".
        milliseconds: median time.
        tflops: 10^12 floating-point operations a second that its matrix products amount to, those of keys that a query
            does not see left out; None where not counted.
    """

    name: str
    milliseconds: float
    tflops: float | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        device: name of the device.
        shape: sizes.
        config: configuration.
        kind: how inputs were drawn.
        errors: results of the check, by what was checked.
        correct: whether the check passed.
        ceilings: the device's measured rates: "tflops" of a large matrix product, "gigabytes" a second of a copy.
        stages: times.
        extra_bytes: peak memory of a forward pass beyond its inputs; None where it is not known.
    """

    device: str
    shape: Shape
    config: NSAConfig
    kind: Kind
    errors: Mapping[str, float]
    correct: bool
    ceilings: Mapping[str, float]
    stages: tuple[Stage, ...]
    extra_bytes: int | None

    def milliseconds(self, name: str) -> float | None:
        """Returns the time of a stage, or None if it was not timed."""
        return next((stage.milliseconds for stage in self.stages if stage.name == name), None)

    def speedup(self, direction: str) -> float | None:
        """Returns how many times faster than the fastest dense attention, for "forward" or "forward+backward".

        None when the check failed or there is nothing to compare with.
        """
        dense = [
            stage.milliseconds
            for stage in self.stages
            if stage.name.startswith("dense") and stage.name.endswith(f" {direction}")
        ]
        nsa = self.milliseconds(f"nsa {direction}")
        return min(dense) / nsa if self.correct and dense and nsa else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        speedups = {direction: self.speedup(direction) for direction in ("forward", "forward+backward")}
        return {**dataclasses.asdict(self), "speedup": speedups}

    def __str__(self) -> str:
        shape = self.shape
        verdict = "passed" if self.correct else "FAILED, so no speedup is given"
        errors = ", ".join(f"{name} {value:.2g}" for name, value in self.errors.items())
        rates = self.ceilings
        sizes = f"B={shape.batch} H={shape.heads} H_kv={shape.kv_heads} T={shape.tokens:,}"
        heads = f"D={shape.head_size} D_v={shape.value_size}"
        lines = [
            f"{self.device}: {sizes} {heads}, {self.config.combine}, {self.kind} inputs",
            f"check: {verdict} ({errors})",
            f"ceilings: {rates['tflops']:.1f} TFLOP/s matrix product, {rates['gigabytes']:.0f} GB/s copy",
        ]
        width = max(len(stage.name) for stage in self.stages)
        for stage in self.stages:
            rate = ""
            if stage.tflops is not None:
                rate = f"  {stage.tflops:8.2f} TFLOP/s  {stage.tflops / rates['tflops']:5.0%} of the ceiling"
            lines.append(f"  {stage.name:{width}}  {stage.milliseconds:10.3f} ms{rate}")
        if self.extra_bytes is not None:
            lines.append(f"extra memory of a forward pass: {self.extra_bytes / 2**30:.2f} GiB")
        for direction in ("forward", "forward+backward"):
            speedup = self.speedup(direction)
            if speedup is not None:
                lines.append(f"{direction}: {speedup:.2f} times the fastest dense attention's speed")
        return "\n".join(lines)
