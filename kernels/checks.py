"""What `nsa::attention` accepts: every argument is checked before a kernel sees it."""

import math

import torch
from torch import Tensor

from nsa_compile.config import NSAConfig
from nsa_compile.errors import (
    CompressionError,
    ConfigError,
    DeviceError,
    DtypeError,
    GatesError,
    HeadCountError,
    ShapeError,
)
from nsa_compile.kernels.compression import count_compressed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gates: Tensor | None,
    compressed_key: Tensor | None,
    compressed_value: Tensor | None,
    window_key: Tensor | None,
    window_value: Tensor | None,
    first_key: Tensor | None,
    last_key: Tensor | None,
    key_valid: Tensor | None,
    scale: float | None,
    config: NSAConfig,
) -> None:
    """Checks the arguments of `nsa::attention`; kernels/attention.py documents them.

    Raises:
        ShapeError: a rank or size does not fit.
        HeadCountError: H_kv does not divide H.
        DtypeError: a dtype is not accepted, or query, key and value differ.
        DeviceError: the tensors are not all on one device.
        GatesError: gates are missing in gated mode, or given in joint mode.
        CompressionError: compressed keys and values do not fit, or one is given without the other.
        ConfigError: `scale` is not finite, or joint mode is given a window branch of its own.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} has shape {_shape(tensor)}; give [batch, heads, tokens, head size].")
    batch, heads, num_queries, head_size = query.shape
    kv_heads, num_keys = key.shape[1:3]
    value_size = value.shape[3]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise HeadCountError(
            f"query has {heads} heads and key {kv_heads}; the number of query heads must be a multiple of that of "
            "key heads (heads are dimension 1: transpose [batch, tokens, heads, head size] first)."
        )
    if head_size == 0 or value_size == 0:
        raise ShapeError(f"head sizes must be at least 1, not {head_size} (query) and {value_size} (value).")
    _check_size("key", key, (batch, kv_heads, num_keys, head_size), "[B, H_kv, S, D], with B and D of query")
    _check_size("value", value, (batch, kv_heads, num_keys, value_size), "[B, H_kv, S, D_v], with B, H_kv and S of key")
    _check_mode(gates, compressed_key, compressed_value, window_key, window_value, config)

    num_compressed = count_compressed(num_keys, config.block_length, config.block_stride)
    why = (
        f"[B, H_kv, N_cmp, head size]; {num_keys} keys make N_cmp = {num_compressed} compressed tokens with "
        f"block_length={config.block_length} and block_stride={config.block_stride}"
    )
    if compressed_key is not None:
        size = (batch, kv_heads, num_compressed, head_size)
        _check_size("compressed_key", compressed_key, size, why, CompressionError)
    if compressed_value is not None:
        size = (batch, kv_heads, num_compressed, value_size)
        _check_size("compressed_value", compressed_value, size, why, CompressionError)
    if window_key is not None:
        _check_size("window_key", window_key, (batch, kv_heads, num_keys, head_size), "the shape of key")
    if window_value is not None:
        _check_size("window_value", window_value, (batch, kv_heads, num_keys, value_size), "the shape of value")
    if gates is not None:
        _check_size("gates", gates, (batch, heads, num_queries, 3), "[B, H, T, 3]: compressed, selected, window")
    _check_vector("first_key", first_key, batch, num_queries, "[B, T] or [1, T]", _INTEGERS)
    _check_vector("last_key", last_key, batch, num_queries, "[B, T] or [1, T]", _INTEGERS)
    _check_vector("key_valid", key_valid, batch, num_keys, "[B, S] or [1, S]", (torch.bool,))

    same = {
        "query": query,
        "key": key,
        "value": value,
        "compressed_key": compressed_key,
        "compressed_value": compressed_value,
        "window_key": window_key,
        "window_value": window_value,
    }
    _check_dtypes(same, gates)
    others = {"gates": gates, "first_key": first_key, "last_key": last_key, "key_valid": key_valid}
    for name, tensor in (same | others).items():
        if tensor is not None and tensor.device != query.device:
            raise DeviceError(f"{name} is on {tensor.device} and query on {query.device}; move all to one device.")
    if scale is not None and not math.isfinite(scale):
        raise ConfigError(f"scale={scale} is not accepted; give a finite number, or None for 1/sqrt(head size).")


def _check_mode(
    gates: Tensor | None,
    compressed_key: Tensor | None,
    compressed_value: Tensor | None,
    window_key: Tensor | None,
    window_value: Tensor | None,
    config: NSAConfig,
) -> None:
    if config.combine == "joint":
        if gates is not None:
            raise GatesError(
                "gates were given, but combine='joint' has one softmax and no gates; leave them out, or use "
                "combine='gated'."
            )
        if compressed_value is not None:
            raise CompressionError(
                "compressed_value was given, but combine='joint' uses compressed keys only, to score blocks; "
                "leave it out."
            )
        if window_key is not None or window_value is not None:
            raise ConfigError(
                "window_key and window_value need combine='gated': in joint mode a token has one key and one value."
            )
        return
    if gates is None:
        raise GatesError("combine='gated' needs gates, [B, H, T, 3] in [0, 1]; give them, or use combine='joint'.")
    if (compressed_key is None) != (compressed_value is None):
        missing = "compressed_key" if compressed_key is None else "compressed_value"
        raise CompressionError(f"{missing} is missing; give both compressed_key and compressed_value, or neither.")


def _check_dtypes(same: dict[str, Tensor | None], gates: Tensor | None) -> None:
    expected = same["query"].dtype  # type: ignore[union-attr]
    for name, tensor in same.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise DtypeError(f"{name} is {tensor.dtype}; give float16, bfloat16, float32 or float64.")
        if tensor.dtype != expected:
            raise DtypeError(f"{name} is {tensor.dtype} and query {expected}; cast them to one dtype, or use autocast.")
    if gates is not None and gates.dtype not in _FLOATS:
        raise DtypeError(f"gates are {gates.dtype}; give float16, bfloat16, float32 or float64.")


def _check_size(
    name: str,
    tensor: Tensor,
    size: tuple[int, ...],
    meaning: str,
    error: type[ShapeError | CompressionError] = ShapeError,
) -> None:
    if tensor.dim() != len(size) or any(given != wanted for given, wanted in zip(tensor.shape, size, strict=True)):
        raise error(f"{name} has shape {_shape(tensor)}; give {_bracket(size)}: {meaning}.")


def _check_vector(
    name: str, tensor: Tensor | None, batch: int, length: int, meaning: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DtypeError(f"{name} is {tensor.dtype}; give {accepted}.")
    if tensor.dim() != 2 or tensor.shape[1] != length or (tensor.shape[0] != batch and tensor.shape[0] != 1):
        raise ShapeError(f"{name} has shape {_shape(tensor)}; give {_bracket((batch, length))}: {meaning}.")


def _shape(tensor: Tensor) -> str:
    return _bracket(tuple(tensor.shape))


def _bracket(size: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, size))}]"
