"""Trains one small language model twice from scratch, dense and with native NSA, on the same data: is it as good?

Both runs share the seed, the text, the order and the optimizer; the second model has learned parts attached.  Shown are
the losses on held-out files, how often a key is retrieved at every depth of the context, and the speed of training.
`python examples/train_from_scratch.py --out results` writes `results/train_from_scratch.json` and, with matplotlib,
`train_from_scratch.png`, both anew after each stage.  Two processes with `--only dense` and `--only NSA` fill the same
file, one after the other.  On a CPU a toy of the same form runs.
"""

import argparse
import contextlib
import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from native_training.charts import draw_comparison
from native_training.corpus import PACKAGES, token_stream, train_tokenizer
from native_training.facts import plant, retrieval_rates
from native_training.model import Decoder, ModelConfig
from native_training.outcomes import Outcome, OutcomeFile, table
from native_training.settings import add_nsa_options, nsa_config
from native_training.training import backend_for, compile_layers, likeliest, next_token_loss, optimizer_for, progress
from torch import Tensor, nn

from nsa_compile import NSAConfig, attach, learned_parts

# Finer compression than the paper's (32, 16), and keys that the branches share: in so few steps the scores that choose
# blocks learn little retrieval otherwise.  Half the paper's window leaves time for more blocks.
FINE = NSAConfig(
    combine="gated", compression="mlp", block_length=4, block_stride=4, num_selected=20, window=256, min_keys=0
)
# Small blocks for the toy, so that there is something to choose from.
TOY = dataclasses.replace(FINE, selection_block=16, num_selected=6, num_local=2, window=32)


# Options that outcomes depend on; those that are compared have them in common.
_CONDITIONS = ("tokens", "batch", "steps", "learning_rate", "facts", "log", "samples", "eager", "mode", "seed")


