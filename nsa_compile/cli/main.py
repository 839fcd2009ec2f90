"""Parses the command line and runs a subcommand."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from nsa_compile.errors import InternalError, NSAError

# Subcommand -> the module that implements it.
COMMANDS = {
    "explain": "nsa_compile.cli.explain",
    "rewrite": "nsa_compile.cli.rewrite",
    "doctor": "nsa_compile.cli.doctor",
    "bench": "nsa_compile.cli.bench",
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m nsa_compile", description="Native Sparse Attention.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after the program's name; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 for a negative outcome, 2 for a user's mistake.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except InternalError:
        raise
    except NSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing more can be written to it.
        sys.stderr.close()
        return 0
