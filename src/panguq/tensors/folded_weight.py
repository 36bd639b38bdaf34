"""Weights that took up a scale but are not written yet: the stored weight and its factors.

A pass that scales weights is mostly followed by one that quantizes them, so the scaled weight is
needed a few times and never kept. Writing it would cost a copy of the model on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from panguq.tensors.nameless import roomy_empty
from panguq.tensors.row_slices import row_slices


class FoldedWeight(Tensor):
    """A weight times a float64 factor per index of some axes, computed when it is read.

    It has the weight's shape and dtype and no storage. Each product is computed in float64 and
    rounded once to that dtype. Every op reads it as the plain tensor that `materialized` gives, so
    nobody needs to know of it; who reads it several times takes that tensor first.
    """

    _source: Tensor
    _factors: Mapping[int, Tensor]

    @staticmethod
    def __new__(cls, source: Tensor, factors: Mapping[int, Tensor]) -> FoldedWeight:
        """`source` of any shape; `factors` by axis, each `[size of the axis]`."""
        made: FoldedWeight = Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=source.dtype, device=source.device, requires_grad=False
        )
        made._source = source.detach()
        made._factors = dict(factors)
        if isinstance(source, FoldedWeight):  # one rounding, not two
            made._source = source._source
            known = source._factors
            for axis, factor in known.items():
                made._factors[axis] = made._factors.get(axis, 1.0) * factor
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"FoldedWeight({list(self.shape)}, {self.dtype}, axes={sorted(self._factors)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any op: on the plain tensor."""
        return func(*tree_map(materialized, args), **tree_map(materialized, kwargs or {}))

    def _compute(self) -> Tensor:
        source = self._source
        folded = roomy_empty(source.shape, source.dtype)
        for some in row_slices(source):
            product = source[some].to(torch.float64, copy=True)
            for axis, factor in sorted(self._factors.items()):
                shape = [1] * source.dim()
                shape[axis] = -1
                product *= (factor[some] if axis == 0 else factor).view(shape)
            folded[some] = product.to(source.dtype)
        return folded


def materialized(value: Any) -> Any:
    """The plain tensor that a folded weight stands for; anything else as it is."""
    return value._compute() if isinstance(value, FoldedWeight) else value
