"""Rules for the numbers in AscendV1 folders. A tensor of the wrong form is left to other rules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.check.files import NOBODY, CheckedFolder, Hit, Rule, shards_of
from panguq.formats.checkpoint.ascend_v1_tensors import W4A8_SHIFT, unpack_rows
from panguq.servers import FUSED, NPU_SERVERS

_RELATIVE = 1e-6  # of products of two float32 numbers, with room for one more rounding
_SCALES = ("weight_scale", "weight_scale_second", "input_scale", "deq_scale")
_FOUR_BITS = ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
_STATIC = ("W8A8", "W8A8_MIX")


def described_linears(folder: CheckedFolder) -> Iterator[tuple[str, str]]:
    """(path, type) of each linear that the description says is quantized."""
    for name, kind in (folder.description or {}).items():
        path, dot, leaf = name.rpartition(".")
        if dot and leaf == "weight" and isinstance(kind, str) and kind != "FLOAT":
            yield path, kind


def floats(folder: CheckedFolder, name: str) -> Tensor | None:
    """A tensor's values as float64, an int64 deq_scale decoded; None without the tensor."""
    if name not in folder.tensors:
        return None
    tensor = folder.tensor(name)
    if name.endswith(".deq_scale") and tensor.dtype == torch.int64:
        tensor = (tensor & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)
    return tensor.double()


def codes(folder: CheckedFolder, path: str, kind: str) -> Tensor | None:
    """A linear's codes int8 [n, k]; None if they are not int8 [·, k]."""
    info = folder.tensors.get(f"{path}.weight")
    if info is None or info.dtype != "I8" or len(info.shape) != 2:
        return None
    stored = folder.tensor(f"{path}.weight")
    return unpack_rows(stored) if kind == "W4A8_DYNAMIC" else stored


def _bad_scale(folder: CheckedFolder) -> Iterator[Hit]:
    for path, _ in described_linears(folder):
        for leaf in _SCALES:
            scale = floats(folder, f"{path}.{leaf}")
            if scale is None:
                continue
            if not bool(scale.isfinite().all()):
                yield Hit(f"{path}.{leaf}", "not finite")
            elif bool((scale == 0).any()):
                yield Hit(f"{path}.{leaf}", "a scale is zero")
            elif leaf == "input_scale" and bool((scale < 0).any()):
                yield Hit(f"{path}.{leaf}", "negative")


