"""Learn the codes and scales of a block's weights from the error of the block's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from panguq.errors import NumericsError
from panguq.ir.edit import label
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.run.reverse_sweep import recorded
from panguq.ir.run.sweep import PassedBlock
from panguq.passes.codes.soft_codes import SoftCodes, harden

HARDENED = (0.0, 0.5, 0.75, 0.9, 0.97, 1.0)
"""The share of levels that is fixed when each stage begins; stages have the same length."""
LAST_RATE = 0.1
"""Of the first learning rate, to which it falls linearly."""


@dataclass(frozen=True)
class Rates:
    """How long and how fast a block learns: `steps` in all, `batches` in each of them."""

    steps: int
    batches: int
    codes: float
    scales: float


class BlockLearner:
    """The output of a block, fed by the quantized model, against the float block's.

    The loss is the relative squared error sum_t w_t |y_t - f_t|^2 / sum_t w_t |f_t|^2 with y_t
    `[n]` the block's output at token t, f_t that of the float model, whose own blocks are in front
    of it, and a weight w_t for each token: those given, `[tokens]` for each batch, or
    1 / (|f_t|^2 + the median of all |f|^2), since a norm behind a residual stream sees no token's
    length, and a few tokens may be a hundred times longer than the others.
    """

    def __init__(self, block: PassedBlock, weights: Sequence[Tensor] | None) -> None:
        self.block = block
        self.end = block.nodes[-1]
        for value in block.float_ends:
            ensure_finite(label(self.end), value, "activation")
        squares = [_rows(value).square().sum(1) for value in block.float_ends]
        if weights is None:
            usual = torch.cat(squares).median().clamp_min(1e-30)
            weights = [1 / (square + usual) for square in squares]
        self._weights = weights
        pairs = zip(weights, squares, strict=True)
        self._size = sum(float((w * s).sum(dtype=torch.float64)) for w, s in pairs)
        inside = set(block.nodes)
        self._read = [n for n in block.nodes for n in n.all_input_nodes if n not in inside]

    def error(self, ends: Sequence[Tensor]) -> float:
        """The loss of these outputs, one for each batch; 0 where the float model's are zero."""
        total = sum(float(self._squares(i, end).sum()) for i, end in enumerate(ends))
        return total / self._size if self._size else 0.0

    def outputs(self, weights: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """The block's output for every batch with these values in place of others."""
        with torch.no_grad():
            return [self._run(batch, weights) for batch in range(len(self.block.starts))]

    def learn(
        self,
        weights: Mapping[fx.Node, SoftCodes],
        rates: Rates,
        generator: torch.Generator,
        progress: Callable[[int], None],
    ) -> None:
        """Learn these weights' codes, by the node that has the weight, until all are fixed.

        `progress` is told how many steps are made. Raises NumericsError for a gradient that is not
        finite.
        """
        soft = list(weights.values())
        order = self._order(generator)
        step = 0
        for stage, share in enumerate(HARDENED):
            harden(soft, share)
            last = math.ceil(rates.steps * (stage + 1) / len(HARDENED))
            while step < last:
                at_once = [next(order) for _ in range(rates.batches)]
                gradients = self._gradients(weights, at_once)
                progress(step)
                left = 1 - (1 - LAST_RATE) * step / rates.steps
                step += 1
                for weight, gradient in zip(soft, gradients, strict=True):
                    weight.step(gradient, step, rates.codes * left, rates.scales * left)

    def _order(self, generator: torch.Generator) -> Iterator[int]:
        """Batches, all of them in a random order, and again."""
        while True:
            yield from torch.randperm(len(self.block.starts), generator=generator).tolist()

    def _gradients(
        self, weights: Mapping[fx.Node, SoftCodes], batches: Sequence[int]
    ) -> list[Tensor]:
        """Of half the loss at each weight, summed over the batches, float32 `[n, k]`.

        Times the number of tokens: Adam does not care, and 16-bit floats keep their digits.
        """
        leaves = {node: soft.values().requires_grad_() for node, soft in weights.items()}
        total = [torch.zeros(leaf.shape) for leaf in leaves.values()]
        tokens = sum(len(weight) for weight in self._weights)
        for batch in batches:
            with torch.enable_grad():
                output = self._run(batch, leaves)
            if not output.requires_grad:
                break
            difference = self._difference(batch, output.detach())
            factor = self._weights[batch] * (tokens / self._size if self._size else 0.0)
            at = (difference * factor[:, None]).view(output.shape).to(output.dtype)
            found = torch.autograd.grad(output, list(leaves.values()), at, allow_unused=True)
            for into, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    into += gradient.float()
        for node, gradient in zip(leaves, total, strict=True):
            if not torch.isfinite(gradient).all():
                raise NumericsError(
                    f"the gradient at {label(node)} holds NaN or Inf",
                    "leave progressive-rounding out of the recipe, or compile in float32",
                )
        return total

    def _difference(self, batch: int, output: Tensor) -> Tensor:
        """What the output has more than the float model's, float32 `[tokens, n]`."""
        wanted = self.block.float_ends[batch]
        return _rows(output) - _rows(wanted)

    def _squares(self, batch: int, output: Tensor) -> Tensor:
        squares = self._difference(batch, output).square().sum(1, dtype=torch.float64)
        return squares * self._weights[batch]

    def _run(self, batch: int, weights: Mapping[fx.Node, Tensor]) -> Tensor:
        start = self.block.starts[batch]
        values: dict[fx.Node, Any] = {
            node: weights[node] if node in weights else start[node] for node in self._read
        }
        for node in self.block.nodes:
            values[node] = recorded(node, values)
        end: Tensor = values[self.end]
        return end


def _rows(value: Tensor) -> Tensor:
    """A value `[.., n]` as float32 `[tokens, n]`."""
    return value.reshape(-1, value.shape[-1]).float()
