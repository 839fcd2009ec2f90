"""From the parts of an attention, each in its own layout, to a site in the operator's layout."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from nsa_compile.passes.axes import Axis, Dimension, Dimensions, leaves, resolved
from nsa_compile.passes.layout import LabelledTensor, arrange, head_operand, operand
from nsa_compile.passes.metadata import recorded_dtype
from nsa_compile.passes.parts import FactorPart, MaskPart, Parts
from nsa_compile.passes.predicate.causes import cause_of_weights
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.repetition import HeadGroups, head_groups, sources
from nsa_compile.passes.sites import AttentionSite, Factor, Mask, MaskKind, Place, Reason, Rejection, Step

_TO_DTYPE = torch.ops.aten.to.dtype


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
    masks = [(sources(mask.tensor, reader, writes), mask) for mask in parts.masks]
    depended = frozenset().union(*(mask[-1].axes for mask, _ in masks))
    batch = _batch(parts, groups, depended)
    if not batch <= set(groups.own):
        return rejected(Reason.UNSUPPORTED_SHAPE, "Keys or values are broadcast over the batch.")
    batch_dim = tuple(axis for axis in groups.own if axis in batch)
    kv_dim = tuple(axis for axis in groups.own if axis not in batch)
    rows = (batch_dim, (*kv_dim, *groups.shared), parts.length)
    if not all(recorded_dtype(part.node).is_floating_point for part in (parts.query, parts.key, parts.value)):
        return rejected(Reason.UNSUPPORTED_DTYPE, "Query, key and value are not real floating-point numbers.")
    dtype = None if parts.is_autocast else _common_dtype(queries, keys, values, parts.output.node)
    query = operand(queries, (*rows, parts.depth), dtype)
    key = head_operand(keys, (batch_dim, kv_dim, parts.keys, parts.depth), dtype)
    value = head_operand(values, (batch_dim, kv_dim, parts.keys, parts.value_depth), dtype)
    output = arrange((*rows, parts.value_depth), parts.output.dims)
    if query is None or key is None or value is None or output is None:
        arranged = {"query": query, "key": key, "value": value, "output": output}
        name = next(name for name, found in arranged.items() if found is None)
        return rejected(Reason.UNSUPPORTED_SHAPE, f"The {name} cannot be viewed as [batch, heads, length, size].")
    placed_masks, placed_factors = [], []
    for mask, part in masks:
        placed = placed_mask(mask, part, (*rows, parts.keys))
        if placed is None:
            biases = [other.tensor.node for other in parts.masks if other.kind is MaskKind.ADDITIVE]
            for bias in biases:
                reason = cause_of_weights(bias, place.scope)
                if reason is not None:
                    return rejected(reason, f"{bias.name}, which is computed of parameters, is added.", bias)
            sentence = f"The mask {mask[0].node.name} is not laid out as batch, heads, queries and keys."
            return rejected(Reason.MASK_NOT_PROVED, sentence, mask[0].node)
        placed_masks.append(placed)
    for part in parts.factors:
        factor = _factor(part, rows)
        if factor is None:
            sentence = f"{part.tensor.node.name} scales the scores, and is not laid out as batch, heads and queries."
            return rejected(Reason.UNSUPPORTED_SCALE, sentence, part.tensor.node)
        placed_factors.append(factor)
    output_dtype = recorded_dtype(parts.output.node)
    return AttentionSite(
        place=dataclasses.replace(
            place, shapes=place.shapes or {"query": query.shape, "key": key.shape, "value": value.shape}
        ),
        query=query,
        key=key,
        value=value,
        masks=tuple(placed_masks),
        is_causal=parts.is_causal,
        scale=parts.scale,
        symbolic_scales=parts.symbolic_scales,
        dtype=dtype or output_dtype,
        output=output if dtype in (None, output_dtype) else (*output, Step(_TO_DTYPE, (output_dtype,))),
        factors=tuple(placed_factors),
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


def placed_mask(mask: Sequence[LabelledTensor], part: MaskPart, scores: Dimensions) -> Mask | None:
    """Finds, among a mask and what it is a view of, one laid out as batch, heads, queries, keys or products of them."""
    full = resolved(scores)
    for tensor in mask:
        dims = resolved(tensor.dims)
        first = len(full) - len(dims)
        if first >= 0 and all(dim in ((), wanted) for dim, wanted in zip(dims, full[first:], strict=True)):
            return Mask(tensor.node, part.kind, factor=part.factor)
        axes = [product for dim in dims if (product := _product_of(dim, full)) is not None]
        if len(axes) == len(dims):
            return Mask(tensor.node, part.kind, tuple(axes), part.factor)
    return None


def _product_of(dim: Dimension, full: Dimensions) -> tuple[int, ...] | None:
    """Returns which of some dimensions a dimension is the product of; None where it is none."""
    numbers: list[int] = []
    while dim:
        number = next((i for i, part in enumerate(full) if part and dim[: len(part)] == part), None)
        if number is None:
            return None
        numbers.append(number)
        dim = dim[len(full[number]) :]
    return tuple(numbers)


def _factor(part: FactorPart, rows: Dimensions) -> Factor | None:
    """Arranges a factor of the scores as `[B|1, H|1, T|1, 1]`."""
    own = part.tensor.axes
    target = tuple(tuple(axis for axis in dim if axis in own) for dim in resolved(rows))
    if any(kept not in ((), dim) for kept, dim in zip(target, resolved(rows), strict=True)):
        return None
    arranged = operand([part.tensor], (*target, ()), None)
    return None if arranged is None else Factor(arranged, part.is_divisor)


def _common_dtype(
    queries: Sequence[LabelledTensor],
    keys: Sequence[LabelledTensor],
    values: Sequence[LabelledTensor],
    output: fx.Node,
) -> torch.dtype:
    """Chooses the dtype to compute in: the output's if all operands have it, before casts to a wider one if need be."""
    available = [{recorded_dtype(tensor.node) for tensor in operand} for operand in (queries, keys, values)]
    own = [recorded_dtype(operand[0].node) for operand in (queries, keys, values)]
    common = set.intersection(*available)
    for preferred in (recorded_dtype(output), *own):
        if preferred in common:
            return preferred
    return max(own, key=lambda dtype: torch.finfo(dtype).bits)
