"""The quantizers and matmuls of an Ascend graph as the ONNX operators that compute the same.

int8 codes are multiplied by MatMulInteger. A weight-only matmul is DequantizeLinear and MatMul,
with the weight rounded to 16 bits in between, as the cube core needs it; MatMulNBits would not
round it, and differ by 57 dB. The metadata names the kernel and schedule that an NPU would run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from panguq.formats.onnx.blocks import normalize
from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.quantize import packed_pairs, token_codes
from panguq.formats.onnx.step import Emitter, Step
from panguq.ir.ops.packing import pack_int4
from panguq.kernels.ascend.limits import CODES_PER_WORD, W4A8_GROUP
from panguq.kernels.ascend.own.int4_weight import QUARTERS, codes_of_quarters
from panguq.kernels.ascend.vendor.dtypes import dtype_number, dtype_of
from panguq.kernels.ascend.vendor.quant_matmul import SHIFT
from panguq.kernels.ascend.vendor.trans_quant_param import scale_bits, scale_of
from panguq.lowering.ascend.dispatch import Operands

_INT8 = (None, dtype_number(torch.qint8), dtype_number(torch.int8))


# --- quantizers ---------------------------------------------------------------------------------


def _npu_quantize(step: Step) -> str:
    """Spelled out, not QuantizeLinear: 16-bit products are often just a half, where they differ."""
    given = step.arguments()
    if given["div_mode"] or given["dtype"] not in _INT8:
        raise step.error("only int8 codes of a multiplied scale are written")
    values = step.read(given["input"], torch.float32)
    codes = _static_codes(step, values, given["scales"], given["zero_points"])
    return step.result("Cast", codes, to=TensorProto.INT8)


def _static_codes(step: Step, values: str, scales: Any, zero_points: Any) -> str:
    """clamp(round(values * scales + zero_points)), still float32."""
    scaled = step.add("Mul", values, step.read(scales, torch.float32), suffix="scaled")
    if zero_points is not None:
        offset = step.read(zero_points, torch.float32)
        scaled = step.add("Add", scaled, offset, suffix="shifted")
    rounded = step.add("Round", scaled, suffix="rounded")
    limits = (
        step.number(-128.0, torch.float32, "quant_min"),
        step.number(127.0, torch.float32, "quant_max"),
    )
    return step.add("Clip", rounded, *limits, suffix="clamped")


def _npu_dynamic_quant(step: Step) -> Value:
    given = step.arguments()
    if given["dst_type"] not in _INT8 or given["group_index"] is not None:
        raise step.error(
            "4-bit codes of activations have no ONNX operator", "export another stage or scheme"
        )
    values = step.read(given["input"], torch.float32)
    if given["smooth_scales"] is not None:
        factor = step.read(given["smooth_scales"], torch.float32)
        values = step.add("Mul", values, factor, suffix="smoothed")
    return _codes_and_scales(step, values, 0, 1)


def _codes_and_scales(step: Step, values: str, codes_at: int, scale_at: int) -> Value:
    codes, scale = step.result_name(codes_at), step.result_name(scale_at)
    found, column = token_codes(step, values, 127)
    flat = step.add("Squeeze", column, step.integers([-1], "scale_axis"), suffix="scales")
    names = [""] * (max(codes_at, scale_at) + 1)
    names[codes_at], names[scale_at] = step.call_it(found, codes), step.call_it(flat, scale)
    return tuple(names)


# --- int8 codes times integer weights -----------------------------------------------------------


def _npu_quant_matmul(step: Step) -> str:
    given = step.arguments()
    x, weight = given["x1"], given["x2"]
    output = dtype_of(given["output_dtype"], torch.int8)
    if x.meta["val"].dtype != torch.int8 or output in (torch.int8, torch.int32):
        raise step.error(f"only int8 codes and float results are written, not {output}")
    if weight.meta["val"].dtype == torch.int32:
        return _int8_by_int4(step, given)
    if given["offset"] is not None:
        raise step.error("has an offset, which belongs to int8 results")
    scale = step.known(given["scale"])
    if scale.dtype == torch.int64:
        scale = scale_of(scale)
    elif given["pertoken_scale"] is None and output == torch.float16:
        # torch_npu cuts the scale to 19 bits here.
        scale = scale_bits(scale.float()).view(torch.float32)
    return _int8_matmul(step, x, weight, scale, given["pertoken_scale"], given["bias"])


def _own_w8a8(step: Step) -> str:
    given = step.arguments()
    scale = step.known(given["scale"])
    operands = (given["x"], given["weight"], scale, given["pertoken_scale"], given["bias"])
    return _int8_matmul(step, *operands)


def _int8_matmul(
    step: Step, x: fx.Node, weight: fx.Node, scale: Tensor, pertoken_scale: Any, bias: Any
) -> str:
    """(x @ weight + int32 bias) * scale * pertoken_scale + float bias."""
    total = step.add("MatMulInteger", step.read(x), step.read(weight), suffix="int32")
    if bias is not None and bias.meta["val"].dtype == torch.int32:
        total = step.add("Add", total, step.read(bias), suffix="int32_biased")
        bias = None
    result = step.add("Cast", total, suffix="float32", to=TensorProto.FLOAT)
    steps = step.builder.add_tensor(f"{step.label}.deq_scale", scale.float().reshape(-1))
    last = ["Mul", result, steps]
    if pertoken_scale is not None:
        scaled = step.add(*last, suffix="weight_scaled")
        last = ["Mul", scaled, _column(step, pertoken_scale)]
    if bias is not None:
        last = ["Add", step.add(*last, suffix="unbiased"), step.read(bias, torch.float32)]
    return step.finish(*last)


def _column(step: Step, pertoken_scale: fx.Node) -> str:
    """Scales per token as `[..., 1]`."""
    name = step.read(pertoken_scale, torch.float32)
    if step.node.meta["val"].dim() == pertoken_scale.meta["val"].dim():
        return name
    return step.add("Unsqueeze", name, step.integers([-1], "column"), suffix="token_scale")


def _int8_by_int4(step: Step, given: dict[str, Any]) -> str:
    """sum over groups of 256 inputs of (x - 8) @ weight * scale, plus offset, times pertoken_scale.

    See `npu_quant_matmul`. One batched MatMulInteger, a group a batch: x `[g, m, 256]`, weight
    `[g, 256, n]`.
    """
    k, words = (int(size) for size in given["x2"].meta["val"].shape)
    groups, n = k // W4A8_GROUP, words * CODES_PER_WORD
    weight = _int4(step, given["x2"], (groups, W4A8_GROUP, n))
    weight = step.add("Cast", weight, suffix="weight_int8", to=TensorProto.INT8)
    shape = step.integers([-1, groups, W4A8_GROUP], "groups")
    apart = step.add("Reshape", step.read(given["x1"]), shape, suffix="x_groups")
    batched = step.add("Transpose", apart, suffix="x_batched", perm=[1, 0, 2])
    shift = step.number(SHIFT, torch.int8, "shift")
    total = step.add("MatMulInteger", batched, weight, shift, suffix="int32")
    result = step.add("Cast", total, suffix="float32", to=TensorProto.FLOAT)
    scale = scale_of(step.known(given["scale"])).reshape(groups, 1, n)
    steps = step.builder.add_tensor(f"{step.label}.group_scale", scale)
    result = step.add("Mul", result, steps, suffix="group_scaled")
    axis = step.integers([0], "groups_axis")
    total = step.add("ReduceSum", result, axis, suffix="sum", keepdims=0)
    if given["offset"] is not None:
        offset = step.read(given["offset"], torch.float32)
        total = step.add("Add", total, offset, suffix="unshifted")
    if given["pertoken_scale"] is None:
        return step.finish("Identity", total)
    return step.finish("Mul", total, _column(step, given["pertoken_scale"]))


# --- 16-bit activations times integer weights ---------------------------------------------------


def _weight_quant_matmul(step: Step) -> str:
    given = step.arguments()
    steps, offset = given["antiquant_scale"], given["antiquant_offset"]
    operands = (given["x"], given["weight"], steps, offset, given["bias"])
    return _weight_only(step, *operands, given["antiquant_group_size"])


def _own_w4a16(step: Step) -> str:
    given = step.arguments()
    operands = (given["x"], given["weight"], given["scale"], given["offset"], given["bias"])
    return _weight_only(step, *operands, given["group_size"])


def _weight_only(
    step: Step, x: fx.Node, weight: fx.Node, scale: Any, offset: Any, bias: Any, group_size: int
) -> str:
    """x @ ((codes + offset) * scale rounded to x's dtype) + bias; weight `[k, n]` in ONNX.

    panguq's own kernel scales sums, not weights, so that these are not rounded; its layout tells.
    """
    dtype = x.meta["val"].dtype
    k, columns = (int(size) for size in weight.meta["val"].shape)
    is_own = weight.meta["val"].dtype == torch.int16
    if weight.meta["val"].dtype == torch.int32:
        n, elem_type = columns * CODES_PER_WORD, TensorProto.INT4
        codes = _int4(step, weight, (k, n))
    elif is_own:
        n, elem_type = columns * QUARTERS, TensorProto.INT4
        codes = _int4_quarters(step, weight, (k, n))
    else:
        n, elem_type = columns, TensorProto.INT8
        codes = step.read(weight)
    shape = (-(-k // group_size), n) if group_size else (n,)
    scales = step.known(scale).float().reshape(-1)
    if scales.numel() == 1:
        scales = scales.repeat(n)
    inputs = [codes, step.builder.add_tensor(f"{step.label}.weight_scale", scales.reshape(shape))]
    if offset is not None:
        inputs.append(_zero_point(step, step.lazy(offset), shape, elem_type))
    attributes: dict[str, Any] = {"axis": 1}
    if group_size:
        attributes = {"axis": 0, "block_size": group_size}
    wide = step.add("DequantizeLinear", *inputs, suffix="weight", **attributes)
    values = wide if is_own else step.round_to(wide, dtype, "weight_rounded")
    tokens = step.read(x)
    if bias is None:
        return step.finish("MatMul", tokens, values)
    product = step.add("MatMul", tokens, values, suffix="product")
    return step.finish("Add", product, step.read(bias, torch.float32))


def _zero_point(
    step: Step, offset: Callable[[], Tensor], shape: tuple[int, ...], elem_type: int
) -> str:
    """The added offset as the zero point that is taken off, an integer."""
    found = -offset().float()
    if bool((found != found.round()).any()):
        raise step.error("its antiquant_offset is not whole, which no ONNX zero point is")
    codes = found.to(torch.int8).reshape(shape)
    name = f"{step.label}.zero_point"
    if elem_type == TensorProto.INT4:
        return step.builder.add_weight(name, elem_type, shape, lambda: packed_pairs(codes))
    return step.builder.add_tensor(name, codes)


def _int4(step: Step, weight: fx.Node, shape: tuple[int, ...]) -> str:
    """A weight of eight codes a word as int4: the words' bytes are ONNX's own layout."""
    lazy = step.lazy(weight)
    name = f"{step.label}.codes"
    return step.builder.add_weight(
        name, TensorProto.INT4, shape, lambda: lazy().contiguous().view(torch.uint8)
    )


def _int4_quarters(step: Step, weight: fx.Node, shape: tuple[int, ...]) -> str:
    """A weight of four codes a word, each of another quarter of n, as int4."""
    lazy = step.lazy(weight)
    name = f"{step.label}.codes"
    return step.builder.add_weight(
        name, TensorProto.INT4, shape, lambda: pack_int4(codes_of_quarters(lazy()))
    )


def _dispatch(step: Step) -> str:
    """All kernels of a table read one layout and compute the same: the plain matmul. The table is
    in the metadata."""
    given = step.arguments()
    fields = ("x", "weight", "scale", "offset", "pertoken_scale", "bias", "group_size")
    operands = Operands(**{name: given[name] for name in (*fields, "output_dtype")})
    if operands.x.meta["val"].dtype != torch.int8:
        return _weight_only(
            step,
            operands.x,
            operands.weight,
            operands.scale,
            operands.offset,
            operands.bias,
            operands.group_size,
        )
    scale = step.known(operands.scale)
    scale = scale_of(scale) if scale.dtype == torch.int64 else scale
    return _int8_matmul(
        step, operands.x, operands.weight, scale, operands.pertoken_scale, operands.bias
    )


# --- norms that quantize ------------------------------------------------------------------------


def _summed(step: Step, given: dict[str, Any]) -> tuple[str, str]:
    """x1 + x2 in float32, and the name of the rounded sum, result 2."""
    for name in ("beta", "smooth_scale1", "smooth_scale2", "scales2"):
        if given.get(name) is not None:
            raise step.error(f"has {name}, which ONNX export does not write")
    name = step.result_name(2)
    wide = step.add("Add", step.read(given["x1"]), step.read(given["x2"]), suffix="sum.wide")
    dtype = given["x1"].meta["val"].dtype
    return wide, step.call_it(step.round_to(wide, dtype, "sum"), name)


def _add_rms_norm_quant(step: Step) -> Value:
    given = step.arguments()
    if given["div_mode"]:
        raise step.error("divides by its scale, and only multiplied scales are written")
    codes = step.result_name(0)
    wide, total = _summed(step, given)
    half = given["x1"].meta["val"].dtype == torch.float16
    values = normalize(step, total if half else wide, given["gamma"], given["epsilon"])
    if half:
        values = step.round_to(values, torch.float16, "normalized")
    values = step.add("Mul", values, step.read(given["gamma"]), suffix="times_gamma")
    if half:
        values = step.round_to(values, torch.float16, "gamma_rounded")
    clamped = _static_codes(step, values, given["scales1"], given["zero_points1"])
    cast = step.add("Cast", clamped, suffix="int8", to=TensorProto.INT8)
    return (step.call_it(cast, codes), "", total)


def _add_rms_norm_dynamic_quant(step: Step) -> Value:
    given = step.arguments()
    if given["y_dtype"] not in _INT8:
        raise step.error("4-bit codes of activations have no ONNX operator")
    wide, total = _summed(step, given)
    values = normalize(step, wide, given["gamma"], given["epsilon"])
    values = step.add("Mul", values, step.read(given["gamma"]), suffix="times_gamma")
    found = _codes_and_scales(step, values, 0, 3)
    return (found[0], "", total, found[3])


def _in_kernel_layout(step: Step) -> Value | None:
    """int4 weights in words: read by the matmuls themselves."""
    return None


EMITTERS: dict[str, Emitter] = {
    "npu.npu_add_rms_norm_dynamic_quant.default": _add_rms_norm_dynamic_quant,
    "npu.npu_add_rms_norm_quant.default": _add_rms_norm_quant,
    "npu.npu_dynamic_quant.default": _npu_dynamic_quant,
    "npu.npu_quant_matmul.default": _npu_quant_matmul,
    "npu.npu_quantize.default": _npu_quantize,
    "npu.npu_weight_quant_batchmatmul.default": _weight_quant_matmul,
    "panguq.dispatch_matmul.default": _dispatch,
    "panguq_npu.int4_quarters.default": _in_kernel_layout,
    "panguq_npu.int4_weight.default": _in_kernel_layout,
    "panguq_npu.w4a16.default": _own_w4a16,
    "panguq_npu.w8a8.default": _own_w8a8,
}
