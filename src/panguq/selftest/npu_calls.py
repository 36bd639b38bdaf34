"""Legal calls of each torch_npu op and layout, with m tokens, all arguments by keyword."""

from __future__ import annotations

from typing import Any

import torch

from panguq.kernels.ascend.vendor import ops as npu
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.selftest.attention_calls import attention_call, causal, rotary_call
from panguq.selftest.moe_calls import MOE
from panguq.selftest.operands import (
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
    int8s,
    reals,
    steps,
    words,
)


def fixed(*shape: int) -> torch.Tensor:
    """int64 scales as npu_trans_quant_param makes them."""
    scale = steps(*shape)
    return npu.npu_trans_quant_param(scale.view(-1)).view(shape)


def dynamic(m: int, dtype: torch.dtype, **rest: Any) -> Arguments:
    return {
        "x1": int8s(m, K),
        "x2": int8s(K, N),
        "scale": steps(N),
        "pertoken_scale": reals(m, dtype=FP32),
        "output_dtype": dtype_number(dtype),
        **rest,
    }


def static(m: int, scale: torch.Tensor, dtype: torch.dtype, **rest: Any) -> Arguments:
    return {
        "x1": int8s(1, m, K),
        "x2": int8s(K, N),
        "scale": scale,
        "output_dtype": dtype_number(dtype),
        **rest,
    }


