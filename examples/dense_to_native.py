"""Makes a pretrained dense model a native sparse one: attaches learned parts, trains briefly, and shows the gap left.

The model is SmolLM2-135M-Instruct (see quickstart.py), the text the sources of installed packages, some of which are
held out.  The table has the negative log-likelihood on held-out text of the dense model, of joint mode, which needs no
training, and of gated NSA before and after training; and, since training also teaches the model this kind of text, of
the dense model after the same steps.  `dense_to_native.txt` in the folder `--out` is the table as far as it has come.
"""

import argparse
import copy
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from native_training.corpus import token_stream
from native_training.settings import add_nsa_options, nsa_config
from native_training.training import backend_for, compile_layers, next_token_loss, optimizer_for, progress
from quickstart import load, packaged_model
from torch import Tensor, nn

from nsa_compile import NSAConfig, attach
from nsa_compile.attach import learned_parts

# Parts of an attention that a pretrained model knows nothing of, and that learn faster than the rest.
_NEW = ("gates", "compress_key", "compress_value")
# Finer compression than the paper's (32, 16): a mean of 32 keys shows less than a dense checkpoint's queries look for;
# and twice as many blocks.
FINE = NSAConfig(
    combine="gated",
    compression="mlp",
    branch_kv="independent",
    block_length=8,
    block_stride=8,
    num_selected=32,
    min_keys=0,
)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluates, trains, and prints the table.

    Args:
        arguments: command line; that of the process by default.

    Returns:
        What was evaluated -> negative log-likelihood per token, nats.
    """
    options = parse(arguments)
    progress(f"loading {options.model.name}")
    model, tokenizer = load(options.model, options.device, "float32")
    text = Text(tokenizer, options)
    progress(f"{len(text.training):,} tokens for training, {len(text.held_out)} sequences held out")

    results: dict[str, float] = {}
    options.out.mkdir(parents=True, exist_ok=True)

    def note(name: str, compiled: Any) -> None:
        results[name] = evaluate(compiled, text.held_out, options)
        (options.out / "dense_to_native.txt").write_text(table(results, options))
        progress(f"{name}: {results[name]:.4f}")

    compile_layers(model.base_model.layers, backend_for(None, options.eager))
    note("dense", model)
    joint = dataclasses.replace(options.config, combine="joint", compression="mean", branch_kv="shared")
    compile_layers(model.base_model.layers, backend_for(joint, options.eager))
    note("joint, no training", model)

    native = copy.deepcopy(model)
    attach(native.base_model, options.config, text.held_out[:1, :-1].to(options.device), start="dense")
    compile_layers(native.base_model.layers, backend_for(options.config, options.eager))
    note("gated, no training", native)
    train(native, text, options)
    note(f"gated, {options.steps} steps", native)
    if options.control:
        compile_layers(model.base_model.layers, backend_for(None, options.eager))
        train(model, text, options)
        note(f"dense, {options.steps} steps", model)
    print(table(results, options))
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and fills in what depends on the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="T, length of a sequence; 8192 on a GPU, 1024 on a CPU")
    parser.add_argument("--steps", type=int, help="steps of training; 300 on a GPU, 2 on a CPU")
    parser.add_argument("--batch", type=int, help="sequences of a step; 4 on a GPU, 1 on a CPU")
    parser.add_argument("--held-out", type=int, help="sequences to evaluate; 16 on a GPU, 1 on a CPU")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the model's parameters and their copies")
    parser.add_argument("--learned-rate", type=float, default=1e-3, help="of gates and compression")
    add_nsa_options(parser)
    parser.add_argument("--no-control", dest="control", action="store_false", help="do not train the dense model too")
    parser.add_argument("--eager", action="store_true", help="run the graphs as they are, without Inductor")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the table")
    parser.add_argument("--model", type=Path, help="a GGUF file, or a folder that transformers can load")
    options = parser.parse_args(arguments)
    is_gpu = torch.device(options.device).type == "cuda"
    defaults = {"tokens": (8192, 1024), "steps": (300, 2), "batch": (4, 1), "held_out": (16, 1)}
    for name, (gpu, cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, gpu if is_gpu else cpu)
    options.model = options.model or packaged_model()
    options.config = nsa_config(FINE, options)
    return options


class Text:
    """The corpus as the model's tokens.

    Args:
        tokenizer: the model's.
        options: what `parse` returned.
    """

    def __init__(self, tokenizer: Any, options: argparse.Namespace) -> None:
        self._options = options
        end = tokenizer.eos_token_id or 0

        def encode(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False).input_ids

        length = options.tokens + 1
        needed = options.steps * options.batch * length + length
        self.training = token_stream(encode, end, needed, held_out=False)
        self.held_out = token_stream(encode, end, options.held_out * length, held_out=True).view(-1, length)

    def batch(self, step: int) -> Tensor:
        """Returns the sequences `[B, T + 1]` of a step, the same for every run."""
        draw, length = random.Random(step), self._options.tokens + 1
        starts = [draw.randrange(len(self.training) - length + 1) for _ in range(self._options.batch)]
        return torch.stack([self.training[start : start + length] for start in starts])


@torch.no_grad()
def evaluate(model: Any, sequences: Tensor, options: argparse.Namespace) -> float:
    """Returns the mean negative log-likelihood of the tokens of `[N, T + 1]` after the first, nats."""
    model.eval()
    losses = [loss_of(model, part.to(options.device)) * len(part) for part in sequences.split(options.batch)]
    return torch.stack(losses).sum().item() / len(sequences)


def train(model: Any, text: Text, options: argparse.Namespace) -> None:
    """Trains all parameters."""
    model.train()
    own, learned = split_parameters(model)
    schedules = [optimizer_for(own, options.learning_rate, options.steps)]
    if len(learned):
        schedules.append(optimizer_for(learned, options.learned_rate, options.steps))
    progress(f"training {options.steps} steps; the first one compiles")
    for step in range(options.steps):
        loss = loss_of(model, text.batch(step).to(options.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in schedules:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step == 0 or (step + 1) % 25 == 0 or step + 1 == options.steps:
            progress(f"step {step + 1}: loss {loss.item():.4f}")


def split_parameters(model: nn.Module) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Separates what a pretrained model brings, branches' copies of its projections included, from what is new."""
    learned = {
        parameter
        for parts in learned_parts(model).values()
        for name, parameter in parts.named_parameters()
        if name.split(".")[0] in _NEW
    }
    own = [parameter for parameter in model.parameters() if parameter not in learned]
    return nn.ParameterList(own), nn.ParameterList(learned)


def loss_of(model: Any, sequences: Tensor) -> Tensor:
    """The loss of `[B, T + 1]`."""

    def decode(tokens: Tensor) -> Tensor:
        # A cache would make the graph of each layer another: it is asked by the layer's number.
        return model.base_model(tokens, use_cache=False).last_hidden_state

    return next_token_loss(decode, model.lm_head, sequences)


def table(results: dict[str, float], options: argparse.Namespace) -> str:
    """Lays the results out, with the distance to the dense model that was trained as long."""
    title = f"nll per token, {options.tokens:,} tokens, {options.held_out} sequences"
    lines = [f"{title:<52}{'':>10}{'above dense':>14}"]
    for name, value in results.items():
        dense = results.get(f"dense, {name.partition(', ')[2]}", results["dense"])
        lines.append(f"{name:<52}{value:>10.4f}{value - dense:>14.4f}")
    return "\n".join(["", *lines, ""])


if __name__ == "__main__":
    main()
