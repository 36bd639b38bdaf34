"""Importing this module registers every torch_npu op that a lowered graph may contain."""

from __future__ import annotations

from panguq.kernels.ascend.vendor.attention import npu_fused_infer_attention_score
from panguq.kernels.ascend.vendor.dynamic_quant import npu_dynamic_quant
from panguq.kernels.ascend.vendor.format_cast import npu_format_cast
from panguq.kernels.ascend.vendor.gelu import npu_geglu, npu_gelu
from panguq.kernels.ascend.vendor.grouped_matmul import npu_grouped_matmul
from panguq.kernels.ascend.vendor.grouped_swiglu_quant import npu_grouped_matmul_swiglu_quant_v2
from panguq.kernels.ascend.vendor.int4pack import npu_convert_weight_to_int4pack
from panguq.kernels.ascend.vendor.kronecker_quant import npu_kronecker_quant
from panguq.kernels.ascend.vendor.moe_combine import (
    npu_moe_finalize_routing,
    npu_moe_token_unpermute,
)
from panguq.kernels.ascend.vendor.moe_gating import (
    npu_moe_gating_top_k,
    npu_moe_gating_top_k_softmax,
)
from panguq.kernels.ascend.vendor.moe_routing import npu_moe_init_routing_v2
from panguq.kernels.ascend.vendor.quant_matmul import npu_quant_matmul
from panguq.kernels.ascend.vendor.quantize import npu_quantize
from panguq.kernels.ascend.vendor.rms_norm import npu_add_rms_norm, npu_rms_norm
from panguq.kernels.ascend.vendor.rms_norm_quant import (
    npu_add_rms_norm_dynamic_quant,
    npu_add_rms_norm_quant,
)
from panguq.kernels.ascend.vendor.rotary_mul import npu_rotary_mul
from panguq.kernels.ascend.vendor.swiglu import npu_swiglu
from panguq.kernels.ascend.vendor.trans_quant_param import npu_trans_quant_param
from panguq.kernels.ascend.vendor.weight_quant_matmul import npu_weight_quant_batchmatmul

__all__ = [
    "npu_add_rms_norm",
    "npu_add_rms_norm_dynamic_quant",
    "npu_add_rms_norm_quant",
    "npu_convert_weight_to_int4pack",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_fused_infer_attention_score",
    "npu_geglu",
    "npu_gelu",
    "npu_grouped_matmul",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_kronecker_quant",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_moe_token_unpermute",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
    "npu_trans_quant_param",
    "npu_weight_quant_batchmatmul",
]
