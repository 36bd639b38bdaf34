"""Adam's step (arXiv 1412.6980), for values whose number may shrink between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEAN_MEMORY, SQUARE_MEMORY, SMALLEST_GRADIENT = 0.9, 0.95, 1e-12


@dataclass
class Adam:
    """Running means of gradients and of their squares, float32, of one shape."""

    mean: Tensor
    square: Tensor

    @classmethod
    def like(cls, values: Tensor) -> Adam:
        """The state before the first step for values of this shape."""
        return cls(torch.zeros(values.shape), torch.zeros(values.shape))

    def step(self, gradient: Tensor, number: int, rate: float) -> Tensor:
        """What step `number`, counted from 1, takes off each value, at most about `rate`."""
        self.mean.lerp_(gradient, 1 - MEAN_MEMORY)
        self.square.lerp_(gradient.square(), 1 - SQUARE_MEMORY)
        root = (self.square / (1 - SQUARE_MEMORY**number)).sqrt_().add_(SMALLEST_GRADIENT)
        return rate / (1 - MEAN_MEMORY**number) * self.mean / root

    def kept(self, which: Tensor) -> Adam:
        """The state of some of the values alone."""
        return Adam(self.mean[which], self.square[which])
