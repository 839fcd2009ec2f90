"""The rewrite passes from a program, without compiling: graphs from `torch.export` and from `symbolic_trace`.

The rewritten graphs are ordinary FX graphs: run them, look at them, or hand them to other tools.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nsa_compile import NSAConfig, RewriteReport, rewrite
from nsa_compile.report_text import difference

TOKENS = 1500
# So many blocks that they hold every key: joint mode then equals full attention, which is checked below.
CONFIG = NSAConfig(num_selected=24, min_keys=0)


class Attention(nn.Module):
    """Causal attention with grouped queries: 8 heads, 2 KV heads, D = 16."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(128, (8 + 2 + 2) * 16)
        self.out = nn.Linear(128, 128)

    def forward(self, states: Tensor) -> Tensor:
        """Maps `[B, T, 128]` to `[B, T, 128]`."""
        heads = self.project(states).unflatten(-1, (12, 16)).transpose(1, 2)
        query, key, value = heads.split([8, 2, 2], dim=1)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(2))


def from_export(model: nn.Module, states: Tensor) -> tuple[RewriteReport, Tensor]:
    """Rewrites an exported program, before `run_decompositions` takes its attention apart."""
    program = torch.export.export(model, (states,))
    report = rewrite(program, CONFIG)
    return report, program.module()(states)


def from_symbolic_trace(model: nn.Module, states: Tensor) -> tuple[RewriteReport, Tensor]:
    """Rewrites a traced graph; it carries no shapes, so example inputs are needed."""
    graph_module = fx.symbolic_trace(model)
    report = rewrite(graph_module, CONFIG, example_inputs=(states,))
    return report, graph_module(states)


def main() -> None:
    """Rewrites both ways, prints what happened, and compares the results with the dense model's."""
    torch.manual_seed(0)
    model, states = Attention().eval(), torch.randn(1, TOKENS, 128)
    with torch.no_grad():
        dense = model(states)
        for origin, rewrite_model in (("torch.export", from_export), ("symbolic_trace", from_symbolic_trace)):
            report, sparse = rewrite_model(model, states)
            error = ((sparse - dense).norm() / dense.norm()).item()
            print(f"from {origin}:\n{report}\nrelative error against dense: {error:.1e}\n")
            print(f"what changed in the graph:\n{difference(report.graphs[0], context=0)}\n")


if __name__ == "__main__":
    main()
