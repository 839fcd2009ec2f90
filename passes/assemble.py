"""From the parts of an attention, each in its own layout, to a site in the operator's layout."""

import dataclasses
from collections.abc import Sequence

from torch import fx

from nsa_compile.passes.axes import Axis, Dimension, Dimensions, leaves, resolved
from nsa_compile.passes.layout import LabelledTensor, arrange, operand
from nsa_compile.passes.metadata import dtype_of
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.repetition import HeadGroups, head_groups, sources
from nsa_compile.passes.sites import AttentionSite, Mask, MaskKind, Place, Reason, Rejection


@dataclasses.dataclass(frozen=True)
class Parts:
    """An attention as it was read: tensors whose dimensions share axes.

    Attributes:
        query: queries; their axes are those of the scores' rows, `heads`, batch and head size.
        key: keys.
        value: values.
        output: the node that is replaced, with its dimensions.
        length: the axis of query positions; empty for a single one.
        keys: the axis of key positions.
        depth: the axis of the query's and key's head size.
        value_depth: the axis of the value's head size.
        batch: axes known to be the batch; None where that is open.
        masks: masks with their dimensions in axes of the scores.
        autocasts: under autocast, the call brings its operands to one dtype, that of the output.
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
    masks: tuple[tuple[LabelledTensor, MaskKind], ...] = ()
    is_causal: bool = False
    scale: "float | fx.Node | None" = None
    autocasts: bool = False


def assemble(parts: Parts, place: Place, writes: Writes) -> AttentionSite | Rejection:
    """Finds how each part is viewed in the operator's layout.

    Args:
        parts: what was read.
        place: where the attention is.
        writes: the in-place writes of its graph.

    Returns:
        The site; or the first thing about the layout that the operator cannot express.
    """

    def rejected(reason: Reason, sentence: str, *nodes: fx.Node) -> Rejection:
        return Rejection(reason, sentence, nodes or (place.node,), place)

    reader = place.node
    queries, keys, values = (sources(part, reader, writes) for part in (parts.query, parts.key, parts.value))
    groups = head_groups(parts.query, keys, values, (*parts.length, *parts.depth))
    masks = [(sources(mask, reader, writes), kind) for mask, kind in parts.masks]
    depended = frozenset().union(*(mask[-1].axes for mask, _ in masks)) if masks else frozenset()
    batch = _batch(parts, groups, depended)
    if not batch <= set(groups.own):
        return rejected(Reason.UNSUPPORTED_SHAPE, "Keys or values are broadcast over the batch.")
    batch_dim = tuple(axis for axis in groups.own if axis in batch)
    kv_dim = tuple(axis for axis in groups.own if axis not in batch)
    head_dim = (*kv_dim, *groups.shared)
    query = operand(queries, (batch_dim, head_dim, parts.length, parts.depth))
    key = operand(keys, (batch_dim, kv_dim, parts.keys, parts.depth))
    value = operand(values, (batch_dim, kv_dim, parts.keys, parts.value_depth))
    output = arrange((batch_dim, head_dim, parts.length, parts.value_depth), parts.output.dims)
    for name, found in (("query", query), ("key", key), ("value", value), ("output", output)):
        if found is None:
            return rejected(Reason.UNSUPPORTED_SHAPE, f"The {name} cannot be viewed as [batch, heads, length, size].")
    problem = _dtype_problem(*((place.node,) if parts.autocasts else (each.node for each in (query, key, value))))
    if problem:
        return rejected(Reason.UNSUPPORTED_DTYPE, problem)
    scores = (batch_dim, head_dim, parts.length, parts.keys)
    placed = []
    for mask, kind in masks:
        node = _right_aligned(mask, scores)
        if node is None:
            sentence = f"The mask {mask[0].node.name} is not laid out as [batch, heads, queries, keys]."
            return rejected(Reason.MASK_NOT_PROVED, sentence, mask[0].node)
        placed.append(Mask(node, kind))
    return AttentionSite(
        place=place,
        query=query,
        key=key,
        value=value,
        masks=tuple(placed),
        is_causal=parts.is_causal,
        scale=parts.scale,
        output=output,
    )


def _batch(parts: Parts, groups: HeadGroups, depended: frozenset[Axis]) -> set[Axis]:
    """Chooses the batch axes among those that queries, keys and values have in common.

    Where the model does not tell, the first of several is the batch.  A single one is heads, unless masks differ
    along it: visible keys may depend on the batch, never on the head.
    """
    if parts.batch is not None:
        return set(leaves(parts.batch))
    if len(groups.own) > 1:
        return {groups.own[0]}
    return set(groups.own) & depended


def _right_aligned(mask: Sequence[LabelledTensor], scores: Dimensions) -> fx.Node | None:
    """Returns the mask's source that broadcasts to `[B, H, T, S]` as it is."""
    full = resolved(scores)
    for tensor in mask:
        dims = resolved(tensor.dims)
        if len(dims) <= len(full) and all(
            dim in ((), wanted) for dim, wanted in zip(dims, full[len(full) - len(dims) :], strict=True)
        ):
            return tensor.node
    return None


def _dtype_problem(*nodes: fx.Node) -> str:
    dtypes = set(map(dtype_of, nodes))
    if len(dtypes) != 1:
        return f"Query, key and value have different dtypes: {', '.join(sorted(map(str, dtypes)))}."
    dtype = dtypes.pop()
    return "" if dtype is not None and dtype.is_floating_point else f"The dtype is {dtype}."
