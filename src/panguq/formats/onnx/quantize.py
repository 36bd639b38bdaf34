"""Quantizing and dequantizing as ONNX nodes: QuantizeLinear and DequantizeLinear where they fit.

QuantizeLinear computes clamp(round(x / scale) + zero_point), panguq clamp(round(x * (1 / scale) +
zero_point)): the same codes except next to a half. panguq rounds 1 / scale to the dtype of x;
the scale that QuantizeLinear is given is the reciprocal of that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.step import Emitter, Step
from panguq.ir.ops.packing import pack_int4
from panguq.ir.ops.quantize import SMALLEST_AMAX

_RANGES: dict[tuple[int, int], int] = {(-128, 127): TensorProto.INT8, (-8, 7): TensorProto.INT4}


# --- activations --------------------------------------------------------------------------------


def _quantize_per_tensor(step: Step) -> str:
    x, scale, zero_point, quant_min, quant_max = step.node.args
    assert isinstance(x, fx.Node)
    dtype = x.meta["val"].dtype
    factor = step.known(scale).reshape(()).reciprocal().to(dtype).float()
    divisor = step.builder.add_tensor(f"{step.label}.scale", factor.reciprocal())
    offset = step.known(zero_point).reshape(()).to(torch.int8)
    zero = step.builder.add_tensor(f"{step.label}.zero_point", offset)
    values = step.read(x, torch.float32)
    if (quant_min, quant_max) == (-128, 127):
        return step.result("QuantizeLinear", values, divisor, zero)
    codes = step.add("QuantizeLinear", values, divisor, zero, suffix="unclamped")
    return _clipped(step, codes, quant_min, quant_max)


def _clipped(step: Step, codes: str, quant_min: Any, quant_max: Any) -> str:
    limits = (
        step.number(quant_min, torch.int8, "quant_min"),
        step.number(quant_max, torch.int8, "quant_max"),
    )
    return step.result("Clip", codes, *limits)


def _quantize_per_token(step: Step) -> Value:
    given = step.arguments()
    if given["clip"] != 1.0:
        raise step.error("tokens that are clipped are not written", "leave flatquant out")
    codes, scale = step.result_name(0), step.result_name(1)
    found = token_codes(step, step.read(given["x"], torch.float32), given["quant_max"])
    return (step.call_it(found[0], codes), step.call_it(found[1], scale))


def token_codes(step: Step, values: str, quant_max: Any) -> tuple[str, str]:
    """Codes int8 `[..., k]` and scale float32 `[..., 1]` of float32 values `[..., k]`.

    scale = max(amax|x|, 1e-30) / quant_max; code = round(x * (1 / scale)). No ONNX operator
    quantizes with a scale per token.
    """
    size = step.add("Abs", values, suffix="abs")
    largest = step.add("ReduceMax", size, step.integers([-1], "last_axis"), suffix="amax")
    least = step.number(SMALLEST_AMAX, torch.float32, "smallest_amax")
    limited = step.add("Max", largest, least, suffix="limited_amax")
    steps = step.number(quant_max, torch.float32, "quant_max")
    scale = step.add("Div", limited, steps, suffix="token_scale")
    factor = step.add("Reciprocal", scale, suffix="token_factor")
    scaled = step.add("Mul", values, factor, suffix="scaled")
    rounded = step.add("Round", scaled, suffix="rounded")
    return step.add("Cast", rounded, suffix="token_codes", to=TensorProto.INT8), scale


def _quantize_per_channel(step: Step) -> str:
    """QuantizeLinear has one axis of scales, and these differ by head and channel."""
    x, scale, quant_max = step.node.args
    factor = step.builder.add_tensor(f"{step.label}.factor", step.known(scale).reciprocal())
    scaled = step.add("Mul", step.read(x, torch.float32), factor, suffix="scaled")
    rounded = step.add("Round", scaled, suffix="rounded")
    assert isinstance(quant_max, int)
    limits = (
        step.number(-quant_max, torch.float32, "quant_min"),
        step.number(quant_max, torch.float32, "quant_max"),
    )
    clipped = step.add("Clip", rounded, *limits, suffix="clipped")
    return step.result("Cast", clipped, to=TensorProto.INT8)


def _dequantize(step: Step) -> str:
    codes, scale, zero_point, _ = step.node.args
    assert isinstance(scale, fx.Node)
    if scale in step.builder.constants and step.known(scale).numel() == 1:
        steps = step.builder.add_tensor(
            f"{step.label}.scale", step.known(scale).reshape(()).float()
        )
        inputs = [step.read(codes), steps]
        if zero_point is not None:
            offset = step.known(zero_point).reshape(()).to(torch.int8)
            inputs.append(step.builder.add_tensor(f"{step.label}.zero_point", offset))
        return step.finish("DequantizeLinear", *inputs)
    values = step.read(codes, torch.float32, "codes")
    if zero_point is not None:
        offset_name = step.read(zero_point, torch.float32, "zero_point")
        values = step.add("Sub", values, offset_name, suffix="shifted")
    return step.finish("Mul", values, step.read(scale, torch.float32))


# --- weights ------------------------------------------------------------------------------------


def _quantize_weight(step: Step) -> str:
    weight, scale, zero_point, group_size, *limits = step.arguments().values()
    elem_type: int = _RANGES.get((limits[0], limits[1]), TensorProto.INT8)
    values = step.read(weight, torch.float32)
    inputs, attributes = weight_steps(
        step, weight.meta["val"].shape, scale, zero_point, group_size, elem_type
    )
    if zero_point is None:
        attributes["output_dtype"] = elem_type
    if (limits[0], limits[1]) in _RANGES:
        name = step.result("QuantizeLinear", values, *inputs, **attributes)
        step.builder.types[name] = (elem_type, step.builder.types[name][1])
        return name
    codes = step.add("QuantizeLinear", values, *inputs, suffix="unclamped", **attributes)
    return _clipped(step, codes, *limits)


def weight_steps(
    step: Step, shape: Sequence[Any], scale: Any, zero_point: Any, group_size: Any, elem_type: int
) -> tuple[list[str], dict[str, Any]]:
    """Scale and zero point of a weight `[.., n, k]` as QuantizeLinear and DequantizeLinear take it.

    One scale an output is `[n]` with axis 0, one a group `[n, k / group_size]` with axis 1 and
    block_size. Experts' weights `[experts, n, k]` have scales `[experts, n, k / group_size]`.
    """
    *rows, k = (int(size) for size in shape)
    per_channel = group_size == k and len(rows) == 1
    groups = tuple(rows) if per_channel else (*rows, k // group_size)
    inputs = [stored_as(step, scale, groups, torch.float32, "scale")]
    if zero_point is not None:
        inputs.append(codes_as(step, zero_point, groups, elem_type, "zero_point"))
    if per_channel:
        return inputs, {"axis": 0}
    return inputs, {"axis": len(rows), "block_size": group_size}


def stored_as(
    step: Step, node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype, hint: str
) -> str:
    """A stored tensor in another shape and dtype; the tensor itself where it has them."""
    value = node.meta["val"]
    if value.dtype == dtype and tuple(value.shape) == shape:
        return step.read(node)
    return step.builder.add_tensor(
        f"{step.label}.{hint}", step.known(node).to(dtype).reshape(shape)
    )


def codes_as(step: Step, node: fx.Node, shape: tuple[int, ...], elem_type: int, hint: str) -> str:
    """Stored integers as int8, or as int4 two to a byte."""
    name, lazy = f"{step.label}.{hint}", step.lazy(node)
    if elem_type != TensorProto.INT4:
        return step.builder.add_tensor(name, lazy().to(torch.int8).reshape(shape))
    return step.builder.add_weight(
        name, elem_type, shape, lambda: packed_pairs(lazy().to(torch.int8))
    )


def packed_pairs(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7] of any shape -> uint8, two a byte, the first in the low half."""
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return pack_int4(flat.reshape(1, -1))


