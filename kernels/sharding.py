"""Sharding rules: the operators on DTensors whose heads, or batch, are spread over processes.

The heads of a group stay together: queries are spread over H and keys over H_kv, alike.  Nothing is communicated in
either direction.  Tokens are not spread: a query may need any key.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Operator -> its results that have heads, in the order of its schema.
_RESULTS = {
    "select_blocks": 1,
    "gated_attention": 1,
    "output_dot_gradient": 1,
    **{f"{branch}_attention": 2 for branch in ("compressed", "selected", "window", "joint")},
    **{f"{branch}_attention_backward": 3 for branch in ("compressed", "selected", "window", "joint")},
}
# Tensors without heads: one row for each sequence of the batch.
_WITHOUT_HEADS = frozenset({"first_key", "last_key", "key_valid", "compressed_valid", "block_valid"})


def register_rules_for(tensor: Tensor) -> None:
    """Registers the rules when the first DTensor is seen; torch.distributed is not imported for others."""
    if is_sharded(tensor):
        _register()


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether a tensor is a DTensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


@functools.cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for name in _RESULTS:
        operator = getattr(torch.ops.nsa, name).default
        register_sharding(operator)(functools.partial(_placements, operator))


def _placements(operator: Any, *tensors: Any, **attributes: Any) -> Sequence[tuple[list[Any], list[Any]]]:
    """The ways in which an operator can work on parts: for each, the placements of results, and of arguments."""
    from torch.distributed.tensor import Replicate, Shard

    arguments = operator._schema.arguments[: len(tensors)]
    given = {argument.name: tensor for argument, tensor in zip(arguments, tensors, strict=True)}
    results = _RESULTS[operator._schema.name.removeprefix("nsa::")]

    def placed(with_heads: Any, without_heads: Any) -> tuple[list[Any], list[Any]]:
        inputs = [
            None if tensor is None else without_heads if name in _WITHOUT_HEADS else with_heads
            for name, tensor in given.items()
        ]
        return [with_heads] * results, [*inputs, *[None] * len(attributes)]

    ways = [placed(Replicate(), Replicate()), placed(Shard(0), Shard(0))]
    keys = given.get("key", given.get("compressed_key", given.get("output")))
    # Query heads are a multiple of the KV heads.
    if keys is not None and keys.shape[1] % keys.mesh.size() == 0:
        ways.append(placed(Shard(1), Replicate()))
    return ways
