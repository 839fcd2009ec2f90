"""Real text for training: the Python sources of the standard library and of installed packages.

Which file is held out depends on its name alone, so training and held-out files are the same wherever a package is
installed.
"""

import hashlib
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("stdlib", "torch", "transformers")
# One file of so many is held out.
HELD_OUT_ONE_OF = 20
END = "<|end|>"
# About what Python sources have.
_CHARACTERS_PER_TOKEN = 4
_CHARACTERS_AT_ONCE = 4_000_000

Encode = Callable[[list[str]], list[list[int]]]


def texts(*, held_out: bool, packages: Sequence[str] = PACKAGES) -> Iterator[str]:
    """Yields the files of the corpus in an order without pattern, either those for training or those held out."""
    named = [(f"{package}/{path.relative_to(root)}", path) for package in packages for root, path in _files(package)]
    for name, path in sorted(named, key=lambda pair: _number(pair[0])):
        if (_number(name) % HELD_OUT_ONE_OF == 0) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(vocabulary: int, characters: int, packages: Sequence[str] = PACKAGES) -> Any:
    """Trains a byte-level BPE tokenizer on the start of the training files; digits are tokens of their own.

    Args:
        vocabulary: its size.
        characters: how much text it is trained on.
        packages: whose files the corpus is.

    Returns:
        A tokenizer of the package tokenizers, whose token 0 ends a file.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(texts(held_out=False, packages=packages), characters), trainer)
    return tokenizer


def token_stream(encode: Encode, end: int, count: int, *, held_out: bool, packages: Sequence[str] = PACKAGES) -> Tensor:
    """Returns the first tokens of the corpus, file after file.

    Args:
        encode: from texts to their tokens.
        end: the token that ends a file.
        count: how many tokens to return; fewer where the corpus ends.
        held_out: of the files held out, or of those for training.
        packages: whose files the corpus is.

    Returns:
        `[count]`.
    """
    found: list[int] = []
    batch: list[str] = []
    characters = 0
    for text in texts(held_out=held_out, packages=packages):
        batch.append(text)
        characters += len(text)
        # Enough, or as much as is worth encoding at once.
        if characters >= min(_CHARACTERS_PER_TOKEN * (count - len(found)), _CHARACTERS_AT_ONCE):
            found.extend(_joined(encode(batch), end))
            batch.clear()
            characters = 0
        if len(found) >= count:
            break
    found.extend(_joined(encode(batch), end) if batch else ())
    return torch.tensor(found[:count])


def _joined(files: list[list[int]], end: int) -> Iterator[int]:
    for tokens in files:
        yield from tokens
        yield end


def _files(package: str) -> Iterator[tuple[Path, Path]]:
    """Yields a package's root and each of its sources; nothing where it is not installed."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            return
        root = Path(found.origin).parent
    for path in root.rglob("*.py"):
        if "site-packages" not in path.relative_to(root).parts:
            yield root, path


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _limited(parts: Iterator[str], characters: int) -> Iterator[str]:
    for part in parts:
        if characters <= 0:
            return
        yield part
        characters -= len(part)
