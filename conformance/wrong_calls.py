"""Calls that are wrong on purpose, and why. No layer's verdict is written here: it is asked.

`documented` is the page that rules the call out, where there is one. The pages are those of
op-plugin (docs/zh/custom_APIs/torch_npu) and of CANN's operators (ops-nn, docs/aclnn*.md), for
Atlas A2. A call without such a page is wrong because a layer of the real stack refuses it.
"""

from __future__ import annotations

from typing import NamedTuple

from conformance.calls import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    INT32,
    QINT8,
    QUINT4X2,
    Call,
    call,
)

QMM5, QMM4 = "aclnnQuantMatmulV5", "aclnnQuantMatmulV4"
WQBMM = "aclnnWeightQuantBatchMatmulV2"
NONE = None


class WrongCall(NamedTuple):
    """A call, what is wrong with it, and the page that says so (None: no page, a layer refuses)."""

    why: str
    call: Call
    documented: str | None


def _int8(why: str, documented: str | None, **changed: object) -> WrongCall:
    """An int8 matmul per token with something changed."""
    arguments: dict[str, object] = {
        "x1": "int8[m, 512]", "x2": "int8[512, 256]", "scale": "float32[256]",
        "pertoken_scale": "float32[m]", "output_dtype": BFLOAT16,
    }  # fmt: skip
    return _quant_matmul(why, documented, arguments, changed)


def _static(why: str, documented: str | None, **changed: object) -> WrongCall:
    """An int8 matmul with one scale for all tokens, float16, with something changed."""
    arguments: dict[str, object] = {
        "x1": "int8[m, 512]", "x2": "int8[512, 256]", "scale": "int64[256]",
        "bias": "int32[256]", "output_dtype": FLOAT16,
    }  # fmt: skip
    return _quant_matmul(why, documented, arguments, changed)


def _w4a8(why: str, documented: str | None, **changed: object) -> WrongCall:
    """An int8 x int4 matmul with something changed."""
    arguments: dict[str, object] = {
        "x1": "int8[m, 512]", "x2": "int32[512, 32]", "scale": "int64[2, 256]",
        "offset": "float32[256]", "pertoken_scale": "float32[m, 1]", "output_dtype": BFLOAT16,
        "group_sizes": [0, 0, 256],
    }  # fmt: skip
    return _quant_matmul(why, documented, arguments, changed)


def _w4a4(why: str, documented: str | None, **changed: object) -> WrongCall:
    """An int4 x int4 matmul with something changed."""
    arguments: dict[str, object] = {
        "x1": "int32[m, 64]", "x2": "int32[512, 32]", "scale": "float32[256]",
        "pertoken_scale": "float32[m]", "output_dtype": FLOAT16,
    }  # fmt: skip
    return _quant_matmul(why, documented, arguments, changed)


def _quant_matmul(
    why: str, documented: str | None, arguments: dict[str, object], changed: dict[str, object]
) -> WrongCall:
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in ("x1", "x2", "scale")]
    return WrongCall(why, call("npu_quant_matmul", *first, **merged), documented)


def _weight_only(why: str, documented: str | None, **changed: object) -> WrongCall:
    """A grouped W4A16 matmul with something changed."""
    arguments: dict[str, object] = {
        "x": "bfloat16[m, 512]", "weight": "int32[512, 32]", "antiquant_scale": "bfloat16[4, 256]",
        "antiquant_group_size": 128,
    }  # fmt: skip
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in ("x", "weight", "antiquant_scale")]
    return WrongCall(why, call("npu_weight_quant_batchmatmul", *first, **merged), documented)


def _wrong(why: str, documented: str | None, op: str, *args: object, **kwargs: object) -> WrongCall:
    return WrongCall(why, call(op, *args, **kwargs), documented)


