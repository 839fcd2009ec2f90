"""Sites inside torch's own attention modules, which Dynamo keeps as single calls: they are opened up.

`nn.MultiheadAttention` is one call of `F.multi_head_attention_forward`, and `nn.TransformerEncoderLayer`, evaluated
without gradients, one of `torch._transformer_encoder_layer_fwd`.  A site's operands are then the call's inputs with
the steps that make queries, keys and values of them, and its output has the steps of everything after attention.
"""

import dataclasses
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.assemble import placed_mask
from nsa_compile.passes.axes import Dimensions, dimension
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import number_of, place_of, recorded_dtype, recorded_shape, shape_of, tensor_of
from nsa_compile.passes.parts import MaskPart, Problem
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.repetition import sources
from nsa_compile.passes.sdpa import mask_kind
from nsa_compile.passes.sites import (
    AttentionSite,
    Branch,
    Mask,
    MaskKind,
    Operand,
    Place,
    Reason,
    Rejection,
    Scope,
    Size,
    Step,
)
from nsa_compile.passes.views import broadcast_dimensions

_aten = torch.ops.aten
Steps = tuple[Step, ...]


def is_multihead_call(node: fx.Node) -> bool:
    """Tells whether a node calls `F.multi_head_attention_forward`."""
    return node.op == "call_function" and operation(node) == "multi_head_attention_forward"


def is_encoder_layer(node: fx.Node) -> bool:
    """Tells whether a node calls the fused `torch._transformer_encoder_layer_fwd`."""
    return node.op == "call_function" and operation(node) == "_transformer_encoder_layer_fwd"


def read_multihead_call(node: fx.Node, scope: Scope, writes: Writes) -> AttentionSite | Rejection | None:
    """Reads a call of `F.multi_head_attention_forward`; None where its output is not used."""
    outputs = {user.args[1]: user for user in node.users if operation(user) == "getitem" and user.users}
    if 0 not in outputs:
        return None
    used = [outputs[1]] if 1 in outputs else []
    place = place_of(outputs[0], scope, "nn.MultiheadAttention")
    bound = _with_defaults(arguments(node))
    problem = _multihead_problem(node, bound, used)
    if problem is not None:
        return Rejection(problem.reason, problem.sentence, problem.nodes or (node,), place)
    return _read_multihead(bound, place, writes)


def _with_defaults(bound: dict[str, Any] | None) -> dict[str, Any]:
    defaults = {"training": True, "need_weights": True, "is_causal": False, "use_separate_proj_weight": False}
    return {**defaults, **bound} if bound else {}


def _multihead_problem(node: fx.Node, bound: dict[str, Any], used_weights: list[fx.Node]) -> Problem | None:
    needed = ("query", "key", "value", "out_proj_weight")
    if not bound or not all(isinstance(bound.get(name), fx.Node) for name in needed):
        return Problem(Reason.UNSUPPORTED_CALL, f"The arguments of {node} are not ones that can be read.")
    shapes = [shape for name in needed[:3] if (shape := shape_of(bound[name])) is not None]
    if len(shapes) < 3:
        return Problem(Reason.UNKNOWN_SHAPES, "No shape is recorded for query, key or value.")
    if not len(shapes[0]) == len(shapes[1]) == len(shapes[2]) in (2, 3):
        return Problem(Reason.UNSUPPORTED_SHAPE, f"The shapes {shapes} are not [length, batch, size].")
    if bound["training"] and number_of(bound.get("dropout_p", 0.0)) != 0:
        return Problem(Reason.DROPOUT, f"dropout_p={bound['dropout_p']} in training.")
    if used_weights:
        return Problem(Reason.ATTENTION_WEIGHTS_USED, f"{used_weights[0]} is used.", tuple(used_weights))
    if bound.get("bias_k") is not None or bound.get("bias_v") is not None or bound.get("add_zero_attn"):
        return Problem(Reason.ATTENTION_SINKS, "bias_k, bias_v or add_zero_attn adds a key.")
    if bound.get("static_k") is not None or bound.get("static_v") is not None:
        return Problem(Reason.UNSUPPORTED_CALL, "static_k or static_v is given.")
    return None


