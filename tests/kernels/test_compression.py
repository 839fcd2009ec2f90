"""Mean compression and the vectors of valid keys, against the reference and plain definitions."""

import pytest
import torch

from nsa_compile.kernels import reference
from nsa_compile.kernels.compression import count_compressed, mean_compress
from nsa_compile.kernels.intervals import blocks_with_valid_key, tighten_intervals, valid_compressed_tokens

SHAPES = [(32, 16), (32, 32), (6, 2), (5, 5), (1, 1), (12, 3)]  # (l, d)
LENGTHS = [1, 31, 32, 63, 64, 111, 1000]


@pytest.mark.parametrize(("block_length", "block_stride"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means(relative_error, block_length, block_stride, dtype):
    budget = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for length in LENGTHS:
        tokens = torch.randn(2, length, 3, 5, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        given = mean_compress(tokens, block_length, block_stride)
        doubles = tokens.detach().double().requires_grad_()
        exact = reference.compress_mean(doubles, block_length=block_length, block_stride=block_stride)
        assert given.dtype == dtype
        assert given.shape == exact.shape
        assert given.shape[2] == count_compressed(length, block_length, block_stride)
        assert relative_error(given, exact) < budget
        grad_output = torch.randn_like(given)
        (grad,) = torch.autograd.grad(given, tokens, grad_output)
        (exact_grad,) = torch.autograd.grad(exact, doubles, grad_output.double())
        assert relative_error(grad, exact_grad) < budget


def test_half_precision_sums_are_float32():
    """256 ones and a half: bfloat16 sums would stop at 256."""
    tokens = torch.ones(1, 1, 512, 1, dtype=torch.bfloat16)
    assert mean_compress(tokens, 512, 512).item() == 1.0


@pytest.mark.parametrize(("block_length", "block_stride"), SHAPES)
def test_validity_of_compressed_tokens(block_length, block_stride):
    for length in LENGTHS:
        valid = torch.rand(3, length) > 0.1
        given = valid_compressed_tokens(valid, block_length, block_stride)
        starts = range(0, length - block_length + 1, block_stride)
        assert given.shape == (3, len(starts))
        for column, start in enumerate(starts):
            assert torch.equal(given[:, column], valid[:, start : start + block_length].all(1))


@pytest.mark.parametrize("selection_block", [1, 7, 16, 64])
def test_blocks_with_a_valid_key(selection_block):
    for length in LENGTHS:
        valid = torch.rand(3, length) > 0.9
        given = blocks_with_valid_key(valid, selection_block)
        blocks = valid.split(selection_block, 1)
        assert given.shape == (3, len(blocks))
        for index, block in enumerate(blocks):
            assert torch.equal(given[:, index], block.any(1))


def test_tightened_bounds_lie_on_valid_keys():
    query = torch.empty(2, 1, 50, 4)
    valid = torch.rand(2, 30) > 0.7
    first = torch.randint(-5, 40, (2, 50), dtype=torch.int32)
    last = first + torch.randint(-3, 30, (2, 50), dtype=torch.int32)
    given = tighten_intervals(first, last, valid, is_causal=True, query=query)
    assert all(bound.dtype == torch.int32 for bound in given)
    for b in range(2):
        for t in range(50):
            seen = [s for s in range(30) if first[b, t] <= s <= last[b, t] and valid[b, s]]
            low, high = int(given[0][b, t]), int(given[1][b, t])
            if seen:
                assert (low, high) == (seen[0], seen[-1])
            else:
                assert low > high


def test_tightening_fills_in_missing_bounds():
    query = torch.empty(2, 1, 30, 4)
    valid = torch.ones(2, 40, dtype=torch.bool)
    for is_causal, last in ((True, torch.arange(30)), (False, torch.full((30,), 39))):
        given = tighten_intervals(None, None, valid, is_causal=is_causal, query=query)
        assert torch.equal(given[0], torch.zeros(2, 30, dtype=torch.int32))
        assert torch.equal(given[1], last.to(torch.int32).expand(2, -1))