def _input_offset(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind in described_linears(folder):
        offset = floats(folder, f"{path}.input_offset") if kind in _STATIC else None
        if offset is None:
            continue
        fits = (offset == offset.round()) & (offset >= -128) & (offset <= 127)
        if not bool(fits.all()):
            value = float(offset.flatten()[0])
            yield Hit(f"{path}.input_offset", f"{value:g} is no whole number from -128 to 127")


def _asymmetric_weight(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind in described_linears(folder):
        for leaf in ("weight_offset", "weight_offset_second"):
            offset = floats(folder, f"{path}.{leaf}")
            if offset is not None and bool((offset != 0).any()):
                only = ("vllm-ascend",) if kind == "W8A16" else None
                what = "adds it where the file subtracts" if only else "ignores it"
                yield Hit(f"{path}.{leaf}", f"not zero: the server {what}", only)  # type: ignore[arg-type]


def _code_range(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind in described_linears(folder):
        stored = codes(folder, path, kind) if kind in _FOUR_BITS else None
        if stored is not None and stored.numel() and bool((stored < -8).any() | (stored > 7).any()):
            yield Hit(f"{path}.weight", "codes of 4 bits lie outside -8 to 7")


def _deq_scale_value(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind in described_linears(folder):
        parts = [floats(folder, f"{path}.{leaf}") for leaf in ("input_scale", "weight_scale")]
        deq = floats(folder, f"{path}.deq_scale")
        if kind not in _STATIC or deq is None or any(part is None for part in parts):
            continue
        expected = parts[0].reshape(-1) * parts[1].reshape(-1)  # type: ignore[union-attr]
        if expected.numel() != deq.numel():
            continue
        if not torch.allclose(deq.reshape(-1), expected, rtol=_RELATIVE, atol=0.0):
            yield Hit(f"{path}.deq_scale", "it is not input_scale * weight_scale")


def _quant_bias_errors(folder: CheckedFolder) -> Iterator[tuple[str, bool, bool]]:
    """(tensor, exact, near) where quant_bias is not what its formula gives.

    quant_bias = round(bias / deq_scale - input_offset * sum_k codes). `exact`: within float32;
    `near`: as if bias / deq_scale had been rounded to the model's 16-bit dtype.
    """
    eps = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(folder.dtype, 0.0)
    for path, kind in described_linears(folder):
        stored = codes(folder, path, kind) if kind in _STATIC else None
        deq, offset = (floats(folder, f"{path}.{leaf}") for leaf in ("deq_scale", "input_offset"))
        found = floats(folder, f"{path}.quant_bias")
        if stored is None or deq is None or offset is None or found is None:
            continue
        sums = stored.sum(dim=1, dtype=torch.int64).double()
        bias = floats(folder, f"{path}.bias")
        if not deq.numel() == found.numel() == sums.numel() or not bool((deq != 0).all()):
            continue
        steps = torch.zeros_like(sums) if bias is None else bias.reshape(-1) / deq.reshape(-1)
        error = (found - (steps - offset.reshape(-1) * sums)).abs()
        room = 1.0 + _RELATIVE * (steps.abs() + sums.abs() * offset.abs())
        exact, near = error <= room, error <= room + eps * steps.abs()
        yield f"{path}.quant_bias", bool(exact.all()), bool(near.all())


def _quant_bias_value(folder: CheckedFolder) -> Iterator[Hit]:
    for name, _, near in _quant_bias_errors(folder):
        if not near:
            what = "round(bias / deq_scale - input_offset * the sum of a row's codes)"
            yield Hit(name, f"it is not {what}")


def _quant_bias_rounded(folder: CheckedFolder) -> Iterator[Hit]:
    for name, exact, near in _quant_bias_errors(folder):
        if near and not exact:
            yield Hit(
                name, f"it was computed in {folder.dtype}: the bias is off by what that loses"
            )


def _scale_bias_value(folder: CheckedFolder) -> Iterator[Hit]:
    """scale_bias sums to 8 * sum_k code * scale; msModelSlim rounds the scales to bfloat16."""
    for path, kind in described_linears(folder):
        stored = codes(folder, path, kind) if kind == "W4A8_DYNAMIC" else None
        found = floats(folder, f"{path}.scale_bias")
        scale = floats(folder, f"{path}.weight_scale")
        second = floats(folder, f"{path}.weight_scale_second")
        if stored is None or found is None or scale is None:
            continue
        n, k = stored.shape
        scales = scale if second is None else scale * second
        if scales.shape[:1] != (n,) or k % scales.shape[1] or found.shape[:1] != (n,):
            continue
        products = stored.double() * scales.repeat_interleave(k // scales.shape[1], dim=1)
        room = W4A8_SHIFT * products.abs().sum(1) / 64
        expected = W4A8_SHIFT * products.sum(1)
        if bool(((found.sum(1) - expected).abs() > room).any()):
            yield Hit(f"{path}.scale_bias", "it is not 8 * the sum of a row's codes * scales")


def _input_scale_rounded(folder: CheckedFolder) -> Iterator[Hit]:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(folder.dtype)
    if dtype is None:
        return
    percent = 50 * torch.finfo(dtype).eps
    for path, kind in described_linears(folder):
        scale = floats(folder, f"{path}.input_scale") if kind in _STATIC else None
        if scale is not None and bool((scale != scale.to(dtype).double()).any()):
            yield Hit(
                f"{path}.input_scale",
                f"vllm-ascend rounds it to {folder.dtype}, and deq_scale was made without: "
                f"results are off by up to {percent:.2f} %",
            )


def _fused_input_scale(folder: CheckedFolder) -> Iterator[Hit]:
    static = {path for path, kind in described_linears(folder) if kind in _STATIC}
    for whole, shards in shards_of(static, FUSED):
        for leaf in ("input_scale", "input_offset"):
            values = [floats(folder, f"{shard}.{leaf}") for shard in shards]
            if any(v is None or not torch.equal(v, values[0]) for v in values):  # type: ignore[arg-type]
                yield Hit(f"{whole}.{leaf}", "its shards differ, and the fused matmul has one")


VALUE_RULES = (
    Rule("bad-scale", NPU_SERVERS, _bad_scale),
    Rule("input-offset", NPU_SERVERS, _input_offset, "vllm-ascend keeps it as int8"),
    Rule("asymmetric-weight", NPU_SERVERS, _asymmetric_weight, "op-plugin; vllm-ascend, w8a16.py"),
    Rule("code-range", NPU_SERVERS, _code_range),
    Rule("deq-scale-value", NPU_SERVERS, _deq_scale_value, "msModelSlim, ascendv1.py"),
    Rule("quant-bias-value", NPU_SERVERS, _quant_bias_value, "msModelSlim, ascendv1.py"),
    Rule("quant-bias-rounded", NOBODY, _quant_bias_rounded, "msModelSlim's V1 does this"),
    Rule("scale-bias-value", NPU_SERVERS, _scale_bias_value, "aclnnQuantMatmulV5"),
    Rule("input-scale-rounded", NOBODY, _input_scale_rounded, "vllm-ascend, w8a8_static.py"),
    Rule("fused-input-scale", ("vllm-ascend",), _fused_input_scale, "vllm-ascend, w8a8_static.py"),
)
