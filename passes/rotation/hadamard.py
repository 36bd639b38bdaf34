"""Hadamard matrices by construction: entries 1 and -1, `H H^T = n I`, no stored tables.

An order is built as a Kronecker product of the smallest constructions, each of which is

- 1 and 2, whose products are Sylvester's matrices;
- Paley I: `q + 1` for a prime power q with q % 4 = 3;
- Paley II: `2 (q + 1)` for a prime power q with q % 4 = 1.

Both read the Jacobsthal matrix of the field with q elements. Source: Paley, On orthogonal
matrices, J. Math. Phys. 12 (1933). Orders that need other constructions (the smallest is 92) and
those that cannot exist (3, 9, 18: neither 1, 2 nor a multiple of 4) give None.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

LARGEST_DEGREE = 3  # of a field over its prime field: enough for 344 = 7^3 + 1


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix `[order, order]` in float64, or None if none of the constructions fits."""
    factors = _factors(order)
    if factors is None:
        return None
    return functools.reduce(torch.kron, map(_irreducible_matrix, factors))


def balanced_factors(order: int) -> tuple[int, int] | None:
    """(a, b) with a b = order, both Hadamard orders, and the least a + b; None if there are none.

    A vector times `H_a ⊗ H_b` costs `order (a + b)` multiplications instead of `order^2`.
    """
    pairs = [(a, order // a) for a in (1, *_divisors(order), order) if order % a == 0]
    fitting = [pair for pair in pairs if all(_factors(size) is not None for size in pair)]
    return min(fitting, key=lambda pair: (sum(pair), pair[0]), default=None)


@functools.cache
def _factors(order: int) -> tuple[int, ...] | None:
    """Orders with a construction of their own, whose product this is; small ones first."""
    if order in (1, 2):
        return (order,)
    if order < 1 or order % 4:
        return None
    for first in _divisors(order):
        left, right = _factors(first), _factors(order // first)
        if left is not None and right is not None:
            return (*left, *right)
    return (order,) if _paley_field(order) is not None else None


def _divisors(order: int) -> list[int]:
    """The proper divisors above 1."""
    return [d for d in range(2, order // 2 + 1) if order % d == 0]


def _paley_field(order: int) -> tuple[int, int] | None:
    """(prime, degree) of the field from which Paley makes this order."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and (field := _prime_power(q)) is not None:
            return field
    return None


def _irreducible_matrix(order: int) -> Tensor:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order <= 2:
        return signs[:order, :order]
    field = _paley_field(order)
    assert field is not None
    conference = _conference(*field)
    identity = torch.eye(len(conference), dtype=torch.float64)
    if len(conference) == order:  # Paley I
        return conference + identity
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, signs) + torch.kron(identity, diagonal)


def _conference(prime: int, degree: int) -> Tensor:
    """C `[q + 1, q + 1]` with `C C^T = q I` and a zero diagonal: the Jacobsthal matrix
    `chi(i - j)` with a border of ones; antisymmetric for q % 4 = 3, symmetric for 1."""
    core = _jacobsthal(prime, degree)
    q = len(core)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1.0
    bordered[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    bordered[1:, 1:] = core
    return bordered


def _jacobsthal(prime: int, degree: int) -> Tensor:
    """`[q, q]`: 1 where the difference of two elements is a square, -1 where not, 0 at zero.

    Elements of the field are polynomials below `degree` over the integers modulo `prime`.
    """
    digits = torch.cartesian_prod(*[torch.arange(prime)] * degree).view(-1, degree)
    places = prime ** torch.arange(degree - 1, -1, -1)  # element -> its row in `digits`
    squares = (_multiply(digits, digits, prime) * places).sum(1)
    character = torch.full((prime**degree,), -1.0, dtype=torch.float64)
    character[squares] = 1.0
    character[0] = 0.0
    differences = (digits[:, None] - digits[None]) % prime
    return character[(differences * places).sum(-1)]


def _multiply(left: Tensor, right: Tensor, prime: int) -> Tensor:
    """Products of field elements `[q, degree]`, highest power first."""
    degree = left.shape[1]
    product = torch.zeros(len(left), 2 * degree - 1, dtype=torch.long)
    for i, j in itertools.product(range(degree), repeat=2):
        product[:, i + j] += left[:, i] * right[:, j]
    modulus = torch.tensor(_irreducible(prime, degree))
    for leading in range(degree - 1):  # x^degree = -(the modulus without its first term)
        product[:, leading + 1 : leading + 1 + degree] -= product[:, leading, None] * modulus
    return product[:, degree - 1 :] % prime


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """The lower coefficients of a monic polynomial without a root, which up to degree 3 is
    irreducible; highest power first."""
    for lower in itertools.product(range(prime), repeat=degree):
        values = (_evaluate((1, *lower), x, prime) for x in range(prime))
        if degree == 1 or all(values):
            return lower
    raise AssertionError("a finite field has irreducible polynomials of every degree")


def _evaluate(coefficients: tuple[int, ...], x: int, prime: int) -> int:
    return functools.reduce(lambda value, c: (value * x + c) % prime, coefficients, 0)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(prime, degree) of an odd prime power up to degree 3."""
    if q < 3 or q % 2 == 0:
        return None
    prime = next((d for d in range(3, int(q**0.5) + 1, 2) if q % d == 0), q)
    degree = next((d for d in range(1, LARGEST_DEGREE + 1) if prime**d == q), None)
    return None if degree is None else (prime, degree)
