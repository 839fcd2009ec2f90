"""`python -m nsa_compile rewrite`: a model's graph before and after."""

import argparse

from nsa_compile.cli.models import add_model_arguments, explain_model
from nsa_compile.report import GraphReport
from nsa_compile.report_text import difference

SUMMARY = "Print a model's graph before and after the rewrite, or what differs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    add_model_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--show",
        choices=["diff", "before", "after", "both"],
        default="diff",
        help="a unified diff, or the whole code (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the graphs.

    Returns:
        0 if a graph changes, 1 if none does.
    """
    report = explain_model(arguments)
    for index, graph in enumerate(report.graphs):
        print(f"# graph {index}: {report.summary}" if len(report.graphs) == 1 else f"# graph {index}")
        print(_shown(graph, arguments.show))
    return 0 if report.rewritten else 1


def _shown(graph: GraphReport, show: str) -> str:
    if show == "diff":
        return difference(graph) or "# unchanged"
    if show == "both":
        return f"# before\n{graph.before}\n# after\n{graph.after}"
    return graph.before if show == "before" else graph.after
