"""Importing this module registers every torch_npu op that a lowered graph may contain."""

from __future__ import annotations

from panguq.kernels.ascend.npu_attention import npu_fused_infer_attention_score
from panguq.kernels.ascend.npu_dynamic_quant import npu_dynamic_quant
from panguq.kernels.ascend.npu_format_cast import npu_format_cast
from panguq.kernels.ascend.npu_int4pack import npu_convert_weight_to_int4pack
from panguq.kernels.ascend.npu_quant_matmul import npu_quant_matmul
from panguq.kernels.ascend.npu_quantize import npu_quantize
from panguq.kernels.ascend.npu_rms_norm import npu_add_rms_norm, npu_rms_norm
from panguq.kernels.ascend.npu_rms_norm_quant import (
    npu_add_rms_norm_dynamic_quant,
    npu_add_rms_norm_quant,
)
from panguq.kernels.ascend.npu_rotary_mul import npu_rotary_mul
from panguq.kernels.ascend.npu_swiglu import npu_swiglu
from panguq.kernels.ascend.npu_trans_quant_param import npu_trans_quant_param
from panguq.kernels.ascend.npu_weight_quant_matmul import npu_weight_quant_batchmatmul

__all__ = [
    "npu_add_rms_norm",
    "npu_add_rms_norm_dynamic_quant",
    "npu_add_rms_norm_quant",
    "npu_convert_weight_to_int4pack",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_fused_infer_attention_score",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
    "npu_trans_quant_param",
    "npu_weight_quant_batchmatmul",
]
