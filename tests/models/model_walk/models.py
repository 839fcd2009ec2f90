"""Every model of transformers, built small, with random weights."""

import contextlib
import dataclasses
from typing import Any

import torch

from .changes import CHANGES
from .scenarios import BASE, CAUSAL, MAIN, PADDED, TRAINING
from .sizes import small_settings

IMPLEMENTATIONS = ("sdpa", "eager")
# Models that are walked through everything, in both implementations; each takes minutes.
CORE = ("gemma3_text", "llama")
MAX_PARAMETERS = 3e6
# Models that are encoders, although transformers can make decoders of them.
_ENCODERS = frozenset(("bert", "roberta", "electra", "roformer", "camembert", "rembert", "big_bird", "xlm", "xlnet"))
_NO_HEAD = " (no head)"
# Names of attention dropout in configurations contain one of these; all dropout contains the last.
_ATTENTION, _DROPOUT = ("attention", "attn", "att_"), "drop"


class NotBuiltError(Exception):
    """A model cannot be built small; the message says why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the walk.

    Attributes:
        name: model type, unique with `group`.
        group: "causal" for decoders with a language model's head, "base" for everything else.
        model_class: the class.
    """

    name: str
    group: str
    model_class: Any

    @property
    def walks(self) -> tuple[tuple[str, str], ...]:
        """What it is walked through: pairs of an implementation of attention and a scenario."""
        main = "sdpa" if getattr(self.model_class, "_supports_sdpa", False) else "eager"
        if self.group == "base":
            return ((main, BASE),)
        if self.name in CORE:
            return tuple((implementation, scenario) for scenario in CAUSAL for implementation in IMPLEMENTATIONS)
        other = next(implementation for implementation in IMPLEMENTATIONS if implementation != main)
        return (*((main, scenario) for scenario in MAIN), *((other, scenario) for scenario in (PADDED, TRAINING)))

    def build(self, implementation: str, attention_dropout: float = 0.0) -> torch.nn.Module:
        """Builds the model, in evaluation mode, with no dropout but that of attention.

        Raises:
            NotBuiltError: it takes more than small sizes, or does not have the implementation.
        """
        try:
            return self._build(implementation, attention_dropout)
        except NotBuiltError:
            raise
        except Exception as error:
            raise NotBuiltError(f"{type(error).__name__}: {error}") from error

    def _build(self, implementation: str, attention_dropout: float) -> torch.nn.Module:
        config_class = self.model_class.config_class
        changes = CHANGES.get(self.name.removesuffix(_NO_HEAD), {})
        if self.group == "causal" and hasattr(config_class(), "is_decoder"):
            changes = {**changes, "is_decoder": True}
        config = config_class(**small_settings(config_class, changes))
        found = _set_dropout(config, attention_dropout)
        if attention_dropout and not found:
            raise NotBuiltError("it has no attention dropout")
        with torch.device("meta"):
            parameters = sum(each.numel() for each in self.model_class(copy_of(config)).parameters())
        if parameters > MAX_PARAMETERS:
            raise NotBuiltError(f"{parameters / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        return self.model_class._from_config(config, attn_implementation=implementation).eval()


def copy_of(config: Any) -> Any:
    """Returns a copy of a configuration: building a model changes it."""
    return type(config)(**config.to_diff_dict())


def causal_models() -> list[Entry]:
    """Every class of transformers' mapping of causal language models, once."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return _entries("causal", {name: _class_of(MAPPING, CONFIG_MAPPING[name]) for name in NAMES})


def base_models() -> list[Entry]:
    """Every class of transformers' mapping of models without a head, but those that the causal models contain."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

    found = {}
    for name in MODEL_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[name]
        if name not in CAUSAL_NAMES or name in _ENCODERS or getattr(config_class, "is_encoder_decoder", False):
            # Some parts have a class that transformers does not export, or that needs another package.
            with contextlib.suppress(ValueError, ImportError):
                model_class = _class_of(MODEL_MAPPING, config_class)
                if model_class.config_class is not None:
                    found[name] = model_class
    return _entries("base", found)


def all_models() -> list[Entry]:
    """Every model of the walk, sorted by name."""
    return sorted((*causal_models(), *base_models()), key=lambda entry: entry.name)


def _class_of(mapping: Any, config_class: type) -> Any:
    found = mapping[config_class]
    return found[0] if isinstance(found, tuple | list) else found


def _entries(group: str, classes: dict[str, Any]) -> list[Entry]:
    """One entry for each class, under the first name that is its configuration's, else under the first name."""
    entries: dict[Any, Entry] = {}
    for name, model_class in classes.items():
        own = getattr(model_class.config_class, "model_type", None)
        if model_class not in entries or own == name:
            entries[model_class] = Entry(name if group == "causal" else name + _NO_HEAD, group, model_class)
    return sorted(entries.values(), key=lambda entry: entry.name)


def _set_dropout(config: Any, attention_dropout: float) -> bool:
    """Sets the dropout of a configuration and its parts; tells whether one is attention's."""
    found = False
    for name, value in list(config.to_dict().items()):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            found |= _set_dropout(part, attention_dropout)
        elif _DROPOUT in name and isinstance(value, int | float) and not isinstance(value, bool):
            is_attention = any(word in name for word in _ATTENTION)
            setattr(config, name, type(value)(attention_dropout if is_attention else 0.0))
            found |= is_attention
    return found
