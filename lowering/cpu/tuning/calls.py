"""The kernels of the CPU target on made-up data, as calls whose time can be taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.ir.ops.packing import pack_int4
from panguq.ir.ops.quantize import quantize_per_token
from panguq.kernels.cpu import int4_linear as int4
from panguq.kernels.cpu import int8_linear as int8
from panguq.kernels.cpu import int8_weight_linear as int8_weight
from panguq.kernels.cpu.dequantized_linear import dequantized_linear

GROUP_SIZES = (128, 64, 32)
COLD_BYTES = 64 * 2**20
"""Copies of a weight take turns until they exceed this: a model's weights exceed the cache."""
MAX_COPIES = 64
ALWAYS, NEVER = 2**31 - 1, 0  # few_tokens

TimedCall = Callable[[], object]
Next = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A weight `[n, k]`."""

    n: int
    k: int

    @property
    def group_size(self) -> int:
        """The largest of 128, 64 and 32 that divides k; k if none does."""
        return next((size for size in GROUP_SIZES if self.k % size == 0), self.k)


class KernelCalls:
    """Every kernel of the CPU target that takes this shape, on seeded data.

    `cold_bytes` 0 keeps one copy of each weight, which then stays in the cache.
    """

    def __init__(self, shape: Shape, seed: int = 0, cold_bytes: int = COLD_BYTES) -> None:
        self.shape = shape
        self.cold_bytes = cold_bytes
        self.generator = torch.Generator().manual_seed(seed)
        size = (shape.n, shape.k)
        self.codes = torch.randint(-8, 8, size, dtype=torch.int8, generator=self.generator)
        self.scale = self._scales(shape.n)
        self.group_scale = self._scales(shape.n, shape.k // shape.group_size)

    def __call__(self, m: int) -> dict[str, TimedCall]:
        """The calls for m float32 tokens, by the names of the target's costs."""
        n, k, group = self.shape.n, self.shape.k, self.shape.group_size
        x = torch.randn(m, k, generator=self.generator)
        calls: dict[str, TimedCall] = {"linear": lambda: F.linear(x, self.float_weight())}
        if int8.refusal(m, n, k) is None:
            codes, act_scale = quantize_per_token(x, 127)
            calls["int8_linear"] = lambda: int8.int8_linear(
                codes, act_scale, None, self.int8_weight(), self.scale, None, None, x.dtype
            )
        if int8_weight.refusal(m, n, k) is None:
            calls["int8_weight_linear"] = lambda: self._int8_weight_linear(x, ALWAYS)
        calls["int8_weight_linear (converted)"] = lambda: self._int8_weight_linear(x, NEVER)
        if k % 2 == 0:
            calls["dequantized_linear"] = lambda: dequantized_linear(
                x, self.packed(), self.group_scale, None, group, None, torch.bfloat16
            )
        if int4.refusal(m, n, k, group) is None:
            stored = (self.packed(), self.group_scale, None)
            calls["int4_linear"] = lambda: int4.int4_linear(
                x, self.kernel_weight(), self.kernel_scales, *stored, group, None, ALWAYS
            )
        return calls

    def dequantized_int8(self, m: int) -> TimedCall:
        """`dequantized_linear` on int8 weights, one scale per output: any W8A16 may fall back."""
        x = torch.randn(m, self.shape.k, generator=self.generator)
        scale = self.scale.unsqueeze(1)
        return lambda: dequantized_linear(
            x, self.int8_weight(), scale, None, self.shape.k, None, torch.bfloat16
        )

    @cached_property
    def float_weight(self) -> Next:
        return self._copies(torch.randn(self.codes.shape, generator=self.generator))

    @cached_property
    def int8_weight(self) -> Next:
        return self._copies(self.codes)

    @cached_property
    def packed(self) -> Next:
        return self._copies(pack_int4(self.codes))

    @cached_property
    def kernel_weight(self) -> Next:
        return self._copies(int4.int4_kernel_weight(pack_int4(self.codes)))

    @cached_property
    def kernel_scales(self) -> Tensor:
        return int4.int4_kernel_scales(self.group_scale, None)

    def _int8_weight_linear(self, x: Tensor, few_tokens: int) -> object:
        return int8_weight.int8_weight_linear(x, self.int8_weight(), self.scale, None, few_tokens)

    def _scales(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * 0.01 + 0.001

    def _copies(self, tensor: Tensor) -> Next:
        """A function that returns the next copy of the tensor in turn."""
        size = tensor.numel() * tensor.element_size()
        count = min(MAX_COPIES, self.cold_bytes // size)
        turns = itertools.cycle([tensor, *(tensor.clone() for _ in range(count))])
        return lambda: next(turns)
