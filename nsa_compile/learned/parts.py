"""`LearnedParts`: the parameters that native NSA adds to an attention module, as its submodule `nsa`."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn, ops

from nsa_compile.config import NSAConfig
from nsa_compile.errors import ConfigError
from nsa_compile.kernels import operators as _register_operators  # noqa: F401  (importing registers torch.ops.nsa)
from nsa_compile.passes.branches import BRANCHES

Start = Literal["dense", "scratch"]
# Gates of a dense start.  The selected branch alone is full attention wherever n blocks cover the visible keys.
_SELECTED_GATE, _OTHER_GATE = 0.98, 0.02


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What an attention's learned parts have to fit.

    Attributes:
        channels: C, size of the layer's input.
        heads: H, query heads.
        key_size: D.
        value_size: D_v.
    """

    channels: int
    heads: int
    key_size: int
    value_size: int


class Gates(nn.Module):
    """The gate MLP: `[B, T, C]` to `[B, H, T, 3]` in [0, 1].

    Args:
        channels: C.
        heads: H.

    Reference: arXiv 2502.11089, eq 5.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, max(3 * heads, channels // 8))
        self.output = nn.Linear(self.hidden.out_features, 3 * heads)

    def start(self, start: Start) -> None:
        """Sets the parameters: "dense" opens the selected branch, "scratch" opens all branches halfway."""
        self.hidden.reset_parameters()
        self.output.reset_parameters()
        with torch.no_grad():
            if start == "dense":
                # Input by input the gates are the same at first; the gradient of these weights is not 0.
                self.output.weight.zero_()
                others = torch.tensor([_OTHER_GATE, _SELECTED_GATE, _OTHER_GATE]).logit()
                self.output.bias.copy_(others.repeat(self.output.out_features // 3))
            else:
                self.output.bias.zero_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Computes the gates, as the rewritten graph does."""
        parameters = (self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias)
        return ops.nsa.gates(hidden_states, *parameters)