def _read_multihead(bound: dict[str, Any], place: Place, writes: Writes) -> AttentionSite | Rejection:
    heads, width = bound["num_heads"], bound["embed_dim_to_check"]
    is_batched = len(recorded_shape(bound["query"])) == 3
    split = (
        Step(_aten.unflatten.int, (-1, [heads, -1])),
        *((Step(_aten.permute.default, ([1, 2, 0, 3],)),) if is_batched
          else (Step(_aten.permute.default, ([1, 0, 2],)), Step(_aten.unsqueeze.default, (0,)))),
    )  # fmt: skip
    joined = (
        Step(_aten.permute.default, ([2, 0, 1, 3],)),
        Step(_aten.flatten.using_ints, (2, 3)),
        *(() if is_batched else (Step(_aten.squeeze.dim, (1,)),)),
    )
    operands = []
    for number, name in enumerate(("query", "key", "value")):
        rows = (number * width, (number + 1) * width)
        weight = _weight(bound, f"{name[0]}_proj_weight", rows)
        bias = None if bound.get("in_proj_bias") is None else _rows(bound["in_proj_bias"], rows)
        length, batch = (*recorded_shape(bound[name])[:-1], 1)[:2]
        shape = (batch, heads, length, width // heads)
        operands.append(Operand(bound[name], shape, (Step(_aten.linear.default, (weight, bias)), *split)))
    is_causal = bool(bound["is_causal"]) and bound.get("key_padding_mask") is None and not bound["need_weights"]
    masks = () if is_causal else _masks(bound, operands, place, writes)
    if isinstance(masks, Rejection):
        return masks
    project = Step(_aten.linear.default, (_whole(bound["out_proj_weight"]), _whole(bound.get("out_proj_bias"))))
    return _site(place, operands, masks, is_causal, (*joined, project))


def read_encoder_layer(node: fx.Node, scope: Scope, writes: Writes) -> AttentionSite | Rejection:
    """Reads a call of the fused encoder layer: attention, and all that follows it as steps."""
    place = place_of(node, scope, "nn.TransformerEncoderLayer")
    names = ("source", "width", "heads", "in_weight", "in_bias", "out_weight", "out_bias", "use_gelu", "norm_first",
             "eps", "weight_1", "bias_1", "weight_2", "bias_2", "up_weight", "up_bias", "down_weight", "down_bias",
             "mask", "mask_type")  # fmt: skip
    bound: dict[str, Any] = dict(zip(names, node.args, strict=False))
    tensor = tensor_of(bound.get("source"))
    if node.kwargs or len(node.args) < names.index("mask") or tensor is None or tensor.is_nested or tensor.dim() != 3:
        sentence = f"{node} is not called with one padded batch of sequences."
        return Rejection(Reason.FUSED_ATTENTION, sentence, (node,), place)
    source, width, heads = bound["source"], bound["width"], bound["heads"]
    batch, length, _ = tensor.shape
    norms = [_norm(bound, "1", width), _norm(bound, "2", width)]
    first = bool(bound["norm_first"])
    operands = []
    for number in range(3):
        rows = (number * width, (number + 1) * width)
        project = Step(_aten.linear.default, (_rows(bound["in_weight"], rows), _rows(bound["in_bias"], rows)))
        steps = (
            *((norms[0],) if first else ()),
            project,
            Step(_aten.unflatten.int, (-1, [heads, -1])),
            Step(_aten.transpose.int, (1, 2)),
        )
        operands.append(Operand(source, (batch, heads, length, width // heads), steps))
    activation = _aten.gelu.default if bound["use_gelu"] else _aten.relu.default
    forward = (
        *((norms[1],) if first else ()),
        Step(_aten.linear.default, (_whole(bound["up_weight"]), _whole(bound["up_bias"]))),
        Step(activation),
        Step(_aten.linear.default, (_whole(bound["down_weight"]), _whole(bound["down_bias"]))),
    )
    output = (
        Step(_aten.transpose.int, (1, 2)),
        Step(_aten.flatten.using_ints, (2, 3)),
        Step(_aten.linear.default, (_whole(bound["out_weight"]), _whole(bound["out_bias"]))),
        Step(_aten.add.Tensor, (_whole(source),)),
        *(() if first else (norms[0],)),
        Step(_aten.add.Tensor, (Branch(forward),)),
        *(() if first else (norms[1],)),
    )
    masks = _encoder_masks(bound.get("mask"), bound.get("mask_type"), operands, place, writes)
    return masks if isinstance(masks, Rejection) else _site(place, operands, masks, False, output)


def _site(
    place: Place, operands: list[Operand], masks: tuple[Mask, ...], is_causal: bool, output: Steps
) -> AttentionSite:
    query, key, value = operands
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    return AttentionSite(
        place=dataclasses.replace(place, shapes=shapes),
        query=query,
        key=key,
        value=value,
        dtype=recorded_dtype(place.node),
        masks=masks,
        is_causal=is_causal,
        output=output,
    )


def _masks(
    bound: dict[str, Any], operands: list[Operand], place: Place, writes: Writes
) -> tuple[Mask, ...] | Rejection:
    batch, heads, queries, keys = _score_dimensions(operands)
    layouts = {
        "attn_mask": ((queries, keys), ((*batch, *heads), queries, keys)),
        "key_padding_mask": ((batch, keys), (keys,)),
    }
    masks = []
    for name, wanted in layouts.items():
        if bound.get(name) is not None:
            placed = _placed(bound[name], wanted, (batch, heads, queries, keys), place, writes)
            if isinstance(placed, Rejection):
                return placed
            masks.append(placed)
    return tuple(masks)


def _encoder_masks(
    mask: Any, mask_type: Any, operands: list[Operand], place: Place, writes: Writes
) -> tuple[Mask, ...] | Rejection:
    if mask is None:
        return ()
    full = _score_dimensions(operands)
    batch, _, queries, keys = full
    wanted = {0: ((queries, keys),), 1: ((batch, keys),)}.get(mask_type, (full,))
    placed = _placed(mask, wanted, full, place, writes)
    return placed if isinstance(placed, Rejection) else (placed,)


def _score_dimensions(operands: list[Operand]) -> Dimensions:
    query, key, _ = operands
    sizes: tuple[Size, ...] = (*query.shape[:3], key.shape[2])
    return tuple(dimension(size) for size in sizes)


def _placed(
    mask: Any, layouts: tuple[Dimensions, ...], scores: Dimensions, place: Place, writes: Writes
) -> Mask | Rejection:
    """Reads a mask of one of several layouts; these modules hide a key where a bool mask is true."""
    for layout in layouts:
        dims = broadcast_dimensions(mask, layout) if isinstance(mask, fx.Node) else None
        if dims is not None and len(dims) == len(layout):
            kind = MaskKind.BLOCKED if mask_kind(mask) is MaskKind.ALLOWED else MaskKind.ADDITIVE
            part = MaskPart(LabelledTensor(mask, dims), kind)
            placed = placed_mask(sources(part.tensor, place.node, writes), part, scores)
            if placed is not None:
                return placed
    sentence = f"The mask {mask} is not laid out as batch, heads, queries and keys."
    return Rejection(Reason.MASK_NOT_PROVED, sentence, (place.node,), place)


def _weight(bound: dict[str, Any], name: str, rows: tuple[int, int]) -> Operand:
    if bound["use_separate_proj_weight"]:
        return Operand(bound[name], recorded_shape(bound[name]))
    return _rows(bound["in_proj_weight"], rows)


def _whole(node: fx.Node | None) -> Operand | None:
    return None if node is None else Operand(node, recorded_shape(node))


def _rows(node: fx.Node, rows: tuple[int, int]) -> Operand:
    start, end = rows
    return Operand(node, (end - start, *recorded_shape(node)[1:]), (Step(_aten.slice.Tensor, (0, start, end)),))


def _norm(bound: dict[str, Any], number: str, width: int) -> Step:
    weight, bias = _whole(bound[f"weight_{number}"]), _whole(bound[f"bias_{number}"])
    return Step(_aten.layer_norm.default, ([width], weight, bias, bound["eps"]))