def _unpack_int4(step: Step) -> str:
    """The stored bytes are ONNX's own layout of int4: they become the initializer."""
    stored = step.argument(0)
    assert isinstance(stored, fx.Node)
    return int4_initializer(step, step.node, step.lazy(stored))


def int4_initializer(step: Step, node: fx.Node, make: Any) -> str:
    """An int4 initializer of `node`'s label and shape, whose bytes `make` gives."""
    shape = tuple(int(size) for size in node.meta["val"].shape)
    return step.builder.add_weight(str(step.label), TensorProto.INT4, shape, make)


def _dequantize_weight(step: Step) -> str:
    codes, scale, zero_point, group_size, _ = step.node.args
    assert isinstance(codes, fx.Node)
    name = step.read(codes)
    elem_type = step.builder.elem_type(name) or TensorProto.INT8
    inputs, attributes = weight_steps(
        step, codes.meta["val"].shape, scale, zero_point, group_size, elem_type
    )
    return step.finish("DequantizeLinear", name, *inputs, **attributes)


EMITTERS: dict[str, Emitter] = {
    "panguq.dequantize.default": _dequantize,
    "panguq.dequantize_weight.default": _dequantize_weight,
    "panguq.quantize_per_channel.default": _quantize_per_channel,
    "panguq.quantize_per_tensor.default": _quantize_per_tensor,
    "panguq.quantize_per_token.default": _quantize_per_token,
    "panguq.quantize_weight.default": _quantize_weight,
    "panguq.unpack_int4.default": _unpack_int4,
}
