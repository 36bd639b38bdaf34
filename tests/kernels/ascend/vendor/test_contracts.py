"""Each rule of each contract has a call that breaks it and nothing else; legal calls pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from panguq.errors import LoweringError
from panguq.kernels.ascend.vendor import ops as npu
from panguq.kernels.ascend.vendor.contracts import check_call, violations
from panguq.selftest.attention_calls import causal
from panguq.selftest.npu_calls import LEGAL, fixed
from panguq.selftest.operands import (
    BF16,
    BF16_NUMBER,
    FP16,
    FP16_NUMBER,
    FP32,
    INT8,
    INT32,
    K,
    N,
    words,
)
from panguq.selftest.operands import (
    int8s as codes,
)
from panguq.selftest.operands import (
    reals as floats,
)
from tests.kernels.ascend.moe_wrong_calls import MOE_ILLEGAL

_FP32_NUMBER = 6
_KEY_AND_VALUE = [("key", 2), ("value", 2)]


def _on_meta(*shape: int) -> Tensor:
    """A tensor too large to be real."""
    return torch.empty(shape, dtype=FP16, device="meta")


# The legal call, the arguments that break one rule, and how the rule begins.
ILLEGAL: list[tuple[str, dict[str, Any], str]] = [
    ("int4pack", {"weight": codes(4, 16)}, "weight must be int32, not int8"),
    ("int4pack", {"weight": words(16)}, "weight must have 2 dimensions, not 1"),
    ("int4pack", {"weight": words(4, 12)}, "weight's last size 12 must be a multiple of 8"),
    ("int4pack", {"weight": words(16, 8).t()}, "weight must be contiguous"),
    ("format_cast", {"acl_format": 3}, "acl_format must be 2 (ND) or 29"),
    ("format_cast", {"input": codes(32)}, "a FRACTAL_NZ tensor must have at least 2"),
    ("format_cast", {"customize_dtype": 1}, "customize_dtype must not be given"),
    ("trans_quant_param_row", {"scale": floats(1, 4)}, "scale must be float32, not bfloat16"),
    ("trans_quant_param", {"offset": floats(4)}, "offset must be float32, not bfloat16"),
    ("trans_quant_param_row", {"scale": floats(2, 4, dtype=FP32)}, "scale must have shape [n]"),
    ("trans_quant_param_row", {"round_mode": 2}, "round_mode must be 0 or 1, not 2"),
    ("trans_quant_param", {"offset": floats(3, dtype=FP32)}, "offset must have shape [4] or [1]"),
    ("quantize_token", {"dtype": _FP32_NUMBER}, "dtype must be qint8 or int8 or quint4x2, not"),
    ("quantize_dividing", {"dtype": 16}, "dtype must be qint8 or quint8 or int32, not"),
    ("quantize_dividing", {"input": codes(4, K)}, "input must be float32 or float16 or bfloat16"),
    ("quantize_token", {"scales": floats(1, dtype=FP32), "zero_points": None}, "scales must have"),
    ("quantize_token", {"zero_points": torch.zeros(1, dtype=INT32)}, "zero_points must be bfloat"),
    ("quantize_token", {"axis": -3}, "axis must be from -2 to 2, not -3"),
    ("quantize_dividing", {"axis": 2}, "axis must be from -2 to 1, not 2"),
    ("quantize_dividing", {"scales": floats(K, dtype=FP16)}, "scales must be float32 or bfloat16"),
    ("quantize_dividing", {"zero_points": floats(K)[:, None]}, "zero_points must have shape [512]"),
    ("quantize_token", {"scales": floats(7), "zero_points": None}, "scales must have shape [512]"),
    ("quantize_token", {"zero_points": floats(K)}, "zero_points must have shape [1], not [512]"),
    (
        "quantize_float16_channels",
        {"input": floats(4, 20, dtype=FP16), "scales": floats(20, dtype=FP16)},
        "input's last size 20 must be a multiple of 8",
    ),
    ("dynamic_quant", {"input": floats(4, K, dtype=FP32)}, "input must be float16 or bfloat16"),
    ("dynamic_quant", {"input": floats(K)}, "input must have 2 to 8 dimensions, not 1"),
    ("dynamic_quant", {"dst_type": 15}, "dst_type must be int8 or quint4x2"),
    ("dynamic_quant_int4", {"input": floats(4, 20)}, "input's last size 20 must be a multiple"),
    ("dynamic_quant_smooth", {"smooth_scales": floats(K)}, "smooth_scales must be float16"),
    ("dynamic_quant", {"smooth_scales": floats(8)}, "smooth_scales must have shape [512]"),
    ("dynamic_quant", {"group_index": words(2)}, "group_index must not be given"),
    ("dynamic_quant", {"quant_mode": "pertensor"}, "quant_mode must be 'pertoken'"),
    ("dynamic_quant", {"dst_type_max": 3.0}, "dst_type_max must be 0"),
    (
        "kronecker_quant",
        {
            "x": floats(4, 24, 16, dtype=FP32),
            "kronecker_p1": floats(24, 24, dtype=FP32),
            "kronecker_p2": floats(16, 16, dtype=FP32),
        },
        "x must be float16 or bfloat16",
    ),
    ("kronecker_quant", {"x": floats(4, 384)}, "x must have 3 dimensions, not 2"),
    ("kronecker_quant", {"kronecker_p1": floats(24, 24, dtype=FP16)}, "kronecker_p1 must be bfl"),
    ("kronecker_quant", {"kronecker_p2": floats(16, 8)}, "kronecker_p2 must have shape [16, 16]"),
    (
        "kronecker_quant",
        {"x": floats(2, 24, 12), "kronecker_p2": floats(12, 12)},
        "x's last size 12 must be a multiple of 8",
    ),
    (
        "kronecker_quant",
        {"x": floats(2, 24, 264), "kronecker_p2": floats(264, 264)},
        "kronecker_p2 may have 256 rows, not 264",
    ),
    (
        "kronecker_quant",
        {
            "x": torch.empty(262145, 24, 16, dtype=BF16, device="meta"),
            "kronecker_p1": torch.empty(24, 24, dtype=BF16, device="meta"),
            "kronecker_p2": torch.empty(16, 16, dtype=BF16, device="meta"),
        },
        "x's first size may be 262144, not 262145",
    ),
    ("kronecker_quant", {"clip_ratio": 1.5}, "clip_ratio must lie in (0, 1], not 1.5"),
    ("kronecker_quant", {"dst_dtype": 1}, "dst_dtype must be int32, not 1"),
    ("kronecker_quant", {"dst_type_max": 3.0}, "dst_type_max must not be given"),
    # npu_quant_matmul, int8 x int8
    ("w8a8_bfloat16", {"x1_dtype": 1}, "x1_dtype must not be given"),
    ("w8a8_bfloat16", {"y_scale": fixed(1, N)}, "y_scale must not be given"),
    ("w8a8_bfloat16", {"x1": floats(4, K)}, "x1 and x2 must be int8 and int8"),
    ("w8a8_bfloat16", {"x2": floats(K, N)}, "x1 and x2 must be int8 and int8"),
    ("w8a8_bfloat16", {"x1": codes(K)}, "x1 must have 2 to 6 dimensions, not 1"),
    ("w8a8_bfloat16", {"x2": codes(1, K, N)}, "x2 must have 2 dimensions, not 3"),
    ("w8a8_bfloat16", {"x2": codes(K - 1, N)}, "x1's k 512 must equal x2's k 511"),
    ("w8a8_bfloat16", {"x1": codes(0, K)}, "m must be at least 1, not 0"),
    ("w8a8_bfloat16", {"x1": codes(4, 0), "x2": codes(0, N)}, "k must be at least 1, not 0"),
    (
        "w8a8_bfloat16",
        {"x2": codes(K, 65536), "scale": floats(1, dtype=FP32), "bias": None},
        "n must be at most 65535, not 65536",
    ),
    ("w8a8_bfloat16", {"x1": codes(1, 65536), "x2": codes(65536, N)}, "k must be at most 65535"),
    ("w8a8_bfloat16", {"group_sizes": [0, 0, 128]}, "group_sizes must not be given"),
    ("w8a8_bfloat16", {"scale": fixed(N)}, "scale must be float32 or bfloat16, not int64"),
    ("w8a8_bfloat16", {"scale": floats(N, dtype=FP16)}, "scale must be float32 or bfloat16"),
    ("w8a8_bfloat16", {"scale": floats(1, N, dtype=FP32)}, "scale must have shape [64] or [1]"),
    ("w8a8_bfloat16", {"scale": floats(N - 1, dtype=FP32)}, "scale must have shape [64] or [1]"),
    ("w8a8_bfloat16", {"offset": floats(N, dtype=FP32)}, "offset must not be given"),
    ("w8a8_bfloat16", {"bias": floats(N, dtype=FP16)}, "bias must be int32 or bfloat16 or float32"),
    ("w8a8_bfloat16", {"bias": floats(N - 1)}, "bias must have shape [64]"),
    ("w8a8_bfloat16", {"output_dtype": _FP32_NUMBER}, "output_dtype must be float16 or int8 or"),
    ("w8a8_float16", {"scale": floats(N, dtype=FP32)}, "scale must be int64, made by npu_trans"),
    ("w8a8_float16", {"scale": floats(N)}, "scale must be int64, not bfloat16"),
    ("w8a8_float16", {"bias": floats(N, dtype=FP16)}, "bias must be int32, not float16"),
    ("w8a8_int8", {"scale": floats(N, dtype=FP32)}, "scale must be int64, made by npu_trans"),
    ("w8a8_int8", {"offset": floats(N)}, "offset must be float32, not bfloat16"),
    ("w8a8_int8", {"offset": floats(2, dtype=FP32)}, "offset must have shape [64] or [1]"),
    ("w8a8_int32", {"scale": fixed(1)}, "scale must be float32 or bfloat16, not int64"),
    ("w8a8_int32", {"bias": floats(N)}, "bias must be int32, not bfloat16"),
    ("w8a8_dynamic_bfloat16", {"scale": fixed(N)}, "scale must be float32 or bfloat16, not int64"),
    ("w8a8_dynamic_float16", {"scale": floats(N)}, "scale must be float32, not bfloat16"),
    ("w8a8_dynamic_float16", {"bias": floats(N)}, "bias must be int32 or float16 or float32"),
    ("w8a8_dynamic_bfloat16", {"output_dtype": 1}, "output_dtype must be bfloat16 or float16 with"),
    ("w8a8_dynamic_bfloat16", {"pertoken_scale": floats(4)}, "pertoken_scale must be float32"),
    (
        "w8a8_dynamic_bfloat16",
        {"pertoken_scale": floats(5, dtype=FP32)},
        "pertoken_scale must have shape [4], not [5]",
    ),
    ("w8a8_dynamic_bfloat16", {"x1": codes(2, 4, K)}, "x1 must have shape [m, 512] with a pertok"),
    # npu_quant_matmul, int8 x int4
    ("w4a8_bfloat16", {"x1": codes(1, 4, K)}, "x1 must have shape [m, k], not [1, 4, 512]"),
    (
        "w4a8_bfloat16",
        {"x1": codes(4, 384), "x2": words(384, N // 8), "scale": fixed(1, N)},
        "k must be a multiple of 256, not 384",
    ),
    (
        "w4a8_bfloat16",
        {"x1": codes(4, 29696), "x2": words(29696, 8), "scale": fixed(116, N)},
        "k must be less than 29576, not 29696",
    ),
    ("w4a8_bfloat16", {"scale": floats(2, N, dtype=FP32)}, "scale must be int64, not float32"),
    ("w4a8_bfloat16", {"scale": fixed(4, N)}, "scale must have shape [2, 64], not [4, 64]"),
    ("w4a8_bfloat16", {"scale": fixed(N)}, "scale must have shape [2, 64], not [64]"),
    ("w4a8_bfloat16", {"offset": None}, "offset must be given"),
    ("w4a8_bfloat16", {"offset": floats(N)}, "offset must be float32, not bfloat16"),
    ("w4a8_bfloat16", {"offset": floats(1, dtype=FP32)}, "offset must have shape [64], not [1]"),
    ("w4a8_bfloat16", {"pertoken_scale": None}, "pertoken_scale must be given"),
    (
        "w4a8_bfloat16",
        {"pertoken_scale": floats(4, dtype=FP32)},
        "pertoken_scale must have shape [4, 1], not [4]",
    ),
    ("w4a8_bfloat16", {"bias": floats(N, dtype=FP32)}, "bias must not be given"),
    ("w4a8_bfloat16", {"output_dtype": None}, "output_dtype must be float16 or bfloat16"),
    ("w4a8_bfloat16", {"group_sizes": [0, 0, 128]}, "group_sizes must be [0, 0, 256]"),
    ("w4a8_bfloat16", {"x2": words(N // 8, K).t()}, "x2 must be contiguous"),
    ("w4a8_bfloat16", {"x2": words(K - 256, N // 8)}, "x1's k 512 must equal x2's k 256"),
    # npu_quant_matmul, int4 x int4
    ("w4a4_float16", {"x2": words(K // 8, N // 8)}, "x1's k 512 must equal x2's k 64"),
    ("w4a4_float16", {"x1": words(K // 8, 4).t()}, "x1 must be contiguous"),
    ("w4a4_static", {"output_dtype": BF16_NUMBER}, "output_dtype must be float16 without perto"),
    ("w4a4_static", {"scale": floats(N, dtype=FP32)}, "scale must be int64, made by npu_trans"),
    ("w4a4_bfloat16", {"scale": floats(2, N, dtype=FP32)}, "scale must have shape [64] or [1]"),
    # npu_weight_quant_batchmatmul
    ("w8a16_channel", {"quant_scale": fixed(N)}, "quant_scale must not be given"),
    ("w8a16_channel", {"weight_dtype": 285}, "weight_dtype must not be given"),
    ("w8a16_channel", {"inner_precise": 1}, "inner_precise must be 0"),
    (
        "w8a16_channel",
        {"x": floats(4, K, dtype=FP32), "antiquant_scale": floats(N, dtype=FP32)},
        "x must be bfloat16 or float16, not float32",
    ),
    ("w8a16_channel", {"weight": floats(K, N)}, "weight must be int8 or int32, not bfloat16"),
    ("w8a16_channel", {"x": floats(1, 4, K)}, "x and weight must have 2 dimensions, not 3 and 2"),
    ("w8a16_channel", {"weight": codes(K - 1, N)}, "x's k 512 must equal weight's k 511"),
    ("w8a16_channel", {"x": floats(0, K)}, "m must be at least 1, not 0"),
    (
        "w8a16_channel",
        {"weight": codes(K, 65536), "antiquant_scale": floats(1)},
        "n must be from 1 to 65535, not 65536",
    ),
    ("w8a16_channel", {"x": floats(4, 65536), "weight": codes(65536, N)}, "k must be from 1 to"),
    ("w4a16_groups", {"weight": words(N // 8, K).t()}, "weight must be contiguous"),
    ("w4a16_groups", {"antiquant_group_size": 48}, "antiquant_group_size must be 0 or a multiple"),
    ("w4a16_groups", {"antiquant_group_size": K}, "antiquant_group_size must be 0 or a multiple"),
    ("w4a16_groups", {"antiquant_group_size": -32}, "antiquant_group_size must be 0 or a multiple"),
    ("w8a16_channel", {"antiquant_scale": floats(N, dtype=FP32)}, "antiquant_scale must have x's"),
    ("w8a16_channel", {"antiquant_scale": floats(N - 1)}, "antiquant_scale must have shape [64]"),
    ("w4a16_groups", {"antiquant_scale": floats(N)}, "antiquant_scale must have shape [8, 64]"),
    ("w4a16_groups", {"antiquant_offset": floats(N)}, "antiquant_offset must have shape [8, 64]"),
    (
        "w8a16_channel",
        {"antiquant_offset": floats(N, dtype=FP32)},
        "antiquant_offset must be bfloat16, not float32",
    ),
    ("w4a16_groups", {"bias": floats(N)}, "bias must be float32, not bfloat16"),
    ("w8a16_offset_bias", {"bias": floats(N, dtype=FP32)}, "bias must be float16, not float32"),
    ("w8a16_offset_bias", {"bias": floats(2, dtype=FP16)}, "bias must have shape [64] or [1, 64]"),
    # norms
    ("rms_norm", {"input": codes(4, K), "gamma": floats(K, dtype=FP32)}, "input must be float32"),
    ("rms_norm", {"input": floats(*[1] * 8, K)}, "input must have 1 to 8 dimensions, not 9"),
    ("rms_norm", {"gamma": floats(K, dtype=FP16)}, "gamma must be bfloat16 or float32, not float"),
    ("rms_norm", {"gamma": floats(K - 1)}, "gamma must have shape [512], not [511]"),
    ("rms_norm", {"gamma": floats(1, 1, 4, K)}, "gamma must have from 1 to x's 3 dimensions"),
    ("rms_norm", {"input": floats(4, 0), "gamma": floats(0)}, "gamma must have elements"),
    (
        "add_rms_norm",
        {"x1": floats(*[1] * 8, 4, K), "x2": floats(*[1] * 8, 4, K)},
        "x1 must have 1",
    ),
    ("add_rms_norm", {"x2": floats(1, K)}, "x2 must have shape [4, 512], not [1, 512]"),
    ("add_rms_norm", {"x2": floats(4, K, dtype=FP16)}, "x2 must have x1's dtype bfloat16, not flo"),
    ("add_rms_norm", {"gamma": floats(K, dtype=FP32)}, "gamma must have x1's dtype bfloat16, not"),
    ("add_rms_norm", {"gamma": floats(8)}, "gamma must have shape [512], not [8]"),
    ("add_rms_norm_quant", {"axis": 1}, "axis must be -1, not 1"),
    ("add_rms_norm_quant", {"dst_type": 16}, "dst_type must be int8"),
    ("add_rms_norm_quant", {"zero_points2": floats(K)}, "zero_points2 must not be given without"),
    ("add_rms_norm_quant", {"scales1": floats(K, dtype=FP32)}, "scales1 must be bfloat16, not flo"),
    ("add_rms_norm_quant", {"zero_points1": codes(K)}, "zero_points1 must be bfloat16, not int8"),
    ("add_rms_norm_quant", {"beta": floats(K, dtype=FP32)}, "beta must be bfloat16, not float32"),
    ("add_rms_norm_quant", {"scales1": floats(1)}, "scales1 must have shape [512], not [1]"),
    ("add_rms_norm_quant_twice", {"zero_points1": floats(K)}, "zero_points1 must be int32, not bf"),
    ("add_rms_norm_quant_twice", {"scales2": floats(K)}, "scales2 must be float32, not bfloat16"),
    ("add_rms_norm_dynamic_quant", {"output_mask": [False, False]}, "output_mask must be two val"),
    (
        "add_rms_norm_dynamic_quant",
        {"smooth_scale2": floats(K)},
        "output_mask[1] must be True with smooth_scale2",
    ),
    (
        "add_rms_norm_dynamic_quant",
        {"smooth_scale2": floats(K), "output_mask": None},
        "smooth_scale2 alone must not be given",
    ),
    ("add_rms_norm_dynamic_quant", {"y_dtype": 15}, "y_dtype must be int8 or quint4x2, not"),
    ("add_rms_norm_dynamic_quant", {"beta": floats(8)}, "beta must have shape [512], not [8]"),
    (
        "add_rms_norm_dynamic_quant_twice",
        {"smooth_scale1": floats(K)},
        "smooth_scale1 must be float16, not bfloat16",
    ),
    ("add_rms_norm_dynamic_quant", {"x1": floats(K), "x2": floats(K)}, "x1 must have 2 to 8 dim"),
    (
        "add_rms_norm_dynamic_quant",
        {"x1": floats(4, 20), "x2": floats(4, 20), "gamma": floats(20), "y_dtype": 16},
        "x1's last size 20 must be a multiple of 8 for quint4x2",
    ),
    (
        "add_rms_norm_quant",
        {"x1": floats(*[1] * 8, K), "x2": floats(*[1] * 8, K)},
        "x1 must have 1 to 8 dimensions, not 9",
    ),
    ("swiglu", {"input": codes(4, K)}, "input must be float32 or float16 or bfloat16, not int8"),
    ("swiglu", {"input": floats(*[1] * 8, K)}, "input must have 1 to 8 dimensions, not 9"),
    ("swiglu", {"input": floats(K, 4).t()}, "input must be contiguous"),
    ("swiglu", {"dim": 3}, "dim must be from -3 to 2, not 3"),
    ("swiglu_dim", {"input": floats(4, 5, 8)}, "input's size 5 in dim 1 must be even"),
    ("swiglu", {"input": floats(0, K)}, "input must have elements"),
    ("gelu", {"input": codes(4, K)}, "input must be float32 or float16 or bfloat16, not int8"),
    ("gelu", {"approximate": "erf"}, "approximate must be 'none' or 'tanh', not 'erf'"),
    ("gelu", {"input": floats(*[1] * 8, K)}, "input must have at most 8 dimensions, not 9"),
    ("geglu", {"input": codes(4, K)}, "input must be float32 or float16 or bfloat16, not int8"),
    ("geglu", {"input": floats(*[1] * 8, K)}, "input must have 1 to 8 dimensions, not 9"),
    ("geglu", {"approximate": 2}, "approximate must be 0 or 1, not 2"),
    ("geglu", {"dim": 3}, "dim must be from -3 to 2, not 3"),
    ("geglu_exact", {"input": floats(4, 5, 8)}, "input's size 5 in dim 1 must be even"),
    # npu_rotary_mul
    ("rotary_mul", {"rotate": floats(64, 64)}, "rotate must not be given"),
    ("rotary_mul", {"rotary_mode": "quarter"}, "rotary_mode must be 'half' or 'interleave'"),
    ("rotary_mul", {"r2": floats(1, 1, 4, 64, dtype=FP32)}, "r2 must have input's dtype bfloat16"),
    ("rotary_mul", {"input": floats(1, 1, 4, 4, 64)}, "input must have 3 or 4 dimensions, not 5"),
    (
        "rotary_mul",
        dict.fromkeys(("input", "r1", "r2"), floats(1, 1, 4, 63)),
        "input's last size must be even and less than 896, not 63",
    ),
    (
        "rotary_mul",
        dict.fromkeys(("input", "r1", "r2"), floats(1, 1, 4, 896)),
        "input's last size must be even and less than 896, not 896",
    ),
    ("rotary_mul", {"r2": floats(1, 4, 4, 64)}, "r2 must have shape [1, 1, 4, 64]"),
    ("rotary_mul", dict.fromkeys(("r1", "r2"), floats(1, 1, 4, 32)), "r1 must have shape [1, 1, 4"),
    (
        "rotary_mul",
        {"input": floats(3, 4, 5, 64), **dict.fromkeys(("r1", "r2"), floats(1, 1, 1, 64))},
        "r1 must have shape [1, 1, 5, 64] or",
    ),
    (
        "rotary_mul",
        {"input": _on_meta(1000, 4, 600, 64)}
        | dict.fromkeys(("r1", "r2"), _on_meta(1, 1, 600, 64)),
        "input's batch must be fewer than 1000, not 1000",
    ),
    (
        "rotary_mul",
        {"input": floats(2, 9, 2, 64), **dict.fromkeys(("r1", "r2"), floats(1, 1, 2, 64))},
        "batch times heads in layout BNSD must be at most 8 for each position, not 2 * 9 for 2",
    ),
    (
        "rotary_mul",
        {"input": floats(1, 4, 40, 24), **dict.fromkeys(("r1", "r2"), floats(1, 1, 40, 24))},
        "batch times heads in layout BNSD must be at most half a position for each core",
    ),
    # npu_fused_infer_attention_score
    ("attention", {"pse_shift": floats(1, 6, 4, 4)}, "pse_shift must not be given"),
    ("attention", {"block_size": 128}, "block_size must not be given"),
    ("attention", {"input_layout": "BSH"}, "input_layout must be 'BNSD', not 'BSH'"),
    ("attention", {"pre_tokens": 65535}, "pre_tokens and next_tokens must be 2147483647"),
    ("attention", {"inner_precise": 4}, "inner_precise must be 0, 1, 2 or 3, not 4"),
    (
        "attention",
        {what: floats(2, n, 4, 64, dtype=FP32) for what, n in [("query", 6), *_KEY_AND_VALUE]},
        "query must be float16 or bfloat16, not float32",
    ),
    ("attention", {"key": codes(2, 2, 4, 64)}, "key must have query's dtype bfloat16, not int8"),
    ("attention", {"value": floats(2, 4, 64)}, "query, key and value must have 4 dimensions"),
    ("attention", {"query": floats(2, 4, 6, 64).transpose(1, 2)}, "query must be contiguous"),
    ("attention", {"num_heads": 0}, "num_heads must be more than 0, not 0"),
    ("attention", {"num_heads": 8}, "num_heads must be query's 6 heads, not 8"),
    ("attention", {"num_key_value_heads": 3}, "num_key_value_heads must be key's 2 heads, not 3"),
    (
        "attention",
        {"query": floats(2, 258, 4, 64), "num_heads": 258, "key": floats(2, 6, 4, 64)}
        | {"value": floats(2, 6, 4, 64), "num_key_value_heads": 6},
        "num_heads must be at most 256, not 258",
    ),
    (
        "attention",
        {"query": floats(2, 130, 4, 64), "num_heads": 130},
        "num_heads must be a multiple of num_key_value_heads, at most 64 times, not 130 for 2",
    ),
    (
        "attention",
        {"query": floats(2, 7, 4, 64), "num_heads": 7},
        "num_heads must be a multiple of num_key_value_heads, at most 64 times, not 7 for 2",
    ),
    (
        "attention",
        {what: floats(1, 2, 4, 64) for what, _ in _KEY_AND_VALUE},
        "key must have shape [2, 2, 4, 64], not [1, 2, 4, 64]",
    ),
    ("attention", {"value": floats(2, 2, 4, 32)}, "value must have shape [2, 2, 4, 64], not"),
    (
        "attention",
        {what: floats(2, n, 4, 60) for what, n in [("query", 6), *_KEY_AND_VALUE]},
        "the head size must be a multiple of 8 of at most 512, not 60",
    ),
    (
        "attention",
        {what: floats(2, n, 4, 520) for what, n in [("query", 6), *_KEY_AND_VALUE]},
        "the head size must be a multiple of 8 of at most 512, not 520",
    ),
    (
        "attention_without_mask",
        {what: _on_meta(65537, 4, 4, 64) for what in ("query", "key", "value")},
        "the batch must be at most 65536, not 65537",
    ),
    (
        "attention_without_mask",
        {"query": _on_meta(2, 4, 1, 64)}
        | {what: _on_meta(2, 4, 262145, 64) for what, _ in _KEY_AND_VALUE},
        "the keys must be at most 262144, not 262145",
    ),
    (
        "attention_without_mask",
        {what: _on_meta(2, 4, 20971521, 64) for what, _ in _KEY_AND_VALUE},
        "the keys must be at most 20971520, not 20971521",
    ),
    ("attention", {"sparse_mode": 4}, "sparse_mode must be 0, 2 or 3, not 4"),
    ("attention_causal", {"atten_mask": None}, "atten_mask must be given with sparse_mode 3"),
    ("attention_causal", {"atten_mask": causal(4, 4)}, "atten_mask must have shape [2048, 2048]"),
    ("attention", {"atten_mask": floats(1, 1, 4, 4)}, "atten_mask must be bool or int8 or uint8"),
    ("attention", {"atten_mask": causal(1, 1, 4, 4).mT}, "atten_mask must be contiguous"),
    ("attention", {"atten_mask": causal(2, 4, 4)}, "atten_mask must have shape [2, 1, 4, 4] or"),
    ("attention", {"atten_mask": causal(1, 1, 4, 5)}, "atten_mask must have shape [2, 1, 4, 4] or"),
    *MOE_ILLEGAL,
]


def rules(name: str, **changes: Any) -> list[str]:
    op, arguments = LEGAL[name]
    return [violation.rule for violation in violations(op, (), {**arguments(4), **changes})]


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_call_breaks_no_rule(name: str) -> None:
    assert rules(name) == []


@pytest.mark.parametrize(("name", "changes", "rule"), ILLEGAL)
def test_an_illegal_call_breaks_its_rule_alone(name: str, changes: Any, rule: str) -> None:
    broken = rules(name, **changes)
    # Another group size also wants another number of scales.
    if "antiquant_group_size" in changes:
        broken = [other for other in broken if not other.startswith("antiquant_scale must have")]
    assert [other[: len(rule)] for other in broken] == [rule]


def test_every_op_has_illegal_calls() -> None:
    assert {LEGAL[name][0] for name, _, _ in ILLEGAL} == {op for op, _ in LEGAL.values()}


@pytest.mark.parametrize("name", LEGAL)
def test_tensors_may_be_on_the_meta_device(name: str) -> None:
    op, arguments = LEGAL[name]
    on_meta = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments(4))
    assert violations(op, (), on_meta) == []


def symbolic(arguments: dict[str, Any], m: int) -> tuple[dict[str, Any], ShapeEnv]:
    """The arguments as fake tensors in which every size m is a symbol."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if size == m else DimDynamic.STATIC for size in tensor.shape]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    return pytree.tree_map_only(Tensor, fake, arguments), env


