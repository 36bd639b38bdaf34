"""The weights whose codes are chosen together, and the codes that a method chose for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import DequantizedWeight, Linear, QuantizedWeight
from panguq.passes.codes.gram import InputMoments


@dataclass(frozen=True)
class WeightProblem:
    """The weights that read one value, row by row under each other, and that value.

    `weight` float32 `[n, k]`; `inputs` one tensor `[..., k]` a batch, as the matmuls meet it: every
    weight before them is quantized, and so is the value itself where the scheme says so; after
    weigh-tokens, times the root of each token's weight.
    `moments` are those of `inputs`, where other problems have the same inputs.
    `float_inputs` is the same value in the float model, empty unless the pass asks for it.
    `dtype` is that of the stored weights; scales of 8-bit codes must be values of it.
    """

    names: tuple[str, ...]
    weight: Tensor
    spec: QuantSpec
    group_size: int
    dtype: torch.dtype
    inputs: Sequence[Tensor]
    float_inputs: Sequence[Tensor] = ()
    moments: InputMoments | None = None


@dataclass(frozen=True)
class Solution:
    """Codes, mostly int8, `[n, k]`, scale and zero point int8 `[n, groups]` for a problem.

    `extra` holds what else a method stores, by name, each with n rows; `shared` what they share.
    `notes` are the method's own columns of the pass's table.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str | int | float | None, ...] = ()

    def rows(self, which: slice) -> Solution:
        """The solution for these rows alone."""
        zero = None if self.zero_point is None else self.zero_point[which]
        extra = {name: tensor[which] for name, tensor in self.extra.items()}
        return Solution(self.codes[which], self.scale[which], zero, extra, self.shared, self.notes)


def quantizer_of(matmul: fx.Node) -> QuantizedWeight:
    """The `quantize_weight` behind a fake-quant matmul's weight."""
    return QuantizedWeight.of(DequantizedWeight.of(Linear.of(matmul).weight).codes)


def weight_sqnr_db(weight: Tensor, quantized: Tensor) -> float:
    """What is left of a weight after quantization, in decibels of its noise."""
    noise = (quantized.float() - weight.float()).square().sum()
    return decibels(float(weight.float().square().sum() / noise.clamp_min(1e-30)))
