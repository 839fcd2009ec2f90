"""An attention as it was read: tensors in the model's layouts, whose dimensions share axes."""

import dataclasses

from torch import fx

from nsa_compile.passes.axes import Dimension
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.sites import MaskKind, Reason


@dataclasses.dataclass(frozen=True)
class MaskPart:
    """A mask with its dimensions in axes of the scores; `factor` multiplies an additive one."""

    tensor: LabelledTensor
    kind: MaskKind
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class FactorPart:
    """A tensor that the scores are multiplied by, or divided; the same for all keys."""

    tensor: LabelledTensor
    is_divisor: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an attention is made of.

    Attributes:
        query: queries.
        key: keys.
        value: values.
        output: the node that is replaced, with its dimensions.
        length: the axes of query positions; none for a single one.
        keys: the axes of key positions.
        depth: the axes of the query's and key's head size.
        value_depth: the axes of the value's head size.
        batch: axes known to be the batch; None where that is open.
        masks: all of them hold.
        is_causal: query t sees keys 0…t.
        scale: factor of the scores; None for 1/sqrt(D).
        symbolic_scales: symbolic numbers that scale them too, with the power of each.
        factors: tensors that scale the scores.
        is_autocast: the products cast their operands, as the operator then does too.
    """

    query: LabelledTensor
    key: LabelledTensor
    value: LabelledTensor
    output: LabelledTensor
    length: Dimension
    keys: Dimension
    depth: Dimension
    value_depth: Dimension
    batch: Dimension | None = None
    masks: tuple[MaskPart, ...] = ()
    is_causal: bool = False
    scale: float | None = None
    symbolic_scales: tuple[tuple[fx.Node, int], ...] = ()
    factors: tuple[FactorPart, ...] = ()
    is_autocast: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why something was not read."""

    reason: Reason
    sentence: str
    nodes: tuple[fx.Node, ...] = ()
