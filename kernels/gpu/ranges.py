"""Attention to one range of keys, and its gradients: by Hopper's kernels where they serve, else by Triton's.

Arguments as in `launch.py`.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from nsa_compile.kernels.gpu import launch
from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry


def attend(
    query: Tensor, key: Tensor, value: Tensor, intervals: Intervals, geometry: KeyGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output [B, H, T, D_v] and lse [B, H, T] float32."""
    query, key, value = map(launch.contiguous_rows, (query, key, value))
    output, lse = launch.new_output(query, value), query.new_empty(query.shape[:3], dtype=torch.float32)
    kernels = _kernels("forward", query, key, value, intervals, geometry, scale)
    kernels.flash_forward(query, key, value, intervals, geometry, scale, output, lse)
    return output, lse


def attention_lse(query: Tensor, key: Tensor, intervals: Intervals, geometry: KeyGeometry, scale: float) -> Tensor:
    """Returns lse [B, H, T] float32 alone; by Triton's kernel, as one in Gluon was no faster (NOTES.md)."""
    query, key = map(launch.contiguous_rows, (query, key))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch.flash_forward(query, key, key, intervals, geometry, scale, None, lse)
    return lse


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    geometry: KeyGeometry,
    scale: float,
    delta: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, contiguous, in the inputs' dtype."""
    query, key, value, grad = map(launch.contiguous_rows, (query, key, value, grad_output))
    lse, delta = lse.contiguous(), delta.contiguous()
    attention = (query, key, value, intervals, geometry, scale)
    grad_query = query.new_empty(query.shape)
    _kernels("query_gradient", *attention).flash_query_gradient(*attention, grad, lse, delta, grad_query)
    grad_key, grad_value = _kernels("key_gradient", *attention).flash_key_gradient(*attention, grad, lse, delta)
    return grad_query, grad_key, grad_value


def _kernels(
    stage: str, query: Tensor, key: Tensor, value: Tensor, intervals: Intervals, geometry: KeyGeometry, scale: float
) -> ModuleType:
    """The module whose launches serve a stage: "forward", "query_gradient" or "key_gradient"."""
    kernels = hopper(query.device.type)
    if kernels is not None and kernels.handles(stage, query, key, value, intervals, geometry, scale):
        return kernels
    return launch


@functools.cache
def hopper(device_type: str) -> ModuleType | None:
    """The launches of the kernels in Gluon, whose interface may still change from one Triton to the next."""
    if device_type != "cuda":
        return None
    try:
        from nsa_compile.kernels.gpu.hopper import launch as kernels
    except (ImportError, AttributeError) as error:
        warnings.warn(f"this Triton's Gluon is unknown, and attention slower: {error}", stacklevel=2)
        return None
    return kernels