@pytest.mark.parametrize("name", LEGAL)
def test_a_symbolic_number_of_tokens_is_legal_and_stays_open(name: str) -> None:
    op, arguments = LEGAL[name]
    kwargs, env = symbolic(arguments(13), 13)
    guards = len(env.guards)
    assert violations(op, (), kwargs) == []
    assert len(env.guards) == guards


def test_what_is_known_is_checked_beside_a_symbolic_size() -> None:
    op, arguments = LEGAL["w8a16_channel"]
    kwargs, _ = symbolic({**arguments(13), "weight": codes(K - 1, N)}, 13)
    assert [violation.rule for violation in violations(op, (), kwargs)] == [
        "x's k 512 must equal weight's k 511"
    ]


def test_the_error_names_the_module_the_rule_and_its_source() -> None:
    op, arguments = LEGAL["w4a16_groups"]
    kwargs = {**arguments(4), "bias": floats(N)}
    with pytest.raises(LoweringError) as caught:
        check_call(op, (), kwargs, "model.layers.0.self_attn.q_proj")
    assert caught.value.message == (
        "model.layers.0.self_attn.q_proj: an Ascend NPU cannot run"
        " npu.npu_weight_quant_batchmatmul.default: bias must be float32, not bfloat16"
        " (op-plugin's page on npu_weight_quant_batchmatmul, for bfloat16 activations)"
    )
    check_call(op, (), arguments(4), "a legal call")


def test_arguments_that_do_not_fit_the_schema() -> None:
    (violation,) = violations(npu.npu_format_cast, (codes(2, 2),), {"format": 29})
    assert violation.op == "npu.npu_format_cast.default"
    assert violation.rule.startswith("the arguments must fit the schema: ")


def test_an_op_without_a_contract() -> None:
    with pytest.raises(LoweringError, match=r"aten.mm.default has no contract"):
        violations(torch.ops.aten.mm.default, (), {})


def test_dtype_arguments_may_be_dtypes() -> None:
    assert rules("w8a8_dynamic_bfloat16", output_dtype=torch.bfloat16) == []
    assert rules("w8a8_dynamic_float16", output_dtype=FP16_NUMBER) == []
    assert rules("w8a8_dynamic_float16", output_dtype=INT8) != []
    assert rules("w8a8_int8", output_dtype=None) == []
    assert rules("w4a8_bfloat16", output_dtype=BF16) == []
