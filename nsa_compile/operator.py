"""`nsa_attention`: Native Sparse Attention as one function call."""

from torch import Tensor, ops

from nsa_compile.config import NSAConfig
from nsa_compile.errors import CompressionError, ConfigError
from nsa_compile.kernels import operators as _register_operators  # noqa: F401  (importing registers torch.ops.nsa)

_DEFAULT = NSAConfig()


def nsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: NSAConfig = _DEFAULT,
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
) -> Tensor:
    """Attends with Native Sparse Attention.

    Query t sees the keys s with first_key[t] ≤ s ≤ last_key[t] and key_valid[s]; a query that sees none gets 0.

    Args:
        query: `[B, H, T, D]`, any strides; copied only if its last dimension is not contiguous, as all tensors here.
        key: `[B, H_kv, S, D]`; H_kv divides H.
        value: `[B, H_kv, S, D_v]`.
        config: sizes of blocks and window, and how branches are combined; `min_keys` does not matter here.
        gates: `[B, H, T, 3]` in [0, 1], order compressed, selected, window; needed by and only for
            `combine="gated"`.
        compressed_key: `[B, H_kv, N_cmp, D]`, keys of N_cmp = (S − l) // d + 1 compressed tokens; None takes the mean.
        compressed_value: `[B, H_kv, N_cmp, D_v]`; gated mode only, together with `compressed_key`.
        window_key: `[B, H_kv, S, D]`, the window branch's own keys (`branch_kv="independent"`); gated mode only.
        window_value: `[B, H_kv, S, D_v]`; likewise.
        first_key: `[B, T]` or `[1, T]` integers, first visible key of each query; None means 0.
        last_key: `[B, T]` or `[1, T]` integers, last visible key; None means t if `is_causal`, else S − 1.
        key_valid: `[B, S]` or `[1, S]` bool; False hides a key from every query, as padding does.
        is_causal: what a missing `last_key` means; a given `last_key` overrides it.
        scale: factor of the logits; None means 1/√D.

    Returns:
        `[B, H, T, D_v]`, dtype of `query`.

    Raises:
        NSAError: a subclass for each mistake: `ShapeError`, `HeadCountError`, `DtypeError`, `DeviceError`,
            `GatesError`, `CompressionError`, `ConfigError`.

    Reference: arXiv 2502.11089, section 3.
    """
    if not isinstance(config, NSAConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; give an NSAConfig, such as NSAConfig(num_selected=32)."
        )
    if config.compression != "mean" and compressed_key is None:
        raise CompressionError(
            f"compression={config.compression!r} has learned parts; give compressed_key and compressed_value, "
            "or use compression='mean'."
        )
    if config.branch_kv == "independent" and (window_key is None or window_value is None):
        raise ConfigError(
            "branch_kv='independent' gives the window branch its own keys and values; give window_key and "
            "window_value, or use branch_kv='shared'."
        )
    return ops.nsa.attention(
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
        is_causal=is_causal,
        scale=scale,
        **config.operator_arguments(),
    )
