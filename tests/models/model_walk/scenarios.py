"""What is done to each model: whether it trains, has a cache or padding."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .inputs import base_inputs, left_padding, token_ids

CACHED = 16


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A way to call a model.

    Attributes:
        inputs: given the model, the arguments of the call; each time fresh ones, for caches are changed.
        trains: whether the model is in training mode, and gradients are taken.
        attention_dropout: of the model.
        dynamic: as in `torch.compile`.
        checkpoints: whether layers are checkpointed.
    """

    inputs: Callable[[Any], dict[str, Any]]
    trains: bool = False
    attention_dropout: float = 0.0
    dynamic: bool | None = None
    checkpoints: bool = False


def _prefill(_: Any) -> dict[str, Any]:
    return {"input_ids": token_ids()}


def _without_cache(_: Any) -> dict[str, Any]:
    return {"input_ids": token_ids(), "use_cache": False}


def _padded(_: Any) -> dict[str, Any]:
    return {"input_ids": token_ids(), "attention_mask": left_padding()}


def _labelled(_: Any) -> dict[str, Any]:
    ids, mask = token_ids(), left_padding()
    # The last padding would predict the first token, and what it attends to is nobody's matter.
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def _after(make_cache: Callable[[Any], Any], count: int) -> Callable[[Any], dict[str, Any]]:
    def inputs(model: Any) -> dict[str, Any]:
        cache, ids = make_cache(model), token_ids()
        with torch.no_grad():
            cache = model(input_ids=ids[:, :CACHED], past_key_values=cache, use_cache=True).past_key_values
        return {"input_ids": ids[:, CACHED : CACHED + count], "past_key_values": cache, "use_cache": True}

    return inputs


def _dynamic_cache(model: Any) -> Any:
    import transformers

    return transformers.DynamicCache(config=model.config)


def _static_cache(model: Any) -> Any:
    import transformers

    return transformers.StaticCache(config=model.config, max_cache_len=40)


# Of decoders with a head for a language model.
CAUSAL = {
    "prefill": Scenario(_prefill),
    "without cache": Scenario(_without_cache),
    "padded": Scenario(_padded),
    "training": Scenario(_labelled, trains=True),
    "attention dropout": Scenario(_labelled, trains=True, attention_dropout=0.1),
    "checkpointing": Scenario(_labelled, trains=True, checkpoints=True),
    "dynamic lengths": Scenario(_padded, dynamic=True),
    "one token, dynamic cache": Scenario(_after(_dynamic_cache, 1)),
    "four tokens, dynamic cache": Scenario(_after(_dynamic_cache, 4)),
    "one token, static cache": Scenario(_after(_static_cache, 1)),
}
PADDED, TRAINING = "padded", "training"
# Those that every decoder is walked through in one implementation of attention.
MAIN = ("prefill", "without cache", PADDED, TRAINING, "checkpointing", "dynamic lengths", "one token, static cache")
# Of all other models, without a head.
BASE = "forward"
SCENARIOS = {**CAUSAL, BASE: Scenario(base_inputs)}