INT8_MATMUL = (
    _int8("K differs: 512 and 511", NONE, x2="int8[511, 256]"),
    _int8("x1 is float16", QMM4, x1="float16[m, 512]"),
    _int8("x1 and x2 are bfloat16", QMM4, x1="bfloat16[m, 512]", x2="bfloat16[512, 256]"),
    _int8("x1 is uint8", QMM4, x1="uint8[m, 512]"),
    _int8("x1 has one dimension", NONE, x1="int8[512]", pertoken_scale=None),
    _int8("a scale of the wrong length", NONE, scale="float32[255]"),
    _int8("a scale of two dimensions", NONE, scale="float32[1, 256]"),
    _int8("a float16 scale", QMM4, scale="float16[256]"),
    _int8("a bfloat16 scale and a float16 result", NONE, scale="bfloat16[256]",
          output_dtype=FLOAT16),
    _int8("an int64 scale beside pertoken_scale", QMM4, scale="int64[256]"),
    _int8("pertoken_scale of the wrong length", QMM4, pertoken_scale="float32[7]"),
    _int8("pertoken_scale of two dimensions", NONE, pertoken_scale="float32[m, 1]"),
    _int8("a bfloat16 pertoken_scale", QMM4, pertoken_scale="bfloat16[m]"),
    _int8("an int8 result per token", QMM4, output_dtype=INT8),
    _int8("no output_dtype, so int8, per token", QMM4, output_dtype=None),
    _int8("a float32 result", QMM4, output_dtype=FLOAT32),
    _int8("a float16 bias and a bfloat16 result", NONE, bias="float16[256]"),
    _int8("a bfloat16 bias and a float16 result", QMM5, bias="bfloat16[256]", output_dtype=FLOAT16),
    _int8("an int64 bias", NONE, bias="int64[256]"),
    _int8("a bias of the wrong length", NONE, bias="float32[128]"),
    _int8("offset with a bfloat16 result", QMM4, offset="float32[256]"),
    _int8("N = 65536", QMM4, x2="int8[512, 65536]", scale="float32[65536]"),
    _int8("K = 65536", QMM4, x1="int8[m, 65536]", x2="int8[65536, 256]"),
    _static("a float32 bias without a scale per token, float16", QMM4, bias="float32[256]"),
    _static("a float16 offset", NONE, offset="float16[256]", output_dtype=INT8),
    _static("an int64 scale and a bfloat16 result", QMM4, output_dtype=BFLOAT16),
    _static("an int64 scale and an int32 result", NONE, output_dtype=INT32),
)  # fmt: skip

INT4_MATMUL = (
    _w4a8("a float32 scale", NONE, scale="float32[2, 256]"),
    _w4a8("groups of 128", QMM5, scale="int64[4, 256]", group_sizes=[0, 0, 128]),
    _w4a8("groups of 128, not said", NONE, scale="int64[4, 256]", group_sizes=None),
    _w4a8("group_sizes of 128 with scales for 256", QMM5, group_sizes=[0, 0, 128]),
    _w4a8("a scale of one dimension", QMM5, scale="int64[256]"),
    _w4a8("a scale of one dimension, no groups", NONE, scale="int64[256]", group_sizes=None),
    _w4a8("K differs: 512 and 256", NONE, x2="int32[256, 32]"),
    _w4a8("K = 384, not a multiple of 256", QMM5, x1="int8[m, 384]", x2="int32[384, 32]",
          scale="int64[1, 256]"),
    _w4a8("K = 29696, above 29576", QMM5, x1="int8[m, 29696]", x2="int32[29696, 32]",
          scale="int64[116, 256]"),
    _w4a8("an int32 bias", QMM5, bias="int32[256]"),
    _w4a8("a float32 bias", QMM5, bias="float32[256]"),
    _w4a8("pertoken_scale of one dimension", QMM5, pertoken_scale="float32[m]"),
    _w4a8("pertoken_scale of one dimension, no groups", NONE, pertoken_scale="float32[m]",
          group_sizes=None),
    _w4a8("no pertoken_scale", QMM5, pertoken_scale=None),
    _w4a8("a float16 offset", NONE, offset="float16[256]"),
    _w4a8("an offset of the wrong length", QMM5, offset="float32[255]"),
    _w4a8("an int8 result", NONE, output_dtype=INT8),
    _w4a8("x1 of three dimensions", QMM5, x1="int8[2, m, 512]"),
    _w4a4("K differs: 8 * 32 and 512", NONE, x1="int32[m, 32]"),
    _w4a4("a bfloat16 result without a scale per token", NONE, pertoken_scale=None,
          output_dtype=BFLOAT16),
    _w4a4("a scale of the wrong length", NONE, scale="float32[255]"),
    _w4a4("an int8 result", QMM5, output_dtype=INT8),
)  # fmt: skip

