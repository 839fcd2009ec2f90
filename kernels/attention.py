"""`nsa::attention`, the composite: compress, attend to compressed tokens, select blocks, attend to them and the window.

Plain aten around the opaque operators of kernels/operators.py, so that Inductor fuses what surrounds them.
"""

import math

import torch
from torch import Tensor

from nsa_compile.config import NSAConfig
from nsa_compile.kernels.checks import check_arguments
from nsa_compile.kernels.compression import mean_compress, sum_dtype
from nsa_compile.kernels.intervals import (
    blocks_with_valid_key,
    resolve_intervals,
    tighten_intervals,
    valid_compressed_tokens,
)
from nsa_compile.kernels.sharding import register_rules_for

# A sequence's output from which on one operator sums all branches: 8,192 tokens of 32 heads of 128 numbers of 16 bits.
# Not a batch's, or a sequence's result would depend on the others.
LARGE_OUTPUT_BYTES = 1 << 26


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gates: Tensor | None = None,
    compressed_key: Tensor | None = None,
    compressed_value: Tensor | None = None,
    window_key: Tensor | None = None,
    window_value: Tensor | None = None,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    key_valid: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    block_length: int = 32,
    block_stride: int = 16,
    selection_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    combine: str = "joint",
) -> Tensor:
    """Native Sparse Attention.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, H_kv, S, D]`; the selected branch's, where branches differ.
        value: `[B, H_kv, S, D_v]`; likewise.
        gates: `[B, H, T, 3]` in [0, 1], order compressed, selected, window; for `combine="gated"` only.
        compressed_key: `[B, H_kv, N_cmp, D]`, or None for the mean of `key`.
        compressed_value: `[B, H_kv, N_cmp, D_v]`, or None for the mean of `value`; unused in joint mode.
        window_key: `[B, H_kv, S, D]` of the window branch, or None for `key`; gated mode only.
        window_value: `[B, H_kv, S, D_v]` of the window branch, or None for `value`.
        first_key: `[B | 1, T]` integers, first visible key; None means 0.
        last_key: `[B | 1, T]` integers, last visible key; None means t if `is_causal`, else S − 1.
        key_valid: `[B | 1, S]` bool; False hides a key from every query.
        is_causal: what a missing `last_key` means, nothing else.
        scale: factor of the logits; None means 1/√D.
        block_length: l.
        block_stride: d.
        selection_block: l'.
        num_selected: n.
        num_initial: forced blocks at the start.
        num_local: forced blocks at the end.
        window: w.
        combine: "joint" or "gated".

    Returns:
        `[B, H, T, D_v]`, dtype of `query`, contiguous.  Where no gradient is needed and `query` lies in memory as
        `[B, T, H, D]`, a gated output of 64 MiB a sequence or more lies so too, as torch's fused attentions lay out
        theirs.

    Raises:
        NSAError: see `check_arguments`.

    Reference: arXiv 2502.11089, eqs 5–12.
    """
    joint = combine == "joint"
    register_rules_for(query)
    check_arguments(
        query,
        key,
        value,
        gates=gates,
        compressed_key=compressed_key,
        compressed_value=compressed_value,
        window_key=window_key,
        window_value=window_value,
        first_key=first_key,
        last_key=last_key,
        key_valid=key_valid,
        scale=scale,
        config=NSAConfig(  # refuses what NSA is not defined for
            block_length=block_length,
            block_stride=block_stride,
            selection_block=selection_block,
            num_selected=num_selected,
            num_initial=num_initial,
            num_local=num_local,
            window=window,
            combine=combine,  # type: ignore[arg-type]
        ),
    )
    query, key, value = (_contiguous_rows(each) for each in (query, key, value))
    num_keys = key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    first_key, last_key = resolve_intervals(first_key, last_key, is_causal=is_causal, query=query, num_keys=num_keys)
    visible = (first_key, last_key)
    compression = {"block_length": block_length, "block_stride": block_stride}

    if compressed_key is None:
        compressed_key = mean_compress(key.detach() if joint else key, **compression)
    compressed_key = _contiguous_rows(compressed_key)
    compressed_valid = block_valid = None
    candidates = visible
    if key_valid is not None:
        key_valid = key_valid.expand(query.shape[0], num_keys)
        compressed_valid = valid_compressed_tokens(key_valid, **compression)
        block_valid = blocks_with_valid_key(key_valid, selection_block)
        candidates = tighten_intervals(first_key, last_key, key_valid, is_causal=is_causal, query=query)

    causal = {"is_causal": is_causal, "scale": scale}
    compressed_output = lse = None
    if not joint:
        if compressed_value is None:
            compressed_value = mean_compress(value, **compression)
        compressed_output, lse = torch.ops.nsa.compressed_attention(
            query,
            compressed_key,
            _contiguous_rows(compressed_value),
            *visible,
            compressed_valid,
            **causal,
            **compression,
            num_keys=num_keys,
        )
    block_indices = torch.ops.nsa.select_blocks(
        query.detach(),
        compressed_key.detach(),
        lse,
        *candidates,
        compressed_valid,
        block_valid,
        **causal,
        **compression,
        selection_block=selection_block,
        num_selected=num_selected,
        num_initial=num_initial,
        num_local=num_local,
        num_keys=num_keys,
    )
    forced = {"num_initial": num_initial, "num_local": num_local}
    if gates is None or compressed_output is None:  # joint, as was checked
        output, _ = torch.ops.nsa.joint_attention(
            query,
            key,
            value,
            block_indices,
            *visible,
            key_valid,
            **causal,
            selection_block=selection_block,
            window=window,
            **forced,
        )
        return output.contiguous()
    forced |= causal | {"selection_block": selection_block}
    window_key = key if window_key is None else _contiguous_rows(window_key)
    window_value = value if window_value is None else _contiguous_rows(window_value)
    if _is_summed_in_one(
        compressed_output, query, key, value, gates, compressed_key, compressed_value, window_key, window_value
    ):
        output = torch.ops.nsa.gated_attention(
            query,
            key,
            value,
            block_indices,
            window_key,
            window_value,
            *visible,
            key_valid,
            compressed_output,
            gates,
            window=window,
            **forced,
        )
        return output if query.transpose(1, 2).is_contiguous() else output.contiguous()
    selected_output, _ = torch.ops.nsa.selected_attention(
        query, key, value, block_indices, *visible, key_valid, **forced
    )
    compressed_gate, selected_gate, window_gate = gates.to(sum_dtype(query)).split(1, -1)
    # Products promote to the gates' dtype element by element; a cast of its own would be another pass over memory.
    total = torch.addcmul(compressed_output * compressed_gate, selected_output, selected_gate)
    window_output, _ = torch.ops.nsa.window_attention(
        query, window_key, window_value, *visible, key_valid, **causal, window=window
    )
    total = torch.addcmul(total, window_output, window_gate)
    return total.to(query.dtype, memory_format=torch.contiguous_format, copy=True)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """Copies a tensor only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _is_summed_in_one(output: Tensor, *inputs: Tensor | None) -> bool:
    """Whether one operator computes and sums what follows the compressed branch, where a branch's output needs much.

    Saves memory, and on a Hopper GPU time.  Gradients need each branch's output.  Where they are not needed and outputs
    are small, gates and sums are fused behind the last branch instead.
    """
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs):
        return False
    size = math.prod(output.shape[1:]) * output.element_size()  # `Size.numel` would fix a symbolic length
    return isinstance(size, int) and size >= LARGE_OUTPUT_BYTES
