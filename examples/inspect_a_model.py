"""What the backend would do to a model: `explain`, as a table, as values, and as a page.

The model has random weights.  Its first call is a plain prefill, its second a batch padded on the left, as models
get it for generation; both are understood.  The third model is an encoder, whose queries see keys after themselves:
it stays dense, and the report names the reason.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile import NSAConfig, explain

TOKENS = 2048


class Encoder(nn.Module):
    """Attention of every position to every other."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 3 * 64)

    def forward(self, states: Tensor) -> Tensor:
        """Maps `[B, T, 64]` to `[B, T, 64]`."""
        heads = self.project(states).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(*heads.unbind()).transpose(1, 2).flatten(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints three reports.

    Args:
        arguments: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, help="also write the first report as a page, with the graphs")
    options = parser.parse_args(arguments)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(shape).eval()
    tokens = torch.randint(0, 512, (2, TOKENS))

    report = explain(model)(tokens)
    print(f"--- prefill\n{report}\n")
    for site in report.sites[:1]:
        print(f"a site as values: {site.module=} {site.decision=} {site.mask=}\n")
    if options.html:
        print(f"written: {report.to_html(options.html)}\n")

    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, :100] = 0
    print(f"--- padded batch, 24 blocks\n{explain(model, NSAConfig(num_selected=24))(tokens, padding)}\n")

    print(f"--- encoder\n{explain(Encoder())(torch.randn(1, TOKENS, 64))}")


if __name__ == "__main__":
    main()
