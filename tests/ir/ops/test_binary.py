"""Binarized weights: every code means what is documented, and the matmul multiplies by it."""

import pytest
import torch
from torch.library import opcheck

from panguq.ir.ops.binary import dequantize_binary
from panguq.kernels.cpu.binary_linear import binary_linear


def random_weight(n: int, k: int, block_size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(-2, 2, (n, k), dtype=torch.int8, generator=generator)
    blocks = -(-k // block_size)
    magnitudes = torch.rand(n, 4 * blocks, generator=generator).bfloat16()
    salient = torch.randint(-1, 1, (1, k), dtype=torch.int8, generator=generator)
    return codes, magnitudes, salient


def obvious_weight(codes, magnitudes, salient, block_size) -> torch.Tensor:
    """One weight at a time."""
    n, k = codes.shape
    weight = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            code = int(codes[i, j])
            is_large = code in (-2, 1)
            place = 4 * (j // block_size) + (2 if salient[0, j] else 0) + is_large
            magnitude = float(magnitudes[i, place])
            weight[i, j] = -magnitude if code < 0 else magnitude
    return weight


@pytest.mark.parametrize("k", [8, 20, 33])
def test_every_weight_is_its_sign_times_its_magnitude(k):
    codes, magnitudes, salient = random_weight(5, k, 16)
    weight = dequantize_binary(codes, magnitudes, salient, 16, torch.float32)
    assert torch.equal(weight, obvious_weight(codes, magnitudes, salient, 16))


def test_the_four_codes():
    codes = torch.tensor([[-2, -1, 0, 1, -2, 0]], dtype=torch.int8)
    salient = torch.tensor([[0, 0, 0, 0, -1, 1]], dtype=torch.int8)
    magnitudes = torch.tensor([[1.0, 2.0, 5.0, 7.0]])
    weight = dequantize_binary(codes, magnitudes, salient, 128, torch.float32)
    assert weight.tolist() == [[-2.0, -1.0, 1.0, 2.0, -7.0, 5.0]]


@pytest.mark.parametrize("n", [3, 700])
def test_the_matmul_multiplies_by_the_dequantized_weight(n):
    codes, magnitudes, salient = random_weight(n, 600, 128)
    x, bias = torch.randn(2, 3, 600), torch.randn(n)
    weight = dequantize_binary(codes, magnitudes, salient, 128, torch.float32)
    result = binary_linear(x, codes, magnitudes, salient, 128, bias, torch.float32)
    assert torch.allclose(result, x @ weight.T + bias, atol=1e-3)
    assert not torch.allclose(result, x @ weight.T, atol=1e-3)
    rounded = binary_linear(x.bfloat16(), codes, magnitudes, salient, 128, None, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and rounded.shape == (2, 3, n)


def test_fakes_agree_with_bodies():
    weight = random_weight(4, 20, 16)
    opcheck(dequantize_binary, (*weight, 16, torch.float32))
    opcheck(binary_linear, (torch.randn(2, 20), *weight, 16, None, torch.float32))
