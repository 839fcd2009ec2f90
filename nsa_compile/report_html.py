"""`RewriteReport` as one HTML page without scripts or other files."""

import html
from collections.abc import Iterable, Sequence

from nsa_compile.report import GraphReport, RewriteReport
from nsa_compile.report_text import COLUMNS, Row, describe_config, difference, table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --rewritten: #18794e; --declined: #ad5700; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top; }
.more td { border-top: 0; max-width: 70rem; padding-top: 0; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: #8881; max-height: 40rem; overflow: auto; padding: .8rem; tab-size: 4; }
summary { cursor: pointer; }
.rewritten { color: var(--rewritten); font-weight: 600; }
.declined { color: var(--declined); font-weight: 600; }
.add { color: var(--rewritten); } .remove { color: #c62a2f; }
""".strip()


def page(report: RewriteReport) -> str:
    """Renders a report as a page; every text of the model and its graphs is escaped."""
    rows = table(report.sites)
    parts = [
        f"<h1>{html.escape(report.summary)}</h1>",
        f"<p>nsa_compile, {html.escape(describe_config(report.config))}</p>",
        _sites(rows) if rows else "<p>The model has no attention that the passes know.</p>",
        _list("Graph breaks", report.break_reasons),
        _list("Notes", report.notes),
        *(_graph(index, graph) for index, graph in enumerate(report.graphs) if graph.before),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.summary)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _sites(rows: Sequence[Row]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    lines = [f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>"]
    for row in rows:
        site = row.sites[0]
        module, spelling, mask, shapes, decision, reason = map(html.escape, row.cells)
        cells = (
            f"<code>{module}</code>",
            f"<code>{spelling}</code>",
            mask,
            f"<code>{shapes}</code>",
            f'<span class="{site.decision}">{decision}</span>',
            f"{reason}<br>{html.escape(site.sentence)}" if reason else "",
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        lines.append(f'<tr class="more"><td colspan="{len(COLUMNS)}">{_details(row)}</td></tr>')
    return "\n".join([*lines, "</tbody>\n</table>"])


def _details(row: Row) -> str:
    """Renders what a row has no column for: the modules it stands for, the proof, the source lines."""
    site = row.sites[0]
    items = [*(f"Proof (query i, key j): {sentence}" for sentence in site.proof)]
    if site.nodes:
        items.append(f"Nodes at fault: {', '.join(site.nodes)}")
    items += list(dict.fromkeys(each.sentence for each in row.sites if each.sentence != site.sentence))
    if len(row.sites) > 1:
        items.append(f"Modules: {', '.join(each.module for each in row.sites)}")
    trace = f"<pre>{html.escape(site.stack_trace)}</pre>" if site.stack_trace else ""
    if not items and not trace:
        return ""
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<details><summary>details</summary><ul>{listed}</ul>{trace}</details>"


def _list(title: str, items: Iterable[str]) -> str:
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in dict.fromkeys(items))
    return f"<h2>{title}</h2>\n<ul>{listed}</ul>" if listed else ""


def _graph(index: int, graph: GraphReport) -> str:
    blocks = [("before", html.escape(graph.before)), ("after", html.escape(graph.after))]
    changes = difference(graph)
    if changes:
        blocks.insert(0, ("changes", "\n".join(map(_coloured, changes.splitlines()))))
    folded = "\n".join(f"<details><summary>{title}</summary><pre>{code}</pre></details>" for title, code in blocks)
    return f"<h2>Graph {index}</h2>\n{folded}"


def _coloured(line: str) -> str:
    kind = {"+": "add", "-": "remove"}.get(line[:1])
    escaped = html.escape(line)
    return f'<span class="{kind}">{escaped}</span>' if kind else escaped
