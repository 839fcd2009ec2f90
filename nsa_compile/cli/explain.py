"""`python -m nsa_compile explain`: what NSA would do to a model."""

import argparse
import json

from nsa_compile.cli.models import add_model_arguments, explain_model, progress

SUMMARY = "Show which attentions of a model become NSA, and why the others do not."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    add_model_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument("--html", metavar="FILE", help="also write the report as a page")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report.

    Returns:
        0 if an attention becomes NSA, 1 if none does.
    """
    report = explain_model(arguments)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    if arguments.html:
        progress(f"wrote {report.to_html(arguments.html)}")
    return 0 if report.rewritten else 1