def w4a8_call(m: int, dtype: torch.dtype) -> Arguments:
    return {
        "x1": int8s(m, K),
        "x2": words(K, N // 8),
        "scale": fixed(K // 256, N),
        "offset": reals(N, dtype=FP32),
        "pertoken_scale": reals(m, 1, dtype=FP32),
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
        "x": reals(m, K, dtype=dtype),
        "weight": weight,
        "antiquant_scale": reals(*scale, dtype=dtype),
        **rest,
    }


def _int32(n: int) -> torch.Tensor:
    return torch.randint(-1000, 1000, (n,), dtype=INT32)


def sums(m: int, dtype: torch.dtype, gamma: torch.dtype, **rest: Any) -> Arguments:
    """x1, x2 and gamma of the ops that normalize a sum."""
    return {
        "x1": reals(m, K, dtype=dtype),
        "x2": reals(m, K, dtype=dtype),
        "gamma": reals(K, dtype=gamma),
        **rest,
    }


_wq = npu.npu_weight_quant_batchmatmul
_qm = npu.npu_quant_matmul
_groups = (K // GROUP, N)

LEGAL: dict[str, Call] = {
    "int4pack": (
        npu.npu_convert_weight_to_int4pack,
        lambda m: {"weight": torch.randint(-8, 8, (m, 16), dtype=INT32)},
    ),
    "format_cast": (
        npu.npu_format_cast,
        lambda m: {"input": int8s(m, 32), "acl_format": 29},
    ),
    "trans_quant_param": (
        npu.npu_trans_quant_param,
        lambda m: {"scale": reals(m, dtype=FP32), "offset": reals(m, dtype=FP32)},
    ),
    "trans_quant_param_row": (
        npu.npu_trans_quant_param,
        lambda m: {"scale": reals(1, m, dtype=FP32), "round_mode": 1},
    ),
    "trans_quant_param_one_offset": (
        npu.npu_trans_quant_param,
        lambda m: {"scale": reals(m, dtype=FP32), "offset": reals(1, dtype=FP32)},
    ),
    "quantize_token": (
        npu.npu_quantize,
        lambda m: {
            "input": reals(1, m, K),
            "scales": reals(1) * 100,
            "zero_points": reals(1) * 10,
            "dtype": QINT8,
            "axis": -1,
            "div_mode": False,
        },
    ),
    "quantize_float16_channels": (
        npu.npu_quantize,
        lambda m: {
            "input": reals(m, K, dtype=FP16),
            "scales": reals(K, dtype=FP16) * 7,
            "zero_points": None,
            "dtype": QUINT4X2,
            "axis": -1,
            "div_mode": False,
        },
    ),
    "quantize_dividing": (
        npu.npu_quantize,
        lambda m: {
            "input": reals(m, K),
            "scales": steps(K) * 10,
            "zero_points": _int32(K) % 20,
            "dtype": QINT8,
        },
    ),
    "dynamic_quant": (npu.npu_dynamic_quant, lambda m: {"input": reals(1, m, K)}),
    "dynamic_quant_smooth": (
        npu.npu_dynamic_quant,
        lambda m: {
            "input": reals(m, K, dtype=FP16),
            "smooth_scales": reals(K, dtype=FP16),
        },
    ),
    "dynamic_quant_int4": (
        npu.npu_dynamic_quant,
        lambda m: {"input": reals(m, K), "dst_type": QUINT4X2},
    ),
    "kronecker_quant": (
        npu.npu_kronecker_quant,
        lambda m: {
            "x": reals(m, 24, 16),
            "kronecker_p1": reals(24, 24),
            "kronecker_p2": reals(16, 16),
            "clip_ratio": 0.75,
        },
    ),
    "w8a8_bfloat16": (
        _qm,
        lambda m: static(m, steps(N), BF16, bias=_int32(N)),
    ),
    "w8a8_bfloat16_scale": (
        _qm,
        lambda m: static(m, steps(N, dtype=BF16), BF16, bias=reals(N)),
    ),
    "w8a8_float16": (_qm, lambda m: static(m, fixed(N), FP16, bias=_int32(N))),
    "w8a8_int8": (
        _qm,
        lambda m: static(m, fixed(N), INT8, offset=reals(N, dtype=FP32)),
    ),
    "w8a8_int32": (_qm, lambda m: static(m, reals(1, dtype=FP32), INT32, bias=_int32(N))),
    "w8a8_dynamic_bfloat16": (_qm, lambda m: dynamic(m, BF16, bias=reals(N, dtype=FP32))),
    "w8a8_dynamic_bfloat16_bias": (_qm, lambda m: dynamic(m, BF16, bias=reals(N))),
    "w8a8_dynamic_float16": (_qm, lambda m: dynamic(m, FP16, bias=reals(N, dtype=FP16))),
    "w8a8_dynamic_int32_bias": (_qm, lambda m: dynamic(m, FP16, bias=_int32(N))),
    "w4a8_bfloat16": (_qm, lambda m: w4a8_call(m, BF16)),
    "w4a8_float16": (_qm, lambda m: {**w4a8_call(m, FP16), "group_sizes": [0, 0, 256]}),
    "w4a4_static": (_qm, lambda m: int4_by_int4(m, FP16, scale=fixed(N), bias=_int32(N))),
    "w4a4_float16": (
        _qm,
        lambda m: int4_by_int4(m, FP16, scale=steps(N), pertoken_scale=reals(m, dtype=FP32)),
    ),
    "w4a4_bfloat16": (
        _qm,
        lambda m: int4_by_int4(m, BF16, scale=steps(N), pertoken_scale=reals(m, dtype=FP32)),
    ),
    "w8a16_channel": (_wq, lambda m: weight_only(m, int8s(K, N), BF16, (N,))),
    "w8a16_transposed": (_wq, lambda m: weight_only(m, int8s(N, K).t(), BF16, (1, N))),
    "w8a16_offset_bias": (
        _wq,
        lambda m: weight_only(
            m,
            int8s(K, N),
            FP16,
            (1, N),
            antiquant_offset=reals(1, N, dtype=FP16),
            bias=reals(N, dtype=FP16),
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
            antiquant_offset=reals(*_groups),
            bias=reals(N, dtype=FP32),
            antiquant_group_size=GROUP,
        ),
    ),
    "w4a16_short_last_group": (
        _wq,
        lambda m: weight_only(m, words(K, N // 8), FP16, (6, N), antiquant_group_size=96),
    ),
    "rms_norm": (
        npu.npu_rms_norm,
        lambda m: {"input": reals(1, m, K), "gamma": reals(K), "epsilon": 1e-5},
    ),
    "rms_norm_float32_gamma": (
        npu.npu_rms_norm,
        lambda m: {
            "input": reals(m, 8, 64, dtype=FP16),
            "gamma": reals(8, 64, dtype=FP32),
        },
    ),
    "add_rms_norm": (npu.npu_add_rms_norm, lambda m: {**sums(m, BF16, BF16), "epsilon": 1e-5}),
    "add_rms_norm_float16": (npu.npu_add_rms_norm, lambda m: sums(m, FP16, FP16)),
    "add_rms_norm_quant": (
        npu.npu_add_rms_norm_quant,
        lambda m: sums(
            m,
            BF16,
            BF16,
            scales1=reals(K) * 50,
            zero_points1=reals(K),
            div_mode=False,
        ),
    ),
    "add_rms_norm_quant_twice": (
        npu.npu_add_rms_norm_quant,
        lambda m: sums(
            m,
            FP16,
            FP16,
            scales1=reals(K, dtype=FP32),
            zero_points1=_int32(K),
            beta=reals(K, dtype=FP16),
            scales2=reals(K, dtype=FP32),
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
            smooth_scale1=reals(K, dtype=FP16),
            smooth_scale2=reals(K, dtype=FP16),
            beta=reals(K, dtype=FP16),
            y_dtype=QUINT4X2,
        ),
    ),
    "add_rms_norm_dynamic_quant_second": (
        npu.npu_add_rms_norm_dynamic_quant,
        lambda m: sums(m, BF16, BF16, smooth_scale2=reals(K), output_mask=[False, True]),
    ),
    "swiglu": (npu.npu_swiglu, lambda m: {"input": reals(1, m, K)}),
    "swiglu_dim": (
        npu.npu_swiglu,
        lambda m: {"input": reals(m, 4, 8, dtype=FP32), "dim": 1},
    ),
    "gelu": (npu.npu_gelu, lambda m: {"input": reals(1, m, K), "approximate": "tanh"}),
    "geglu": (npu.npu_geglu, lambda m: {"input": reals(1, m, K), "activate_left": True}),
    "geglu_exact": (
        npu.npu_geglu,
        lambda m: {"input": reals(m, 4, 8, dtype=FP32), "dim": 1, "approximate": 0},
    ),
    "rotary_mul": (npu.npu_rotary_mul, lambda m: rotary_call(m, "BNSD", BF16)),
    "rotary_mul_heads_last": (npu.npu_rotary_mul, lambda m: rotary_call(m, "BSND", FP16)),
    "rotary_mul_interleave": (
        npu.npu_rotary_mul,
        lambda m: rotary_call(m, "TND", FP32, "interleave"),
    ),
    "attention": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention_call(m, BF16, 6, 2, atten_mask=causal(1, 1, m, m)),
    ),
    "attention_batch_mask": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention_call(
            m, FP16, 4, 4, atten_mask=causal(2, 1, m, m), softmax_lse_flag=True
        ),
    ),
    "attention_causal": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention_call(m, BF16, 6, 2, atten_mask=causal(2048, 2048), sparse_mode=3),
    ),
    "attention_without_mask": (
        npu.npu_fused_infer_attention_score,
        lambda m: attention_call(m, FP16, 4, 4),
    ),
    **MOE,
}
