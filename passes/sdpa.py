"""Sites that are calls of `scaled_dot_product_attention`, however they are written."""

from typing import Any

import torch
from torch import fx

from nsa_compile.passes.assemble import assemble
from nsa_compile.passes.axes import Dimension, dimension, dimensions, unify, unify_as_required
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import dtype_of, number_of, place_of, shape_of
from nsa_compile.passes.parts import MaskPart, Parts
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.sites import AttentionSite, MaskKind, Reason, Rejection, Scope, Shape
from nsa_compile.passes.views import broadcast_dimensions

OPERATION = "scaled_dot_product_attention"


def is_sdpa_call(node: fx.Node) -> bool:
    """Tells whether a node calls `scaled_dot_product_attention`: the torch function or the aten operator."""
    return node.op == "call_function" and operation(node) == OPERATION


def read_sdpa_call(node: fx.Node, scope: Scope, writes: Writes) -> AttentionSite | Rejection:
    """Reads one call.

    Args:
        node: a node for which `is_sdpa_call` holds.
        scope: the graph that holds it.
        writes: the in-place writes of that graph.

    Returns:
        The site, its masks unproved; or why the call cannot be one.
    """
    is_aten = isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    spelling = ("aten." if is_aten else "F.") + OPERATION
    place = place_of(node, scope, spelling)

    def rejected(reason: Reason, sentence: str, *nodes: fx.Node) -> Rejection:
        return Rejection(reason, sentence, nodes or (node,), place)

    bound = arguments(node)
    if bound is None:
        return rejected(Reason.UNSUPPORTED_CALL, f"{spelling} is called with arguments that its signature lacks.")
    names = ("query", "key", "value")
    operands = [operand for name in names if isinstance(operand := bound.get(name), fx.Node)]
    mask = bound.get("attn_mask")
    if len(operands) < 3 or not isinstance(mask, fx.Node | None):
        return rejected(Reason.UNSUPPORTED_CALL, "query, key, value and attn_mask are not all nodes of the graph.")
    shapes = [shape for each in operands if (shape := shape_of(each)) is not None]
    if len(shapes) < 3:
        return rejected(Reason.UNKNOWN_SHAPES, "No shape is recorded for query, key or value.")
    place = place_of(node, scope, spelling, dict(zip(names, shapes, strict=True)))
    is_causal, enable_gqa = (number_of(bound.get(name, False)) for name in ("is_causal", "enable_gqa"))
    if is_causal is None or enable_gqa is None:
        return rejected(Reason.UNSUPPORTED_CALL, "is_causal and enable_gqa are not constants.")
    if mask is not None and is_causal:
        return rejected(Reason.UNSUPPORTED_CALL, "Both attn_mask and is_causal=True are given.", node, mask)
    if number_of(bound.get("dropout_p", 0.0)) != 0:
        return rejected(Reason.DROPOUT, f"dropout_p={bound['dropout_p']}.")
    parts = read_operands(node, operands, shapes, mask, bool(enable_gqa))
    if isinstance(parts, str):
        return rejected(Reason.UNSUPPORTED_SHAPE, parts)
    scale = bound.get("scale")
    number = number_of(scale)
    read = Parts(
        **parts,
        is_causal=bool(is_causal),
        scale=number if number is not None or scale is None else 1.0,
        symbolic_scales=((scale, 1),) if isinstance(scale, fx.Node) and number is None else (),
        is_autocast=any(dtype_of(each) != dtype_of(node) for each in operands),
    )
    return assemble(read, place, writes)


def read_operands(
    node: fx.Node, operands: list[fx.Node], shapes: list[Shape], mask: fx.Node | None, enable_gqa: bool
) -> "dict[str, Any] | str":
    """Names the axes of a call's tensors.

    Args:
        node: the call's output.
        operands: query, key and value.
        shapes: their shapes.
        mask: broadcast to the scores; None where there is none.
        enable_gqa: whether fewer heads of keys and values than of queries are shared.

    Returns:
        The parts that follow from it; a sentence where the shapes do not fit.
    """
    query, key, value = (dimensions(shape) for shape in shapes)
    if not len(query) == len(key) == len(value) >= 2:
        return f"query, key and value have {len(query)}, {len(key)} and {len(value)} dimensions."
    for dims in (key, value):
        for position, (mine, theirs) in enumerate(zip(query[:-2], dims[:-2], strict=True)):
            is_grouped = enable_gqa and position == len(query) - 3
            if not _shares_heads(mine, theirs, is_grouped):
                return f"Dimension {position} of the query does not fit that of key or value: {shapes}."
    *lead, length, depth = query
    if not unify_as_required(depth, key[-1]) or not unify_as_required(key[-2], value[-2]):
        return f"The sizes of query, key and value do not fit: {shapes}."
    scores = (*lead, length, key[-2])
    masks = ()
    if mask is not None:
        mask_dims = broadcast_dimensions(mask, scores)
        if mask_dims is None:
            return f"The mask's shape {shape_of(mask)} does not fit the scores."
        masks = (MaskPart(LabelledTensor(mask, mask_dims), mask_kind(mask)),)
    return {
        "query": LabelledTensor(operands[0], query),
        "key": LabelledTensor(operands[1], key),
        "value": LabelledTensor(operands[2], value),
        "output": LabelledTensor(node, (*lead, length, value[-1])),
        "length": length,
        "keys": key[-2],
        "depth": depth,
        "value_depth": value[-1],
        "batch": tuple(axis for dim in lead[:-1] for axis in dim) if len(lead) != 1 else None,
        "masks": masks,
    }


def _shares_heads(query: Dimension, key: Dimension, is_grouped: bool) -> bool:
    """Identifies a leading axis of the query with that of key or value, which may be broadcast or, grouped, smaller."""
    if not key:
        return True
    if is_grouped:
        (heads,), (kv_heads,) = query, key
        if isinstance(heads.size, int) and isinstance(kv_heads.size, int) and heads.size % kv_heads.size == 0:
            return unify(query, (*key, *dimension(heads.size // kv_heads.size)))
    return unify_as_required(query, key)


def mask_kind(node: fx.Node) -> MaskKind:
    """Tells how a mask operand is read: by its dtype."""
    return MaskKind.ALLOWED if dtype_of(node) is torch.bool else MaskKind.ADDITIVE
