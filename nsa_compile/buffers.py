"""Masks and their fill values that a module keeps: read when a graph is compiled, watched for changes when it runs."""

import dataclasses
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from nsa_compile.passes.predicate.constants import abstract_constant
from nsa_compile.passes.predicate.tensor import AbstractTensor
from nsa_compile.passes.sites import Scope

logger = logging.getLogger(__name__)

# How Dynamo names a placeholder that stands for a buffer, and one for any other attribute of the module it compiles.
_BUFFER = re.compile(r"_buffers_")
_ATTRIBUTE = re.compile(r"^[lL]_self(?!.*_parameters_)_")


@dataclasses.dataclass
class _Reading:
    """A buffer as it was read.

    Attributes:
        tensor: the buffer, for as long as the model has it.
        version: torch's count of the writes to it.
        meaning: what its values were read as, or the number in it.
    """

    tensor: "weakref.ref[torch.Tensor]"
    version: int
    meaning: AbstractTensor | float


class BufferReader:
    """Reads the buffers of one graph, and remembers which.

    Args:
        graph_module: the graph, of Dynamo.
        inputs: the tensors that it is compiled for, one for each placeholder.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self._graph_module = graph_module
        self._readable: dict[fx.Node, tuple[int, torch.Tensor, AbstractTensor | None]] = {}
        self._readings: dict[int, _Reading] = {}
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        if len(placeholders) != len(inputs):
            return
        for place, (node, tensor) in enumerate(zip(placeholders, inputs, strict=True)):
            is_kept = _BUFFER.search(node.name) or (_ATTRIBUTE.search(node.name) and _is_square(tensor))
            # A number is fetched when a mask fills it in: buffers often hold one, and fetching waits for the device.
            if is_kept and _is_readable(tensor):
                meaning = abstract_constant(tensor) if tensor.numel() > 1 else None
                if meaning is not None or tensor.numel() == 1:
                    self._readable[node] = (place, tensor, meaning)

    @property
    def may_read(self) -> bool:
        """Whether any buffer has values that can be read."""
        return bool(self._readable)

    @property
    def has_read(self) -> bool:
        """Whether a buffer was read."""
        return bool(self._readings)

    def __call__(self, node: fx.Node, scope: Scope) -> torch.Tensor | None:
        """Returns the values of a buffer of several elements; None for what may not be read."""
        tensor = self._find(node, scope)
        return self._read(node) if tensor is not None and tensor.numel() > 1 else None

    def number(self, node: fx.Node, scope: Scope) -> float | None:
        """Returns the number in a buffer of one element; None for what may not be read."""
        tensor = self._find(node, scope)
        is_number = tensor is not None and tensor.numel() == 1 and not tensor.is_complex()
        return self._read(node).item() if is_number else None

    def _find(self, node: fx.Node, scope: Scope) -> torch.Tensor | None:
        if scope.graph_module is not self._graph_module or node not in self._readable:
            return None
        return self._readable[node][1]

    def _read(self, node: fx.Node) -> torch.Tensor:
        place, tensor, meaning = self._readable[node]
        meaning = tensor.item() if meaning is None else meaning
        self._readings[place] = _Reading(weakref.ref(tensor), tensor._version, meaning)
        return tensor

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Tells whether the buffers among a call's inputs still mean what was read."""
        return all(_holds(reading, inputs[place]) for place, reading in self._readings.items())

    def watched(self, rewritten: Callable[..., Any], dense: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that runs the rewritten graph while the buffers hold, and else the dense one."""
        is_warned = False

        def run(*inputs: Any) -> Any:
            nonlocal is_warned
            if self.hold(inputs):
                return rewritten(*inputs)
            if not is_warned:
                is_warned = True
                logger.warning(
                    "A tensor of the model that a mask was read from has been changed: this graph runs dense and "
                    "uncompiled from now on.  torch._dynamo.reset() lets it be compiled anew."
                )
            return dense(*inputs)

        return run


def _is_readable(tensor: Any) -> bool:
    """Whether a tensor's values are known, and torch counts the writes to it."""
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    return not tensor.is_inference() and not tensor.requires_grad and tensor.numel() > 0


def _is_square(tensor: Any) -> bool:
    """Whether a tensor may be a mask over queries and keys for all batches; others may be data that changes."""
    return isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 1


def _meaning(tensor: torch.Tensor) -> AbstractTensor | float | None:
    return abstract_constant(tensor) if tensor.numel() > 1 else tensor.item()


def _holds(reading: _Reading, tensor: torch.Tensor) -> bool:
    """Whether a buffer means what was read; another buffer, or one that was written, is read again."""
    if tensor is reading.tensor() and tensor._version == reading.version:
        return True
    if tensor.is_inference() or tensor.numel() == 0 or _meaning(tensor) != reading.meaning:
        return False
    reading.tensor, reading.version = weakref.ref(tensor), tensor._version
    return True
