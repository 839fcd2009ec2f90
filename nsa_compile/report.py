"""What happened to each attention of a model: `RewriteReport`, for people and for programs."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nsa_compile.config import NSAConfig

Decision = Literal["rewritten", "declined"]


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention of the model.

    Attributes:
        module: dotted name of the module that computes it, relative to what was compiled; "" for that itself.
        module_class: name of the module's class.
        spelling: how the model writes it, such as "F.scaled_dot_product_attention".
        mask: what the mask lets a query see, in words: "causal, padding"; "" where that was not found out.
        proof: how that was proved, a sentence for each part of the mask.
        shapes: operand -> its shape, such as "[1, 32, 8192, 128]"; symbols where sizes are dynamic.
        decision: "rewritten" or "declined".
        reason: name of the `Reason` of a decline, such as "TOO_SHORT"; "" where rewritten.
        sentence: the reason in words, naming the operation or value at fault; "" where rewritten.
        node: name of the node in the graph as it was before.
        nodes: names of the nodes at fault.
        stack_trace: the user's source lines that made the node.
        graph: index of the graph that holds it, in order of capture.
        learned: the learned parts that it uses, such as "gates, mlp compression"; "" for none.
    """

    module: str
    spelling: str
    mask: str
    shapes: Mapping[str, str]
    decision: Decision
    reason: str = ""
    sentence: str = ""
    proof: tuple[str, ...] = ()
    module_class: str = ""
    node: str = ""
    nodes: tuple[str, ...] = ()
    stack_trace: str = ""
    graph: int = 0
    learned: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as values that JSON takes."""
        return {**dataclasses.asdict(self), "shapes": dict(self.shapes)}


@dataclasses.dataclass(frozen=True)
class UnusedParts:
    """Learned parts of a module that no attention of the graph uses: the module runs dense.

    Attributes:
        module: dotted name of the module.
        reason: name of the `Reason` why its attention is declined; "" where it has none in the graph.
        sentence: that in words.
    """

    module: str
    reason: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph of the model.

    Attributes:
        before: its code as it was captured; "" where it was not kept.
        after: its code after the rewrite; equal to `before` where nothing changed.
        break_reason: why the graph ends before its function does; None where it does not.
    """

    before: str = ""
    after: str = ""
    break_reason: str | None = None


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did, or would do, to the attentions of a model.  `str()` gives a table.

    Attributes:
        config: the configuration of the rewrite.
        sites: every attention found, in order of execution within a graph.
        graphs: every graph; more than one where Dynamo breaks the model.
        notes: what else a reader should know about the result.
        unused_parts: learned parts that are attached and not used.
    """

    config: NSAConfig
    sites: tuple[SiteReport, ...] = ()
    graphs: tuple[GraphReport, ...] = ()
    notes: tuple[str, ...] = ()
    unused_parts: tuple[UnusedParts, ...] = ()

    def with_note(self, note: str) -> "RewriteReport":
        """Returns the report with a note added."""
        return dataclasses.replace(self, notes=(*self.notes, note))

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        """The attentions that became, or would become, NSA."""
        return tuple(site for site in self.sites if site.decision == "rewritten")

    @property
    def declined(self) -> tuple[SiteReport, ...]:
        """The attentions that stay dense."""
        return tuple(site for site in self.sites if site.decision == "declined")

    @property
    def break_reasons(self) -> tuple[str, ...]:
        """Why Dynamo broke the model into several graphs; empty where it did not."""
        return tuple(graph.break_reason for graph in self.graphs if graph.break_reason is not None)

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        noun = "attention" if len(self.sites) == 1 else "attentions"
        line = f"{len(self.rewritten)} of {len(self.sites)} {noun} rewritten"
        return line if len(self.graphs) < 2 else f"{line}, in {len(self.graphs)} graphs"

    def to_dict(self, *, graphs: bool = False) -> dict[str, Any]:
        """Returns the report as values that JSON takes.

        Args:
            graphs: put the code of the graphs in, which is long.
        """
        return {
            "config": self.config.to_dict(),
            "rewritten": len(self.rewritten),
            "declined": len(self.declined),
            "sites": [site.to_dict() for site in self.sites],
            "graphs": [
                dataclasses.asdict(graph) if graphs else {"break_reason": graph.break_reason} for graph in self.graphs
            ],
            "notes": list(self.notes),
        }

    def to_html(self, path: "str | os.PathLike[str]") -> Path:
        """Writes the report as one HTML page that needs no other file: table, proofs, graphs before and after."""
        from nsa_compile.report_html import page

        target = Path(path)
        target.write_text(page(self), encoding="utf-8")
        return target

    def __str__(self) -> str:
        from nsa_compile.report_text import text

        return text(self)
