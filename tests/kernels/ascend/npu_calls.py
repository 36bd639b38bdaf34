"""Legal calls of each torch_npu op and layout, with m tokens, all arguments by keyword."""

from __future__ import annotations

from typing import Any

import torch

from panguq.kernels.ascend.vendor import ops as npu
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from tests.kernels.ascend.moe_calls import MOE
from tests.kernels.ascend.operands import (
    BF16,
    FP16,
    FP32,
    GROUP,
    INT8,
    INT32,
    QINT8,
    QUINT4X2,
    Arguments,
    Call,
    K,
    N,
    codes,
    floats,
    words,
)


def fixed(*shape: int) -> torch.Tensor:
    """int64 scales as npu_trans_quant_param makes them."""
    scale = floats(*shape, dtype=FP32)
    return npu.npu_trans_quant_param(scale.view(-1)).view(shape)


def dynamic(m: int, dtype: torch.dtype, **rest: Any) -> Arguments:
    return {
        "x1": codes(m, K),
        "x2": codes(K, N),
        "scale": floats(N, dtype=FP32),
        "pertoken_scale": floats(m, dtype=FP32),
        "output_dtype": dtype_number(dtype),
        **rest,
    }


def static(m: int, scale: torch.Tensor, dtype: torch.dtype, **rest: Any) -> Arguments:
    return {
        "x1": codes(1, m, K),
        "x2": codes(K, N),
        "scale": scale,
        "output_dtype": dtype_number(dtype),
        **rest,
    }


