"""`python -m nsa_compile bench`: NSA and dense attention timed side by side, on this machine."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from nsa_compile.bench import Shape, run_benchmark
from nsa_compile.cli.settings import add_config_arguments, config_of

SUMMARY = "Time NSA beside dense attention on this machine, stage by stage."
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    on_gpu = torch.cuda.is_available()
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batch", type=int, default=1, help="B (default: %(default)s)")
    sizes.add_argument("--heads", type=int, default=64 if on_gpu else 8, help="H, query heads (default: %(default)s)")
    sizes.add_argument("--kv-heads", type=int, default=4 if on_gpu else 2, help="H_kv (default: %(default)s)")
    sizes.add_argument("--tokens", type=int, default=65_536 if on_gpu else 4096, help="T = S (default: %(default)s)")
    sizes.add_argument("--head-size", type=int, default=128 if on_gpu else 64, help="D (default: %(default)s)")
    sizes.add_argument("--value-size", type=int, help="D_v (default: that of --head-size)")
    parser.add_argument("--inputs", choices=["random", "correlated"], default="random", help="(default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bfloat16" if on_gpu else "float32", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--forward-only", action="store_true", help="leave the backward pass out")
    parser.add_argument("--eager", action="store_true", help="call the operators without torch.compile")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table.

    Returns:
        0 if the check against float64 passed, else 1.
    """
    start = time.monotonic()

    def progress(message: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {message}", file=sys.stderr, flush=True)

    shape = Shape(
        arguments.batch, arguments.heads, arguments.kv_heads, arguments.tokens, arguments.head_size,
        arguments.value_size or arguments.head_size,
    )  # fmt: skip
    result = run_benchmark(
        shape, config_of(arguments), kind=arguments.inputs, device=arguments.device, dtype=_DTYPES[arguments.dtype],
        backward=not arguments.forward_only, compiled=not arguments.eager, progress=progress,
    )  # fmt: skip
    print(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result.to_dict(), indent=2), encoding="utf-8")
        progress(f"wrote {arguments.json}")
    return 0 if result.correct else 1
