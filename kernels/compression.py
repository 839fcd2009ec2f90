"""Mean compression: l tokens at stride d become one, in plain aten, memory linear in S."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.sharding import is_sharded


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which numbers like a tensor's are summed: float32, float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def count_compressed(num_keys: int, block_length: int, block_stride: int) -> int:
    """Returns N_cmp, the number of compressed tokens that S keys make."""
    return 0 if num_keys < block_length else (num_keys - block_length) // block_stride + 1


def mean_compress(tokens: Tensor, block_length: int, block_stride: int) -> Tensor:
    """Averages each l tokens, d apart; the sums are in float32 (float64 for float64), each token read once.

    Args:
        tokens: `[B, H_kv, S, D]`.
        block_length: l.
        block_stride: d; divides l.

    Returns:
        `[B, H_kv, N_cmp, D]`, dtype of `tokens`.

    Reference: arXiv 2502.11089, eq 7, with φ the mean.
    """
    if count_compressed(tokens.shape[2], block_length, block_stride) == 0:
        return tokens[:, :, :0].contiguous()
    # Cast first: Inductor fuses the cast, and the gradient of `unfold` would else be added up in half precision.
    sums = _chunks(tokens.to(sum_dtype(tokens)), block_stride).sum(-1)
    total = functools.reduce(torch.add, iterate_neighbours(sums, 2, block_length // block_stride))
    return (total / block_length).to(tokens.dtype)


def _chunks(tokens: Tensor, size: int) -> Tensor:
    """Views `[B, H_kv, S, D]` as whole chunks, `[B, H_kv, S // size, D, size]`."""
    if is_sharded(tokens):
        # DTensors have no rule for `unfold`; with symbolic shapes it is the view that needs no guard on S.
        count = tokens.shape[2] // size
        return tokens.narrow(2, 0, count * size).unflatten(2, (count, size)).transpose(3, 4)
    return tokens.unfold(2, size, size)


def iterate_neighbours(chunks: Tensor, dim: int, count: int) -> Iterator[Tensor]:
    """Yields `count` views of `chunks`, shifted by 0, 1, … along `dim`: elementwise, runs of neighbouring chunks.

    Sizes are differences of one size, so that symbolic shapes need no guard.
    """
    for shift in range(count):
        yield chunks.narrow(dim, shift, chunks.shape[dim] - (count - 1))