def int8_by_int4(m: int, dtype: torch.dtype) -> Arguments:
    return {
        "x1": codes(m, K),
        "x2": words(K, N // 8),
        "scale": fixed(K // 256, N),
        "offset": floats(N, dtype=FP32),
        "pertoken_scale": floats(m, 1, dtype=FP32),
        "output_dtype": dtype_number(dtype),
    }


def int4_by_int4(m: int, dtype: torch.dtype, **rest: Any) -> Arguments:
    return {
        "x1": words(m, K // 8),
        "x2": words(K, N // 8),
        "output_dtype": dtype_number(dtype),
        **rest,
    }


def weight_only(
    m: int, weight: torch.Tensor, dtype: torch.dtype, scale: tuple[int, ...], **rest: Any
) -> Arguments:
    return {
        "x": floats(m, K, dtype=dtype),
        "weight": weight,
        "antiquant_scale": floats(*scale, dtype=dtype),
        **rest,
    }


def _int32(n: int) -> torch.Tensor:
    return torch.randint(-1000, 1000, (n,), dtype=INT32)


def sums(m: int, dtype: torch.dtype, gamma: torch.dtype, **rest: Any) -> Arguments:
    """x1, x2 and gamma of the ops that normalize a sum."""
    return {
        "x1": floats(m, K, dtype=dtype),
        "x2": floats(m, K, dtype=dtype),
        "gamma": floats(K, dtype=gamma),
        **rest,
    }


def rotary(m: int, layout: str, dtype: torch.dtype, mode: str = "half") -> Arguments:
    """Tables for all heads, of which there are 4."""
    shapes = {
        "BNSD": ((1, 4, m, 64), (1, 1, m, 64)),
        "BSND": ((2, m, 4, 64), (1, m, 1, 64)),
        "TND": ((m, 4, 64), (m, 1, 64)),
    }
    x, table = shapes[layout]
    return {
        "input": floats(*x, dtype=dtype),
        "r1": floats(*table, dtype=dtype),
        "r2": floats(*table, dtype=dtype),
        "rotary_mode": mode,
    }


def attention(m: int, dtype: torch.dtype, heads: int, kv_heads: int, **rest: Any) -> Arguments:
    """m queries and keys of a batch of 2."""
    return {
        "query": floats(2, heads, m, 64, dtype=dtype),
        "key": floats(2, kv_heads, m, 64, dtype=dtype),
        "value": floats(2, kv_heads, m, 64, dtype=dtype),
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": 0.125,
        "input_layout": "BNSD",
        **rest,
    }


def causal(*shape: int) -> torch.Tensor:
    """True where a key is hidden."""
    return torch.ones(shape, dtype=torch.bool).triu(1)


_wq = npu.npu_weight_quant_batchmatmul
_qm = npu.npu_quant_matmul
_groups = (K // GROUP, N)

LEGAL: dict[str, Call] = {
    "int4pack": (
        npu.npu_convert_weight_to_int4pack,
        lambda m: {"weight": torch.randint(-8, 8, (m, 16), dtype=INT32)},
    ),
    "int4pack_float": (
        npu.npu_convert_weight_to_int4pack,
        lambda m: {"weight": torch.randint(-8, 8, (m, 16)).to(FP32)},
    ),
    "format_cast": (npu.npu_format_cast, lambda m: {"input": codes(m, 32), "acl_format": 29}),
    "trans_quant_param": (
        npu.npu_trans_quant_param,
        lambda m: {"scale": floats(m, dtype=FP32), "offset": floats(m, dtype=FP32)},
    ),
    "trans_quant_param_row": (
        npu.npu_trans_quant_param,
        lambda m: {"scale": floats(1, m, dtype=FP32), "round_mode": 1},
    ),
    "trans_quant_param_one_offset": (
        npu.npu_trans_quant_param,
        lambda m: {"scale": floats(m, dtype=FP32), "offset": floats(1, dtype=FP32)},
    ),
    "quantize_token": (
        npu.npu_quantize,
        lambda m: {
            "input": floats(1, m, K),
            "scales": floats(1),
            "zero_points": floats(1),
            "dtype": QINT8,
            "axis": -1,
            "div_mode": False,
        },
    ),
    "quantize_float16_channels": (
        npu.npu_quantize,
        lambda m: {
            "input": floats(m, K, dtype=FP16),
            "scales": floats(K, dtype=FP16),
            "zero_points": None,
            "dtype": QUINT4X2,
            "axis": -1,
            "div_mode": False,
        },
    ),
    "quantize_dividing": (
        npu.npu_quantize,
        lambda m: {
            "input": floats(m, K),
            "scales": floats(K, dtype=FP32),
            "zero_points": _int32(K),
            "dtype": QINT8,
        },
    ),
    "dynamic_quant": (npu.npu_dynamic_quant, lambda m: {"input": floats(1, m, K)}),
    "dynamic_quant_smooth": (
        npu.npu_dynamic_quant,
        lambda m: {"input": floats(m, K, dtype=FP16), "smooth_scales": floats(K, dtype=FP16)},
    ),
    "dynamic_quant_int4": (
        npu.npu_dynamic_quant,
        lambda m: {"input": floats(m, K), "dst_type": QUINT4X2},
    ),
    "w8a8_bfloat16": (
        _qm,
        lambda m: static(m, floats(N, dtype=FP32), BF16, bias=_int32(N)),
    ),
    "w8a8_bfloat16_scale": (_qm, lambda m: static(m, floats(N), BF16, bias=floats(N))),
    "w8a8_float16": (_qm, lambda m: static(m, fixed(N), FP16, bias=_int32(N))),
    "w8a8_int8": (
        _qm,
        lambda m: static(m, fixed(N), INT8, offset=floats(N, dtype=FP32)),
    ),
    "w8a8_int32": (_qm, lambda m: static(m, floats(1, dtype=FP32), INT32, bias=_int32(N))),
    "w8a8_dynamic_bfloat16": (_qm, lambda m: dynamic(m, BF16, bias=floats(N, dtype=FP32))),
    "w8a8_dynamic_bfloat16_bias": (_qm, lambda m: dynamic(m, BF16, bias=floats(N))),
    "w8a8_dynamic_float16": (_qm, lambda m: dynamic(m, FP16, bias=floats(N, dtype=FP16))),
    "w8a8_dynamic_int32_bias": (_qm, lambda m: dynamic(m, FP16, bias=_int32(N))),
    "w4a8_bfloat16": (_qm, lambda m: int8_by_int4(m, BF16)),
    "w4a8_float16": (_qm, lambda m: {**int8_by_int4(m, FP16), "group_sizes": [0, 0, 256]}),
    "w4a4_static": (_qm, lambda m: int4_by_int4(m, FP16, scale=fixed(N), bias=_int32(N))),
    "w4a4_float16": (
        _qm,
        lambda m: int4_by_int4(
            m, FP16, scale=floats(N, dtype=FP32), pertoken_scale=floats(m, dtype=FP32)
        ),
    ),
    "w4a4_bfloat16": (
        _qm,
        lambda m: int4_by_int4(
            m, BF16, scale=floats(N, dtype=FP32), pertoken_scale=floats(m, dtype=FP32)
        ),
    ),
    "w8a16_channel": (_wq, lambda m: weight_only(m, codes(K, N), BF16, (N,))),
    "w8a16_transposed": (_wq, lambda m: weight_only(m, codes(N, K).t(), BF16, (1, N))),
    "w8a16_offset_bias": (
        _wq,
        lambda m: weight_only(
            m,
            codes(K, N),
            FP16,
            (1, N),
            antiquant_offset=floats(1, N, dtype=FP16),
            bias=floats(N, dtype=FP16),
        ),
    ),
    "w4a16_groups": (
        _wq,
        lambda m: weight_only(m, words(K, N // 8), BF16, _groups, antiquant_group_size=GROUP),
    ),
    "w4a16_groups_offset_bias": (
        _wq,
        lambda m: weight_only(
            m,
            words(K, N // 8),
            BF16,
            _groups,
            antiquant_offset=floats(*_groups),
            bias=floats(N, dtype=FP32),
            antiquant_group_size=GROUP,
        ),
    ),
    "w4a16_short_last_group": (
        _wq,
        lambda m: weight_only(m, words(K, N // 8), FP16, (6, N), antiquant_group_size=96),
    ),
    "rms_norm": (
        npu.npu_rms_norm,
        lambda m: {"input": floats(1, m, K), "gamma": floats(K), "epsilon": 1e-5},
    ),
    "rms_norm_float32_gamma": (
        npu.npu_rms_norm,
        lambda m: {"input": floats(m, 8, 64, dtype=FP16), "gamma": floats(8, 64, dtype=FP32)},
    ),
    "add_rms_norm": (npu.npu_add_rms_norm, lambda m: {**sums(m, BF16, BF16), "epsilon": 1e-5}),
    "add_rms_norm_float16": (npu.npu_add_rms_norm, lambda m: sums(m, FP16, FP16)),
    "add_rms_norm_quant": (
        npu.npu_add_rms_norm_quant,
        lambda m: sums(m, BF16, BF16, scales1=floats(K), zero_points1=floats(K), div_mode=False),
    ),
    "add_rms_norm_quant_twice": (
        npu.npu_add_rms_norm_quant,
        lambda m: sums(
            m,
            FP16,
            FP16,
            scales1=floats(K, dtype=FP32),
            zero_points1=_int32(K),
            beta=floats(K, dtype=FP16),
            scales2=floats(K, dtype=FP32),
            zero_points2=_int32(K),
        ),
    ),
    "add_rms_norm_dynamic_quant": (
        npu.npu_add_rms_norm_dynamic_quant,
        lambda m: sums(m, BF16, BF16, output_mask=[True, False]),
    ),
    "add_rms_norm_dynamic_quant_twice": (
        npu.npu_add_rms_norm_dynamic_quant,
        lambda m: sums(
            m,
            FP16,
            FP16,
            smooth_scale1=floats(K, dtype=FP16),
            smooth_scale2=floats(K, dtype=FP16),
            beta=floats(K, dtype=FP16),
            y_dtype=QUINT4X2,
        ),
    ),
    "add_rms_norm_dynamic_quant_second": (
        npu.npu_add_rms_norm_dynamic_quant,
        lambda m: sums(m, BF16, BF16, smooth_scale2=floats(K), output_mask=[False, True]),
    ),
    "swiglu": (npu.npu_swiglu, lambda m: {"input": floats(1, m, K)}),
    "swiglu_dim": (npu.npu_swiglu, lambda m: {"input": floats(m, 4, 8, dtype=FP32), "dim": 1}),
    "gelu": (npu.npu_gelu, lambda m: {"input": floats(1, m, K), "approximate": "tanh"}),
    "geglu": (npu.npu_geglu, lambda m: {"input": floats(1, m, K), "activate_left": True}),
    "geglu_exact": (
        npu.npu_geglu,
        lambda m: {"input": floats(m, 4, 8, dtype=FP32), "dim": 1, "approximate": 0},
    ),
    "rotary_mul": (npu.npu_rotary_mul, lambda m: rotary(m, "BNSD", BF16)),
    "rotary_mul_heads_last": (npu.npu_rotary_mul, lambda m: rotary(m, "BSND", FP16)),
    "rotary_mul_interleave": (npu.npu_rotary_mul, lambda m: rotary(m, "TND", FP32, "interleave")),
    "attention": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention(m, BF16, 6, 2, atten_mask=causal(1, 1, m, m)),
    ),
    "attention_batch_mask": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention(m, FP16, 4, 4, atten_mask=causal(2, 1, m, m), softmax_lse_flag=True),
    ),
    "attention_causal": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention(m, BF16, 6, 2, atten_mask=causal(2048, 2048), sparse_mode=3),
    ),
    "attention_without_mask": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention(m, FP16, 4, 4),
    ),
    **MOE,
}
