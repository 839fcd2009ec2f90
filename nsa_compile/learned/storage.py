"""Learned parts in a folder: `nsa.safetensors` and `nsa_config.json`, beside the model's own files or anywhere."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsa_compile.attach import Attachment, add_parts, finish, learned_parts, original_module
from nsa_compile.config import NSAConfig
from nsa_compile.errors import AttachError
from nsa_compile.learned.parts import LearnedParts, Sizes

WEIGHTS, DESCRIPTION = "nsa.safetensors", "nsa_config.json"


def save_learned(model: nn.Module, directory: "str | os.PathLike[str]") -> Path:
    """Writes a model's learned parts and their configuration into a folder, and nothing else of the model.

    Sharded parameters (`fully_shard`) are gathered: every process has to call, and every one writes; give each a
    folder of its own, or let only rank 0 keep what it wrote.

    Args:
        model: a model with learned parts.
        directory: the folder; made if it is not there.

    Returns:
        The folder.

    Raises:
        AttachError: the model has no learned parts.
    """
    from safetensors.torch import save_file

    attached = learned_parts(model)
    if not attached:
        raise AttachError("the model has no learned parts to save; nsa_compile.attach(model, config) adds them.")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}" if name else key: _whole(value.detach()).contiguous().cpu()
        for name, parts in attached.items()
        for key, value in parts.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    modules = {name: _describe(parts) for name, parts in attached.items()}
    (folder / DESCRIPTION).write_text(json.dumps({"modules": modules}, indent=2) + "\n", encoding="utf-8")
    return folder


def load_learned(model: nn.Module, directory: "str | os.PathLike[str]") -> tuple[str, ...]:
    """Gives a model the learned parts that `save_learned` wrote: attaches them, or sets those that are attached.

    The model is not captured or run; it needs no example inputs.

    Args:
        model: the model that they were saved from, or one like it; not sharded.
        directory: the folder.

    Returns:
        The names of the modules that have them.

    Raises:
        AttachError: the folder has no learned parts, or they do not fit the model.
    """
    from safetensors.torch import load_file

    folder = Path(directory)
    if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
        raise AttachError(f"{folder} has no {DESCRIPTION} and {WEIGHTS}; nsa_compile.save_learned writes them.")
    modules = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["modules"]
    tensors = load_file(folder / WEIGHTS)
    model = original_module(model)
    attached = learned_parts(model)
    if attached and list(attached) != list(modules):
        raise AttachError(f"the model has learned parts in {', '.join(attached)}; {folder} has {', '.join(modules)}.")
    for name, description in modules.items():
        if not attached:
            _add(model, name, description, folder)
        _set(model.get_submodule(name), name, tensors, folder)
    finish(model)
    return tuple(modules)


def _whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that is distributed (a DTensor); all its processes have to ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _describe(parts: LearnedParts) -> dict[str, Any]:
    return {
        "config": parts.config.to_dict(),
        "sizes": dataclasses.asdict(parts.sizes),
        "originals": list(parts.originals),
        "dtype": str(next(parts.parameters()).dtype).removeprefix("torch."),
    }


def _add(model: nn.Module, name: str, description: dict[str, Any], folder: Path) -> None:
    attachment = Attachment(
        module=name,
        sizes=Sizes(**description["sizes"]),
        originals=tuple(description["originals"]),
        dtype=getattr(torch, description["dtype"]),
    )
    try:
        add_parts(model, attachment, NSAConfig(**description["config"]), "dense")
    except AttributeError as error:
        raise AttachError(f"{folder} has learned parts for {name!r}, which this model lacks: {error}") from error


def _set(module: nn.Module, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    prefix = f"{name}." if name else ""
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        module.get_submodule("nsa").load_state_dict(state)
    except RuntimeError as error:
        raise AttachError(f"the learned parts of {name!r} in {folder} do not fit this model: {error}") from error
