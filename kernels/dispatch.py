"""Which implementation serves an operator: Triton on CUDA tensors where there is one, else blockwise aten."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_compile.kernels.blockwise import branches, selection

# Operator -> module below kernels/gpu that has a function of the operator's name.
_GPU_MODULE = {
    "compressed_attention": "compressed",
    "select_blocks": "selection",
    "selected_attention": "selected",
    "window_attention": "window",
    "joint_attention": "joint",
    "joint_listed": "joint",
    "gated_attention": "gated",
    "output_dot_gradient": "launch",
}


def implementation(operator: str, query: Tensor) -> Callable[..., Any]:
    """Returns the function that computes `operator` for tensors like `query`.

    Args:
        operator: name without the namespace, such as "window_attention_backward".
        query: the operator's query; its device and dtype decide.
    """
    if query.device.type == "cuda" and query.dtype != torch.float64:
        function = _gpu_function(operator)
        if function is not None:
            return function
    return blockwise_function(operator)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which kernels are launched on `device`: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def blockwise_function(operator: str) -> Callable[..., Any]:
    """Returns the aten implementation of `operator`, which serves every device."""
    return getattr(selection if operator == "select_blocks" else branches, operator)


@functools.cache
def _gpu_function(operator: str) -> Callable[..., Any] | None:
    module = f"nsa_compile.kernels.gpu.{_GPU_MODULE[operator.removesuffix('_backward')]}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), operator, None)
