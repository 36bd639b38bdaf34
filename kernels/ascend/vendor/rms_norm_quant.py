"""npu_add_rms_norm_quant and _dynamic_quant: a sum, its norm, and the codes of the norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.ir.ops.quantize import quantize_per_token
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    Broken,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.dtypes import dtype_of
from panguq.kernels.ascend.vendor.int4pack import pack_words
from panguq.kernels.ascend.vendor.library import define_npu_op
from panguq.kernels.ascend.vendor.rms_norm import add_findings, normalized

_DOCS = OP_PLUGIN.format("npu_add_rms_norm_quant")
_META = "torch_npu's Meta kernel for npu_add_rms_norm_quant"
_DYNAMIC_DOCS = OP_PLUGIN.format("npu_add_rms_norm_dynamic_quant")
_HALVES = (torch.float16, torch.bfloat16)
# By x1's dtype.
_SCALE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}
_ZERO_POINT_DTYPE = {torch.float16: torch.int32, torch.bfloat16: torch.bfloat16}
_LARGEST_CODE: dict[torch.dtype | None, int] = {torch.int8: 127, torch.quint4x2: 7}


def _one_gamma(x1: Tensor, gamma: Tensor, source: str) -> Iterator[Broken]:
    yield from wrong_dtype("x1", x1, _HALVES, source)
    yield from wrong_shape("gamma", gamma, [x1.shape[-1:]], source)


def _contract(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None,
    scales2: Tensor | None,
    zero_points2: Tensor | None,
    axis: int,
    dst_type: int | None,
) -> Iterator[Broken]:
    if not 1 <= x1.dim() <= 8:
        yield Broken(f"x1 must have 1 to 8 dimensions, not {x1.dim()}", _DOCS)
        return
    yield from _one_gamma(x1, gamma, _DOCS)
    yield from add_findings(x1, x2, gamma, _DOCS)
    if axis != -1:
        yield Broken(f"axis must be -1, not {axis}", _META)
    if dtype_of(dst_type, torch.int8) != torch.int8:
        yield Broken(f"dst_type must be int8, not {dst_type}", _DOCS)
    if zero_points2 is not None and scales2 is None:
        yield Broken("zero_points2 must not be given without scales2", _DOCS)
    if x1.dtype in _HALVES:
        scale, zero_point = (_SCALE_DTYPE[x1.dtype],), (_ZERO_POINT_DTYPE[x1.dtype],)
        yield from wrong_dtype("scales1", scales1, scale, _DOCS)
        yield from wrong_dtype("scales2", scales2, scale, _DOCS)
        yield from wrong_dtype("zero_points1", zero_points1, zero_point, _DOCS)
        yield from wrong_dtype("zero_points2", zero_points2, zero_point, _DOCS)
        yield from wrong_dtype("beta", beta, (x1.dtype,), _DOCS)
    for what, tensor in (
        ("scales1", scales1),
        ("scales2", scales2),
        ("zero_points1", zero_points1),
        ("zero_points2", zero_points2),
        ("beta", beta),
    ):
        yield from wrong_shape(what, tensor, [x1.shape[-1:]], _DOCS)


def _fake(x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y1 = x1.new_empty(x1.shape, dtype=torch.int8)
    return y1, torch.empty_like(y1), x1.new_empty(x1.shape)


@define_npu_op(
    "npu_add_rms_norm_quant(Tensor x1, Tensor x2, Tensor gamma, Tensor scales1,"
    " Tensor? zero_points1, Tensor? beta=None, Tensor? scales2=None, Tensor? zero_points2=None, *,"
    " int axis=-1, float epsilon=1e-06, bool div_mode=True, int? dst_type=None)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of norm(x1 + x2) * gamma + beta with scales1, with scales2, and the sum.

    x1, x2 [..., k], gamma and beta [k], float16 or bfloat16; scales [k] float32 and zero points
    [k] int32 for float16, both bfloat16 for bfloat16. Returns int8 [..., k] twice (zeros without
    scales2, where the op leaves the memory as it is) and x1's dtype [..., k]. Codes are
    clamp(round(y / scales + zero_points)), or y * scales if not `div_mode`.

    op-plugin's page gives the formula; where it rounds is read from ops-nn's kernel
    (add_rms_norm_quant.h): in bfloat16 nothing is rounded between sum and code unless there is a
    beta, which rounds the sum; in float16 the sum, the normalized sum and its product with gamma
    are rounded. So codes may differ by one from those of `npu_quantize` after `npu_add_rms_norm`.
    """
    wide = x1.to(torch.float32) + x2.to(torch.float32)
    total = wide.to(x1.dtype)
    half = x1.dtype == torch.float16
    y, _ = normalized(total.to(torch.float32) if half or beta is not None else wide, gamma, epsilon)
    if half:
        y = (y.to(torch.float16) * gamma).to(torch.float32)
    else:
        y.mul_(gamma.to(torch.float32))
    if beta is not None:
        y.add_(beta.to(torch.float32))
    y1 = _static_codes(y, scales1, zero_points1, div_mode)
    if scales2 is None:
        return y1, torch.zeros_like(y1), total
    return y1, _static_codes(y, scales2, zero_points2, div_mode), total


def _static_codes(y: Tensor, scales: Tensor, zero_points: Tensor | None, div_mode: bool) -> Tensor:
    scales = scales.to(torch.float32)
    codes = y / scales if div_mode else y * scales
    if zero_points is not None:
        codes.add_(zero_points.to(torch.float32))
    return codes.round_().clamp_(-128, 127).to(torch.int8)


