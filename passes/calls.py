"""Names for what nodes do: one canonical name for every way of writing an operation, and arguments by name.

`torch.matmul(a, b)`, `a @ b`, `a.matmul(b)`, `torch.bmm(a, b)` and `aten.matmul.default(a, b)` are all "matmul" with
the arguments "input" and "other".  A new spelling is a line in one of the two tables.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

# Spelling -> canonical name, where they differ.  An operation and its in-place form share a name.
SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("bmm", "mm", "linalg_matmul", "__matmul__"), "matmul"),
    "baddbmm_": "baddbmm",
    **dict.fromkeys(("_softmax", "_safe_softmax", "special_softmax", "softmax_"), "softmax"),
    **dict.fromkeys(("iadd", "add_", "__add__", "__radd__", "__iadd__"), "add"),
    **dict.fromkeys(("isub", "sub_", "subtract", "__sub__"), "sub"),
    **dict.fromkeys(("imul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"), "mul"),
    **dict.fromkeys(("truediv", "itruediv", "div_", "divide", "true_divide", "__truediv__"), "div"),
    "masked_fill_": "masked_fill",
    "dropout_": "dropout",
    **dict.fromkeys(("clip", "clamp_", "clamp_min", "clip_"), "clamp"),
    "nan_to_num_": "nan_to_num",
    "tanh_": "tanh",
    **dict.fromkeys(("exp_", "special_exp"), "exp"),
    **dict.fromkeys(("exp2_", "special_exp2"), "exp2"),
    **dict.fromkeys(("_log_softmax", "special_log_softmax"), "log_softmax"),
    "special_logsumexp": "logsumexp",
    "vector_norm": "linalg_vector_norm",
    "reciprocal_": "reciprocal",
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"), "to"),
    "convert_element_type": "to",
}

# Canonical name -> parameter names in order.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ),
    "multi_head_attention_forward": (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
        "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask",
        "need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
        "static_k", "static_v", "average_attn_weights", "is_causal",
    ),
    "matmul": ("input", "other"),
    "baddbmm": ("input", "batch1", "batch2", "beta", "alpha"),
    "softmax": ("input", "dim", "dtype"),
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "mul": ("input", "other"),
    "div": ("input", "other", "rounding_mode"),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
    "dropout": ("input", "p", "training", "inplace"),
    "clamp": ("input", "min", "max"),
    "maximum": ("input", "other"),
    "max": ("input", "other", "keepdim", "dim"),
    "amax": ("input", "dim", "keepdim"),
    "nan_to_num": ("input", "nan", "posinf", "neginf"),
    "tanh": ("input",),
    "exp": ("input",),
    "exp2": ("input",),
    "log_softmax": ("input", "dim", "dtype"),
    "logsumexp": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim", "dtype"),
    "norm": ("input", "ord", "dim", "keepdim", "dtype"),
    "linalg_vector_norm": ("input", "ord", "dim", "keepdim", "dtype"),
    "normalize": ("input", "ord", "dim", "eps"),
    "reciprocal": ("input",),
    "cat": ("tensors", "dim"),
    "to": ("input",),
}  # fmt: skip

# A parameter's other names: those of aten, and of single spellings.
_PARAMETER_SYNONYMS: Mapping[str, str] = {
    "self": "input",
    "mat2": "other",
    "tensor2": "other",
    "train": "training",
    "half_to_float": "dtype",
    "y": "other",
    "axis": "dim",
    "p": "ord",
    "keepdims": "keepdim",
}
# Keyword arguments that say nothing about the value.
_IGNORED = frozenset(("_stacklevel", "memory_format", "copy", "non_blocking", "layout", "pin_memory"))
# Modules that `symbolic_trace` leaves as calls -> canonical name, and which attributes are arguments.
_MODULES: Mapping[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Softmax: ("softmax", ("dim",)),
    nn.Dropout: ("dropout", ("p", "training")),
}


def operation(node: fx.Node) -> str:
    """Returns the canonical name of what a node computes."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    elif node.op == "call_module":
        module = _module(node)
        known = _MODULES.get(type(module)) if module is not None else None
        return known[0] if known else node.op
    else:
        return node.op
    return SYNONYMS.get(name, name)


def arguments(node: fx.Node) -> "dict[str, Any] | None":
    """Binds a call's arguments to the parameter names of its operation; None where they do not fit."""
    names = PARAMETERS.get(operation(node))
    if names is None:
        return None
    if node.op == "call_method" and node.target == "where":
        names = ("input", "condition", "other")
    if operation(node) == "to":
        return {"input": node.args[0]} if node.args else None
    if len(node.args) > len(names):
        return None
    bound = dict(zip(names, node.args, strict=False))
    for keyword, value in node.kwargs.items():
        name = keyword if keyword in names else _PARAMETER_SYNONYMS.get(keyword, keyword)
        if name in _IGNORED:
            continue
        if name in bound or name not in names:
            return None
        bound[name] = value
    if node.op == "call_module":
        module = _module(node)
        if module is None or type(module) not in _MODULES:
            return None
        bound |= {name: getattr(module, name) for name in _MODULES[type(module)][1]}
    return bound


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None
