"""Native training: a small dense language model gets learned gates, compression and branches, and trains on.

The model first learns dense attention, then `attach` adds the parts of native NSA so that it begins where the dense
model stands; they train with it, by the usual optimizer, and are saved beside it.  Nothing is compiled here, which
suits a model of this size: `model.compile(backend="nsa")` computes the same, faster.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn import functional
from train_a_tiny_model import CONFIG, TOKENS, LanguageModel

from nsa_compile import attach, load_learned, save_learned

GATED = CONFIG.replace(combine="gated", compression="mlp", branch_kv="independent")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains dense, attaches, trains on, and prints the loss on held-out text at each stage.

    Args:
        arguments: command line; that of the process by default.

    Returns:
        Stage -> held-out loss, nats per byte.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-steps", type=int, default=20)
    parser.add_argument("--native-steps", type=int, default=20)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    held_out, text = text[: 8 * (TOKENS + 1)].view(8, -1), text[8 * (TOKENS + 1) :]
    model, start, losses = LanguageModel(), time.perf_counter(), {}

    def note(stage: str) -> None:
        with torch.no_grad():
            losses[stage] = loss_of(model, held_out).item()
        print(f"{stage:20}  loss {losses[stage]:.3f}  {time.perf_counter() - start:5.1f} s", flush=True)

    train(model, text, options.dense_steps)
    note("dense")

    # Before the optimizer is made: it has to know the new parameters.
    names = attach(model, GATED, held_out[:1, :-1], start="dense")
    print(f"learned parts in {', '.join(names)}")
    note("native, as attached")
    train(model, text, options.native_steps)
    note("native, trained on")

    with tempfile.TemporaryDirectory() as folder:
        save_learned(model, folder)
        copy = LanguageModel()
        load_learned(copy, folder)
    # The model's own parameters are kept as ever; here, with the learned ones, as a state_dict.
    copy.load_state_dict(model.state_dict())
    model = copy
    note("saved and loaded")
    return losses


def train(model: LanguageModel, text: Tensor, steps: int) -> None:
    """Trains all parameters for some steps of 2 sequences."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        offsets = torch.randint(0, len(text) - TOKENS, (2,)).tolist()
        loss = loss_of(model, torch.stack([text[offset : offset + TOKENS + 1] for offset in offsets]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def loss_of(model: LanguageModel, batch: Tensor) -> Tensor:
    """Returns the mean loss of bytes `[B, T + 1]`, each after those before it."""
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


if __name__ == "__main__":
    main()
