"""A learned transform of one value and of the weights that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.ops import kronecker as kronecker_op  # noqa: F401  (registers the op)
from panguq.ir.ops.opset import body_of
from panguq.ir.ops.quantize import SMALLEST_AMAX
from panguq.ir.views import Linear
from panguq.passes.rotation.matrices import random_rotation
from panguq.passes.transforms.factors import KroneckerFactors
from panguq.passes.transforms.sites import TransformSite

CLIP_START = 4.0  # a clip is the sigmoid of what is learned: 0.98 to begin with
LARGEST_LOG_CONDITION = 2.0  # of a factor: with e^2 each, rounding them costs little
SMALLEST_SIZE = 1e-5  # of a channel's values or weights
kronecker = body_of(torch.ops.panguq.kronecker.default)  # the op itself is opaque to autograd


class RoundedRows(torch.autograd.Function):
    """`clamp(round(x / scale), low, high) * scale` for rows x `[..., k]`, scale `[..., 1]`.

    Rounding passes gradients on, clamping does not, and the scale has that of Esser et al. (LSQ,
    arXiv 1902.08153).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        codes = steps.round().clamp_(low, high)
        inside = (steps >= low - 0.5) & (steps <= high + 0.5)
        ctx.save_for_backward(codes - steps.mul_(inside), inside)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (error, inside) = gradients, ctx.saved_tensors
        return gradient * inside, (gradient * error).sum(-1, keepdim=True), None, None


def rounded_rows(x: Tensor, clip: Tensor, low: int, high: int) -> Tensor:
    """Rows x `[..., k]` on grids whose code `high` stands for `clip` of a row's largest
    magnitude; `clip` broadcasts to `[..., 1]`."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) * clip / high
    found: Tensor = RoundedRows.apply(x, scale, low, high)
    return found


@dataclass(eq=False)
class Learned:
    """What is learned at a site: x becomes `(x / s) (L ⊗ R)`, a weight W `[n, k]` that reads it
    `W diag(s) (L ⊗ R)^-T`, and both are clipped when they are rounded.

    L is a fixed orthogonal matrix times the exponential of a learned one, so that it has an inverse
    whatever is learned; R alike. s is the exponential of `log_scale` `[channels]`.
    """

    site: TransformSite
    start: tuple[Tensor, Tensor]
    exponents: tuple[Tensor, Tensor]
    log_scale: Tensor
    clip: Tensor
    weight_clips: tuple[Tensor, ...]

    @staticmethod
    def begin(
        site: TransformSite,
        size: Tensor,
        weights: Sequence[Tensor],
        alpha: float,
        generator: torch.Generator,
    ) -> Learned:
        """Random rotations (`passes/rotation/matrices.py`), s = size^alpha / w^(1 - alpha) with w
        the root mean square of the weights' columns, in the geometric mean 1, and hardly a clip.

        size `[k]`: the root mean square of x by channel.
        """
        start = [random_rotation(n, generator).dense().float() if n > 1 else torch.ones(1, 1)
                 for n in site.split]  # fmt: skip
        used, channels = site.column >= 0, 0 if site.scales is None else site.scales.channels
        met = torch.stack([w.float().square().mean(0) for w in weights]).mean(0).sqrt()
        sizes = torch.zeros(2, channels)
        for into, values in zip(sizes, (size, met), strict=True):
            into.scatter_reduce_(0, site.column[used], values[used], "amax")
        act, weight = sizes.clamp_min(SMALLEST_SIZE).log()
        alive = sizes[0] > 0
        log_scale = alpha * act - (1 - alpha) * weight
        log_scale = torch.where(alive, log_scale - log_scale[alive].mean(), 0.0)
        return Learned(
            site,
            (start[0], start[1]),
            (torch.zeros_like(start[0]), torch.zeros_like(start[1])),
            log_scale,
            torch.tensor(CLIP_START),
            tuple(torch.full((len(weight),), CLIP_START) for weight in weights),
        )

    def parameters(self) -> dict[str, Tensor]:
        """All that is learned, by name; clips begin with `clip`."""
        clips = {f"clip_weight.{i}": clip for i, clip in enumerate(self.weight_clips)}
        left, right = self.exponents
        named = {"left": left, "right": right, "scale": self.log_scale, "clip": self.clip}
        return named | clips

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take up what `parameters` were at another time."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(values[name])

    def scale(self) -> Tensor:
        """s `[k]`."""
        column = self.site.column
        if self.site.scales is None:
            return torch.ones(len(column))
        return torch.where(column < 0, 0.0, self.log_scale[column.clamp_min(0)]).exp()

    def factors(self) -> list[Tensor]:
        """L and R."""
        pairs = zip(self.start, self.exponents, strict=True)
        return [fixed @ torch.linalg.matrix_exp(free) for fixed, free in pairs]

    def inverses(self) -> list[Tensor]:
        """Of L and R, transposed."""
        pairs = zip(self.start, self.exponents, strict=True)
        return [fixed @ torch.linalg.matrix_exp(-free.T) for fixed, free in pairs]

    def quantized_input(self, x: Tensor) -> Tensor:
        """x `[..., k]` transformed and rounded, float32."""
        high = self.site.activation.quant_max
        return rounded_rows(
            kronecker(x / self.scale(), *self.factors()), self.clip.sigmoid(), -high, high
        )

    def quantized_weights(self, weights: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
        """The weights `[n, k]` of the site's linears, transformed and rounded, one scale a row."""
        scale, inverses = self.scale(), self.inverses()
        found = {}
        for linear, weight, clip in zip(self.site.linears, weights, self.weight_clips, strict=True):
            turned = kronecker(weight.float() * scale, *inverses)
            spec = self.site.weight_spec(linear)
            found[linear] = rounded_rows(
                turned, clip.sigmoid()[:, None], spec.quant_min, spec.quant_max
            )
        return found

    def bound(self) -> None:
        """Keep L and R far from singular."""
        with torch.no_grad():
            for free in self.exponents:
                spread = torch.linalg.eigvalsh((free + free.T) / 2)
                excess = float(spread[-1] - spread[0]) / LARGEST_LOG_CONDITION
                if excess > 1:
                    free /= excess

    def stored(self, dtype: torch.dtype) -> KroneckerFactors:
        """L and R as the graph has them."""
        with torch.no_grad():
            left, right = (factor.to(dtype) for factor in self.factors())
        return KroneckerFactors(left, right)


def stored_weights(site: TransformSite, weights: Mapping[fx.Node, Tensor]) -> list[Tensor]:
    """The values of the site's weights, in the order of its linears."""
    return [weights[Linear.of(linear).weight] for linear in site.linears]
