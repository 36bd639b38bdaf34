"""Quantized matmuls of experts on a CPU: a turn of the Loop does what the kernel does for a matmul.

The kernels for few tokens round activations and results to bfloat16, and so do the nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.experts import OwnValues, joined_rows, product, stored
from panguq.formats.onnx.step import Emitter, Step


def int8_product(
    step: Step, codes: str, weight: str | None, scale: str | None, zero_point: str | None = None
) -> str:
    """`(codes - zero_point) @ weight * scale`, float32; weight int8 `[k, n]`, scale `[n]`."""
    assert weight is not None and scale is not None
    inputs = [codes, weight] if zero_point is None else [codes, weight, zero_point]
    total = step.add("MatMulInteger", *inputs, suffix="int32")
    wide = step.add("Cast", total, suffix="float32", to=TensorProto.FLOAT)
    return step.add("Mul", wide, scale, suffix="weight_scaled")


def _expert_int8_linear(step: Step) -> str:
    given = step.arguments()
    static = step.tensor(given["act_scale"])
    per_token = static is None or static.numel() > 1
    act_scale = step.read(given["act_scale"])
    rows = [step.read(given["codes"]), *([act_scale] if per_token else [])]
    zero_point = None
    if given["act_zero_point"] is not None:
        offset = step.known(given["act_zero_point"]).reshape(()).to(torch.int8)
        zero_point = step.builder.add_tensor(f"{step.label}.zero_point", offset)
    scales = step.known(given["weight_scale"]).float().flatten(1)
    own = [
        stored(step, given["weight"]),
        step.builder.add_tensor(f"{step.label}.weight_scale", scales),
        stored(step, given["bias"]),
    ]

    def make(rows: list[str], own: OwnValues) -> str:
        assert own[0] is not None
        turned = step.add("Transpose", own[0], suffix="weight_t", perm=[1, 0])
        total = int8_product(step, rows[0], turned, own[1], zero_point)
        factor = rows[1] if per_token else act_scale
        result = step.add("Mul", total, factor, suffix="scaled")
        return result if own[2] is None else step.add("Add", result, own[2], suffix="biased")

    return joined_rows(step, given["counts"], rows, own, make)


def _expert_int8_weight_linear(step: Step) -> str:
    given = step.arguments()
    x = step.round_to(step.read(given["x"], torch.float32), torch.bfloat16, "x_bfloat16")
    scales = step.known(given["weight_scale"]).float().flatten(1)
    own = [
        stored(step, given["weight"]),
        step.builder.add_tensor(f"{step.label}.weight_scale", scales),
        stored(step, given["bias"]),
    ]

    def make(rows: list[str], own: OwnValues) -> str:
        assert own[0] is not None and own[1] is not None
        wide = step.add("Cast", own[0], suffix="weight_float32", to=TensorProto.FLOAT)
        total = step.round_to(product(step, rows[0], wide, None), torch.bfloat16, "bfloat16")
        result = step.add("Mul", total, own[1], suffix="scaled")
        return result if own[2] is None else step.add("Add", result, own[2], suffix="biased")

    return joined_rows(step, given["counts"], [x], own, make)


def _expert_int4_linear(step: Step) -> str:
    given = step.arguments()
    scales = step.known(given["scale"]).to(torch.bfloat16).float()
    offsets = None
    if given["zero_point"] is not None:
        # The kernel adds -zero_point * scale, rounded to bfloat16: a zero point that is no integer.
        moved = (step.known(given["zero_point"]).float() * scales).to(torch.bfloat16).float()
        offsets = torch.where(scales == 0, 0, moved / scales)
    return _weight_only(step, given, given["packed"], scales, offsets, torch.bfloat16, None)


def _expert_dequantized_linear(step: Step) -> str:
    given = step.arguments()
    zero_point = given["zero_point"]
    offsets = None if zero_point is None else step.known(zero_point).float()
    scales, dtype = step.known(given["scale"]).float(), given["compute_dtype"]
    return _weight_only(step, given, given["codes"], scales, offsets, dtype, dtype)


def _weight_only(
    step: Step,
    given: dict[str, Any],
    codes: fx.Node,
    scales: Tensor,
    offsets: Tensor | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
) -> str:
    """x and the product rounded to `dtype`, the weight to `weight_dtype` (None: not)."""
    x = step.round_to(step.read(given["x"], torch.float32), dtype, "x_rounded")
    packed = codes.meta["val"].dtype == torch.uint8
    n, columns = (int(size) for size in codes.meta["val"].shape[1:])
    own = [
        nibbles(step, codes) if packed else stored(step, codes),
        step.builder.add_tensor(f"{step.label}.weight_scale", scales.unsqueeze(-1)),
        None
        if offsets is None
        else step.builder.add_tensor(f"{step.label}.zero_point", offsets.unsqueeze(-1)),
        stored(step, given["bias"]),
    ]
    k, groups = columns * (2 if packed else 1), int(scales.shape[-1])

    def make(rows: list[str], own: OwnValues) -> str:
        assert own[0] is not None and own[1] is not None
        shape = [n, groups, k // groups]
        weight = from_nibbles(step, own[0], shape) if packed else _floats(step, own[0], shape)
        if own[2] is not None:
            weight = step.add("Sub", weight, own[2], suffix="shifted")
        weight = step.add("Mul", weight, own[1], suffix="weight_groups")
        weight = step.add("Reshape", weight, step.integers([n, k], "matrix"), suffix="weight")
        if weight_dtype is not None:
            weight = step.round_to(weight, weight_dtype, "weight_rounded")
        result = step.round_to(product(step, rows[0], weight, None), dtype, "product_rounded")
        return result if own[3] is None else step.add("Add", result, own[3], suffix="biased")

    return joined_rows(step, given["counts"], [x], own, make)


def _floats(step: Step, codes: str, shape: list[int]) -> str:
    wide = step.add("Cast", codes, suffix="codes_float32", to=TensorProto.FLOAT)
    return step.add("Reshape", wide, step.integers(shape, "codes_shape"), suffix="codes_groups")


def nibbles(step: Step, codes: fx.Node) -> str:
    """Stored 4-bit codes as bytes of two, each code + 8: onnxruntime gathers no int4.

    They are uint8, or int32 of eight.
    """
    lazy, (*rows, columns) = step.lazy(codes), (int(size) for size in codes.meta["val"].shape)
    shape = [*rows, columns * codes.meta["val"].dtype.itemsize]
    name = f"{step.label}.weight_nibbles"

    def shifted() -> Tensor:
        return lazy().contiguous().view(torch.uint8).bitwise_xor(0x88)

    return step.builder.add_weight(name, TensorProto.UINT8, shape, shifted)


def from_nibbles(step: Step, pairs: str, shape: list[int]) -> str:
    """float32 codes, in `shape`, of bytes `[n, k / 2]` that hold code + 8, the low half first."""
    low = step.add("BitwiseAnd", pairs, step.number(15, torch.uint8, "mask"), suffix="low")
    four = step.number(4, torch.uint8, "four")
    high = step.add("BitShift", pairs, four, suffix="high", direction="RIGHT")
    axis = step.integers([-1], "pairs_axis")
    both = [
        step.add("Unsqueeze", half, axis, suffix=f"{name}_half")
        for half, name in ((low, "low"), (high, "high"))
    ]
    joined = step.add("Concat", *both, suffix="both", axis=-1)
    wide = _floats(step, joined, shape)
    return step.add("Sub", wide, step.number(8.0, torch.float32, "eight"), suffix="codes")


def _kernel_layout(step: Step) -> Value | None:
    """What `expert_int4_linear` reads straight from the stored tensors."""
    return None


EMITTERS: dict[str, Emitter] = {
    "panguq_cpu.expert_dequantized_linear.default": _expert_dequantized_linear,
    "panguq_cpu.expert_int4_kernel_scales.default": _kernel_layout,
    "panguq_cpu.expert_int4_kernel_weight.default": _kernel_layout,
    "panguq_cpu.expert_int4_linear.default": _expert_int4_linear,
    "panguq_cpu.expert_int8_linear.default": _expert_int8_linear,
    "panguq_cpu.expert_int8_weight_linear.default": _expert_int8_weight_linear,
}