def main(arguments: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Trains both models and compares them.

    Args:
        arguments: command line; that of the process by default.

    Returns:
        The outcomes, "dense" and "NSA"; with `--only`, also that of an earlier process in the same folder.
    """
    options = parse(arguments)
    file = OutcomeFile(options.out, conditions(options))
    progress("training a tokenizer")
    tokenizer = train_tokenizer(options.model.vocabulary, options.tokenizer_characters, options.packages)
    data = Data(tokenizer, options)
    progress(f"{len(data.training):,} tokens for training, {len(data.held_out):,} held out")
    for name in options.only or ("dense", "NSA"):
        torch.manual_seed(options.seed)
        model = Decoder(options.model).to(options.device)
        if name == "NSA":
            attach(model, options.config, data.training[: options.tokens][None].to(options.device), start="scratch")
        config = options.config if name == "NSA" else None
        compile_layers(model.layers, backend_for(config, options.eager), options.mode)
        for stage in Run(name, model, data, options, functools.partial(file.write, name)).stages():
            picture = draw_comparison(file.path)
            progress(f"{name}: {stage}; see {file.path}" + (f" and {picture.name}" if picture else ""))
        torch.compiler.reset()
    print(table(file.outcomes))
    return file.outcomes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and fills in what depends on the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="T, length of a sequence")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--steps", type=int, help="steps of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--facts", type=int, help="facts in each sequence, each stated twice")
    parser.add_argument("--log", type=int, help="steps between two notes of the loss")
    parser.add_argument("--samples", type=int, help="questions for each length and depth")
    parser.add_argument("--retrieve-with", type=int, nargs="*", help="n, other numbers of blocks to ask for keys with")
    parser.add_argument("--time-at", type=int, nargs="*", help="sequence lengths to time training steps at")
    parser.add_argument("--heads", type=int, help="query heads of both models")
    parser.add_argument("--key-heads", type=int, help="KV heads; the query heads of a group share a choice of blocks")
    parser.add_argument("--head-size", type=int, help="D of both models")
    add_nsa_options(parser)
    parser.add_argument("--mode", help="of torch.compile; CUDA graphs (reduce-overhead) on a GPU if not given")
    parser.add_argument("--only", nargs="*", choices=["dense", "NSA"], help="one of the two runs")
    parser.add_argument("--eager", action="store_true", help="run the graphs as they are, without Inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the outcomes")
    options = parser.parse_args(arguments)
    is_gpu = torch.device(options.device).type == "cuda"
    gpu = {
        "tokens": 8192,
        "batch": 4,
        "steps": 3500,
        "facts": 16,
        "log": 25,
        "samples": 8,
        "retrieve_with": [32],
        "time_at": [8192, 16384, 32768],
    }
    toy: dict[str, Any] = {"tokens": 256, "batch": 4, "steps": 20, "facts": 2, "log": 5, "samples": 1}
    toy |= {"retrieve_with": [], "time_at": [256]}
    for name, value in (gpu if is_gpu else toy).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    model = ModelConfig() if is_gpu else ModelConfig(512, 64, layers=2, heads=4, key_heads=2, head_size=16)
    if options.mode is None and is_gpu and not options.eager:
        options.mode = "reduce-overhead"
    sizes = {name: getattr(options, name) for name in ("heads", "key_heads", "head_size")}
    options.model = dataclasses.replace(model, **{name: size for name, size in sizes.items() if size is not None})
    options.config = nsa_config(FINE if is_gpu else TOY, options)
    options.packages = PACKAGES if is_gpu else ("stdlib",)
    options.tokenizer_characters = 20_000_000 if is_gpu else 300_000
    return options


class Data:
    """Text as tokens, and the batches that both runs see.

    Args:
        tokenizer: what `train_tokenizer` returned.
        options: what `parse` returned.
    """

    def __init__(self, tokenizer: Any, options: argparse.Namespace) -> None:
        self._tokenizer = tokenizer
        self._options = options
        needed = options.steps * options.batch * options.tokens
        windows = 16 * options.batch if options.device != "cpu" else options.batch
        packages = options.packages
        self.training = token_stream(self.encode_batch, 0, needed, held_out=False, packages=packages)
        self.held_out = token_stream(
            self.encode_batch, 0, windows * (options.tokens + 1), held_out=True, packages=packages
        )

    def encode(self, text: str) -> list[int]:
        """Returns a text's tokens."""
        return self._tokenizer.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of several texts."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def batch(self, step: int) -> Tensor:
        """Returns the sequences `[B, T + 1]` of a step, the same for every run."""
        options, draw = self._options, random.Random(step)
        starts = [draw.randrange(len(self.training) - options.tokens - 1) for _ in range(options.batch)]
        windows = [self.training[start : start + options.tokens + 1] for start in starts]
        return torch.stack([plant(window, self.encode, options.facts, draw) for window in windows])

    def validation(self) -> Tensor:
        """Returns the held-out sequences `[N, T + 1]`, without facts."""
        length = self._options.tokens + 1
        return self.held_out[: len(self.held_out) // length * length].view(-1, length)


class Run:
    """One model's training and what comes after it.

    Args:
        name: what to call it.
        model: its layers compiled, its learned parts attached.
        data: the data.
        options: what `parse` returned.
        keep: called whenever there is more in the outcome.
    """

    def __init__(
        self, name: str, model: Decoder, data: Data, options: argparse.Namespace, keep: Callable[[Outcome], None]
    ) -> None:
        self._name, self._model, self._data, self._options, self._keep = name, model, data, options, keep
        self._optimizer, self._scheduler = optimizer_for(model, options.learning_rate, options.steps)
        self._outcome = Outcome(sum(parameter.numel() for parameter in model.parameters()))

    def stages(self) -> Iterator[str]:
        """Trains and validates, asks for keys, and times steps.

        Yields:
            What was done; the outcome so far is kept.
        """
        self._train()
        self._keep(self._outcome)
        yield "trained"
        self._outcome.retrieved = self._retrieve()
        self._keep(self._outcome)
        yield "keys retrieved"
        for number in self._options.retrieve_with if self._name == "NSA" else ():
            # Nothing that was learned depends on how many blocks are selected.
            with selecting(self._model, number):
                self._outcome.retrieved_with[number] = self._retrieve()
            self._keep(self._outcome)
            yield f"keys retrieved with {number} blocks"
        # Long sequences are what sparse attention is for, and each length takes long to compile.
        for tokens in sorted(self._options.time_at, reverse=True):
            self._outcome.step_times[tokens] = self._step_time(tokens)
            self._keep(self._outcome)
            yield f"steps of {tokens:,} tokens timed"

    def _train(self) -> None:
        options, outcome = self._options, self._outcome
        recent: list[Tensor] = []
        trained = 0.0
        if options.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        progress(f"{self._name}: training {outcome.parameters / 1e6:.1f} million parameters; the first step compiles")
        for step in range(options.steps):
            start = time.perf_counter()
            recent.append(self._step(self._data.batch(step)))
            if step == 0:
                progress(f"{self._name}: step 1, loss {recent[0].item():.4f}")
            if (step + 1) % options.log == 0 or step + 1 == options.steps:
                outcome.losses.append(torch.stack(recent).mean().item())
                recent.clear()
            # The first steps compile.
            trained += time.perf_counter() - start if step >= options.log else 0.0
            if (step + 1) % (10 * options.log) == 0 or step + 1 == options.steps:
                outcome.validation[step + 1] = self._validate()
                self._keep(outcome)
                progress(
                    f"{self._name}: step {step + 1}, loss {outcome.losses[-1]:.4f}, held out "
                    f"{outcome.validation[step + 1]:.4f}"
                )
        if trained:
            outcome.tokens_per_second = (options.steps - options.log) * options.batch * options.tokens / trained
        if options.device != "cpu":
            outcome.memory = torch.cuda.max_memory_allocated() / 2**30

    def _step(self, sequences: Tensor) -> Tensor:
        sequences = sequences.to(self._options.device, non_blocking=True)
        loss = self._loss(sequences)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, sequences: Tensor) -> Tensor:
        return next_token_loss(self._model, self._model.logits, sequences)

    @torch.no_grad()
    def _validate(self) -> float:
        parts = self._data.validation().split(self._options.batch)
        whole = [part for part in parts if len(part) == self._options.batch]
        losses = [self._loss(part.to(self._options.device)) for part in whole]
        return torch.stack(losses).mean().item()

    def _retrieve(self) -> list[list[float]]:
        options = self._options
        progress(f"{self._name}: retrieving keys")

        def predict(tokens: Tensor) -> Tensor:
            return likeliest(self._model, self._model.logits, tokens.to(options.device)).cpu()

        return retrieval_rates(
            predict,
            self._data.held_out,
            self._data.encode,
            tokens=options.tokens,
            lengths=[options.tokens * (i + 1) // 4 for i in range(4)],
            depths=[i / 7 for i in range(8)],
            samples=options.samples,
            batch=options.batch,
        )

    def _step_time(self, tokens: int) -> float:
        """Median time of a step's forward and backward for one sequence, in ms."""
        progress(f"{self._name}: timing steps of {tokens:,} tokens")
        sequence = self._data.training[: tokens + 1][None].to(self._options.device)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            self._loss(sequence).backward()
            if sequence.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
            self._model.zero_grad(set_to_none=True)
        return statistics.median(times[3:])


@contextlib.contextmanager
def selecting(model: nn.Module, number: int) -> Iterator[None]:
    """Within the context, queries of a model with learned parts attend to `number` blocks."""
    parts = learned_parts(model).values()
    before = [each.config for each in parts]
    for each in parts:
        each.config = each.config.replace(num_selected=number)
    try:
        yield
    finally:
        for each, config in zip(parts, before, strict=True):
            each.config = config


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what has to be the same for two runs to be compared."""
    return {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "model": dataclasses.asdict(options.model),
        "config": dataclasses.asdict(options.config),
        **{name: getattr(options, name) for name in _CONDITIONS},
    }


if __name__ == "__main__":
    main()
