"""`rewrite`: puts NSA in the place of the attentions of a graph, and reports on each."""

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from nsa_compile.buffers import BufferReader
from nsa_compile.config import NSAConfig
from nsa_compile.errors import ConfigError, InternalError, NSAError, UnsupportedGraphError
from nsa_compile.passes.find import find_sites
from nsa_compile.passes.learned import find_markers
from nsa_compile.passes.metadata import propagate_shapes, record_constants
from nsa_compile.passes.plan import Decision, RewritePlan, plan_rewrite
from nsa_compile.passes.rewrite import apply_plan
from nsa_compile.passes.sites import Shape
from nsa_compile.report import GraphReport, RewriteReport, SiteReport, UnusedParts

logger = logging.getLogger(__name__)


def rewrite(
    graph_module: fx.GraphModule | torch.export.ExportedProgram,
    config: NSAConfig | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
) -> RewriteReport:
    """Puts Native Sparse Attention in the place of the attentions of a graph, in place.

    Args:
        graph_module: a graph from Dynamo, `torch.export` (before `run_decompositions`) or `torch.fx.symbolic_trace`;
            an ExportedProgram stands for its graph.
        config: the configuration; `NSAConfig()` by default.
        example_inputs: positional inputs, from which shapes are recorded in a graph that has none
            (one of `symbolic_trace`).

    Returns:
        What became of each attention.  One that is declined stays as it was; that is never an error.

    Raises:
        ConfigError: `config` is not an NSAConfig.
        UnsupportedGraphError: what was given is no graph.
        InternalError: a pass failed, which is a bug of nsa_compile; the graph is not to be used.
    """
    settings = check_config(config)
    if isinstance(graph_module, torch.export.ExportedProgram):
        record_constants(graph_module)
        graph_module = graph_module.graph_module
    if not isinstance(graph_module, fx.GraphModule):
        raise UnsupportedGraphError(
            f"rewrite takes a torch.fx.GraphModule or an ExportedProgram, not {type(graph_module).__name__}; "
            "for a model, use torch.compile(model, backend=nsa_backend)."
        )
    if example_inputs is not None:
        propagate_shapes(graph_module, example_inputs)
    return rewrite_graph(graph_module, settings)


def rewrite_graph(
    graph_module: fx.GraphModule,
    config: NSAConfig,
    *,
    keep_code: bool = True,
    break_reason: str | None = None,
    buffers: BufferReader | None = None,
) -> RewriteReport:
    """Rewrites a graph in place, as `rewrite` does, for callers that have checked their arguments.

    Args:
        graph_module: the graph.
        config: the configuration.
        keep_code: put the graph's code before and after into the report, which costs time.
        break_reason: why the graph ends early, for the report.
        buffers: reads the values of tensors that nothing can change unnoticed.

    Raises:
        InternalError: a pass failed.
    """
    before = readable(graph_module) if keep_code else ""
    try:
        found = find_sites(graph_module, buffers.number if buffers is not None else None)
        plan = plan_rewrite(found, config, buffers, find_markers(graph_module))
        # The nodes are named as they were before: rewriting erases them.
        sites = tuple(map(_site_report, plan.decisions))
        unused = _unused_parts(plan)
        apply_plan(graph_module, plan)
    except NSAError:
        raise
    except Exception as error:
        logger.exception("a pass failed on this graph:\n%s", readable(graph_module))
        raise InternalError(
            f"nsa_compile failed while rewriting a graph: {type(error).__name__}: {error}\nThis is a bug of "
            "nsa_compile, not of the model; please report it with the output of TORCH_LOGS='+nsa_compile'.  "
            "torch.compile(model) compiles the model without NSA."
        ).with_traceback(error.__traceback__) from error
    after = readable(graph_module) if keep_code and (plan.replacements or plan.markers) else before
    graphs = (GraphReport(before, after, break_reason),)
    return RewriteReport(config, sites, graphs, _notes(config, sites, unused), unused)


