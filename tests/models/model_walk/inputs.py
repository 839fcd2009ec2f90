"""Inputs for every kind of model: tokens, images, spectrograms, sound."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from .sizes import VOCABULARY

BATCH, LENGTH, PADDED = 2, 24, 5


def token_ids(length: int = LENGTH) -> torch.Tensor:
    """Tokens `[BATCH, length]` that are never padding."""
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def left_padding(length: int = LENGTH) -> torch.Tensor:
    """An attention mask `[BATCH, length]` whose first row is padded."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, :PADDED] = 0
    return mask


class NoInputsError(Exception):
    """None of the inputs that are known are a model's; the message says why the first one is not."""


def base_inputs(model: Any) -> dict[str, Any]:
    """Returns the first inputs with which a model without a head runs; tokens are padded where it takes that.

    Raises:
        NoInputsError: it runs with none of them.
    """
    problem: Exception | None = None
    for inputs in _candidates(model):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # noqa: BLE001, PERF203  (whatever a model does not support)
            problem = problem or error
        else:
            return inputs
    raise NoInputsError(str(problem or "none are known")) from problem


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs that a model may take, by the names of its arguments."""
    names = inspect.signature(model.forward).parameters
    tokens = {"input_ids": token_ids()} if "input_ids" in names else {}
    target = {"decoder_input_ids": token_ids()} if "decoder_input_ids" in names else {}
    if tokens and "attention_mask" in names:
        yield {**tokens, **target, "attention_mask": left_padding()}
    if tokens:
        yield tokens | target
    images = _images(model)
    if "pixel_values" in names:
        yield {"pixel_values": images} | target
        yield {"pixel_values": images} | tokens
        yield {"pixel_values": images[:, None].expand(-1, 4, -1, -1, -1)}
    for name in ("input_features", "input_values", "audio_values"):
        if name in names:
            mels = getattr(model.config, "num_mel_bins", 16)
            yield from ({name: each} | target for each in (_noise(mels, 2 * 64), _noise(2 * 64, mels), _noise(4000)))
            yield from ({name: each} | target for each in (_noise(1, 4000), _noise(1, mels, 64)))


def _images(model: Any) -> torch.Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size, channels = getattr(config, "image_size", 32), getattr(config, "num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _noise(channels if isinstance(channels, int) else 3, height, width)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))
