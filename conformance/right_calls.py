"""Calls as lowered graphs make them: every scheme, both dtypes, openPangu's shapes.

These must be taken by every layer. m is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from conformance.calls import BFLOAT16, FLOAT16, QINT8, QUINT4X2, Call, call
from conformance.moe_calls import grouped_calls, routing_calls

# k inputs, n outputs of openPangu's down projection and of a projection with a bias.
SHAPES = {"down": (6144, 1536), "key": (1536, 768)}
SHAPES_7B = {"gate and up": (4096, 25600), "down": (12800, 4096), "key": (4096, 1024)}
DTYPES = ("bfloat16", "float16")
SCHEMES = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16", "W4A16_ASYM", "W4A8", "W4A4")
GROUP, W4A8_GROUP = 128, 256


def matmul_calls(scheme: str, dtype: str, k: int, n: int, biased: bool) -> list[Call]:
    """The calls that one linear layer [k] -> [n] becomes."""
    output = {"bfloat16": BFLOAT16, "float16": FLOAT16}[dtype]
    x, packed = f"{dtype}[m, {k}]", f"int32[{k}, {n // 8}]"
    if scheme == "W8A8":
        scale = f"float32[{n}]" if dtype == "bfloat16" else f"int64[{n}]"
        return [
            call("npu_quantize", x, f"{dtype}[1]", f"{dtype}[1]", QINT8, -1, False),
            call(
                "npu_quant_matmul", f"int8[m, {k}]", f"int8[{k}, {n}]", scale,
                bias=f"int32[{n}]", output_dtype=output,
            ),
        ]  # fmt: skip
    if scheme in ("W8A16", "W4A16", "W4A16_ASYM"):
        grouped = scheme != "W8A16"
        scale = f"{dtype}[{k // GROUP}, {n}]" if grouped else f"{dtype}[{n}]"
        return [
            call(
                "npu_weight_quant_batchmatmul", x, packed if grouped else f"int8[{k}, {n}]", scale,
                scale if scheme == "W4A16_ASYM" else None, None, None,
                _float_bias(dtype, n) if biased else None, GROUP if grouped else 0,
            )
        ]  # fmt: skip
    if scheme == "W8A8_DYNAMIC":
        # With a scale per token the bias is added after scaling; float32 for a bfloat16 result.
        bias = {"bias": f"float32[{n}]"} if biased else {}
        return [
            call("npu_dynamic_quant", x),
            call(
                "npu_quant_matmul", f"int8[m, {k}]", f"int8[{k}, {n}]", f"float32[{n}]",
                pertoken_scale="float32[m]", **bias, output_dtype=output,
            ),
        ]  # fmt: skip
    if scheme == "W4A8":
        return [
            call("npu_dynamic_quant", x),
            call(
                "npu_quant_matmul", f"int8[m, {k}]", packed, f"int64[{k // W4A8_GROUP}, {n}]",
                offset=f"float32[{n}]", pertoken_scale="float32[m, 1]", output_dtype=output,
                group_sizes=[0, 0, W4A8_GROUP],
            ),
        ]  # fmt: skip
    assert scheme == "W4A4"
    return [
        call("npu_dynamic_quant", x, dst_type=QUINT4X2),
        call(
            "npu_quant_matmul", f"int32[m, {k // 8}]", packed, f"float32[{n}]",
            pertoken_scale="float32[m]", output_dtype=output,
        ),
    ]  # fmt: skip


def _float_bias(dtype: str, n: int) -> str:
    """What npu_weight_quant_batchmatmul wants: float32 beside bfloat16, float16 beside float16."""
    return f"{'float32' if dtype == 'bfloat16' else 'float16'}[{n}]"


def block_calls(dtype: str, hidden: int = 1536, ffn: int = 6144) -> list[Call]:
    """The calls around the matmuls of a decoder block, and those that prepare weights."""
    x, gamma = f"{dtype}[2, m, {hidden}]", f"{dtype}[{hidden}]"
    scale, zero_point = (dtype, dtype) if dtype == "bfloat16" else ("float32", "int32")
    return [
        call("npu_rms_norm", x, gamma, 1e-5),
        call("npu_add_rms_norm", x, x, gamma, 1e-5),
        call(
            "npu_add_rms_norm_quant", x, x, gamma, f"{scale}[{hidden}]", f"{zero_point}[{hidden}]",
            epsilon=1e-5, div_mode=False,
        ),
        call("npu_add_rms_norm_dynamic_quant", x, x, gamma, epsilon=1e-5),
        call("npu_swiglu", f"{dtype}[2, m, {2 * ffn}]", -1),
        call(
            "npu_rotary_mul", f"{dtype}[2, 12, m, 128]", f"{dtype}[2, 1, m, 128]",
            f"{dtype}[2, 1, m, 128]",
        ),
        call(
            "npu_fused_infer_attention_score", f"{dtype}[2, 12, m, 128]", f"{dtype}[2, 6, m, 128]",
            f"{dtype}[2, 6, m, 128]", num_heads=12, num_key_value_heads=6, scale=128**-0.5,
            input_layout="BNSD",
        ),
        call(
            "npu_kronecker_quant", f"{dtype}[m, 32, 48]", f"{dtype}[32, 32]", f"{dtype}[48, 48]",
            0.75,
        ),
        call("npu_trans_quant_param", f"float32[{hidden}]"),
        call("npu_convert_weight_to_int4pack", f"int32[{ffn}, {hidden}]"),
    ]  # fmt: skip


def all_calls(shapes: dict[str, tuple[int, int]] = SHAPES) -> Iterator[tuple[str, Call]]:
    """Each call once, with a name."""
    seen: set[str] = set()
    named: list[tuple[str, Call]] = [
        (f"{scheme} {dtype} {layer}{' bias' if biased else ''}", one)
        for scheme in SCHEMES
        for dtype in DTYPES
        for layer, (k, n) in shapes.items()
        for biased in (False, True)
        for one in matmul_calls(scheme, dtype, k, n, biased)
    ]
    named += [(f"block {dtype}", one) for dtype in DTYPES for one in block_calls(dtype)]
    named += [(f"routing {dtype}", one) for dtype in DTYPES for one in routing_calls(dtype)]
    named += [one for dtype in DTYPES for one in grouped_calls(dtype)]
    for name, one in named:
        if str(one) not in seen:
            seen.add(str(one))
            yield name, one
