"""Builds the model that a command line names, without memory for its weights, and inputs for it."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nsa_compile import compat
from nsa_compile.cli.settings import add_config_arguments, config_of
from nsa_compile.errors import ModelLoadError, NSAError
from nsa_compile.explain import explain
from nsa_compile.report import RewriteReport

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_TOKENS = 4096


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model, how it is called, and the NSA configuration."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help="a Hugging Face name, a folder with config.json, a config.json, a .gguf file, or a model type such as "
        "'llama'; only the configuration is read, weights are not needed",
    )
    group.add_argument(
        "--tokens", type=int, help=f"tokens per sequence (default: {DEFAULT_TOKENS}, or the model's limit)"
    )
    group.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    group.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa", help="attention (default: %(default)s)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype (default: %(default)s)")
    group.add_argument("--padded", action="store_true", help="pass an attention_mask, as for a padded batch")
    group.add_argument("--train", action="store_true", help="training mode with labels, instead of inference")
    group.add_argument("--dynamic", action="store_true", help="compile for dynamic shapes")
    group.add_argument("--tiny", action="store_true", help="keep only the first layers, to be quick")
    add_config_arguments(parser)


def explain_model(arguments: argparse.Namespace) -> RewriteReport:
    """Explains the model that the command line names; its tensors have shapes and no storage.

    Raises:
        ConfigError: the NSA configuration is none.
        ModelLoadError: the model is not to be found, cannot be built, or does not run on the inputs.
    """
    config = config_of(arguments)
    configuration, tokens = _configuration_and_tokens(arguments)
    with compat.fake_tensors(), _default_dtype(DTYPES[arguments.dtype]):
        model = _instantiate(configuration, arguments.attn)
        model.train(arguments.train)
        inputs = _inputs(model, configuration, arguments, tokens)
        progress("capturing the graph")
        try:
            return explain(model, config, dynamic=arguments.dynamic or None)(**inputs)
        except NSAError:
            raise
        except Exception as error:
            given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise ModelLoadError(f"{type(model).__name__} does not run on {given}: {_sentence(error)}") from error


def _configuration_and_tokens(arguments: argparse.Namespace) -> tuple[Any, int]:
    for name in ("tokens", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ModelLoadError(f"--{name} {value} is not accepted; give at least 1.")
    configuration = load_configuration(arguments.model)
    text = configuration.get_text_config()
    if arguments.tiny:
        _keep_first_layers(text)
    limit = getattr(text, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else DEFAULT_TOKENS
    tokens = arguments.tokens or min(DEFAULT_TOKENS, limit)
    if tokens > limit:
        progress(f"note: the model is made for {limit} tokens; --tokens {tokens} is more")
    return configuration, tokens


def load_configuration(name: str) -> Any:
    """Returns the Hugging Face configuration for a name, folder, file or model type.

    Raises:
        ModelLoadError: there is none, or transformers is not installed.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise ModelLoadError(
            "Loading a model needs transformers; install it with: pip install 'nsa-compile[models]'"
        ) from None
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf" and path.is_file():
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if path.is_dir():
            return _from_folder(path)
        if path.is_file() or not _looks_like_path(name):
            return AutoConfig.for_model(name) if name in CONFIG_MAPPING else AutoConfig.from_pretrained(name)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{name!r} cannot be loaded: {_sentence(error)}") from error
    raise ModelLoadError(f"{name!r} does not exist; give a folder with config.json, a .gguf file or a model's name.")


def _from_folder(folder: Path) -> Any:
    from transformers import AutoConfig

    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    weights = sorted(folder.glob("*.gguf"))
    if not weights:
        raise ModelLoadError(f"{str(folder)!r} holds neither a config.json nor a .gguf file.")
    return AutoConfig.from_pretrained(folder, gguf_file=weights[0].name)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".json", ".gguf")) or name.count("/") > 1


def _instantiate(configuration: Any, attention: str) -> torch.nn.Module:
    import transformers

    named = (getattr(transformers, name, None) for name in getattr(configuration, "architectures", None) or ())
    known = next((cls for cls in named if cls is not None), None)
    progress(f"building {known.__name__ if known else configuration.model_type} without weights")
    try:
        if known is not None:
            return known._from_config(configuration, attn_implementation=attention)
        causal = type(configuration) in transformers.AutoModelForCausalLM._model_mapping
        family = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        return family.from_config(configuration, attn_implementation=attention)
    except Exception as error:
        raise ModelLoadError(
            f"transformers cannot build {configuration.model_type!r} with attention {attention!r}: {_sentence(error)}"
        ) from error


def _inputs(model: torch.nn.Module, configuration: Any, arguments: argparse.Namespace, tokens: int) -> dict[str, Any]:
    batch = arguments.batch
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = getattr(configuration, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, getattr(configuration, "num_channels", 3), height, width)
        return {name: torch.zeros(shape, dtype=DTYPES[arguments.dtype])}
    if name != "input_ids":
        raise ModelLoadError(
            f"{type(model).__name__} takes {name!r}, which is not made here; in Python, nsa_compile.explain(model) "
            "takes any inputs."
        )
    input_ids = torch.zeros(batch, tokens, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if arguments.padded:
        inputs["attention_mask"] = torch.ones(batch, tokens, dtype=torch.long)
    if arguments.train:
        inputs["labels"] = input_ids
    elif getattr(configuration, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = input_ids
    return inputs


def _keep_first_layers(configuration: Any) -> None:
    """Cuts a configuration down to two layers, or to as many as show every type of layer."""
    types = getattr(configuration, "layer_types", None)
    count = 2
    if types:
        count = max(count, 1 + max(types.index(kind) for kind in set(types)))
        configuration.layer_types = types[:count]
    for name in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(configuration, name, None), int):
            setattr(configuration, name, min(count, getattr(configuration, name)))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def progress(message: str) -> None:
    """Says on the error stream what is being done, so that the output stays clean."""
    print(message, file=sys.stderr, flush=True)


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    # Dynamo's errors begin with their kind; what happened is in the explanation.
    explained = (line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: "))
    return next(explained, lines[0] if lines else type(error).__name__)
