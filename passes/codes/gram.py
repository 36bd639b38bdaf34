"""Second moments of a matmul's inputs and the factor of their inverse that GPTQ's family reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from panguq.errors import NumericsError
from panguq.ranks import ranks

DAMPING_TRIES = 8  # each ten times the one before
INVERTED_AT_ONCE = 256  # columns; fewer cost more in calls than they save in arithmetic
PANEL = 128  # rows of X^T X; fewer cost more in calls than they save in arithmetic
GRID = 2.0**-30  # what sums of products of numbers below 1 are multiples of
MOST = 2.0**22  # up to here such sums are exact in float64
ROUNDING = 1.5 * 2**52 * GRID  # added and subtracted, it leaves a multiple of GRID
TOKENS_AT_ONCE = 512  # over more, a BLAS may split the sum as its number of threads has it


def gram(inputs: Iterable[Tensor]) -> Tensor:
    """X^T X over all tokens of all batches `[..., k]`, float64 `[k, k]`, exactly symmetric.

    Of batches that ranks share, each gives its own and gets the sum over all. Products are float32
    over `TOKENS_AT_ONCE` tokens, in which their error (2^-24 of the diagonal) is far below any
    damping. Their float64 sums are exact, so that no order of tokens or ranks shows in the result:
    every channel is divided by a power of two near its largest magnitude, and products are rounded
    to multiples of `GRID`, of which float64 holds all up to `MOST`; a column's own diagonal is
    then at least 1/4 (the idea of reproducible sums, Demmel and Nguyen, ARITH 2013). Only the upper
    half is computed, in panels of rows, which takes little more than half the time.

    Raises NumericsError where there is no input, and for sums beyond float32, which reads them.
    """
    batches = [batch.reshape(-1, batch.shape[-1]) for batch in inputs]
    if not batches:
        raise _no_input()
    k = batches[0].shape[1]
    exponents = _exponents(batches)
    down = torch.ldexp(torch.ones(k), -exponents)
    starts = range(0, k, PANEL)
    panels = [torch.zeros(min(PANEL, k - s), k - s, dtype=torch.float64) for s in starts]
    for batch in batches:
        for rows in batch.split(TOKENS_AT_ONCE):
            scaled = rows.float() * down
            for start, panel in zip(starts, panels, strict=True):
                product = scaled[:, start : start + PANEL].T @ scaled[:, start:]
                panel += product.double().add_(ROUNDING).sub_(ROUNDING)
    ranks().add_up(panels)
    if ranks().count > 1 and any(float(panel.diagonal().max()) > MOST for panel in panels):
        raise NumericsError(
            f"more than {MOST:.0f} calibration tokens: their sums may depend on the ranks' number",
            "give less data, or start one process",
        )
    total = torch.empty(k, k, dtype=torch.float64)
    up = torch.ldexp(torch.ones(k, dtype=torch.float64), exponents)
    for start, panel in zip(starts, panels, strict=True):
        stop = start + len(panel)
        panel.mul_(up[start:stop, None]).mul_(up[start:])
        square = panel[:, : len(panel)]
        square.copy_(square.triu() + square.triu(1).T)
        total[start:stop, start:] = panel
        total[stop:, start:stop] = panel[:, len(panel) :].T
    if not float(total.diagonal().max()) <= torch.finfo(torch.float32).max:
        raise _not_finite()
    return total


def _exponents(batches: Sequence[Tensor]) -> Tensor:
    """e `[k]`, int32, with |x| < 2^e for every value of a channel in all batches of all ranks."""
    amax = torch.zeros(batches[0].shape[1])
    for batch in batches:
        if len(batch):
            amax = torch.maximum(amax, batch.abs().amax(0).float())
    return torch.frexp(ranks().largest(amax)).exponent.clamp_min(-126)


def cross_gram(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """X^T Y over all tokens of pairs of batches X and Y `[..., k]`, float64 `[k, k]`.

    Products are float32 within a batch, in which their error (2^-24 of the diagonal) is far below
    any damping, and float64 ones would take twice as long; sums over batches are float64, so
    that their number does not matter.
    """
    total: Tensor | None = None
    for left, right in pairs:
        rows, columns = (t.reshape(-1, t.shape[-1]).float() for t in (left, right))
        product = rows.T @ columns
        total = product.double() if total is None else total.add_(product)
    if total is None:
        raise _no_input()
    return total


def _no_input() -> NumericsError:
    return NumericsError("there is no input to take second moments of", "give calibration data")


def _not_finite() -> NumericsError:
    return NumericsError(
        "the second moments of a matmul's input are not finite",
        "the model overflows on the calibration data",
    )


class InverseFactor(NamedTuple):
    """Upper triangular `factor` `[k, k]`, float64: factor^T factor = (H + damping diag(H))^-1.

    H has its rows and columns in the order asked for. `damping` is the share that was added in the
    end.
    """

    factor: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> InverseFactor:
    """The upper Cholesky factor of the inverse of `hessian` `[k, k]`, symmetric, not changed.

    `order` `[k]` is that of rows and columns, their own by default. At most three more matrices of
    this size are held at a time: of 12800 inputs each takes 1.3 GB.

    Every entry of the diagonal is multiplied by 1 + `damping`, which divides all correlations by
    1 + `damping` at any scale of the inputs. Each time the factorization fails, `damping` grows
    tenfold. (The authors of GPTQ add a share of the diagonal's mean instead. Where one channel is a
    thousand times larger than the others, as in front of some down_proj, that mean is the
    channel's alone and drowns all others.) Inputs that are always zero get the mean: they meet
    nobody. Computed from one Cholesky factorization from the last row up, H = R R^T with R upper
    triangular, so that H^-1 = R^-T R^-1 and the factor is R^-1; nothing is inverted twice.

    Raises NumericsError if no damping helps, or the matrix is not finite.
    """
    if not hessian.sum().isfinite():  # without a matrix of answers
        raise _not_finite()
    order = torch.arange(len(hessian)) if order is None else order
    backwards = order.flip(0)
    damped = hessian.double()[backwards].index_select(1, backwards)
    diagonal = damped.diagonal()
    own = diagonal.clone()
    own[own == 0] = float(own.mean()) or 1.0
    for attempt in range(DAMPING_TRIES):
        wanted = damping * 10.0**attempt if damping > 0 or attempt == 0 else 1e-8 * 10.0**attempt
        diagonal.copy_(own * (1 + wanted))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            del damped, diagonal
            return InverseFactor(triangular_inverse(lower).flip(0, 1), wanted)
    raise NumericsError(
        f"the second moments of a matmul's input have no Cholesky factor even with {wanted:g} "
        "times their diagonal added",
        "give more calibration data",
    )


def triangular_inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix `[k, k]`, of which no other half is computed.

    [A 0; C B]^-1 = [A^-1 0; -B^-1 C A^-1 B^-1], over and over, takes k^3 / 3 multiplications where
    solving for an identity takes k^3.
    """
    inverse = torch.zeros_like(lower)
    _invert_into(inverse, lower)
    return inverse


def _invert_into(inverse: Tensor, lower: Tensor) -> None:
    k = len(lower)
    if k <= INVERTED_AT_ONCE:
        identity = torch.eye(k, dtype=lower.dtype)
        inverse.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, second = slice(0, k // 2), slice(k // 2, k)
    _invert_into(inverse[first, first], lower[first, first])
    _invert_into(inverse[second, second], lower[second, second])
    across = lower[second, first] @ inverse[first, first]
    torch.mm(inverse[second, second], across, out=inverse[second, first]).neg_()


class InputMoments:
    """The second moments of inputs, one tensor `[..., k]` a batch, and the factor of their inverse.

    Both are computed when they are first asked for, and once: problems with the same inputs, such
    as those of experts that meet all tokens, share them.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self._factors: dict[object, InverseFactor] = {}

    @cached_property
    def hessian(self) -> Tensor:
        """`gram` of the inputs, not to be changed. Raises NumericsError where there are none."""
        return gram(self.inputs)

    def together(self) -> None:
        """Compute the moments now, where all ranks do, each with its share of the inputs."""
        _ = self.hessian

    def inverse(self, damping: float, order: Tensor) -> InverseFactor:
        """`inverse_factor` with this damping and order of inputs; raises what it raises."""
        asked = (damping, *order.tolist())
        if asked not in self._factors:
            self._factors = {asked: inverse_factor(self.hessian, damping, order)}
        return self._factors[asked]


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """sum over tokens of (dW x)^2 for each output `[n]`, from dW `[n, k]` and X^T X `[k, k]`."""
    difference = difference.to(hessian.dtype)
    return (difference @ hessian).mul_(difference).sum(1)
