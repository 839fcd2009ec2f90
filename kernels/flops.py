"""FLOP counts of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

As torch counts scaled_dot_product_attention: matrix products only, and masks do not make them smaller.  A listed
block counts whole, so do w window tokens where there are as many keys.  A backward pass is five products, two of
them of D_v, where the forward pass is two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = torch.Size


def _select_blocks(query: Shape, compressed_key: Shape, *_: Any, **__: Any) -> int:
    batch, heads, num_queries, head_size = query
    return 2 * batch * heads * num_queries * compressed_key[2] * head_size


def _keys_of_compressed_attention(key: Shape, *_: Any, **__: Any) -> int:
    return key[2]


def _keys_of_selected_attention(
    key: Shape, _value: Shape, block_indices: Shape, *_: Any, selection_block: int, **__: Any
) -> int:
    return min(block_indices[3] * selection_block, key[2])


def _keys_of_window_attention(key: Shape, *_: Any, window: int, **__: Any) -> int:
    return min(window, key[2])


def _keys_of_gated_attention(
    key: Shape, value: Shape, block_indices: Shape, *_: Any, selection_block: int, window: int, **__: Any
) -> int:
    """Of the selected branch and of the window, each with a softmax of its own."""
    selected = _keys_of_selected_attention(key, value, block_indices, selection_block=selection_block)
    return selected + _keys_of_window_attention(key, window=window)


def _keys_of_joint_attention(
    key: Shape, _value: Shape, block_indices: Shape, *_: Any, selection_block: int, window: int, **__: Any
) -> int:
    return min(block_indices[3] * selection_block + window, key[2])


def _forward(keys_per_query: Callable[..., int]) -> Callable[..., int]:
    def count(query: Shape, key: Shape, value: Shape, *rest: Any, **attributes: Any) -> int:
        batch, heads, num_queries, head_size = query
        num_keys = keys_per_query(key, value, *rest, **attributes)
        return 2 * batch * heads * num_queries * num_keys * (head_size + value[3])

    return count


def _backward(keys_per_query: Callable[..., int]) -> Callable[..., int]:
    def count(_grad_output: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **attributes: Any) -> int:
        batch, heads, num_queries, head_size = query
        num_keys = keys_per_query(key, value, *rest, **attributes)
        return 2 * batch * heads * num_queries * num_keys * (3 * head_size + 2 * value[3])

    return count


def register_flop_formulas() -> None:
    """Registers a formula for each opaque operator; the composite counts as the sum of what it calls."""
    nsa = torch.ops.nsa
    register_flop_formula(nsa.select_blocks)(_select_blocks)
    register_flop_formula(nsa.gated_attention)(_forward(_keys_of_gated_attention))
    for name, keys_per_query in {
        "compressed_attention": _keys_of_compressed_attention,
        "selected_attention": _keys_of_selected_attention,
        "window_attention": _keys_of_window_attention,
        "joint_attention": _keys_of_joint_attention,
    }.items():
        register_flop_formula(getattr(nsa, name))(_forward(keys_per_query))
        register_flop_formula(getattr(nsa, f"{name}_backward"))(_backward(keys_per_query))
