"""NSAConfig on the command line: an option for each field, under the field's name."""

import argparse
import dataclasses
import inspect
import re
import typing
from typing import Any

from nsa_compile.config import NSAConfig


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--num-selected 32` and so on for all fields of `NSAConfig`."""
    group = parser.add_argument_group("NSA configuration")
    hints = typing.get_type_hints(NSAConfig)
    described = _descriptions()
    for field in dataclasses.fields(NSAConfig):
        choices = typing.get_args(hints[field.name])
        is_word = bool(choices) and all(isinstance(choice, str) for choice in choices)
        words: dict[str, Any] = {"choices": choices} if is_word else {}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            type=str if is_word else _number_or_word,
            help=f"{described[field.name]} (default: %(default)s)",
            **words,
        )


def config_of(arguments: argparse.Namespace) -> NSAConfig:
    """Returns the configuration that the command line asks for.

    Raises:
        ConfigError: the values do not fit together.
    """
    return NSAConfig(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(NSAConfig)})


def _number_or_word(text: str) -> Any:
    # Words such as "auto" are checked by NSAConfig, which says what it accepts.
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _descriptions() -> dict[str, str]:
    """Reads what each field means from the docstring of the class."""
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(NSAConfig.__doc__ or ""), re.MULTILINE)
    known = {name: re.sub(r"\s+", " ", text).rstrip(".").replace("`", "").replace("%", "%%") for name, text in entries}
    return {field.name: known.get(field.name, field.name) for field in dataclasses.fields(NSAConfig)}
