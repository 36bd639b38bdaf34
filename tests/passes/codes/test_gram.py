"""Second moments and the factor of their inverse, against plain float64 linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from panguq.errors import NumericsError
from panguq.passes.codes.gram import cross_gram, gram, inverse_factor, output_error

ORDERS = ((3, 2, 1, 0), (1, 3, 0, 2))


def batches(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_tokens_of_all_batches_count_alike() -> None:
    inputs = batches((2, 7, 5), (1, 3, 5), (4, 5))
    tokens = torch.cat([batch.reshape(-1, 5) for batch in inputs]).double()
    assert gram(inputs).dtype == torch.float64
    torch.testing.assert_close(gram(inputs), tokens.T @ tokens, rtol=1e-6, atol=1e-5)


def test_sixteen_bit_inputs_are_multiplied_in_float32() -> None:
    (x,) = batches((64, 6))
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(gram([half]), half.double().T @ half.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("tokens", "k"), [(30, 129), (1100, 5), (600, 300)])
def test_gram_is_exactly_symmetric_beyond_a_panel_and_a_piece(tokens, k) -> None:
    (x,) = batches((tokens, k))
    found = gram([x])
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, x.double().T @ x.double(), rtol=1e-5, atol=1e-3)


def test_no_order_of_batches_shows_in_the_sum() -> None:
    """So that several processes may each add up some batches of a calibration."""
    some = batches((1100, 40), (700, 40), (3, 40), (513, 40))
    some[1] *= torch.logspace(-3, 3, 40)  # channels that differ in size as a model's do
    expected = gram(some)
    assert all(torch.equal(gram([some[i] for i in order]), expected) for order in ORDERS)
    tokens = torch.cat(some).double()
    sizes = tokens.square().sum(0).sqrt()
    wrong = (expected - tokens.T @ tokens).abs() / sizes / sizes[:, None]
    assert float(wrong.max()) < 1e-6


def test_batches_without_tokens_add_nothing() -> None:
    (some,) = batches((7, 4))
    assert torch.equal(gram([some[:0], some]), gram([some]))
    assert not gram([some[:0]]).any()


def test_a_huge_and_a_tiny_channel_keep_their_digits() -> None:
    x = torch.randn(600, 3) * torch.tensor([1e-30, 1.0, 1e15])
    x[7, 2] = 3e16
    wanted = x.double().T @ x.double()
    torch.testing.assert_close(gram([x]), wanted, rtol=1e-5, atol=0)


def test_cross_gram_is_not_symmetric_and_knows_left_from_right() -> None:
    left, right = batches((9, 4), (9, 4))
    found = cross_gram([(left[:5], right[:5]), (left[5:], right[5:])])
    expected = left.double().T @ right.double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(found, found.T)


def test_no_input_is_an_error() -> None:
    with pytest.raises(NumericsError, match="no input"):
        gram([])


@pytest.mark.parametrize("k", [1, 2, 17])
def test_the_factor_is_that_of_the_damped_inverse(k) -> None:
    hessian = gram(batches((40, k)))
    factor, damping = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().diag()
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor, damped.inverse(), rtol=1e-10, atol=1e-12)


def test_the_hessian_is_not_changed() -> None:
    hessian = gram(batches((3, 5)))
    before = hessian.clone()
    inverse_factor(hessian, 0.01)
    assert torch.equal(hessian, before)


def test_dead_inputs_meet_nobody() -> None:
    (x,) = batches((40, 6))
    x[:, [1, 4]] = 0.0
    factor, _ = inverse_factor(gram([x]), 0.01)
    alive = [0, 2, 3, 5]
    off = factor - torch.diag(factor.diagonal())
    assert not off[[1, 4]].any()
    assert not off[:, [1, 4]].any()
    part, _ = inverse_factor(gram([x[:, alive]]), 0.01)
    torch.testing.assert_close(factor[alive][:, alive], part)


@pytest.mark.parametrize("tokens", [1, 3])
def test_more_damping_where_the_factorization_fails(tokens) -> None:
    """Fewer tokens than inputs and next to no damping: the table must show what was needed."""
    hessian = gram([x * 1e3 for x in batches((tokens, 8))])
    factor, damping = inverse_factor(hessian, 0.0)
    assert 0.0 < damping < 0.01
    assert factor.isfinite().all()
    damped = hessian + damping * hessian.diagonal().diag()
    torch.testing.assert_close(factor @ damped @ factor.T, torch.eye(8).double(), atol=1e-4, rtol=0)


def test_all_inputs_zero() -> None:
    factor, _ = inverse_factor(torch.zeros(3, 3, dtype=torch.float64), 0.01)
    assert factor.isfinite().all()
    assert torch.equal(factor, torch.diag(factor.diagonal()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite(value) -> None:
    hessian = torch.eye(3, dtype=torch.float64)
    hessian[0, 1] = value
    with pytest.raises(NumericsError, match="not finite"):
        inverse_factor(hessian, 0.01)


def test_what_no_damping_helps() -> None:
    with pytest.raises(NumericsError, match="no Cholesky factor"):
        inverse_factor(torch.tensor([[1.0, 1e9], [1e9, 1.0]]).double(), 0.01)


def test_output_error_is_that_of_the_matmul() -> None:
    x, change = batches((40, 6), (4, 6))
    expected = (x.double() @ change.double().T).square().sum(0)
    torch.testing.assert_close(output_error(change, gram([x])), expected, rtol=1e-5, atol=1e-5)