class LinearCompression(nn.Module):
    """φ as one matrix: `[B, H_kv, S, D]` to `[B, H_kv, N_cmp, D]`.

    Args:
        size: D.
        block_length: l.
        block_stride: d.

    Reference: arXiv 2502.11089, eq 7.
    """

    def __init__(self, size: int, block_length: int, block_stride: int) -> None:
        super().__init__()
        self.blocks = {"block_length": block_length, "block_stride": block_stride}
        self.weight = nn.Parameter(torch.empty(size, block_length * size))

    def start(self, is_sum: bool = False) -> None:
        """Sets the weight: the mean, or the sum."""
        size, width = self.weight.shape
        length = width // size
        with torch.no_grad():
            self.weight.copy_(_mean_matrix(size, length) * (length if is_sum else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Compresses, as the rewritten graph does."""
        return ops.nsa.compress_linear(tokens, self.weight, **self.blocks)


class MLPCompression(nn.Module):
    """φ as an MLP of two layers, with a position embedding inside the block; the paper's.

    Args:
        size: D.
        block_length: l.
        block_stride: d.

    Reference: arXiv 2502.11089, eq 7.
    """

    def __init__(self, size: int, block_length: int, block_stride: int) -> None:
        super().__init__()
        self.blocks = {"block_length": block_length, "block_stride": block_stride}
        self.position = nn.Parameter(torch.empty(block_length, size))
        self.hidden = nn.Linear(block_length * size, 2 * size)
        self.output = nn.Linear(2 * size, size)

    def start(self, is_sum: bool = False) -> None:
        """Sets the parameters: what is computed is the mean, exactly, or the sum."""
        length, size = self.position.shape
        mean, one = _mean_matrix(size, length), torch.eye(size)
        with torch.no_grad():
            # silu(x) − silu(−x) = x: units in pairs make the MLP the identity on the mean.
            self.hidden.weight.copy_(torch.cat([mean, -mean]))
            self.output.weight.copy_(torch.cat([one, -one], 1) * (length if is_sum else 1))
            for each in (self.position, self.hidden.bias, self.output.bias):
                each.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Compresses, as the rewritten graph does."""
        layers = (self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias)
        return ops.nsa.compress_mlp(tokens, self.position, *layers, **self.blocks)


_COMPRESSION = {"linear": LinearCompression, "mlp": MLPCompression}


class LearnedParts(nn.Module):
    """The learned parts of one attention module.

    Its parameters are used by the rewritten graph, which `bind` hands them to.  Called by hand, the submodules
    compute the same: `gates(hidden_states)`, `compress_key(key)`, `compress_value(value)`.

    Attributes:
        config: the configuration; may be replaced by one with the same learned parts (`num_selected`, `window`).
        sizes: what the parts fit.
        originals: dotted names, below the attention module, of the parameters that branches have copies of.

    Args:
        config: the configuration, gated.
        sizes: sizes of the attention.
        originals: name -> the parameter that its keys and values are projected with; used if branches have their own.
    """

    def __init__(self, config: NSAConfig, sizes: Sizes, originals: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._config = config
        self.sizes = sizes
        self.originals = tuple(originals) if config.branch_kv == "independent" else ()
        self.gates = Gates(sizes.channels, sizes.heads)
        if config.compression != "mean":
            make, blocks = _COMPRESSION[config.compression], (config.block_length, config.block_stride)
            self.compress_key = make(sizes.key_size, *blocks)
            self.compress_value = make(sizes.value_size, *blocks)
        for branch in BRANCHES if self.originals else ():
            self.add_module(branch, _copies({name: originals[name] for name in self.originals}))
        self._describe()

    @property
    def config(self) -> NSAConfig:
        """The configuration.

        Raises:
            ConfigError: one is set that needs other learned parts.
        """
        return self._config

    @config.setter
    def config(self, config: NSAConfig) -> None:
        learned = ("combine", "compression", "branch_kv", "block_length", "block_stride")
        changed = [name for name in learned if getattr(config, name) != getattr(self._config, name)]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} cannot change in a model with learned parts; detach, and attach anew."
            )
        self._config = config
        self._describe()

    def start(self, start: Start, originals: Mapping[str, Tensor]) -> None:
        """Sets all parameters.

        Args:
            start: "dense": near the dense model.  "scratch": for training from scratch.  The compression is the mean,
                but the sum of keys from scratch: a single key that matches a query is not diluted by its neighbours.
            originals: name -> the model's own parameter, for branches with their own.
        """
        self.gates.start(start)
        if self._config.compression != "mean":
            self.compress_key.start(is_sum=start == "scratch")
            self.compress_value.start()
        with torch.no_grad():
            for branch in BRANCHES if self.originals else ():
                for name in self.originals:
                    copy, original = self.get_parameter(f"{branch}.{name}"), originals[name]
                    if start == "scratch" and original.dim() > 1:
                        # As random as the model's own, and independent of it.
                        copy.normal_(std=float(original.float().std()))
                    else:
                        copy.copy_(original)

    def bind(self, owner: nn.Module) -> None:
        """Hands the parameters to the graph that is being traced."""
        originals: list[Tensor] = []
        for name in self.originals:
            parameter: Any = owner
            for part in name.split("."):
                parameter = getattr(parameter, part)
            originals.append(parameter)
        ops.nsa.bind([*self.parameters()], originals, self._description)

    def _describe(self) -> None:
        description = {
            "config": self._config.to_dict(),
            "parts": [name for name, _ in self.named_parameters()],
            "originals": self.originals,
        }
        self._description = json.dumps(description)

    def extra_repr(self) -> str:
        """Returns the configuration, for `print(model)`."""
        return repr(self._config)


def names_of(parameters: Iterable[Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Returns dotted name below a module -> parameter, for those of `parameters` that the module holds."""
    wanted = {id(parameter) for parameter in parameters}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in wanted}


def _mean_matrix(size: int, length: int) -> Tensor:
    """The matrix `[D, l·D]` that averages l vectors of size D."""
    return torch.eye(size).repeat(1, length) / length


def _copies(parameters: Mapping[str, Tensor]) -> nn.Module:
    """A module whose parameters have the names and shapes of some others'."""
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(torch.empty_like(parameter)))
    return root
