"""`attach`: adds the learned parts of native NSA to a model, to be trained with it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsa_compile import compat
from nsa_compile.config import NSAConfig
from nsa_compile.errors import AttachError, ConfigError
from nsa_compile.learned.classes import attached_class, dense_class
from nsa_compile.learned.parts import LearnedParts, Sizes, Start
from nsa_compile.learned.survey import Finding, survey
from nsa_compile.rewriting import check_config

# Name of the submodule that holds the learned parts of an attention module.
NAME = "nsa"


@dataclasses.dataclass(frozen=True)
class Attachment:
    """Learned parts for one attention module.

    Attributes:
        module: dotted name of the attention module.
        sizes: what they have to fit.
        originals: dotted names, below the module, of the parameters that its keys and values are computed with.
        dtype: of the learned parts.
    """

    module: str
    sizes: Sizes
    originals: tuple[str, ...]
    dtype: torch.dtype


def attach(
    model: nn.Module,
    config: NSAConfig | None = None,
    example_inputs: "Tensor | Sequence[Any] | Mapping[str, Any] | None" = None,
    *,
    start: Start = "dense",
    modules: Collection[str] | None = None,
) -> tuple[str, ...]:
    """Adds learned parts to every attention module of a model that the pass would rewrite, in place.

    Each gets a submodule `nsa` with the gate MLP, the compression φ of keys and of values (`compression="linear"` or
    `"mlp"`), and with `branch_kv="independent"` key and value projections of its own for the compressed and the
    window branch; the selected branch keeps the model's.  They are ordinary parameters: attach before the optimizer
    is made, and before the model is wrapped (`DistributedDataParallel`, `fully_shard`) or compiled.

    The model then computes native NSA: compiled with `backend="nsa"`, exported and rewritten, or as it is, operator
    by operator.  Modules keep their learned parts' configuration, whatever that of the backend.

    Args:
        model: the model.
        config: the configuration, of `combine="gated"`; by default the paper's sizes with MLP compression.
        example_inputs: what the model takes, to see its graph: a tensor, positional arguments, or a mapping of keyword
            arguments.  A model that Dynamo captures whole is not run.  None is for models of transformers, which
            have `dummy_inputs`.
        start: "dense": the selected branch is open and branches copy the model's projections, which is near the dense
            model; for checkpoints.  "scratch": all branches halfway open, with projections as random as the model's.
            The compression starts as the mean, but that of keys as their sum from scratch.
        modules: names of the modules to attach to; None for all that have an attention to be rewritten.

    Returns:
        The names of the modules that have learned parts now.

    Raises:
        ConfigError: `config` is not of gated mode.
        AttachError: nothing was found to attach to, or what was found cannot have learned parts.

    Reference: arXiv 2502.11089, section 3.
    """
    settings = _gated(config)
    model = original_module(model)
    if learned_parts(model):
        raise AttachError("the model has learned parts already; nsa_compile.detach(model) takes them off.")
    args, kwargs = _inputs(model, example_inputs)
    found = survey(model, args, kwargs)
    findings = [each for each in found.findings if modules is None or each.module in modules]
    _check(findings, found.refusals, settings, modules)
    names = [each.module for each in findings]
    for finding in _first_of_each(findings):
        attachment = Attachment(finding.module, finding.sizes, tuple(finding.originals), finding.dtype)
        add_parts(model, attachment, settings, start)
    finish(model)
    return tuple(dict.fromkeys(names))


def detach(model: nn.Module) -> tuple[str, ...]:
    """Takes the learned parts off a model, in place: it is dense again.

    Returns:
        The names of the modules that had learned parts.
    """
    model = original_module(model)
    names = tuple(learned_parts(model))
    for name in names:
        delattr(model.get_submodule(name), NAME)
    for module in model.modules():
        dense = dense_class(module)
        if dense is not None:
            module.__class__ = dense
    return names


def learned_parts(model: nn.Module) -> dict[str, LearnedParts]:
    """Returns the learned parts of a model: name of the attention module -> its submodule `nsa`.

    Example:
        >>> parameters = [p for parts in learned_parts(model).values() for p in parts.parameters()]
    """
    named = ((name, module._modules.get(NAME)) for name, module in model.named_modules())
    return {name: parts for name, parts in named if isinstance(parts, LearnedParts)}


def add_parts(model: nn.Module, attachment: Attachment, config: NSAConfig, start: Start) -> None:
    """Adds learned parts to one module, and makes its class one that uses them."""
    module = model.get_submodule(attachment.module)
    if hasattr(module, NAME):
        raise AttachError(f"{attachment.module or 'the model'} has an attribute {NAME!r}, where learned parts go.")
    originals: dict[str, Tensor] = {name: module.get_parameter(name) for name in attachment.originals}
    parts = LearnedParts(config, attachment.sizes, originals)
    device = next((each.device for each in (*originals.values(), *module.parameters())), None)
    parts.to(device=device, dtype=attachment.dtype)
    parts.start(start, originals)
    module.add_module(NAME, parts.train(module.training))
    _set_class(module)


def finish(model: nn.Module) -> None:
    """Lets the model itself run rewritten: masks are built there, outside the attention modules."""
    _set_class(model)


def _set_class(module: nn.Module) -> None:
    if dense_class(module) is not None:
        return
    if "forward" in module.__dict__:
        raise AttachError(
            f"{type(module).__name__} has a forward of its own on the instance (a hook of accelerate, or a wrapper), "
            "which would hide the learned parts; attach before it is wrapped."
        )
    module.__class__ = attached_class(type(module))


def original_module(model: nn.Module) -> nn.Module:
    """Returns the module that was compiled, or the module itself."""
    original = compat.original_callable(model)
    if not isinstance(original, nn.Module):
        raise AttachError(f"learned parts are for a torch.nn.Module, not for a {type(original).__name__}.")
    return original


def _gated(config: NSAConfig | None) -> NSAConfig:
    if config is None:
        return NSAConfig(combine="gated", compression="mlp")
    if check_config(config).combine != "gated":
        raise ConfigError(f"combine={config.combine!r} has no learned parts; give NSAConfig(combine='gated', …).")
    return config


def _inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Sorts example inputs into positional and keyword arguments; makes those of a model of transformers."""
    if example is None:
        example = getattr(model, "dummy_inputs", None)
        if not isinstance(example, Mapping):
            raise AttachError(
                f"{type(model).__name__} does not say what it takes; give inputs, as in attach(model, config, tokens)."
            )
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        example = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in example.items()}
    if isinstance(example, Mapping):
        return (), example
    return ((example,), {}) if isinstance(example, Tensor) else (tuple(example), {})


def _check(
    findings: Sequence[Finding], refusals: Sequence[str], config: NSAConfig, modules: Collection[str] | None
) -> None:
    names = {each.module for each in findings}
    missing = sorted(set(modules or ()) - names)
    if not findings or missing:
        wanted = f"in {', '.join(missing)}" if missing else "that can be rewritten"
        why = "; ".join(refusals) if refusals else "the model has none that is recognised"
        raise AttachError(f"no attention was found {wanted}: {why}.  nsa_compile.explain(model)(...) shows the model.")
    for finding in findings:
        others = [each for each in findings if each.module == finding.module]
        if any(set(each.originals) != set(finding.originals) for each in others):
            raise AttachError(
                f"{finding.module or 'the model'} has {len(others)} attentions with different projections; learned "
                "parts are for one attention to a module."
            )
        if config.branch_kv == "independent" and not finding.originals:
            raise AttachError(
                f"the keys and values of {finding.module or 'the model'} are not projected with parameters, so "
                "branches cannot have their own; use branch_kv='shared'."
            )


def _first_of_each(findings: Sequence[Finding]) -> list[Finding]:
    """A module that runs several times (layers that share parameters) is found as often."""
    return list({finding.module: finding for finding in reversed(findings)}.values())[::-1]
