"""Learned parts as nodes: gates from the layer's input, compressed keys and values, keys and values of each branch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nsa_compile.config import NSAConfig
from nsa_compile.passes.branches import copy_path, with_parameters
from nsa_compile.passes.emission import Emitter
from nsa_compile.passes.learned import LearnedParts
from nsa_compile.passes.metadata import recorded_dtype
from nsa_compile.passes.plan import is_at_least
from nsa_compile.passes.sites import AttentionSite, Operand, Size

_GATES = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
# Kind of compression -> its parameters, in the operator's order.
_COMPRESSION = {
    "mean": (),
    "linear": ("weight",),
    "mlp": ("position", "hidden.weight", "hidden.bias", "output.weight", "output.bias"),
}


def emit_learned(
    emitter: Emitter, site: AttentionSite, learned: LearnedParts, key: fx.Node, value: fx.Node
) -> dict[str, fx.Node]:
    """Emits what learned parts give to an attention.

    Args:
        emitter: places the nodes.
        site: the attention.
        learned: its learned parts.
        key: `[B, H_kv, S, D]`, the model's own keys, in the operator's layout.
        value: `[B, H_kv, S, D_v]`, likewise.

    Returns:
        Arguments of `torch.ops.nsa.attention`: gates, and what differs from the mean of shared keys and values.
    """
    marker = learned.marker
    hidden_states = emitter.operand(learned.hidden_states)
    parameters = [marker.parts[f"gates.{name}"] for name in _GATES]
    shape = (site.batch, site.query_heads, site.query_length, 3)
    dtype = torch.float64 if recorded_dtype(hidden_states) == torch.float64 else torch.float32
    arguments = {"gates": emitter.operator(torch.ops.nsa.gates.default, (hidden_states, *parameters), {}, shape, dtype)}
    branches: dict[str, tuple[fx.Node, fx.Node]] = {}
    for branch, operands in learned.branches.items():
        copied = copy_path(operands)
        own_key, own_value = (with_parameters(operand, copied) for operand in (site.key, site.value))
        branches[branch] = (emitter.operand(own_key), emitter.operand(own_value))
    if "window" in branches:
        arguments["window_key"], arguments["window_value"] = branches["window"]
    if marker.config.compression != "mean" or "compressed" in branches:
        own_key, own_value = branches.get("compressed", (key, value))
        for name, tokens, operand in (("key", own_key, site.key), ("value", own_value, site.value)):
            arguments[f"compressed_{name}"] = _compress(emitter, marker.config, marker.parts, name, tokens, operand)
    return arguments


def _compress(
    emitter: Emitter,
    config: NSAConfig,
    parts: Mapping[str, fx.Node],
    name: str,
    tokens: fx.Node,
    operand: Operand,
) -> fx.Node:
    operator: Any = getattr(torch.ops.nsa, f"compress_{config.compression}").default
    parameters = [parts[f"compress_{name}.{each}"] for each in _COMPRESSION[config.compression]]
    batch, heads, length, size = operand.shape
    attributes = {"block_length": config.block_length, "block_stride": config.block_stride}
    shape = (batch, heads, _count_compressed(length, config), size)
    return emitter.operator(operator, (tokens, *parameters), attributes, shape)


def _count_compressed(num_keys: Size, config: NSAConfig) -> Size:
    """N_cmp: how many compressed tokens S keys make."""
    if not is_at_least(num_keys, config.block_length):
        return 0
    strides: Any = (num_keys - config.block_length) // config.block_stride
    return strides + 1
