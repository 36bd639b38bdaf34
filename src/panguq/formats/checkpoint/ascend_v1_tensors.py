"""What msModelSlim's AscendV1 format stores of a linear, and the formulas.

Formulas and layouts: msModelSlim, modelslim_v1/save/ascendv1.py, and its pages on quantized
weights. Per linear `[n, k]`, beside `bias` float32 `[n]`:

    W8A8           weight int8 [n, k], input_scale and input_offset float32 [1],
                   deq_scale float32 [n] (int64 for float16 models), quant_bias int32 [n],
                   weight_scale and weight_offset float32 [n, 1]
    W8A8_DYNAMIC,  weight int8 [n, k], weight_scale and weight_offset float32 [n, 1]
    W8A16
    W4A8_DYNAMIC   weight int8 [n / 2, k], two rows a byte, weight_scale and weight_offset
                   [n, 1], weight_scale_second and weight_offset_second float32 [n, k / 256],
                   scale_bias float32 [n, 1], or [n, 16] where tensor parallelism splits k;
                   experts have one scale for each output and no second one
    W4A4_FLATQUANT_DYNAMIC
                   weight int8 [n, k] of 4-bit codes, weight_scale and weight_offset [n, 1],
                   left_trans [a, a] and right_trans [b, b] in the model's dtype, by which the
                   loader computes left_trans^T X right_trans, and clip_ratio float32 [1]

Only W8A8 could do without weight_scale; it is written so that readers need not divide for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from panguq.errors import ExportError
from panguq.formats.checkpoint.folder import Output
from panguq.formats.checkpoint.linear import LinearForm, QuantizedLinear
from panguq.kernels.ascend.limits import W4A8_GROUP
from panguq.lowering.ascend.calls import LARGEST_INT32_BIAS

FLAT = "W4A4_FLATQUANT"
TYPES = {
    "W8A8": "W8A8",
    "W8A8_DYNAMIC": "W8A8_DYNAMIC",
    "W8A16": "W8A16",
    "W4A8": "W4A8_DYNAMIC",
    FLAT: "W4A4_FLATQUANT_DYNAMIC",
}
"""What the format calls panguq's schemes; W4A4 behind Kronecker products is called FLAT here."""
FLOAT = "FLOAT"
SLICES = 16
"""Parts of k that `scale_bias` of a split linear is summed over: one for each of 16 devices."""
SPLIT_OVER_K = ("o_proj", "down_proj", "out_proj", "c_proj", "w2")
"""The linears whose k tensor parallelism splits, by the last part of their name."""
W4A8_SHIFT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint: its type in the description, and how to make it."""

    name: str
    type: str
    output: Output


def float_entry(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Entry:
    """A tensor that is not quantized, in another dtype if given."""
    dtype = dtype or tensor.dtype
    return Entry(name, FLOAT, Output(dtype, tuple(tensor.shape), lambda: tensor.to(dtype)))


def linear_entries(linear: QuantizedLinear) -> Iterator[Entry]:
    """The tensors of a linear whose scheme is in `TYPES`; nothing is computed yet.

    Raises ExportError if its bias does not fit the int32 sum (W8A8).
    """
    kind = TYPES[scheme_name(linear)]
    n, k = linear.shape

    def entry(
        leaf: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> Entry:
        return Entry(f"{linear.path}.{leaf}", kind, Output(dtype, shape, make))

    if kind == "W4A8_DYNAMIC":
        groups = k // W4A8_GROUP
        slices = SLICES if linear.path.rpartition(".")[2] in SPLIT_OVER_K else 1
        yield entry("weight", torch.int8, (n // 2, k), lambda: pack_rows(linear.codes()))
        is_plain = linear.is_expert and linear.weight_scale.shape[1] == 1
        first = linear.weight_scale.float if is_plain else lambda: two_scales(linear)[0]
        yield entry("weight_scale", torch.float32, (n, 1), first)
        yield entry("weight_offset", torch.float32, (n, 1), lambda: torch.zeros(n, 1))
        second = (n, groups)
        if not is_plain:
            yield entry("weight_scale_second", torch.float32, second, lambda: two_scales(linear)[1])
            yield entry("weight_offset_second", torch.float32, second, lambda: torch.zeros(second))
        yield entry("scale_bias", torch.float32, (n, slices), lambda: scale_bias(linear, slices))
    else:
        yield entry("weight", torch.int8, (n, k), linear.codes)
        yield entry("weight_scale", torch.float32, (n, 1), lambda: linear.weight_scale.float())
        yield entry("weight_offset", torch.float32, (n, 1), lambda: torch.zeros(n, 1))
    if kind == "W8A8":
        scale, zero = linear.input_scale, linear.input_zero_point
        assert scale is not None and zero is not None
        bias = quant_bias(linear)  # now: a bias that is too large is refused before any writing
        stored = torch.int64 if linear.dtype == torch.float16 else torch.float32
        yield entry("input_scale", torch.float32, (1,), scale.float)
        yield entry("input_offset", torch.float32, (1,), zero.float)
        yield entry("deq_scale", stored, (n,), lambda: stored_deq_scale(linear))
        yield entry("quant_bias", torch.int32, (n,), lambda: bias)
    if linear.left is not None and linear.right is not None:
        left, right = linear.left, linear.right
        yield entry("left_trans", left.dtype, tuple(left.shape), lambda: left)
        yield entry("right_trans", right.dtype, tuple(right.shape), lambda: right)
        yield entry("clip_ratio", torch.float32, (1,), lambda: torch.tensor([linear.clip]))
    if linear.bias is not None:
        yield float_entry(f"{linear.path}.bias", linear.bias, torch.float32)


def scheme_name(linear: LinearForm) -> str:
    """What the tables of servers and of types call a linear's scheme."""
    name = linear.scheme.name.partition("-")[0]
    return FLAT if name == "W4A4" and linear.split is not None else name


