"""Training under the backend: a small byte-level language model learns Python's documentation for a few steps.

Forward and backward run through the operator; the optimizer and the loop are the usual ones.
"""

import argparse
import time
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile import NSABackend, NSAConfig, collect_reports

TOKENS = 512
# Small blocks, so that 512 tokens are worth choosing from.
CONFIG = NSAConfig(
    block_length=8, block_stride=4, selection_block=16, num_selected=8, num_initial=1, num_local=2, window=64
)


class Layer(nn.Module):
    """One transformer layer: attention with 4 heads of 32, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """Maps `[B, T, width]` to `[B, T, width]`."""
        heads = self.project(self.norms[0](states)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        states = states + self.out(attended.transpose(1, 2).flatten(2))
        return states + self.mlp(self.norms[1](states))


class LanguageModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, layers: int = 2, width: int = 128) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(TOKENS, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits `[B, T, 256]` for tokens `[B, T]`."""
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.layers(self.bytes(tokens) + positions))


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains, and prints the loss.

    Args:
        arguments: command line; that of the process by default.

    Returns:
        The loss of each step, nats per byte.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    model = LanguageModel()
    model.compile(backend=NSABackend(CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses, start = [], time.perf_counter()
    with collect_reports() as reports:
        for step in range(options.steps):
            offsets = torch.randint(0, len(text) - TOKENS, (4,)).tolist()
            batch = torch.stack([text[offset : offset + TOKENS + 1] for offset in offsets])
            loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"step {step:3}  loss {losses[-1]:.3f}  {time.perf_counter() - start:5.1f} s", flush=True)
    print(reports[0])
    return losses


if __name__ == "__main__":
    main()