def _outputs(
    smooth_scale1: Tensor | None, smooth_scale2: Tensor | None, mask: Sequence[bool] | None
) -> tuple[bool, bool]:
    """Which of the two quantized results there are."""
    if mask is not None:
        return bool(mask[0]), bool(mask[1])
    return True, smooth_scale1 is not None and smooth_scale2 is not None


def _dynamic_contract(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scale1: Tensor | None,
    smooth_scale2: Tensor | None,
    beta: Tensor | None,
    output_mask: Sequence[bool] | None,
    y_dtype: int | None,
) -> Iterator[Broken]:
    if not 2 <= x1.dim() <= 8:
        yield Broken(f"x1 must have 2 to 8 dimensions, not {x1.dim()}", _DYNAMIC_DOCS)
        return
    yield from _one_gamma(x1, gamma, _DYNAMIC_DOCS)
    yield from add_findings(x1, x2, gamma, _DYNAMIC_DOCS)
    for what, tensor in (
        ("smooth_scale1", smooth_scale1),
        ("smooth_scale2", smooth_scale2),
        ("beta", beta),
    ):
        yield from wrong_dtype(what, tensor, (x1.dtype,), _DYNAMIC_DOCS)
        yield from wrong_shape(what, tensor, [x1.shape[-1:]], _DYNAMIC_DOCS)
    output = dtype_of(y_dtype, torch.int8)
    if output not in _LARGEST_CODE:
        found = output or y_dtype
        yield Broken(f"y_dtype must be int8 or quint4x2, not {found}", _DYNAMIC_DOCS)
    if output == torch.quint4x2 and surely(x1.shape[-1] % CODES_PER_WORD != 0):
        yield Broken(
            f"x1's last size {x1.shape[-1]} must be a multiple of {CODES_PER_WORD} for quint4x2",
            _DYNAMIC_DOCS,
        )
    if output_mask is None:
        if smooth_scale1 is None:
            yield from not_given({"smooth_scale2 alone": smooth_scale2}, _DYNAMIC_DOCS)
        return
    if len(output_mask) != 2 or not any(output_mask):
        yield Broken(
            f"output_mask must be two values, one of them True, not {list(output_mask)}",
            _DYNAMIC_DOCS,
        )
        return
    for number, (wanted, smooth) in enumerate(
        zip(output_mask, (smooth_scale1, smooth_scale2), strict=True)
    ):
        if smooth is not None and not wanted:
            yield Broken(
                f"output_mask[{number}] must be True with smooth_scale{number + 1}", _DYNAMIC_DOCS
            )


def _dynamic_fake(
    x1: Tensor,
    smooth_scale1: Tensor | None,
    smooth_scale2: Tensor | None,
    output_mask: Sequence[bool] | None,
    y_dtype: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed = dtype_of(y_dtype, torch.int8) == torch.quint4x2
    last = x1.shape[-1] // CODES_PER_WORD if packed else x1.shape[-1]
    codes_dtype = torch.int32 if packed else torch.int8
    codes, scales = [], []
    for wanted in _outputs(smooth_scale1, smooth_scale2, output_mask):
        shape = (*x1.shape[:-1], last) if wanted else (0,)
        codes.append(x1.new_empty(shape, dtype=codes_dtype))
        shape = x1.shape[:-1] if wanted else (0,)
        scales.append(x1.new_empty(shape, dtype=torch.float32))
    return codes[0], codes[1], x1.new_empty(x1.shape), scales[0], scales[1]


@define_npu_op(
    "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *,"
    " Tensor? smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None,"
    " float epsilon=1e-06, bool[2]? output_mask=None, int? y_dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dynamic_fake,
    contract=_dynamic_contract,
)
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-token codes of norm(x1 + x2) * gamma + beta, twice, the sum, and the two scales.

    x1, x2 [..., k]; gamma, beta and the smooth scales [k], all float16 or all bfloat16. Returns
    y1, y2, x, scale1, scale2: int8 [..., k] (int32 [..., k / 8] for quint4x2), x1's dtype
    [..., k], float32 [...]. A result that is not asked for has shape [0]: without an output_mask
    the second is there if both smooth scales are. op-plugin's page gives the formula; that nothing
    is rounded between sum and code is read from ops-nn's kernel. Codes and scale are those of
    `panguq::quantize_per_token`, as in `npu_dynamic_quant`.
    """
    wide = x1.to(torch.float32) + x2.to(torch.float32)
    y, _ = normalized(wide, gamma, epsilon)
    y.mul_(gamma.to(torch.float32))
    if beta is not None:
        y.add_(beta.to(torch.float32))
    output = dtype_of(y_dtype, torch.int8)
    packed = output == torch.quint4x2
    codes, scales = [], []
    asked = _outputs(smooth_scale1, smooth_scale2, output_mask)
    for wanted, smooth in zip(asked, (smooth_scale1, smooth_scale2), strict=True):
        if not wanted:
            codes.append(torch.empty(0, dtype=torch.int32 if packed else torch.int8))
            scales.append(torch.empty(0, dtype=torch.float32))
            continue
        values = y if smooth is None else y * smooth.to(torch.float32)
        found, scale = quantize_per_token(values, _LARGEST_CODE[output])
        codes.append(pack_words(found) if packed else found)
        scales.append(scale.squeeze(-1))
    return codes[0], codes[1], wide.to(x1.dtype), scales[0], scales[1]
