"""Times NSA beside dense attention at several lengths, and finds where it begins to be faster.

Every length is first checked against float64; where that fails, no speedup is given.  `--out results` writes
`speed_by_length.json` and, with matplotlib, `speed_by_length.png`.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from native_training.charts import draw_speed
from native_training.training import progress

from nsa_compile import NSAConfig
from nsa_compile.bench import Benchmark, Shape, run_benchmark

DIRECTIONS = ("forward", "forward+backward")


def main(arguments: Sequence[str] | None = None) -> list[Benchmark]:
    """Measures, and prints a table.

    Args:
        arguments: command line; that of the process by default.

    Returns:
        One benchmark for each length.
    """
    options = parse(arguments)
    config = NSAConfig(combine=options.combine)
    measured = []
    for tokens in options.tokens:
        shape = Shape(1, options.heads, options.kv_heads, tokens, options.head_size, options.head_size)
        result = run_benchmark(
            shape,
            config,
            kind=options.inputs,
            device=options.device,
            dtype=torch.bfloat16 if options.device == "cuda" else torch.float32,
            progress=lambda message, tokens=tokens: progress(f"{tokens:,} tokens: {message}"),
        )
        measured.append(result)
    print(table(measured))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "speed_by_length.json"
    path.write_text(json.dumps([result.to_dict() for result in measured], indent=1))
    progress(f"wrote {path}")
    picture = draw_speed(path)
    progress(f"wrote {picture}" if picture else "no picture: matplotlib is not installed")
    return measured


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; the sizes by default are the paper's on a GPU, small ones on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    lengths = [4096, 8192, 16_384, 32_768, 65_536] if on_gpu else [1024, 2048, 4096]
    parser.add_argument("--tokens", type=int, nargs="*", default=lengths, help="lengths, in ascending order")
    parser.add_argument("--heads", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--kv-heads", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--head-size", type=int, default=128 if on_gpu else 32)
    parser.add_argument("--combine", choices=["gated", "joint"], default="gated")
    parser.add_argument("--inputs", choices=["random", "correlated"], default="random")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the outcomes")
    return parser.parse_args(arguments)


def table(measured: Sequence[Benchmark]) -> str:
    """Lays out times and speedups, and the lengths at which NSA becomes faster."""
    lines = [f"{measured[0].device}, {measured[0].config.combine}", ""]
    for direction in DIRECTIONS:
        lines.append(f"{direction:>18}{'dense, ms':>14}{'NSA, ms':>14}{'speedup':>12}")
        for result in measured:
            sparse, speedup = result.milliseconds(f"nsa {direction}"), result.speedup(direction)
            dense = "-" if sparse is None or speedup is None else f"{sparse * speedup:,.3f}"
            lines.append(
                f"{result.shape.tokens:>18,}{dense:>14}{'-' if sparse is None else f'{sparse:,.3f}':>14}"
                f"{'-' if speedup is None else f'{speedup:.2f}x':>12}"
            )
        even = break_even([(each.shape.tokens, each.speedup(direction)) for each in measured])
        lines += [f"faster from about {even:,.0f} tokens on" if even else "not faster at these lengths", ""]
    return "\n".join(lines)


def break_even(speedups: Sequence[tuple[int, float | None]]) -> float | None:
    """Finds the length from which on NSA is at least as fast, between measured lengths by powers.

    Args:
        speedups: lengths in tokens, ascending, and how many times faster NSA is.

    Returns:
        The length; None where the longest is not faster.
    """
    known = [(tokens, speedup) for tokens, speedup in speedups if speedup is not None]
    if not known or known[-1][1] < 1:
        return None
    for (shorter, slow), (longer, fast) in reversed(list(itertools.pairwise(known))):
        if slow < 1:
            share = -math.log(slow) / (math.log(fast) - math.log(slow))
            return shorter * (longer / shorter) ** share
    return known[0][0]


if __name__ == "__main__":
    main()
