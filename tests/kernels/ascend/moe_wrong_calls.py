"""Calls of the ops of a mixture of experts that break one rule: with 4 tokens or rows."""

from __future__ import annotations

from typing import Any

import torch

from panguq.selftest.moe_calls import EXPERTS, INPUTS, OUTPUTS, counts, full, ids, places
from panguq.selftest.operands import (
    BF16,
    BF16_NUMBER,
    FP16,
    FP16_NUMBER,
    FP32,
    INT32,
    words,
)
from panguq.selftest.operands import (
    int8s as codes,
)
from panguq.selftest.operands import (
    reals as floats,
)


def on_meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor too large to be real."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _experts(count: int, *shape: int, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    return [on_meta(count, *shape, dtype=dtype)]


_BIAS = (EXPERTS, OUTPUTS)

# The legal call, the arguments that break one rule, and how the rule begins.
MOE_ILLEGAL: list[tuple[str, dict[str, Any], str]] = [
    ("gating_softmax", {"x": codes(4, 16)}, "x must be float32 or float16 or bfloat16, not int8"),
    ("gating_softmax", {"x": floats(16)}, "x must have 2 or 3 dimensions, not 1"),
    ("gating_softmax", {"k": 17}, "k must be from 1 to 1024 and at most the 16 experts, not 17"),
    ("gating_softmax", {"k": 0}, "k must be from 1 to 1024 and at most the 16 experts, not 0"),
    ("gating_softmax_finished", {"finished": codes(4, 3)}, "finished must be bool, not int8"),
    (
        "gating_softmax_finished",
        {"finished": torch.ones(4, dtype=torch.bool)},
        "finished must have shape [4, 3], not [4]",
    ),
    ("gating", {"x": codes(4, 16)}, "x must be float32 or float16 or bfloat16, not int8"),
    ("gating", {"x": floats(4, 2, 8)}, "x must have 2 dimensions, not 3"),
    ("gating", {"x": on_meta(4, 2049)}, "there may be at most 2048 experts, not 2049"),
    ("gating", {"input_ids": ids(4)[:, 0]}, "input_ids must not be given"),
    ("gating", {"bias": floats(16, dtype=FP32)}, "bias must be bfloat16, not float32"),
    ("gating_groups", {"bias": floats(16, dtype=FP32)}, "bias must have shape [32], not [16]"),
    ("gating_groups", {"group_select_mode": 2}, "group_select_mode must be 0 or 1, not 2"),
    ("gating", {"norm_type": 2}, "norm_type must be 0 or 1, not 2"),
    ("gating", {"renorm": 1}, "renorm must be 0, not 1"),
    ("gating_groups", {"group_count": 5}, "group_count 5 must divide the 32 experts"),
    ("gating_groups", {"k_group": 5}, "k_group must be from 1 to 4, not 5"),
    ("gating_groups", {"k": 17}, "k must be from 1 to k_group x 8, not 17"),
    (
        "gating_groups",
        {"group_count": 16, "k": 2},
        "a group must have more than 2 experts, not 2",
    ),
    (
        "gating_groups",
        {"x": on_meta(4, 640, dtype=FP32), "bias": on_meta(640, dtype=FP32), "group_count": 128},
        "groups of 5 experts, each padded to a multiple of 32, must be at most 2048",
    ),
    ("init_routing", {"x": ids(4, 64)}, "x must be float32 or float16 or bfloat16 or int8, not"),
    ("init_routing", {"expert_idx": ids(4).long()}, "expert_idx must be int32, not int64"),
    ("init_routing", {"x": floats(4, 8, 8)}, "x and expert_idx must have 2 dimensions, not 3"),
    ("init_routing", {"expert_idx": ids(3)}, "expert_idx must have x's 4 rows, not 3"),
    ("init_routing", {"drop_pad_mode": 1}, "drop_pad_mode must be 0, not 1"),
    ("init_routing", {"expert_tokens_num_type": 3}, "expert_tokens_num_type must be 0 or 1 or 2"),
    ("init_routing", {"quant_mode": 2}, "quant_mode must be -1 or 1, not 2"),
    ("init_routing", {"row_idx_type": 2}, "row_idx_type must be 0 or 1, not 2"),
    ("init_routing", {"active_num": 4}, "active_num and expert_capacity must not be given"),
    ("init_routing", {"expert_capacity": 2}, "active_num and expert_capacity must not be given"),
    ("init_routing", {"expert_num": -1}, "expert_num must be from 1 to 10240, not -1"),
    (
        "init_routing_quantizing",
        {"expert_num": 5121},
        "expert_num must be from 1 to 5120, not 5121",
    ),
    (
        "init_routing",
        {"active_expert_range": [2, 5]},
        "active_expert_range must be [first, end) within [0, 4], not [2, 5]",
    ),
    ("init_routing", {"active_expert_range": []}, "active_expert_range must be given"),
    ("init_routing", {"offset": floats(1, dtype=FP32)}, "offset must not be given"),
    ("init_routing_codes", {"scale": floats(4)}, "scale must be float32, not bfloat16"),
    ("init_routing_codes", {"scale": floats(3, dtype=FP32)}, "scale must have shape [4], not [3]"),
    (
        "init_routing_quantizing",
        {"scale": floats(4, 64, dtype=FP32)},
        "scale must have shape [2, 64] or [1, 64], not [4, 64]",
    ),
    (
        "init_routing_codes",
        {"x": codes(4, 2048), "expert_num": 128, "expert_tokens_num_type": 1},
        "expert_tokens_num_type must not be 1 for 128 experts",
    ),
    ("init_routing_quantizing", {"x": codes(4, 64)}, "x must be float to be quantized, not int8"),
    ("unpermute", {"padded_mode": True}, "padded_mode must be False"),
    ("unpermute", {"restore_shape": [4, 64]}, "restore_shape must not be given"),
    ("unpermute", {"permuted_tokens": codes(4, 64)}, "permuted_tokens must be float32 or"),
    ("unpermute", {"sorted_indices": places(4).long()}, "sorted_indices must be int32, not int64"),
    ("unpermute", {"probs": codes(4, 1)}, "probs must be float32 or float16 or bfloat16, not"),
    ("unpermute", {"permuted_tokens": floats(4)}, "permuted_tokens and sorted_indices must have"),
    ("unpermute_alone", {"sorted_indices": places(5)}, "sorted_indices must have permuted_tokens'"),
    ("unpermute", {"probs": floats(4)}, "probs must have 2 dimensions, not 1"),
    ("unpermute", {"probs": floats(4, 2)}, "probs must have one element for each of 4 indices"),
    (
        "unpermute",
        {
            "permuted_tokens": on_meta(513, 8),
            "sorted_indices": on_meta(513, dtype=INT32),
            "probs": on_meta(1, 513),
        },
        "probs may have at most 512 columns, not 513",
    ),
    ("finalize_routing", {"bias": floats(4, 64)}, "bias must not be given"),
    ("finalize_routing", {"export_for_source_row": ids(4)}, "export_for_source_row must not be"),
    ("finalize_routing", {"k": 2}, "k must be 1, its default, not 2"),
    ("finalize_routing", {"drop_pad_mode": 3}, "drop_pad_mode must be 0 or 2, not 3"),
    (
        "finalize_routing_alone",
        {"expanded_permuted_rows": codes(4, 64)},
        "expanded_permuted_rows must be float32 or float16 or bfloat16, not int8",
    ),
    (
        "finalize_routing",
        {"expanded_src_to_dst_row": places(4).long()},
        "expanded_src_to_dst_row must be int32, not int64",
    ),
    (
        "finalize_routing_alone",
        {"expanded_permuted_rows": floats(4, 8, 8)},
        "expanded_permuted_rows and expanded_src_to_dst_row must have 2 dimensions and 1, not 3",
    ),
    (
        "finalize_routing_alone",
        {"expanded_src_to_dst_row": places(5)},
        "expanded_src_to_dst_row must have one element for each of 4 rows, not 5",
    ),
    (
        "finalize_routing",
        {"scales": floats(4, 1, dtype=FP16)},
        "scales must be bfloat16 or float32, not float16",
    ),
    ("finalize_routing", {"scales": floats(4, 2)}, "scales must be [tokens, k] for 4 rows, not"),
    (
        "finalize_routing",
        {"skip1": None, "skip2": floats(4, 64)},
        "skip2 must not be given without skip1",
    ),
    ("finalize_routing", {"skip1": floats(4, 64, dtype=FP32)}, "skip1 must be bfloat16, not"),
    ("finalize_routing", {"skip2": floats(4, 63)}, "skip2 must have shape [4, 64], not [4, 63]"),
    ("grouped_bfloat16", {"offset": [floats(1)]}, "offset must not be given"),
    ("grouped_bfloat16", {"tuning_config": [4]}, "tuning_config must not be given"),
    ("grouped_bfloat16", {"x": [floats(4, INPUTS)] * 2}, "x must be a list of one tensor, not of"),
    ("grouped_bfloat16", {"group_type": None}, "group_type must be 0, not None"),
    ("grouped_bfloat16", {"split_item": 0}, "split_item must be 2 or 3, for one result, not 0"),
    ("grouped_w8a8_bfloat16", {"act_type": 5}, "act_type must be 0, not 5"),
    ("grouped_bfloat16", {"x": [floats(INPUTS)]}, "x must have shape [rows, k] and weight"),
    ("grouped_bfloat16", {"x": [floats(4, 500)]}, "x's k 500 must equal weight's k 512"),
    (
        "grouped_bfloat16",
        {"x": [on_meta(4, 65536)], "weight": _experts(EXPERTS, 65536, OUTPUTS)},
        "k must be from 1 to 65535, not 65536",
    ),
    ("grouped_bfloat16", {"x": [floats(INPUTS, 4).t()]}, "x must be contiguous"),
    (
        "grouped_w4a16",
        {"weight": [words(EXPERTS, OUTPUTS // 8, INPUTS).mT]},
        "weight must be contiguous",
    ),
    (
        "grouped_bfloat16",
        {
            "weight": _experts(1025, INPUTS, OUTPUTS),
            "bias": [on_meta(1025, OUTPUTS, dtype=FP32)],
            "group_list": on_meta(1025, dtype=torch.int64),
        },
        "there may be at most 1024 experts, not 1025",
    ),
    ("grouped_bfloat16", {"group_list": None}, "group_list must be given"),
    ("grouped_bfloat16", {"group_list": counts(4).int()}, "group_list must be int64, not int32"),
    ("grouped_bfloat16", {"group_list_type": 3}, "group_list_type must be 0, 1 or 2, not 3"),
    (
        "grouped_bfloat16",
        {"group_list": counts(4)[:3]},
        "group_list must have shape [4], not [3]",
    ),
    (
        "grouped_bfloat16",
        {
            "weight": [floats(1, INPUTS, OUTPUTS)],
            "bias": None,
            "group_list": torch.tensor([4]),
        },
        "group_list must not be the count of a single expert",
    ),
    (
        "grouped_bfloat16",
        {"group_list": torch.stack((counts(4), counts(4)), 1), "group_list_type": 2},
        "group_list_type must be 0 or 1 unless x and weight are int8",
    ),
    ("grouped_w4a8", {"group_list_type": 0}, "group_list_type must be 1: with 4-bit weights"),
    (
        "grouped_bfloat16",
        {"weight": [floats(EXPERTS, INPUTS, OUTPUTS, dtype=FP16)]},
        "x and weight",
    ),
    ("grouped_bfloat16", {"scale": [floats(*_BIAS)]}, "scale must not be given"),
    ("grouped_bfloat16", {"antiquant_scale": [floats(*_BIAS)]}, "antiquant_scale must not be"),
    ("grouped_bfloat16", {"bias": [floats(*_BIAS)]}, "bias must be float32, not bfloat16"),
    ("grouped_bfloat16", {"bias": [floats(4, 8, dtype=FP32)]}, "bias must have shape [4, 64], not"),
    ("grouped_bfloat16", {"output_dtype": FP16_NUMBER}, "output_dtype must be bfloat16, as x is"),
    ("grouped_w8a16", {"antiquant_offset": None}, "antiquant_scale and antiquant_offset must be"),
    (
        "grouped_w8a16",
        {"antiquant_scale": [floats(*_BIAS, dtype=FP32)]},
        "antiquant_scale must be bfloat16, not float32",
    ),
    (
        "grouped_w8a16",
        {
            "antiquant_scale": [floats(EXPERTS, 4, OUTPUTS)],
            "antiquant_offset": [floats(EXPERTS, 4, OUTPUTS)],
        },
        "antiquant_scale must have shape [4, 64], not [4, 4, 64]",
    ),
    (
        "grouped_w4a16_groups",
        {
            "antiquant_scale": [floats(EXPERTS, 3, OUTPUTS)],
            "antiquant_offset": [floats(EXPERTS, 3, OUTPUTS)],
        },
        "3 groups must divide k 512",
    ),
    (
        "grouped_w4a16_groups",
        {"antiquant_offset": [floats(*_BIAS)]},
        "antiquant_offset must have shape [4, 4, 64], not [4, 64]",
    ),
    ("grouped_int32", {"scale": [floats(*_BIAS)]}, "scale must not be given"),
    ("grouped_int32", {"bias": [floats(*_BIAS)]}, "bias must be int32, not bfloat16"),
    ("grouped_w8a8_bfloat16", {"scale": None}, "scale must be given, or output_dtype be int32"),
    (
        "grouped_w8a8_bfloat16",
        {"scale": [floats(*_BIAS, dtype=FP32)]},
        "scale must be bfloat16, not float32",
    ),
    (
        "grouped_w8a8_float16",
        {"scale": [floats(*_BIAS, dtype=FP16)]},
        "scale must be float32, not float16",
    ),
    ("grouped_w8a8_float16", {"bias": [floats(*_BIAS)]}, "bias must be int32, not bfloat16"),
    ("grouped_w8a8_bfloat16", {"output_dtype": None}, "output_dtype must be float16, bfloat16 or"),
    ("grouped_w8a8_bfloat16", {"scale": [floats(64)]}, "scale must have shape [4, 64], not [64]"),
    (
        "grouped_w8a8_bfloat16",
        {"per_token_scale": [floats(4)]},
        "per_token_scale must be float32, not bfloat16",
    ),
    (
        "grouped_w8a8_bfloat16",
        {"per_token_scale": [floats(4, 1, dtype=FP32)]},
        "per_token_scale must have shape [4], not [4, 1]",
    ),
    (
        "grouped_w4a8",
        {"x": [codes(4, 96)], "weight": [words(EXPERTS, 96, OUTPUTS // 8)]},
        "k must be a multiple of 64 up to 18432, not 96",
    ),
    ("grouped_w4a8", {"bias": None}, "bias must be given"),
    ("grouped_w4a8", {"scale": [floats(EXPERTS, 1, OUTPUTS)]}, "scale must be int64, not bfloat16"),
    (
        "grouped_w4a8",
        {"scale": [full(EXPERTS, OUTPUTS)]},
        "scale must have shape [4, 1, 64] or [4, 2, 64], not [4, 64]",
    ),
    ("grouped_w4a8", {"bias": [floats(*_BIAS)]}, "bias must be float32, not bfloat16"),
    ("grouped_w4a8", {"per_token_scale": None}, "per_token_scale must be given"),
    ("grouped_w4a8", {"output_dtype": None}, "output_dtype must be float16 or bfloat16, not"),
    ("swiglu_quant", {"smooth_scale": floats(4)}, "smooth_scale must not be given"),
    ("swiglu_quant", {"dequant_mode": 1}, "dequant_mode must be 0, its default, not 1"),
    ("swiglu_quant", {"quant_dtype": BF16_NUMBER}, "quant_dtype must be 1, its default, not 15"),
    ("swiglu_quant", {"weight_scale": []}, "weight_scale must be a list of one tensor, not of 0"),
    ("swiglu_quant", {"x": floats(4, INPUTS)}, "x must be int8, not bfloat16"),
    ("swiglu_quant", {"x": codes(INPUTS)}, "x must have shape [rows, k] and weight"),
    ("swiglu_quant", {"x": codes(4, 500)}, "x's k 500 must equal weight's k 512"),
    (
        "swiglu_quant",
        {
            "weight": _experts(EXPERTS, INPUTS, 10242, dtype=torch.int8),
            "weight_scale": [on_meta(EXPERTS, 10242)],
        },
        "n must be even and at most 10240, not 10242",
    ),
    (
        "swiglu_quant_w4a8",
        {
            "x": on_meta(4, 20000, dtype=torch.int8),
            "weight": _experts(EXPERTS, 20000, OUTPUTS // 8, dtype=INT32),
        },
        "k must be less than 20000, not 20000",
    ),
    (
        "swiglu_quant",
        {
            "weight": _experts(1025, INPUTS, OUTPUTS, dtype=torch.int8),
            "weight_scale": [on_meta(1025, OUTPUTS)],
            "group_list": on_meta(1025, dtype=torch.int64),
        },
        "there may be at most 1024 experts, not 1025",
    ),
    ("swiglu_quant", {"group_list_type": 2}, "group_list_type must be 0 or 1, not 2"),
    ("swiglu_quant", {"group_list": counts(4).int()}, "group_list must be int64, not int32"),
    ("swiglu_quant", {"group_list": counts(4)[:3]}, "group_list must have shape [4], not [3]"),
    ("swiglu_quant", {"x_scale": floats(4)}, "x_scale must be float32, not bfloat16"),
    ("swiglu_quant", {"x_scale": floats(3, dtype=FP32)}, "x_scale must have shape [4], not [3]"),
    ("swiglu_quant", {"weight_scale": [full(*_BIAS)]}, "weight_scale must be float32 or float16"),
    ("swiglu_quant", {"weight_scale": [floats(64)]}, "weight_scale must have shape [4, 64], not"),
    (
        "swiglu_quant",
        {"weight_assist_matrix": [floats(*_BIAS)]},
        "weight_assist_matrix must not be given",
    ),
    ("swiglu_quant_w4a8", {"weight_assist_matrix": None}, "weight_assist_matrix must be a list of"),
    (
        "swiglu_quant_w4a8",
        {"weight_assist_matrix": [floats(*_BIAS)]},
        "weight_assist_matrix must be float32, not bfloat16",
    ),
]
