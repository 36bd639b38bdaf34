"""How an axis is split for a Kronecker product, and the two factors as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from panguq.ir.ops import kronecker as kronecker_op  # noqa: F401  (registers the op)
from panguq.kernels.ascend.limits import CODES_PER_WORD, KRONECKER_LARGEST
from panguq.tensors.row_slices import row_slices

panguq = torch.ops.panguq


def split_axis(size: int) -> tuple[int, int] | None:
    """(a, b) with a * b = size, as near to each other as NPU kernels allow: b a multiple of 8,
    where there are such. None if one would be more than they take.

    Both are even or both odd, where they can be: so vllm-ascend's loader splits an axis.
    """
    pairs = [(a, size // a) for a in range(1, size + 1) if size % a == 0]

    def key(pair: tuple[int, int]) -> tuple[bool, bool, int, int]:
        return pair[1] % CODES_PER_WORD != 0, sum(pair) % 2 != 0, max(pair), pair[0]

    found = min(pairs, key=key)
    return found if max(found) <= KRONECKER_LARGEST else None


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """`left` `[a, a]` and `right` `[b, b]` in the model's dtype: x becomes x (left ⊗ right)."""

    left: Tensor
    right: Tensor

    def absorbed(self, weight: Tensor, into: Tensor, by_axis: Mapping[int, Tensor]) -> None:
        """Write `weight` `[n, k]`, multiplied along its axes and with the inverse map on its
        columns, `into` another one: products in float64, rounded once."""
        inverse = [torch.linalg.inv(factor.double()).T for factor in (self.left, self.right)]
        for rows in row_slices(weight):
            exact = weight[rows].to(torch.float64, copy=True)
            if 0 in by_axis:
                exact *= by_axis[0][rows, None]
            if 1 in by_axis:
                exact *= by_axis[1]
            into[rows] = panguq.kronecker(exact, *inverse).to(into.dtype)

    @property
    def condition(self) -> float:
        """The largest singular value of the product over the smallest."""
        spread = [torch.linalg.svdvals(f.double()) for f in (self.left, self.right)]
        return float(math.prod(float(s.max() / s.min()) for s in spread))
