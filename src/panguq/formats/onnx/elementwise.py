"""ATen's arithmetic, comparisons, reductions and float matmuls as ONNX nodes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from panguq.formats.onnx.step import Emitter, Step
from panguq.formats.onnx.types import carried

_UNARY = {
    "abs": "Abs",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "silu": "Swish",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
_BINARY = {
    "div.Tensor": "Div",
    "div.Scalar": "Div",
    "maximum.default": "Max",
    "minimum.default": "Min",
    "mul.Scalar": "Mul",
    "mul.Tensor": "Mul",
    "pow.Tensor_Scalar": "Pow",
    "pow.Tensor_Tensor": "Pow",
}
_COMPARISONS = {
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
}
_LOGIC = {"logical_and": "And", "logical_or": "Or", "bitwise_and": "And", "bitwise_or": "Or"}


def _unary(op_type: str, step: Step) -> str:
    return step.finish(op_type, step.read(step.argument(0), step.dtype))


def _binary(op_type: str, step: Step) -> str:
    first, second = step.pair()
    return step.finish(
        op_type, step.read(first, step.dtype, "left"), step.read(second, step.dtype, "right")
    )


def _sum(op_type: str, turned: bool, step: Step) -> str:
    """`self + alpha * other`, minus, or with the two exchanged."""
    given = step.arguments()
    left = step.read(given["self"], step.dtype, "left")
    right = step.read(given["other"], step.dtype, "right")
    if given["alpha"] != 1:
        factor = step.number(given["alpha"], step.dtype, "alpha")
        if turned:
            left = step.add("Mul", left, factor, suffix="scaled")
        else:
            right = step.add("Mul", right, factor, suffix="scaled")
    return step.finish(op_type, right, left) if turned else step.finish(op_type, left, right)


def _compare(op_type: str, step: Step) -> str:
    first, second = (_operand(argument) for argument in step.pair())
    dtype = carried(torch.result_type(first, second))
    left, right = (step.read(argument, dtype) for argument in step.pair())
    return step.result(op_type, left, right)


def _operand(argument: Any) -> Any:
    """Something of the argument's dtype and kind, for PyTorch's rules of promotion."""
    if isinstance(argument, fx.Node):
        value = argument.meta["val"]
        return torch.empty((1,) * value.dim(), dtype=value.dtype)
    return argument


def _not_equal(step: Step) -> str:
    first, second = (_operand(argument) for argument in step.pair())
    dtype = carried(torch.result_type(first, second))
    left, right = (step.read(argument, dtype) for argument in step.pair())
    return step.result("Not", step.add("Equal", left, right, suffix="equal"))


def _logic(op_type: str, step: Step) -> str:
    if step.dtype != torch.bool:
        raise step.error("works on integers, and only its boolean form has an ONNX node here")
    left, right = (step.read(argument, torch.bool) for argument in step.pair())
    return step.result(op_type, left, right)


def _not(step: Step) -> str:
    if step.dtype != torch.bool:
        raise step.error("works on integers, and only its boolean form has an ONNX node here")
    return step.result("Not", step.read(step.argument(0), torch.bool))


def _rsqrt(step: Step) -> str:
    root = step.add("Sqrt", step.read(step.argument(0), step.dtype), suffix="root")
    return step.finish("Reciprocal", root)


def _gelu(step: Step) -> str:
    given = step.arguments()
    x = step.read(given["self"], step.dtype)
    return step.finish("Gelu", x, approximate=given["approximate"])


def _softmax(step: Step) -> str:
    given = step.arguments()
    return step.finish("Softmax", step.read(given["self"], step.dtype), axis=given["dim"])


def _where(step: Step) -> str:
    condition, yes, no = (step.argument(i) for i in range(3))
    given = (step.read(value, step.dtype) for value in (yes, no))
    return step.result("Where", step.read(condition, torch.bool), *given)


def _masked_fill(step: Step) -> str:
    x, mask, value = (step.argument(i) for i in range(3))
    filled, kept = step.read(value, step.dtype, "value"), step.read(x, step.dtype)
    return step.result("Where", step.read(mask, torch.bool), filled, kept)


def _clamp(step: Step) -> str:
    given = step.arguments()
    x = step.read(given["self"], step.dtype)
    limits = [
        "" if given.get(name) is None else step.number(given[name], step.dtype, name)
        for name in ("min", "max")
    ]
    return step.finish("Clip", x, *limits)


def _reduce(op_type: str, step: Step) -> str:
    given = step.arguments()
    dims = given.get("dim")
    x = step.read(given["self"], step.dtype)
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    axes = step.integers(dims, "axes") if dims else ""
    return step.finish(op_type, x, axes, keepdims=int(bool(given.get("keepdim"))))


def _cumsum(step: Step) -> str:
    given = step.arguments()
    axis = step.builder.add_tensor(f"{step.label}.axis", torch.tensor(given["dim"]))
    return step.finish("CumSum", step.read(given["self"], step.dtype), axis)


def _layer_norm(step: Step) -> str:
    given = step.arguments()
    shape = [int(size) for size in given["normalized_shape"]]
    x = step.read(given["input"], step.dtype)
    if given["weight"] is None:
        weight = step.builder.add_tensor(f"{step.label}.ones", torch.ones(shape))
    else:
        weight = step.read(given["weight"], step.dtype)
    bias = [] if given["bias"] is None else [step.read(given["bias"], step.dtype)]
    return step.finish(
        "LayerNormalization", x, weight, *bias, axis=-len(shape), epsilon=given["eps"]
    )


def _linear(step: Step) -> str:
    given = step.arguments()
    x = step.read(given["input"], step.dtype)
    turned = step.turned(given["weight"], step.dtype)
    if given["bias"] is None:
        return step.finish("MatMul", x, turned)
    product = step.add("MatMul", x, turned, suffix="product")
    return step.finish("Add", product, step.read(given["bias"], step.dtype))


def _matmul(step: Step) -> str:
    left, right = (step.read(argument, step.dtype) for argument in step.pair())
    return step.finish("MatMul", left, right)


def _addmm(step: Step) -> str:
    given = step.arguments()
    if given["beta"] != 1 or given["alpha"] != 1:
        raise step.error("has factors other than 1, which ONNX export does not write")
    left, right = (step.read(given[name], step.dtype) for name in ("mat1", "mat2"))
    product = step.add("MatMul", left, right, suffix="product")
    return step.finish("Add", product, step.read(given["self"], step.dtype))


EMITTERS: dict[str, Emitter] = {
    **{f"aten.{name}.default": functools.partial(_unary, op) for name, op in _UNARY.items()},
    **{f"aten.{name}": functools.partial(_binary, op) for name, op in _BINARY.items()},
    **{
        f"aten.{name}.{kind}": functools.partial(_compare, op)
        for name, op in _COMPARISONS.items()
        for kind in ("Tensor", "Scalar")
    },
    **{
        f"aten.{name}.{kind}": functools.partial(_logic, op)
        for name, op in _LOGIC.items()
        for kind in ("default", "Tensor")
    },
    **{
        f"aten.{name}.{kind}": functools.partial(_sum, op, turned)
        for name, op, turned in (
            ("add", "Add", False),
            ("sub", "Sub", False),
            ("rsub", "Sub", True),
        )
        for kind in ("Tensor", "Scalar")
    },
    "aten._softmax.default": _softmax,
    "aten.addmm.default": _addmm,
    "aten.amax.default": functools.partial(_reduce, "ReduceMax"),
    "aten.amin.default": functools.partial(_reduce, "ReduceMin"),
    "aten.bitwise_not.default": _not,
    "aten.bmm.default": _matmul,
    "aten.clamp.default": _clamp,
    "aten.clamp_max.default": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.cumsum.default": _cumsum,
    "aten.gelu.default": _gelu,
    "aten.layer_norm.default": _layer_norm,
    "aten.linear.default": _linear,
    "aten.logical_not.default": _not,
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.matmul.default": _matmul,
    "aten.mean.default": functools.partial(_reduce, "ReduceMean"),
    "aten.mean.dim": functools.partial(_reduce, "ReduceMean"),
    "aten.mm.default": _matmul,
    "aten.ne.Scalar": _not_equal,
    "aten.ne.Tensor": _not_equal,
    "aten.rsqrt.default": _rsqrt,
    "aten.softmax.int": _softmax,
    "aten.sum.default": functools.partial(_reduce, "ReduceSum"),
    "aten.sum.dim_IntList": functools.partial(_reduce, "ReduceSum"),
    "aten.where.ScalarOther": _where,
    "aten.where.ScalarSelf": _where,
    "aten.where.self": _where,
}
