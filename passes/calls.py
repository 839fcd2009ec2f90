"""Names for what nodes do: one canonical name for every way of writing an operation, and arguments by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

# Canonical name -> parameter names, in order, as the functional form takes them.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ),
}  # fmt: skip

# Spellings whose own name is not the canonical one.
SYNONYMS: Mapping[str, str] = {}


def operation(node: fx.Node) -> str:
    """Returns the canonical name of what a node computes: "matmul" for `@`, `torch.matmul`, `aten.matmul.default`."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return node.op
    return SYNONYMS.get(name, name)


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def arguments(node: fx.Node) -> "dict[str, Any] | None":
    """Binds a call's arguments to the parameter names of its operation; None where they do not fit."""
    names = PARAMETERS.get(operation(node))
    if names is None or len(node.args) > len(names):
        return None
    bound = dict(zip(names, node.args, strict=False))
    for name, value in node.kwargs.items():
        if name in bound or name not in names:
            return None
        bound[name] = value
    return bound
