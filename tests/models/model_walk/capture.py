"""Runs a model through Dynamo with a backend that rewrites and does not compile: what runs is the rewritten graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nsa_compile import NSAConfig, RewriteReport, compat
from nsa_compile.buffers import BufferReader
from nsa_compile.rewriting import copy_graph, rewrite_graph

# Selects every key at the lengths of the walk, so that joint mode equals full attention.
COVERING = NSAConfig(block_length=4, block_stride=4, selection_block=8, num_selected=16, window=8, min_keys=0)
# Selects few.
SPARSE = NSAConfig(
    block_length=2, block_stride=2, selection_block=2, num_selected=3, num_initial=1, num_local=1, window=3, min_keys=0
)


class RewritingBackend:
    """A backend of `torch.compile` whose graphs run as they are after the rewrite.

    Attributes:
        reports: one for each graph.
        break_reasons: why graphs ended early.
        sparse: whether later calls select few keys, as `SPARSE` says, and not all.
    """

    def __init__(self) -> None:
        self.reports: list[RewriteReport] = []
        self.break_reasons: list[str] = []
        self.sparse = False

    def __call__(self, graph_module: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        reason = compat.break_reason(graph_module)
        if reason is not None:
            self.break_reasons.append(reason)
        sparse = copy_graph(graph_module)
        read = BufferReader(graph_module, inputs)
        self.reports.append(rewrite_graph(graph_module, COVERING, keep_code=False, buffers=read))
        rewrite_graph(sparse, SPARSE, keep_code=False, buffers=BufferReader(sparse, inputs))

        def run(*inputs: Any) -> Any:
            return sparse(*inputs) if self.sparse else graph_module(*inputs)

        return run