def loader_split(k: int) -> tuple[int, int] | None:
    """(a, b) with a * b = k into which vllm-ascend's loader splits the inputs of a FLAT linear: the
    nearest to each other that are both even or both odd; None where it finds none."""
    pairs = [(a, k // a) for a in range(1, math.isqrt(k) + 1) if k % a == 0]
    return next((pair for pair in reversed(pairs) if sum(pair) % 2 == 0), None)


def deq_scale(linear: QuantizedLinear) -> Tensor:
    """input_scale * weight_scale, float32 [n]."""
    assert linear.input_scale is not None
    return (linear.input_scale.double() * linear.weight_scale.reshape(-1).double()).float()


def stored_deq_scale(linear: QuantizedLinear) -> Tensor:
    """`deq_scale` as the format has it: float16 models take the float32's bits as an int64."""
    scale = deq_scale(linear)
    return scale.view(torch.int32).to(torch.int64) if linear.dtype == torch.float16 else scale


def quant_bias(linear: QuantizedLinear) -> Tensor:
    """round(bias / deq_scale) - input_offset * sum_k codes, int32 [n].

    The offset's part is whole, so that rounding before or after it is the same but for ties.
    Raises ExportError where a bias is beyond 2^30 steps, which the lowered graph would add
    afterwards and a checkpoint cannot.
    """
    assert linear.input_zero_point is not None
    total = -linear.input_zero_point.long() * linear.codes().sum(dim=1, dtype=torch.int32)
    if linear.bias is not None:
        steps = (linear.bias.double() / deq_scale(linear).double()).round()
        if bool(steps.abs().max() > LARGEST_INT32_BIAS):
            raise ExportError(
                f"{linear.path}: its bias is more than 2^30 steps of deq_scale, too large for the "
                "int32 sum that quant_bias is added to",
                "quantize this linear as W8A8_DYNAMIC",
            )
        total = total + steps.long()
    return total.to(torch.int32)


def two_scales(linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """The float32 factors `[n, 1]` and `[n, k / 256]` whose product is the scale of each group.

    One of them is 1, so that the product is exact. Scales per output are repeated for each group.
    """
    scale = linear.weight_scale.float()
    groups = linear.shape[1] // W4A8_GROUP
    ones = torch.ones(scale.shape[0], groups)
    return (scale, ones) if scale.shape[1] == 1 and groups != 1 else (ones[:, :1], scale)


def scale_bias(linear: QuantizedLinear, slices: int) -> Tensor:
    """8 * the sum of code * scale over each of `slices` parts of k, float32 `[n, slices]`."""
    n, k = linear.shape
    scales = linear.weight_scale.double().repeat_interleave(linear.group_size, dim=1)
    weight = linear.codes().double().mul_(scales)
    return (W4A8_SHIFT * weight.reshape(n, slices, k // slices).sum(-1)).float()


def pack_rows(codes: Tensor) -> Tensor:
    """int8 [n, k] in [-8, 7], n even -> int8 [n / 2, k]; the low nibble holds the even row."""
    low = codes[0::2].bitwise_and(0x0F)
    return codes[1::2].bitwise_left_shift(4).bitwise_or_(low)


def unpack_rows(packed: Tensor) -> Tensor:
    """int8 [n / 2, k] -> int8 [n, k], the inverse of `pack_rows`."""
    low = packed.bitwise_left_shift(4).bitwise_right_shift_(4)  # arithmetic: the sign comes back
    high = packed.bitwise_right_shift(4)
    return torch.stack([low, high], dim=1).reshape(-1, packed.shape[1])
