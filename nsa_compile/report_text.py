"""`RewriteReport` as text: an aligned table in which equal layers share a row, and what its words mean below it."""

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nsa_compile.config import NSAConfig
from nsa_compile.report import GraphReport, RewriteReport, SiteReport

COLUMNS = ("module", "spelling", "mask", "shapes", "decision", "reason")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        cells: texts under `COLUMNS`.
        sites: the sites that the row stands for.
    """

    cells: tuple[str, ...]
    sites: tuple[SiteReport, ...]


def text(report: RewriteReport) -> str:
    """Renders a report for a terminal or a log."""
    rows = table(report.sites)
    # The sites of a row differ in the names of their nodes only: the first one speaks for all.
    first = [row.sites[0] for row in rows]
    parts = [
        f"{report.summary} ({describe_config(report.config)})",
        aligned([COLUMNS, *(row.cells for row in rows)]) if rows else "",
        section("masks (query i, key j)", (f"{site.mask}: {sentence}" for site in first for sentence in site.proof)),
        section("reasons", (f"{site.reason}: {site.sentence}" for site in first if site.reason)),
        section("graph breaks", report.break_reasons),
        section("notes", report.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def describe_config(config: NSAConfig) -> str:
    """Returns the configuration in one line."""
    return (
        f"{config.combine}; blocks of {config.selection_block}, {config.num_selected} selected, "
        f"window {config.window}, compression {config.block_length}/{config.block_stride}"
    )


def table(sites: Iterable[SiteReport]) -> list[Row]:
    """Returns the rows: sites that differ in nothing but a number in the module's name share one."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[SiteReport]] = {}
    for site in sites:
        rest = (site.spelling, site.mask, describe_shapes(site), site.decision, site.reason)
        groups.setdefault((tuple(site.module.split(".")), rest), []).append(site)
    for position in reversed(range(max((len(name) for name, _ in groups), default=0))):
        groups = _join_numbers(groups, position)
    rows = []
    for (name, rest), members in groups.items():
        module = ".".join(name) or "(root)"
        count = f" ({len(members)})" if len(members) > 1 else ""
        rows.append(Row((module + count, *rest), tuple(members)))
    return rows


def _join_numbers(
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[SiteReport]], position: int
) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[SiteReport]]:
    """Joins groups whose names differ only in the number at a position."""
    similar: dict[tuple[object, ...], list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for name, rest in groups:
        numbered = position < len(name) and name[position].isdecimal()
        skeleton = (*name[:position], None, *name[position + 1 :]) if numbered else name
        similar.setdefault((skeleton, rest), []).append((name, rest))
    joined = {}
    for keys in similar.values():
        name, rest = keys[0]
        if len(keys) > 1:
            name = (*name[:position], ranges(int(key[0][position]) for key in keys), *name[position + 1 :])
        joined[name, rest] = [site for key in keys for site in groups[key]]
    return joined


def ranges(numbers: Iterable[int]) -> str:
    """Writes a set of numbers in short: `{0-5,7,9-11}`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) + "}"


def describe_shapes(site: SiteReport) -> str:
    """Returns the shapes of the operands in one line, equal ones together."""
    operands: dict[str, list[str]] = {}
    for operand, shape in site.shapes.items():
        operands.setdefault(shape, []).append(operand)
    return "  ".join(f"{','.join(names)} {shape}" for shape, names in operands.items())


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lays rows out in columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def section(title: str, lines: Iterable[str]) -> str:
    """Returns a titled list of the different lines; "" where there is none."""
    different = dict.fromkeys(line for line in lines if line)
    return "\n".join([f"{title}:", *(f"  {line}" for line in different)]) if different else ""


def difference(graph: GraphReport, context: int = 3) -> str:
    """Returns what a rewrite changed in a graph's code, as a unified diff; "" where nothing.

    Args:
        graph: the graph, with its code kept.
        context: unchanged lines around each change.
    """
    before, after = graph.before.splitlines(), graph.after.splitlines()
    return "\n".join(difflib.unified_diff(before, after, "before", "after", n=context, lineterm=""))
