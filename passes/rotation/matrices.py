"""Orthogonal matrices that spread outliers, kept as Kronecker products of small ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from panguq.passes.rotation.hadamard import balanced_factors, hadamard

DRAWS = 16  # of a Gaussian's orthogonal factor; the flattest is taken


@dataclass(frozen=True, eq=False)
class Rotation:
    """`Q = left ⊗ right`, float64 `[a, a]` and `[b, b]`: rotates runs of `a * b` numbers.

    `how` names the construction.
    """

    left: Tensor
    right: Tensor
    how: str

    @property
    def size(self) -> int:
        """How many numbers are rotated together."""
        return len(self.left) * len(self.right)

    @property
    def flatness(self) -> float:
        """Largest |entry| times sqrt(size): 1 for a Hadamard matrix, sqrt(size) for the identity.

        An outlier of height 1 in one channel leaves at most flatness / sqrt(size) in each.
        """
        largest = self.left.abs().max() * self.right.abs().max()
        return float(largest) * math.sqrt(self.size)

    def apply(self, rows: Tensor) -> Tensor:
        """`x Q` for each run x of `size` numbers in the rows `[..., runs * size]`, in float64."""
        runs = rows.double().reshape(-1, len(self.left), len(self.right))
        return (self.left.T @ (runs @ self.right)).reshape(rows.shape)

    def dense(self) -> Tensor:
        """Q `[size, size]`."""
        return torch.kron(self.left.contiguous(), self.right.contiguous())


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """A seeded orthogonal matrix of this size, as flat as is known.

    With a Hadamard matrix of the size: `H_a / sqrt(a) ⊗ H_b / sqrt(b)`, the rows of each factor
    times random signs (QuaRot, arXiv 2404.00456, has the signs on the product). Otherwise
    `O_c ⊗ H_b / sqrt(b)`, with b the largest divisor for which there is one and O_c the flattest
    orthogonal matrix that is known for c. That is never less flat than the block-diagonal
    `I_c ⊗ H_b / sqrt(b)`, since no entry of O_c is above 1.
    """
    pair = balanced_factors(size)
    if pair is not None:
        a, b = pair
        how = f"hadamard {a} x {b}" if a > 1 else f"hadamard {b}"
        return Rotation(_random_hadamard(a, generator), _random_hadamard(b, generator), how)
    b = max(d for d in range(1, size) if size % d == 0 and hadamard_exists(d))
    left, how = _flat_orthogonal(size // b, generator)
    how += f" x hadamard {b}" if b > 1 else ""
    return Rotation(left, _random_hadamard(b, generator), how)


def hadamard_exists(order: int) -> bool:
    """Whether one can be constructed here."""
    return balanced_factors(order) is not None


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1


def _random_hadamard(order: int, generator: torch.Generator) -> Tensor:
    matrix = hadamard(order)
    assert matrix is not None
    return _signs(order, generator) * matrix / math.sqrt(order)


def _flat_orthogonal(size: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """The flattest of some orthogonal factors of Gaussian matrices and the cosines.

    The flattest one has the smallest largest magnitude.
    """
    drawn = [_orthogonal_factor(size, generator) for _ in range(DRAWS)]
    candidates = [(_signs(size, generator) * cosines(size), f"cosine {size}")]
    candidates += [(matrix, f"gaussian {size}") for matrix in drawn]
    return min(candidates, key=lambda candidate: float(candidate[0].abs().max()))


def _orthogonal_factor(size: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed: Q of a Gaussian's Q R, its signs fixed by the diagonal of R."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) `[size, size]`; no |entry| above sqrt(2 / size)."""
    i = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * torch.outer(i, i + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
