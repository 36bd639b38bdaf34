"""Hadamard matrices are exact in integers; other sizes get flat orthogonal matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panguq.passes.rotation.hadamard import balanced_factors, hadamard
from panguq.passes.rotation.matrices import Rotation, cosines, random_rotation

# Multiples of 4 up to 260 that neither Paley's constructions nor products of them reach.
OTHER_CONSTRUCTIONS = (92, 116, 156, 172, 184, 188, 232, 236, 260)
REACHED = [n for n in range(4, 261, 4) if n not in OTHER_CONSTRUCTIONS]


def assert_hadamard(matrix: Tensor, order: int) -> None:
    integers = matrix.long()
    assert torch.equal(integers.double(), matrix)
    assert integers.abs().eq(1).all()
    assert torch.equal(integers @ integers.T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("order", [1, 2, *REACHED, 344, 1332])
def test_every_claimed_order_is_exact(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert_hadamard(matrix, order)


@pytest.mark.parametrize("order", [-4, 0, 3, 5, 6, 9, 18, 27, 30, 63, 1001, *OTHER_CONSTRUCTIONS])
def test_orders_without_a_construction_give_none(order: int) -> None:
    assert hadamard(order) is None


def test_products_of_two_are_sylvesters() -> None:
    expected = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        expected = torch.cat(
            [torch.cat([expected, expected], 1), torch.cat([expected, -expected], 1)]
        )
    assert torch.equal(hadamard(32), expected)


@pytest.mark.parametrize(
    ("order", "pair"),
    [
        (1, (1, 1)),
        (4, (2, 2)),
        (576, (24, 24)),  # SmolLM2-135M: hidden size
        (1536, (32, 48)),  # its feed-forward
        (4096, (64, 64)),  # openPangu-Embedded-7B: hidden size
        (12800, (100, 128)),  # its feed-forward; 100 = 2 (7^2 + 1)
        (6144, (64, 96)),  # openPangu-Embedded-1B: feed-forward
        (11008, (32, 344)),  # LLaMA-7B: feed-forward; 344 = 7^3 + 1
        (9, None),
        (1472, (4, 368)),
        (92, None),
    ],
)
def test_sizes_of_models(order: int, pair: tuple[int, int] | None) -> None:
    assert balanced_factors(order) == pair


@given(size=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_size_has_a_flat_rotation(size: int, seed: int) -> None:
    rotation = random_rotation(size, torch.Generator().manual_seed(seed))
    q = rotation.dense()
    assert q.shape == (size, size)
    assert (q @ q.T - torch.eye(size)).abs().max() < 1e-13
    assert rotation.flatness == pytest.approx(math.sqrt(size) * q.abs().max().item())
    if balanced_factors(size):
        assert rotation.flatness == pytest.approx(1.0)
    else:
        assert rotation.flatness <= math.sqrt(2) + 1e-9  # what cosines promise


@given(runs=st.integers(1, 4), rows=st.integers(1, 5), a=st.integers(1, 6), b=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_apply_is_a_matmul_with_the_dense_matrix(runs: int, rows: int, a: int, b: int) -> None:
    generator = torch.Generator().manual_seed(a * 100 + b)
    left, right, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((a, a), (b, b), (rows, runs * a * b))
    )
    rotation = Rotation(left, right, "given")
    expected = (x.view(rows, runs, a * b) @ torch.kron(left, right)).view(x.shape)
    assert torch.allclose(rotation.apply(x), expected, rtol=1e-12, atol=1e-12)


def test_nine_heads_get_cosines_which_beat_blocks_and_gaussians() -> None:
    """9 has no Hadamard matrix and no divisor with one but 1: blocks would be the identity."""
    rotation = random_rotation(9, torch.Generator().manual_seed(0))
    assert rotation.how == "cosine 9"
    assert rotation.dense().abs().equal(cosines(9).abs())
    gaussian = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.linalg.qr(gaussian).Q.abs().max().item()
    assert rotation.flatness / 3 < drawn < 1.0  # 1 is the identity's


def test_an_odd_part_is_mixed_instead_of_cut_into_blocks() -> None:
    """18 = 9 x 2: blocks of the largest Hadamard matrix would mix 2 channels, this mixes 18."""
    rotation = random_rotation(18, torch.Generator().manual_seed(0))
    assert rotation.how == "cosine 9 x hadamard 2"
    blocks = torch.kron(torch.eye(9, dtype=torch.float64), hadamard(2)) / math.sqrt(2)
    assert rotation.dense().abs().max() < blocks.abs().max() / 2
    assert (rotation.dense() != 0).sum() > 4 * (blocks != 0).sum()


def test_the_seed_decides() -> None:
    draws = [
        random_rotation(n, torch.Generator().manual_seed(s)) for n in (64, 9) for s in (0, 0, 1)
    ]
    for first, again, other in (draws[:3], draws[3:]):
        assert torch.equal(first.dense(), again.dense())
        assert not torch.equal(first.dense(), other.dense())


def test_cosines_are_orthonormal_and_bounded() -> None:
    for size in (1, 2, 3, 9, 25):
        matrix = cosines(size)
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-13)
        assert matrix.abs().max() <= max(1.0 if size == 1 else 0.0, math.sqrt(2 / size)) + 1e-12