WEIGHT_ONLY_MATMUL = (
    _weight_only("K differs: 512 and 511", WQBMM, weight="int32[511, 32]"),
    _weight_only("groups of 48", WQBMM, antiquant_group_size=48,
                 antiquant_scale="bfloat16[11, 256]"),
    _weight_only("groups of 100", WQBMM, antiquant_group_size=100,
                 antiquant_scale="bfloat16[6, 256]"),
    _weight_only("one group of all K", WQBMM, antiquant_group_size=512,
                 antiquant_scale="bfloat16[1, 256]"),
    _weight_only("a negative group", WQBMM, antiquant_group_size=-128),
    _weight_only("too few scales", WQBMM, antiquant_scale="bfloat16[3, 256]"),
    _weight_only("scales [n, groups]", WQBMM, antiquant_scale="bfloat16[256, 4]"),
    _weight_only("scales for groups, but no group size", WQBMM, antiquant_group_size=0),
    _weight_only("a float32 scale", WQBMM, antiquant_scale="float32[4, 256]"),
    _weight_only("a float16 scale beside bfloat16", WQBMM, antiquant_scale="float16[4, 256]"),
    _weight_only("float32 x", WQBMM, x="float32[m, 512]", antiquant_scale="float32[4, 256]"),
    _weight_only("int8 x", WQBMM, x="int8[m, 512]"),
    _weight_only("a bfloat16 weight", WQBMM, weight="bfloat16[512, 256]"),
    _weight_only("an int8 zero point", WQBMM, antiquant_offset="int8[4, 256]"),
    _weight_only("an offset of another shape", WQBMM, antiquant_offset="bfloat16[1, 256]"),
    _weight_only("a bfloat16 bias beside bfloat16", WQBMM, bias="bfloat16[256]"),
    _weight_only("a float32 bias beside float16", WQBMM, x="float16[m, 512]",
                 antiquant_scale="float16[4, 256]", bias="float32[256]"),
    _weight_only("a bias of the wrong length", WQBMM, bias="float32[255]"),
    _weight_only("N = 65536", WQBMM, weight="int32[512, 8192]",
                 antiquant_scale="bfloat16[4, 65536]"),
    _weight_only("K = 65536", WQBMM, x="bfloat16[m, 65536]", weight="int32[65536, 32]",
                 antiquant_scale="bfloat16[512, 256]"),
    _weight_only("x of one dimension", WQBMM, x="bfloat16[512]"),
)  # fmt: skip


def _norm_quant(why: str, documented: str | None, **changed: object) -> WrongCall:
    """A fused addition, norm and quantization with something changed."""
    arguments: dict[str, object] = {
        "x1": "bfloat16[m, 512]", "x2": "bfloat16[m, 512]", "gamma": "bfloat16[512]",
        "scales1": "bfloat16[512]", "zero_points1": "bfloat16[512]",
    }  # fmt: skip
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in arguments]
    return WrongCall(why, call("npu_add_rms_norm_quant", *first, **merged), documented)


def _attention(why: str, documented: str | None, **changed: object) -> WrongCall:
    """Fused attention of 8 heads, 4 of key and value, with something changed."""
    arguments: dict[str, object] = {
        "query": "bfloat16[2, 8, m, 128]", "key": "bfloat16[2, 4, m, 128]",
        "value": "bfloat16[2, 4, m, 128]", "num_heads": 8, "num_key_value_heads": 4,
        "input_layout": "BNSD",
    }  # fmt: skip
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in ("query", "key", "value")]
    return WrongCall(why, call("npu_fused_infer_attention_score", *first, **merged), documented)


NORM_QUANT, ATTENTION = "aclnnAddRmsNormQuantV2", "aclnnFusedInferAttentionScoreV2"
FUSED = (
    _norm_quant("quantized along another axis", NONE, axis=0),
    _norm_quant("scales of the wrong length", NORM_QUANT, scales1="bfloat16[511]"),
    _norm_quant("gamma of the wrong length", NORM_QUANT, gamma="bfloat16[511]"),
    _norm_quant("a float16 scale beside bfloat16", NORM_QUANT, scales1="float16[512]"),
    _norm_quant("x2 of another dtype", NORM_QUANT, x2="float16[m, 512]"),
    _norm_quant("float32 x", NORM_QUANT, x1="float32[m, 512]", x2="float32[m, 512]",
                gamma="float32[512]"),
    _attention("no heads", NONE, num_heads=0),
    _attention("more heads than the query has", ATTENTION, num_heads=16),
    _attention("heads that are no multiple of the key's", ATTENTION, num_key_value_heads=3),
    _attention("a key of another head size", ATTENTION, key="bfloat16[2, 4, m, 64]"),
    _attention("float32 query", ATTENTION, query="float32[2, 8, m, 128]"),
    _attention("a key of another dtype", ATTENTION, key="float16[2, 4, m, 128]"),
    _attention("a bfloat16 mask", ATTENTION, atten_mask="bfloat16[2, 1, m, m]"),
)  # fmt: skip


def _kronecker(
    why: str,
    documented: str,
    x: str = "bfloat16[m, 32, 48]",
    p1: str = "bfloat16[32, 32]",
    p2: str = "bfloat16[48, 48]",
) -> WrongCall:
    """npu_kronecker_quant with something changed."""
    return WrongCall(why, call("npu_kronecker_quant", x, p1, p2), documented)


