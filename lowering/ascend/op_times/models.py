"""Which model an op of CANN has, by the name under which timings are published."""

from __future__ import annotations

from collections.abc import Mapping

from panguq.lowering.ascend.op_times import attention, rotary, routed, vector
from panguq.lowering.ascend.op_times.call import OpModel

MODELS: Mapping[str, OpModel] = {
    "add_rms_norm_dynamic_quant": vector.vector_model(
        vector.add_rms_norm_quant_work, {"memory_gb_per_s": 650, "element_cycles": 0.6}
    ),
    "apply_rotary_pos_emb": rotary.ROTARY,
    "dequant_swiglu_quant": vector.vector_model(vector.dequant_swiglu_quant_work, {"wide": 2}),
    "dynamic_quant": vector.vector_model(vector.dynamic_quant_work, {"unaligned": 1.5}),
    "gqa": attention.ATTENTION,
    "grouped_matmul": routed.GROUPED,
    "grouped_matmul_swiglu_quant": routed.GROUPED_SWIGLU,
    "mha": attention.ATTENTION,
    "mla": attention.LATENT_ATTENTION,
    "mla_prolog": attention.LATENT_PROLOG,
    "moe_finalize_routing": routed.FINALIZE,
    "moe_gating_top_k": routed.GATING,
    "moe_gating_top_k_softmax": routed.GATING,
    "moe_init_routing_v2": routed.INIT_ROUTING,
    "moe_re_routing": routed.RE_ROUTING,
    "rms_norm": vector.vector_model(
        vector.rms_norm_work, {"unaligned": 1.8, "row_cycles": 6, "element_cycles": 0.34}
    ),
    "softmax": vector.vector_model(vector.softmax_work, {"unaligned": 1.5}),
    "swi_glu": vector.vector_model(
        vector.swi_glu_work, {"wide": 2, "unaligned": 1.2, "slice_us": 8}, sliced=True
    ),
}
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "attention": ("gqa", "mha"),
    "moe_gating_top_k_softmax": ("moe_gating_top_k_softmax", "moe_gating_top_k"),
    "moe_re_routing": ("moe_re_routing", "moe_init_routing_v2"),
}
"""Ops that are one kernel of CANN's, or do the same to rows, and have their constants together;
those of an op without published times are the other's."""
UNMODELLED: Mapping[str, str] = {
    "gather": "no lowered graph calls it, and its times are those of up to four transposes beside",
    "scatter": "no lowered graph calls it, and its times are those of up to three ops beside",
    "sparse_flash_attention": "no lowered graph calls it; which keys it reads is not in its sizes",
    "transpose": "no lowered graph calls it: it moves no memory before something else reads it",
}
"""Ops of published tables that have no price, and why."""
