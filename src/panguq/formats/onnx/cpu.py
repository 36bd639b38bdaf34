"""The matmul kernels of the CPU target as MatMulInteger and MatMulNBits.

The kernels for few tokens round activations and results to bfloat16; so do the nodes, with a pair
of Casts each.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from panguq.formats.onnx.builder import MICROSOFT, Value
from panguq.formats.onnx.quantize import packed_pairs, weight_steps
from panguq.formats.onnx.step import Emitter, Step

LARGEST_BLOCK = 256  # of MatMulNBits; a power of two from 16 on
SMALLEST_BLOCK = 16
FLOAT32_SUMS = 1  # accuracy_level; 4 would quantize the activations


def is_block(group_size: int) -> bool:
    """Whether MatMulNBits takes groups of this many inputs."""
    return SMALLEST_BLOCK <= group_size <= LARGEST_BLOCK and group_size & (group_size - 1) == 0


def _int8_linear(step: Step) -> str:
    given = step.arguments()
    inputs = [step.read(given["codes"]), step.turned(given["weight"])]
    if given["act_zero_point"] is not None:
        offset = step.known(given["act_zero_point"]).reshape(()).to(torch.int8)
        inputs.append(step.builder.add_tensor(f"{step.label}.zero_point", offset))
    total = step.add("MatMulInteger", *inputs, suffix="int32")
    result = step.add("Cast", total, suffix="float32", to=TensorProto.FLOAT)
    weight_scale = step.known(given["weight_scale"]).reshape(-1).float()
    act_scale = step.tensor(given["act_scale"])
    if act_scale is not None and act_scale.numel() == 1:
        scale = step.builder.add_tensor(
            f"{step.label}.deq_scale", weight_scale * act_scale.reshape(1)
        )
        return _with_bias(step, ["Mul", result, scale], given["bias"])
    scale = step.builder.add_tensor(f"{step.label}.weight_scale", weight_scale)
    result = step.add("Mul", result, scale, suffix="weight_scaled")
    return _with_bias(step, ["Mul", result, step.read(given["act_scale"])], given["bias"])


def _with_bias(step: Step, last: list[str], bias: Any) -> str:
    """The node `last` is the result, or what a bias is added to."""
    if bias is None:
        return step.finish(*last)
    scaled = step.add(*last, suffix="unbiased")
    return step.finish("Add", scaled, step.read(bias, torch.float32))


def _int8_weight_linear(step: Step) -> str:
    given = step.arguments()
    weight: fx.Node = given["weight"]
    n, k = (int(size) for size in weight.meta["val"].shape)
    block = next(b for b in (256, 128, 64, 32, 16) if k % b == 0 or b == SMALLEST_BLOCK)
    blocks = -(-k // block)
    lazy = step.lazy(weight)
    ones = step.builder.add_tensor(f"{step.label}.ones", torch.ones(n * blocks))
    bytes_name = step.builder.add_weight(
        f"{step.label}.weight_bytes",
        TensorProto.UINT8,
        (n, blocks, block),
        lambda: _shifted_bytes(lazy(), blocks * block),
    )
    tokens = step.round_to(step.read(given["x"], torch.float32), torch.bfloat16, "x_bfloat16")
    product = _n_bits(step, [tokens, bytes_name, ones], n, k, 8, block)
    product = step.round_to(product, torch.bfloat16, "product_bfloat16")
    scale = step.known(given["weight_scale"]).reshape(-1).float()
    scale_name = step.builder.add_tensor(f"{step.label}.weight_scale", scale)
    return _with_bias(step, ["Mul", product, scale_name], given["bias"])


def _shifted_bytes(codes: Tensor, padded_k: int) -> Tensor:
    """int8 `[n, k]` -> uint8 `[n, padded_k]` of code + 128: MatMulNBits takes 128 off again."""
    shifted = codes.view(torch.uint8).bitwise_xor(0x80)
    return torch.nn.functional.pad(shifted, (0, padded_k - codes.shape[1]), value=0x80)


def _int4_linear(step: Step) -> str:
    given = step.arguments()
    (stored,) = given["kernel_weight"].args
    scale, zero_point = given["kernel_scales"].args
    tokens = step.round_to(step.read(given["x"], torch.float32), torch.bfloat16, "x_bfloat16")
    scales = step.known(scale).to(torch.bfloat16).float()
    offsets = None
    if zero_point is not None:
        # The kernel adds -zero_point * scale, rounded to bfloat16: a zero point that is no integer.
        product = (step.known(zero_point).float() * scales).to(torch.bfloat16).float()
        offsets = torch.where(scales == 0, 0, product / scales)
    inputs = [tokens, *_int4_operands(step, stored, scales, offsets, given["group_size"])]
    n, k = int(stored.meta["val"].shape[0]), int(stored.meta["val"].shape[1]) * 2
    product_name = _n_bits(step, inputs, n, k, 4, given["group_size"])
    rounded = step.round_to(product_name, torch.bfloat16, "product_bfloat16")
    return _with_bias(step, ["Identity", rounded], given["bias"])


def _int4_operands(
    step: Step, stored: fx.Node, scales: Tensor, zero_point: Tensor | None, group_size: int
) -> list[str]:
    """Weight, scales and zero points (float, or 4-bit if they are integers) of MatMulNBits."""
    n, half_k = (int(size) for size in stored.meta["val"].shape)
    lazy = step.lazy(stored)
    weight = step.builder.add_weight(
        f"{step.label}.weight_nibbles",
        TensorProto.UINT8,
        (n, 2 * half_k // group_size, group_size // 2),
        # Two's complement to code + 8, in both halves of each byte.
        lambda: lazy().bitwise_xor(0x88),
    )
    names = [weight, step.builder.add_tensor(f"{step.label}.weight_scale", scales.reshape(-1))]
    if zero_point is not None and zero_point.is_floating_point():
        names.append(step.builder.add_tensor(f"{step.label}.zero_point", zero_point + 8))
    elif zero_point is not None:
        rows = [packed_pairs(row.to(torch.int8)).bitwise_xor(0x88) for row in zero_point]
        names.append(step.builder.add_tensor(f"{step.label}.zero_point", torch.cat(rows)))
    return names


def _n_bits(step: Step, inputs: list[str], n: int, k: int, bits: int, block: int) -> str:
    attributes = {"N": n, "K": k, "bits": bits, "block_size": block}
    return step.add(
        "MatMulNBits",
        *inputs,
        suffix="product",
        domain=MICROSOFT,
        accuracy_level=FLOAT32_SUMS,
        **attributes,
    )


def _dequantized_linear(step: Step) -> str:
    given = step.arguments()
    dtype: torch.dtype = given["compute_dtype"]
    codes: fx.Node = given["codes"]
    four_bits = codes.meta["val"].dtype == torch.uint8
    if four_bits and dtype == torch.float32 and is_block(given["group_size"]):
        return _dequantized_n_bits(step, given)
    n, k = (int(size) for size in codes.meta["val"].shape)
    k *= 2 if four_bits else 1
    held_turned = not four_bits and given["group_size"] == k
    if four_bits:
        lazy = step.lazy(codes)
        stored = step.builder.add_weight(f"{step.label}.codes", TensorProto.INT4, (n, k), lazy)
    else:
        stored = step.turned(codes) if held_turned else step.read(codes)
    elem_type: int = TensorProto.INT4 if four_bits else TensorProto.INT8
    steps, attributes = weight_steps(
        step, (n, k), given["scale"], given["zero_point"], given["group_size"], elem_type
    )
    if held_turned:
        attributes = {"axis": 1}
    weight = step.add("DequantizeLinear", stored, *steps, suffix="weight", **attributes)
    weight = step.round_to(weight, dtype, "weight_rounded")
    if not held_turned:
        weight = step.add("Transpose", weight, suffix="weight_t", perm=[1, 0])
    tokens = step.round_to(step.read(given["x"], torch.float32), dtype, "x_rounded")
    product = step.add("MatMul", tokens, weight, suffix="product")
    product = step.round_to(product, dtype, "product_rounded")
    return _with_bias(step, ["Identity", product], given["bias"])


def _dequantized_n_bits(step: Step, given: dict[str, Any]) -> str:
    codes: fx.Node = given["codes"]
    n, k = int(codes.meta["val"].shape[0]), int(codes.meta["val"].shape[1]) * 2
    zero_point = None if given["zero_point"] is None else step.known(given["zero_point"])
    scales = step.known(given["scale"]).float()
    operands = _int4_operands(step, codes, scales, zero_point, given["group_size"])
    inputs = [step.read(given["x"], torch.float32), *operands]
    product = _n_bits(step, inputs, n, k, 4, given["group_size"])
    return _with_bias(step, ["Identity", product], given["bias"])


def _kernel_layout(step: Step) -> Value | None:
    """What `int4_linear` and `int8_linear` read straight from the stored tensors."""
    return None


EMITTERS: dict[str, Emitter] = {
    "panguq_cpu.dequantized_linear.default": _dequantized_linear,
    "panguq_cpu.int4_kernel_scales.default": _kernel_layout,
    "panguq_cpu.int4_kernel_weight.default": _kernel_layout,
    "panguq_cpu.int4_linear.default": _int4_linear,
    "panguq_cpu.int8_linear.default": _int8_linear,
    "panguq_cpu.int8_weight_linear.default": _int8_weight_linear,
    "panguq_cpu.weight_row_sums.default": _kernel_layout,
}