PACKING, QUANTIZE = "npu_convert_weight_to_int4pack", "npu_quantize"
OTHER = (
    _wrong("12 columns", NONE, PACKING, "int32[64, 12]"),
    _wrong("int8 codes", NONE, PACKING, "int8[64, 32]"),
    _wrong("a transposed view", NONE, PACKING, "int32[64, 32]^T"),
    _wrong("one dimension", NONE, PACKING, "int32[64]"),
    _wrong("float32 x", "aclnnDynamicQuantV2", "npu_dynamic_quant", "float32[m, 512]"),
    _wrong("int8 x", "aclnnDynamicQuantV2", "npu_dynamic_quant", "int8[m, 512]"),
    _wrong("4-bit codes of 516 columns", NONE, "npu_dynamic_quant", "float16[m, 516]",
           dst_type=QUINT4X2),
    _wrong("int32 codes", "aclnnDynamicQuantV2", "npu_dynamic_quant", "float16[m, 512]",
           dst_type=INT32),
    _wrong("smooth_scales of the wrong length", "aclnnDynamicQuantV2", "npu_dynamic_quant",
           "float16[m, 512]", smooth_scales="float16[511]"),
    _wrong("float32 smooth_scales", "aclnnDynamicQuantV2", "npu_dynamic_quant",
           "float16[m, 512]", smooth_scales="float32[512]"),
    _kronecker("a last size of 44", NONE, "bfloat16[m, 32, 44]", p2="bfloat16[44, 44]"),
    _kronecker("two dimensions", "aclnnFlatQuant", "bfloat16[m, 1536]"),
    _kronecker("a factor of another size", "aclnnFlatQuant", p1="bfloat16[24, 24]"),
    _kronecker("a factor of another dtype", "aclnnFlatQuant", p2="float16[48, 48]"),
    _kronecker("a factor of 264 rows", "aclnnFlatQuant", "bfloat16[m, 32, 264]",
               p2="bfloat16[264, 264]"),
    _kronecker("float32 x", "aclnnFlatQuant", "float32[m, 32, 48]", "float32[32, 32]",
               "float32[48, 48]"),
    _wrong("4-bit codes of 12 columns", NONE, QUANTIZE, "float16[m, 12]", "float16[1]", None,
           QUINT4X2, -1, False),
    _wrong("a scale of the wrong length", "aclnnAscendQuantV3", QUANTIZE, "float16[m, 512]",
           "float16[7]", None, QINT8, -1, False),
    _wrong("a zero point of another length than the scale", "aclnnAscendQuantV3", QUANTIZE,
           "float16[m, 512]", "float16[512]", "float16[1]", QINT8, -1, False),
    _wrong("int32 x", "aclnnAscendQuantV3", QUANTIZE, "int32[m, 512]", "float16[1]", None,
           QINT8, -1, False),
    _wrong("a float16 scale", "aclnnTransQuantParamV3", "npu_trans_quant_param", "float16[512]"),
    _wrong("a scale of two rows", NONE, "npu_trans_quant_param", "float32[2, 512]"),
    _wrong("round_mode 2", NONE, "npu_trans_quant_param", "float32[512]", None, 2),
    _wrong("gamma of the wrong length", "aclnnRmsNorm", "npu_rms_norm", "float16[m, 512]",
           "float16[511]"),
    _wrong("int8 x", "aclnnRmsNorm", "npu_rms_norm", "int8[m, 512]", "int8[512]"),
    _wrong("x1 and x2 of other shapes", "aclnnAddRmsNorm", "npu_add_rms_norm", "float16[m, 512]",
           "float16[m, 256]", "float16[512]"),
    _wrong("an odd number of columns", "aclnnSwiGlu", "npu_swiglu", "float16[m, 513]"),
    _wrong("int8 x", "aclnnSwiGlu", "npu_swiglu", "int8[m, 512]"),
    _wrong("cos of another head size", "aclnnRotaryPositionEmbedding", "npu_rotary_mul",
           "float16[1, 8, m, 128]", "float16[1, 1, m, 64]", "float16[1, 1, m, 64]"),
    _wrong("cos of another dtype", "aclnnRotaryPositionEmbedding", "npu_rotary_mul",
           "float16[1, 8, m, 128]", "float32[1, 1, m, 128]", "float32[1, 1, m, 128]"),
)  # fmt: skip

WRONG_CALLS = (*INT8_MATMUL, *INT4_MATMUL, *WEIGHT_ONLY_MATMUL, *FUSED, *OTHER)
