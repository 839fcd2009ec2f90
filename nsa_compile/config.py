"""`NSAConfig`: the numbers that define Native Sparse Attention, validated when it is made."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from nsa_compile.errors import ConfigError, UnknownOptionError

Combine = Literal["joint", "gated"]
Compression = Literal["mean", "linear", "mlp"]
BranchKV = Literal["shared", "independent"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "combine": ("joint", "gated"),
    "compression": ("mean", "linear", "mlp"),
    "branch_kv": ("shared", "independent"),
}
# Field -> the smallest value that makes sense.
_MINIMUM = {
    "block_length": 1,
    "block_stride": 1,
    "selection_block": 1,
    "num_selected": 1,
    "num_initial": 0,
    "num_local": 0,
    "window": 1,
}


@dataclasses.dataclass(frozen=True)
class NSAConfig:
    """Configuration of Native Sparse Attention; frozen, hashable, equal by value.

    Args:
        block_length: l, tokens that one compressed token stands for.
        block_stride: d, tokens between the starts of neighbouring compressed tokens; divides
            `block_length` and `selection_block`.
        selection_block: l', tokens in a block that is selected as a whole; at least `block_length`.
        num_selected: n, blocks each query attends to, `num_initial` and `num_local` counted in it.
        num_initial: blocks at the start of the visible keys that are always selected.
        num_local: blocks at the end of the visible keys that are always selected.
        window: w, tokens in the sliding window, the query's own included.
        combine: "joint": one softmax over the union of selected and window tokens, no parameters, for
            pretrained dense models.  "gated": the paper's weighted sum of three branches; needs learned gates.
        compression: how l tokens become one: "mean" (no parameters), "linear", or "mlp" (the paper's).
        branch_kv: "shared": one key and value projection for all branches.  "independent": one for each
            (the paper's choice; needs learned parts).
        min_keys: a site with fewer keys than this stays dense.  "auto": `num_selected * selection_block`,
            where joint NSA equals dense attention anyway, and 0 in gated mode, which is no
            approximation of dense attention.

    Raises:
        ConfigError: a field, or a combination of fields, is not one that NSA is defined for.

    Reference: arXiv 2502.11089, section 3; the defaults are the paper's.
    """

    block_length: int = 32
    block_stride: int = 16
    selection_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    combine: Combine = "joint"
    compression: Compression = "mean"
    branch_kv: BranchKV = "shared"
    min_keys: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, minimum in _MINIMUM.items():
            _check_integer(name, getattr(self, name), minimum)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
        if self.min_keys != "auto":
            _check_integer("min_keys", self.min_keys, 0, also="'auto'")
        for name in ("block_length", "selection_block"):
            if getattr(self, name) % self.block_stride:
                raise ConfigError(
                    f"block_stride={self.block_stride} does not divide {name}={getattr(self, name)}; choose a "
                    f"divisor of both, such as {math.gcd(self.block_length, self.selection_block)}."
                )
        if self.block_length > self.selection_block:
            raise ConfigError(
                f"block_length={self.block_length} is longer than selection_block={self.selection_block}; "
                "make selection_block at least block_length."
            )
        forced = self.num_initial + self.num_local
        if forced > self.num_selected:
            raise ConfigError(
                f"num_initial + num_local = {forced} blocks are always selected, more than "
                f"num_selected={self.num_selected}; raise num_selected to at least {forced}."
            )
        if self.combine == "joint" and (self.compression, self.branch_kv) != ("mean", "shared"):
            raise ConfigError(
                f"combine='joint' has no learned parts, so it takes compression='mean' and branch_kv='shared', not "
                f"{self.compression!r} and {self.branch_kv!r}; use combine='gated' for learned parts."
            )

    @property
    def min_keys_resolved(self) -> int:
        """The number of keys from which a site is rewritten, with "auto" worked out."""
        if self.min_keys != "auto":
            return self.min_keys
        return self.num_selected * self.selection_block if self.combine == "joint" else 0

    def replace(self, **changes: Any) -> "NSAConfig":
        """Returns a copy with some fields changed.

        Raises:
            UnknownOptionError: a name is not a field.
            ConfigError: the new values do not fit together.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UnknownOptionError(f"nsa option {name!r} is unknown; the options are {', '.join(known)}.")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, in order of definition."""
        return dataclasses.asdict(self)

    def operator_arguments(self) -> dict[str, Any]:
        """Returns the fields that `torch.ops.nsa.attention` takes, by its argument names."""
        names = (*_MINIMUM, "combine")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_options(cls, options: Mapping[str, Any], base: "NSAConfig | None" = None) -> "NSAConfig":
        """Builds a configuration from option names as written after `nsa.`, on top of `base`."""
        return (base or cls()).replace(**options)


def _check_integer(name: str, value: object, minimum: int, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        accepted = f"an integer of at least {minimum}" + (f", or {also}" if also else "")
        raise ConfigError(f"{name}={value!r} is not accepted; give {accepted}.")