def check_config(config: NSAConfig | None) -> NSAConfig:
    """Returns the configuration, the default one for None.

    Raises:
        ConfigError: it is something else.
    """
    if config is None:
        return NSAConfig()
    if not isinstance(config, NSAConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; give an NSAConfig, such as NSAConfig(num_selected=32)."
        )
    return config


def join_reports(config: NSAConfig, reports: Sequence[RewriteReport]) -> RewriteReport:
    """Joins the reports on the graphs of one model, in order."""
    sites = tuple(
        dataclasses.replace(site, graph=index) for index, report in enumerate(reports) for site in report.sites
    )
    graphs = tuple(graph for report in reports for graph in report.graphs)
    unused = tuple(parts for report in reports for parts in report.unused_parts)
    return RewriteReport(config, sites, graphs, _notes(config, sites, unused), unused)


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copies the graphs of a module and of the bodies inside it; parameters and buffers stay shared."""
    duplicate = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, child in graph_module.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(duplicate, name, copy_graph(child))
    return duplicate


def readable(graph_module: fx.GraphModule) -> str:
    """Returns the code of a graph and of the bodies inside it, with shapes."""
    return graph_module.print_readable(print_output=False, include_stride=True, include_device=True)


def _site_report(decision: Decision) -> SiteReport:
    place, rejection = decision.place, decision.rejection
    return SiteReport(
        module=place.module,
        module_class=place.module_class,
        spelling=place.spelling,
        mask=decision.mask,
        proof=decision.proof,
        shapes={operand: _shape_text(shape) for operand, shape in place.shapes.items()},
        decision="declined" if rejection else "rewritten",
        reason=rejection.reason.name if rejection else "",
        sentence=(rejection.sentence or rejection.reason.value) if rejection else "",
        node=place.node.name,
        nodes=tuple(node.name for node in rejection.nodes) if rejection else (),
        stack_trace=place.stack_trace,
        learned=_learned_text(decision),
    )


def _learned_text(decision: Decision) -> str:
    replacement = decision.replacement
    if replacement is None or replacement.learned is None:
        return ""
    config = replacement.config
    branches = "; keys and values for each branch" if config.branch_kv == "independent" else ""
    return f"gates; {config.compression} compression{branches}"


def _unused_parts(plan: RewritePlan) -> tuple[UnusedParts, ...]:
    """Says why learned parts are not used, for each marker whose attention is declined or is not there."""
    unused = []
    for marker in plan.unused_markers:
        declined = [each.rejection for each in plan.decisions if each.marker is marker and each.rejection is not None]
        reason = declined[0].reason.name if declined else ""
        sentence = declined[0].sentence if declined else "No attention of this module was found in its graph."
        unused.append(UnusedParts(marker.module, reason, sentence))
    return tuple(unused)


def _shape_text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _notes(config: NSAConfig, sites: Iterable[SiteReport], unused: Iterable[UnusedParts]) -> tuple[str, ...]:
    learned = Counter(site.learned for site in sites if site.learned)
    return (
        *_joint_notes(config, sites),
        *(f"{count} with learned parts, by their own configuration: {parts}" for parts, count in learned.items()),
        *(
            f"the learned parts of {each.module or 'the model'} are not used: {each.reason} {each.sentence}"
            for each in unused
        ),
    )


def _joint_notes(config: NSAConfig, sites: Iterable[SiteReport]) -> tuple[str, ...]:
    if config.combine != "joint" or all(site.decision == "declined" or site.learned for site in sites):
        return ()
    blocks, size = config.num_selected, config.selection_block
    equal = (
        f"joint mode equals full attention, up to rounding, for a query that sees at most n = {blocks} blocks of l' ="
    )
    other = f"others attend to {blocks} blocks and the last {config.window} keys"
    return (f"{equal} {size} keys (n·l' = {blocks * size}); {other}",)
