"""What the loops of the blockwise path share: a running softmax, gradients in progress, and their layout.

Rows are laid out `[B, H_kv, T, G, …]`: the G heads of a group lie together, because they share keys and lists.
Logits are in units of log 2 (the query is scaled by log2 e beforehand): exp2 is twice as fast as exp on a CPU.
"""

import dataclasses
import math

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)
# A reference may lag behind the largest logit by a factor of 2^40 in the weights: far from overflow, and rarely passed.
_SLACK = 40.0


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of sums over `tensor`: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def to_rows(tensor: Tensor, num_kv_heads: int, scale: float = 1.0) -> Tensor:
    """Copies `[B, H, T, …]` to contiguous rows `[B, H_kv, T, G, …]` in the accumulation dtype, times `scale`."""
    rows = tensor.unflatten(1, (num_kv_heads, tensor.shape[1] // num_kv_heads)).transpose(2, 3)
    rows = rows.to(accumulation_dtype(tensor))
    return (rows * scale if scale != 1.0 else rows).contiguous()


def from_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns rows `[B, H_kv, T, G, …]` into a fresh contiguous `[B, H, T, …]`."""
    return rows.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(1, 2).contiguous()


def query_rows(query: Tensor, num_kv_heads: int, scale: float) -> Tensor:
    """Copies the query to rows whose products with keys are logits in units of log 2."""
    return to_rows(query, num_kv_heads, scale * _LOG2_E)


def to_log2_rows(lse: Tensor, num_kv_heads: int) -> Tensor:
    """Turns natural-log `lse` `[B, H, T]` into rows `[B, H_kv, T, G]` in units of log 2, −inf into +inf.

    A weight 2^(logit − inf) is 0, so that rows that see nothing contribute nothing.
    """
    return to_rows(lse.masked_fill(lse == float("-inf"), float("inf")), num_kv_heads, _LOG2_E)


def hidden_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a mask of hidden keys into an addend: −inf for hidden keys, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


@dataclasses.dataclass
class RunningSoftmax:
    """Softmax attention in progress.

    Weights are 2^(logit − reference), where the reference is not quite the largest logit: it is lifted, and the
    sums rescaled, only when a logit exceeds it by far.

    Attributes:
        reference: `[B, H_kv, T, G]`.
        total: `[B, H_kv, T, G]`, Σ weight.
        weighted: `[B, H_kv, T, G, D_v]`, Σ weight · value.
    """

    reference: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, rows: Tensor, value_size: int) -> "RunningSoftmax":
        """Starts without keys, for query rows `[B, H_kv, T, G, D]`."""
        shape = rows.shape[:-1]
        lowest = torch.finfo(rows.dtype).min / 4
        return cls(rows.new_full(shape, lowest), rows.new_zeros(shape), rows.new_zeros((*shape, value_size)))

    def absorb(self, region: tuple[slice, slice, slice], scores: Tensor) -> Tensor:
        """Adds the weights of further keys to `total`; the caller adds the weighted values.

        Args:
            region: index into `[B, H_kv, T]`.
            scores: `[B', H_kv', c, G, L]` logits, −inf for hidden keys; overwritten.

        Returns:
            The weights, `[B', H_kv', c, G, L]`.
        """
        reference, total = self.reference[region], self.total[region]
        lifted = lift_reference(reference, scores)
        if lifted is not None:
            factor = reference.sub_(lifted).exp2_()
            total.mul_(factor)
            self.weighted[region].mul_(factor.unsqueeze(-1))
            reference.copy_(lifted)
        weights = scores.sub_(reference.unsqueeze(-1)).exp2_()
        total.add_(weights.sum(-1))
        return weights

    def finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns `output` `[B, H, T, D_v]` in `dtype`, in memory `[B, T, H, D_v]`, and log `lse` `[B, H, T]`."""
        nothing = self.total == 0
        output = self.weighted.div_(self.total.masked_fill(nothing, 1.0).unsqueeze(-1))
        lse = self.reference.add(self.total.log2()).div_(_LOG2_E).masked_fill_(nothing, float("-inf"))
        ordered = output.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(2, 3)
        return ordered.transpose(1, 2), from_rows(lse, lse.dtype)


def lift_reference(reference: Tensor, scores: Tensor) -> Tensor | None:
    """Returns a new reference where logits exceed it by far, or None if they nowhere do.

    Args:
        reference: `[…]`.
        scores: `[…, L]` logits, −inf for hidden keys.
    """
    highest = scores.amax(-1)
    lifted = highest > reference + _SLACK
    return torch.where(lifted, highest, reference) if bool(lifted.any()) else None


@dataclasses.dataclass
class Gradients:
    """What the backward loops read and add to; logits are in units of log 2 here too.

    Attributes:
        output: gradient of the output, `[B, H_kv, T, G, D_v]`.
        lse: `[B, H_kv, T, G]` as `to_log2_rows` makes it.
        delta: `[B, H_kv, T, G]`, Σ over D_v of output · its gradient.
        query: sum so far, `[B, H_kv, T, G, D]`.
        key: sum so far, `[B, H_kv, S, D]`.
        value: sum so far, `[B, H_kv, S, D_v]`.
    """

    output: Tensor
    lse: Tensor
    delta: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def start(
        cls, grad_output: Tensor, delta: Tensor, lse: Tensor, rows: Tensor, key: Tensor, value: Tensor
    ) -> "Gradients":
        """Starts at zero.

        Args:
            grad_output: `[B, H, T, D_v]`.
            delta: `[B, H, T]`, Σ over D_v of output · its gradient.
            lse: `[B, H, T]`, natural logarithm.
            rows: query rows `[B, H_kv, T, G, D]`.
            key: `[B, H_kv, S, D]`.
            value: `[B, H_kv, S, D_v]`.
        """
        num_kv_heads = key.shape[1]
        return cls(
            to_rows(grad_output, num_kv_heads),
            to_log2_rows(lse, num_kv_heads),
            to_rows(delta, num_kv_heads),
            torch.zeros_like(rows),
            key.new_zeros(key.shape, dtype=rows.dtype),
            value.new_zeros(value.shape, dtype=rows.dtype),
        )

    def finish(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of query `[B, H, T, D]`, key and value in `dtype`; `scale` is the logits' factor."""
        # The loops multiplied by rows that hold scale · log2 e · query.
        key = self.key.div_(_LOG2_E)
        return from_rows(self.query.mul_(scale), dtype), key.to(dtype), self.value.to(dtype)
