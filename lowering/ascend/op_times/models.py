"""Which model an op of CANN has, by the name under which timings are published."""

from __future__ import annotations

from collections.abc import Mapping

from panguq.lowering.ascend.op_times import attention, rotary, routed, vector
from panguq.lowering.ascend.op_times.call import OpModel

_RMS_NORM = {"unaligned": 1.8, "row_cycles": 6, "element_cycles": 0.34}
_SWIGLU = {"wide": 2, "unaligned": 1.2, "slice_us": 8}
MODELS: Mapping[str, OpModel] = {
    "add_rms_norm": vector.vector_model(vector.add_rms_norm_work, _RMS_NORM),
    "add_rms_norm_quant": vector.vector_model(vector.add_rms_norm_quant_work),
    "add_rms_norm_dynamic_quant": vector.vector_model(
        vector.add_rms_norm_quant_work, {"memory_gb_per_s": 650, "element_cycles": 0.6}
    ),
    "apply_rotary_pos_emb": rotary.ROTARY,
    "dequant_swiglu_quant": vector.vector_model(vector.dequant_swiglu_quant_work, {"wide": 2}),
    "dynamic_quant": vector.vector_model(vector.dynamic_quant_work, {"unaligned": 1.5}),
    "geglu": vector.vector_model(vector.swi_glu_work, _SWIGLU, sliced=True),
    "gelu": vector.vector_model(vector.elementwise_work, _SWIGLU),
    "gqa": attention.ATTENTION,
    "grouped_matmul": routed.GROUPED,
    "grouped_matmul_swiglu_quant": routed.GROUPED_SWIGLU,
    "layer_norm": vector.vector_model(vector.rms_norm_work, _RMS_NORM),
    "mha": attention.ATTENTION,
    "mla": attention.LATENT_ATTENTION,
    "mla_prolog": attention.LATENT_PROLOG,
    "moe_finalize_routing": routed.FINALIZE,
    "moe_gating_top_k": routed.GATING,
    "moe_gating_top_k_softmax": routed.GATING,
    "moe_init_routing_v2": routed.INIT_ROUTING,
    "moe_re_routing": routed.RE_ROUTING,
    "moe_token_unpermute": routed.UNPERMUTE,
    "moved": rotary.MOVED,
    "quantize": vector.vector_model(vector.quantize_work, {"unaligned": 1.5}),
    "rms_norm": vector.vector_model(vector.rms_norm_work, _RMS_NORM),
    "rotary_mul": rotary.ROTARY_MUL,
    "softmax": vector.vector_model(vector.softmax_work, {"unaligned": 1.5}),
    "swi_glu": vector.vector_model(vector.swi_glu_work, _SWIGLU, sliced=True),
}
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "add_rms_norm_dynamic_quant": ("add_rms_norm_dynamic_quant", "add_rms_norm_quant"),
    "apply_rotary_pos_emb": ("apply_rotary_pos_emb", "moved", "rotary_mul"),
    "attention": ("gqa", "mha"),
    "dynamic_quant": ("dynamic_quant", "quantize"),
    "moe_finalize_routing": ("moe_finalize_routing", "moe_token_unpermute"),
    "moe_gating_top_k_softmax": ("moe_gating_top_k_softmax", "moe_gating_top_k"),
    "moe_re_routing": ("moe_re_routing", "moe_init_routing_v2"),
    "rms_norm": ("rms_norm", "add_rms_norm", "layer_norm"),
    "swi_glu": ("swi_glu", "geglu", "gelu"),
}
"""Ops that are one kernel of CANN's, or do the same to rows, and have their constants together;
those of an op without published times are the other's. `moved` is a kernel that moves numbers, and
may do a little with each, as those are that make the tables of a rotary embedding."""
UNMODELLED: Mapping[str, str] = {
    "gather": "no lowered graph calls it, and its times are those of up to four transposes beside",
    "scatter": "no lowered graph calls it, and its times are those of up to three ops beside",
    "sparse_flash_attention": "no lowered graph calls it; which keys it reads is not in its sizes",
    "transpose": "no lowered graph calls it: it moves no memory before something else reads it",
}
"""Ops of published tables that have no price, and why."""
