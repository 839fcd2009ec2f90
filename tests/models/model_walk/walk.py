"""Walks a model through a scenario: what became of each attention, and whether the rewritten model is right."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from nsa_compile import SiteReport

from .capture import RewritingBackend
from .inputs import LENGTH, NoInputsError
from .models import Entry, NotBuiltError
from .scenarios import SCENARIOS, Scenario

MAX_ERROR, MAX_LEAK = 1e-4, 1e-5
_CHANGED = LENGTH - 4


@dataclasses.dataclass(frozen=True)
class Result:
    """What a walk found.

    Attributes:
        outcome: for the table: how many attentions were rewritten under which masks, how many declined and why.
        sites: every attention.
        error: largest relative difference of the rewritten model's outputs from the dense model's, at positions that
            are no padding; and of its gradients where the scenario trains.  None where nothing was rewritten.
        leak: largest relative change of outputs before a token that is changed, where few keys are selected, beyond
            what the dense model itself has; None where nothing was rewritten, or one or a few tokens are run.
    """

    outcome: str
    sites: tuple[SiteReport, ...] = ()
    error: float | None = None
    leak: float | None = None

    @property
    def complaint(self) -> str:
        """What is wrong with the rewritten model; "" for nothing."""
        if self.error is not None and not self.error <= MAX_ERROR:
            return f"WRONG by {self.error:.1e}"
        return f"SEES THE FUTURE by {self.leak:.1e}" if self.leak is not None and not self.leak <= MAX_LEAK else ""


def walk(entry: Entry, implementation: str, scenario_name: str) -> Result:
    """Builds a model, captures it in a scenario, rewrites it, and runs it beside the dense model."""
    scenario = SCENARIOS[scenario_name]
    try:
        model = entry.build(implementation, scenario.attention_dropout)
    except NotBuiltError as error:
        return Result(f"not built: {_one_line(error)}")
    try:
        _prepare(model, scenario)
        scenario.inputs(model)
    except NoInputsError as error:
        return Result(f"no inputs: {_one_line(error)}")
    except Exception as error:  # noqa: BLE001  (whatever a model does not support)
        return Result(f"does not run: {_one_line(error)}")
    try:
        dense = _run(model, model, scenario)
    except Exception as error:  # noqa: BLE001  (whatever a model does not support)
        return Result(f"does not run: {_one_line(error)}")
    torch._dynamo.reset()
    backend = RewritingBackend()
    compiled = torch.compile(model, backend=backend, dynamic=scenario.dynamic)
    try:
        sparse = _run(compiled, model, scenario)
    except Exception as error:
        if "nsa_compile" in _causes(error):
            raise
        return Result(f"not captured: {_one_line(error)}")
    sites = tuple(site for report in backend.reports for site in report.sites)
    result = Result(outcome(sites, len(backend.reports)), sites)
    if not any(site.decision == "rewritten" for site in sites):
        return result
    error = max(_difference(mine, theirs) for mine, theirs in zip(sparse, dense, strict=True))
    return dataclasses.replace(result, error=error, leak=_leak(compiled, model, backend, scenario))


def outcome(sites: tuple[SiteReport, ...], graphs: int = 1) -> str:
    """The attentions in words, such as "2 causal, padding; 1 declined: SOFTCAP"."""
    rewritten = Counter(site.mask for site in sites if site.decision == "rewritten")
    declined = Counter(site.reason for site in sites if site.decision == "declined")
    words = [f"{count} {mask}" for mask, count in sorted(rewritten.items())]
    words += [f"{count} declined: {reason}" for reason, count in sorted(declined.items())]
    words += [f"{graphs} graphs"] if graphs > 1 else []
    return "; ".join(words) if sites else "no attention" + (f"; {graphs} graphs" if graphs > 1 else "")


def _prepare(model: Any, scenario: Scenario) -> None:
    model.train(scenario.trains)
    if scenario.checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _run(call: Callable[..., Any], model: Any, scenario: Scenario) -> list[torch.Tensor]:
    """The outputs where they are no padding, and the gradients where the scenario trains."""
    inputs = scenario.inputs(model)
    torch.manual_seed(0)
    with torch.set_grad_enabled(scenario.trains):
        output = call(**inputs)
    first = _first(output)
    results = [_valid(first.detach(), inputs)]
    if scenario.trains:
        (output["loss"] if "loss" in output else first.square().mean()).backward()
        results += [each.grad for each in model.parameters() if each.grad is not None]
        model.zero_grad(set_to_none=True)
    return results


def _leak(compiled: Any, model: Any, backend: RewritingBackend, scenario: Scenario) -> float | None:
    """How much outputs depend on a later token, beyond what they do in the dense model."""
    tokens = "decoder_input_ids" if "decoder_input_ids" in scenario.inputs(model) else "input_ids"
    if tokens not in scenario.inputs(model) or "past_key_values" in scenario.inputs(model):
        return None
    backend.sparse = True
    changes = []
    for call in (compiled, model):
        outputs = []
        for shift in (0, 7):
            inputs = scenario.inputs(model)
            inputs[tokens][:, _CHANGED] = (inputs[tokens][:, _CHANGED] - 3 + shift) % 61 + 3
            torch.manual_seed(0)
            with torch.set_grad_enabled(scenario.trains):
                outputs.append(_valid(_first(call(**inputs)).detach(), inputs, _CHANGED))
        changes.append(_difference(*outputs))
    return max(changes[0] - changes[1], 0.0)


def _first(output: Any) -> torch.Tensor:
    return output["logits"] if "logits" in output else output[0]


def _valid(tensor: torch.Tensor, inputs: dict[str, Any], length: int | None = None) -> torch.Tensor:
    """The rows of an output that are of tokens before position `length`, and no padding."""
    mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    if mask is None or tensor.shape[:2] != mask.shape:
        return tensor[:, :length]
    return tensor[:, :length][mask[:, :length].bool()]


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value; infinite for NaN."""
    if mine.shape != theirs.shape:
        return float("inf")
    scale = max(float(theirs.abs().max()), 1e-6)
    difference = float((mine - theirs).abs().max()) / scale
    return difference if difference == difference else float("inf")


def _causes(error: BaseException) -> str:
    names = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(type(cause).__module__)
        cause = cause.__cause__
    return " ".join(names)


def _one_line(error: Exception) -> str:
    """The first line of an error, without what differs from run to run."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return re.sub(r"0x[0-9a-f]+|/\S+/", "…", text)[:90].replace("|", "/").strip()
