"""npu_rms_norm and npu_add_rms_norm: root mean square normalization, of a tensor or of a sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    Broken,
    names,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ACLNN = "aclnnRmsNorm"
_ADD_DOCS = OP_PLUGIN.format("npu_add_rms_norm")


def normalized_dims(x: Tensor, gamma: Tensor) -> tuple[int, ...]:
    """The dimensions over which x is normalized: as many of the last ones as gamma has."""
    return tuple(range(x.dim() - gamma.dim(), x.dim()))


def normalized(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) without gamma, and the factor (rstd); x float32."""
    mean_square = x.square().mean(normalized_dims(x, gamma), keepdim=True)
    rstd = mean_square.add_(epsilon).rsqrt_()
    return x * rstd, rstd


def gamma_findings(x: Tensor, gamma: Tensor, source: str) -> Iterator[Broken]:
    """Finds a gamma that does not have the shape of x's last dimensions, or no elements."""
    if not 1 <= gamma.dim() <= x.dim():
        yield Broken(
            f"gamma must have from 1 to x's {x.dim()} dimensions, not {gamma.dim()}", source
        )
        return
    yield from wrong_shape("gamma", gamma, [x.shape[x.dim() - gamma.dim() :]], source)
    if any(surely(size < 1) for size in gamma.shape):
        yield Broken(f"gamma must have elements, not shape {list(gamma.shape)}", source)


def _rstd_like(x: Tensor, gamma: Tensor) -> Tensor:
    shape = (*x.shape[: x.dim() - gamma.dim()], *(1 for _ in gamma.shape))
    return x.new_empty(shape, dtype=torch.float32)


def _contract(input: Tensor, gamma: Tensor) -> Iterator[Broken]:
    yield from wrong_dtype("input", input, FLOATS, _ACLNN)
    if not 1 <= input.dim() <= 8:
        yield Broken(f"input must have 1 to 8 dimensions, not {input.dim()}", _ACLNN)
    if gamma.dtype not in (input.dtype, torch.float32):
        legal = names(list(dict.fromkeys([input.dtype, torch.float32])))
        yield Broken(f"gamma must be {legal}, not {names([gamma.dtype])}", _ACLNN)
    yield from gamma_findings(input, gamma, _ACLNN)


def _fake(input: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _rstd_like(input, gamma)


@define_npu_op(
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """input / sqrt(mean(input^2) + epsilon) * gamma, and rstd, the inverse of the root.

    input float [..., *s]; gamma [*s] of input's dtype or float32. Returns input's dtype [..., *s]
    and float32 [..., 1, ...]. All in float32 with one rounding at the end: the formula is that of
    aclnnRmsNorm, the float32 that of its public kernel and comparison function (ops-nn, rms_norm).
    """
    values, rstd = normalized(input.to(torch.float32), gamma, epsilon)
    return values.mul_(gamma.to(torch.float32)).to(input.dtype), rstd


def add_findings(x1: Tensor, x2: Tensor, gamma: Tensor, source: str) -> Iterator[Broken]:
    """Finds an x2 or gamma that does not fit x1."""
    yield from wrong_shape("x2", x2, [x1.shape], source)
    for what, tensor in (("x2", x2), ("gamma", gamma)):
        if tensor.dtype != x1.dtype:
            found = names([tensor.dtype])
            yield Broken(f"{what} must have x1's dtype {names([x1.dtype])}, not {found}", source)


def _add_contract(x1: Tensor, x2: Tensor, gamma: Tensor) -> Iterator[Broken]:
    yield from wrong_dtype("x1", x1, FLOATS, _ADD_DOCS)
    if not 1 <= x1.dim() <= 8:
        yield Broken(f"x1 must have 1 to 8 dimensions, not {x1.dim()}", _ADD_DOCS)
    yield from add_findings(x1, x2, gamma, _ADD_DOCS)
    yield from gamma_findings(x1, gamma, _ADD_DOCS)


def _add_fake(x1: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x1.new_empty(x1.shape), _rstd_like(x1, gamma), x1.new_empty(x1.shape)


@define_npu_op(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06)"
    " -> (Tensor, Tensor, Tensor)",
    _add_fake,
    contract=_add_contract,
)
def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x1 + x2 as `npu_rms_norm` defines it, rstd, and the sum.

    x1, x2 float [..., *s], gamma [*s], all of one dtype. Returns that dtype [..., *s], float32
    [..., 1, ...] and that dtype [..., *s]. op-plugin's page gives only the formula. Where it
    rounds is taken from the comparison function for Ascend 910B in ops-nn (add_rms_norm): the sum
    is rounded to x1's dtype before it is normalized, and the normalized sum before gamma; this is
    what a model does that has an add and a Llama norm. `npu_rms_norm` rounds once.
    """
    total = x1 + x2
    values, rstd = normalized(total.to(torch.float32), gamma, epsilon)
    return values.to(x1.dtype) * gamma, rstd, total
