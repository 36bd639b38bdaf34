"""Legal calls of the ops of a mixture of experts, with m tokens or rows."""

from __future__ import annotations

from typing import Any

import torch

from panguq.kernels.ascend.vendor import ops as npu
from panguq.selftest.operands import (
    BF16,
    BF16_NUMBER,
    FP16,
    FP16_NUMBER,
    FP32,
    INT32,
    Arguments,
    Call,
    int8s,
    reals,
    steps,
    words,
)

EXPERTS, INPUTS, OUTPUTS = 4, 512, 64


def ids(m: int, k: int = 2) -> torch.Tensor:
    return torch.randint(0, EXPERTS, (m, k), dtype=INT32)


def places(m: int) -> torch.Tensor:
    """Each of m rows once, in any order."""
    return torch.randperm(m, dtype=INT32)


def counts(m: int) -> torch.Tensor:
    """Rows of each expert, m together; two experts get none."""
    return torch.tensor([m - m // 2, 0, m // 2, 0])


def pairs(m: int) -> torch.Tensor:
    """The same as pairs of expert and number."""
    return torch.tensor([[0, m - m // 2], [2, m // 2], [0, 0], [0, 0]])


def full(*shape: int) -> torch.Tensor:
    """int64 scales whose low half is a float32."""
    return steps(*shape).view(INT32).to(torch.int64)


def grouped(m: int, x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> Arguments:
    """A call in which the rows are divided by their number."""
    return {
        "x": [x],
        "weight": [weight],
        "group_list": counts(m),
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 1,
        **rest,
    }


def grouped_float(m: int, dtype: torch.dtype, **rest: Any) -> Arguments:
    weight = reals(EXPERTS, INPUTS, OUTPUTS, dtype=dtype)
    return grouped(m, reals(m, INPUTS, dtype=dtype), weight, **rest)


def grouped_weight_only(
    m: int, weight: torch.Tensor, dtype: torch.dtype, scale: tuple[int, ...], **rest: Any
) -> Arguments:
    return grouped(
        m,
        reals(m, INPUTS, dtype=dtype),
        weight,
        antiquant_scale=[reals(*scale, dtype=dtype)],
        antiquant_offset=[torch.zeros(scale, dtype=dtype)],
        **rest,
    )


def grouped_int8(m: int, **rest: Any) -> Arguments:
    return grouped(m, int8s(m, INPUTS), int8s(EXPERTS, INPUTS, OUTPUTS), **rest)


def grouped_w4a8(m: int, output_dtype: int, groups: int) -> Arguments:
    return grouped(
        m,
        int8s(m, INPUTS),
        words(EXPERTS, INPUTS, OUTPUTS // 8),
        scale=[full(EXPERTS, groups, OUTPUTS)],
        bias=[reals(EXPERTS, OUTPUTS, dtype=FP32)],
        per_token_scale=[reals(m, dtype=FP32)],
        output_dtype=output_dtype,
    )


def swiglu_quant(m: int, weight: torch.Tensor, scale: torch.Tensor, **rest: Any) -> Arguments:
    return {
        "x": int8s(m, INPUTS),
        "weight": [weight],
        "weight_scale": [scale],
        "x_scale": reals(m, dtype=FP32),
        "group_list": counts(m),
        "group_list_type": 1,
        **rest,
    }


_gmm = npu.npu_grouped_matmul
_bias = (EXPERTS, OUTPUTS)

MOE: dict[str, Call] = {
    "gating_softmax": (
        npu.npu_moe_gating_top_k_softmax,
        lambda m: {"x": reals(m, 16), "k": 2},
    ),
    "gating_softmax_finished": (
        npu.npu_moe_gating_top_k_softmax,
        lambda m: {
            "x": reals(m, 3, 16, dtype=FP32),
            "finished": torch.rand(m, 3) < 0.5,
            "k": 4,
        },
    ),
    "gating": (
        npu.npu_moe_gating_top_k,
        lambda m: {"x": reals(m, 16), "k": 2, "out_flag": True},
    ),
    "gating_groups": (
        npu.npu_moe_gating_top_k,
        lambda m: {
            "x": reals(m, 32, dtype=FP32),
            "k": 4,
            "bias": reals(32, dtype=FP32),
            "k_group": 2,
            "group_count": 4,
            "group_select_mode": 1,
            "norm_type": 1,
            "routed_scaling_factor": 2.5,
        },
    ),
    "init_routing": (
        npu.npu_moe_init_routing_v2,
        lambda m: {
            "x": reals(m, 64),
            "expert_idx": ids(m),
            "expert_num": EXPERTS,
            "expert_tokens_num_type": 1,
            "expert_tokens_num_flag": True,
            "active_expert_range": [0, EXPERTS],
        },
    ),
    "init_routing_codes": (
        npu.npu_moe_init_routing_v2,
        lambda m: {
            "x": int8s(m, 64),
            "expert_idx": ids(m),
            "scale": reals(m, dtype=FP32),
            "expert_num": EXPERTS,
            "row_idx_type": 1,
            "active_expert_range": [0, EXPERTS],
        },
    ),
    "init_routing_quantizing": (
        npu.npu_moe_init_routing_v2,
        lambda m: {
            "x": reals(m, 64),
            "expert_idx": ids(m),
            "scale": reals(2, 64, dtype=FP32),
            "expert_num": EXPERTS,
            "expert_tokens_num_type": 2,
            "expert_tokens_num_flag": True,
            "quant_mode": 1,
            "active_expert_range": [1, 3],
        },
    ),
    "unpermute": (
        npu.npu_moe_token_unpermute,
        lambda m: {
            "permuted_tokens": reals(m, 64),
            "sorted_indices": places(m),
            "probs": reals(m, 1, dtype=FP32),
        },
    ),
    "unpermute_alone": (
        npu.npu_moe_token_unpermute,
        lambda m: {
            "permuted_tokens": reals(m, 64, dtype=FP16),
            "sorted_indices": places(m),
        },
    ),
    "finalize_routing": (
        npu.npu_moe_finalize_routing,
        lambda m: {
            "expanded_permuted_rows": reals(m, 64),
            "skip1": reals(m, 64),
            "skip2": None,
            "bias": None,
            "scales": reals(m, 1, dtype=FP32),
            "expanded_src_to_dst_row": places(m),
            "export_for_source_row": None,
            "drop_pad_mode": 2,
        },
    ),
    "finalize_routing_alone": (
        npu.npu_moe_finalize_routing,
        lambda m: {
            "expanded_permuted_rows": reals(m, 64, dtype=FP16),
            "skip1": None,
            "skip2": None,
            "bias": None,
            "scales": None,
            "expanded_src_to_dst_row": places(m),
            "export_for_source_row": None,
        },
    ),
    "grouped_bfloat16": (
        _gmm,
        lambda m: grouped_float(m, BF16, bias=[reals(*_bias, dtype=FP32)]),
    ),
    "grouped_float16": (
        _gmm,
        lambda m: grouped_float(m, FP16, bias=[reals(*_bias, dtype=FP16)]),
    ),
    "grouped_float32_ends": (
        _gmm,
        lambda m: grouped_float(m, FP32, group_list=counts(m).cumsum(0), group_list_type=0),
    ),
    "grouped_w8a16": (
        _gmm,
        lambda m: grouped_weight_only(
            m, int8s(EXPERTS, INPUTS, OUTPUTS), BF16, (EXPERTS, OUTPUTS), split_item=3
        ),
    ),
    "grouped_w4a16": (
        _gmm,
        lambda m: grouped_weight_only(
            m, words(EXPERTS, INPUTS, OUTPUTS // 8), FP16, (EXPERTS, OUTPUTS)
        ),
    ),
    "grouped_w4a16_groups": (
        _gmm,
        lambda m: grouped_weight_only(
            m,
            words(EXPERTS, INPUTS, OUTPUTS // 8),
            BF16,
            (EXPERTS, 4, OUTPUTS),
            bias=[reals(*_bias, dtype=FP32)],
        ),
    ),
    "grouped_w8a8_bfloat16": (
        _gmm,
        lambda m: grouped_int8(
            m,
            scale=[steps(*_bias, dtype=BF16)],
            per_token_scale=[reals(m, dtype=FP32)],
            output_dtype=BF16_NUMBER,
        ),
    ),
    "grouped_w8a8_bfloat16_bias": (
        _gmm,
        lambda m: grouped_int8(
            m,
            scale=[steps(*_bias)],
            per_token_scale=[reals(m, dtype=FP32)],
            bias=[reals(*_bias)],
            output_dtype=BF16_NUMBER,
        ),
    ),
    "grouped_w8a8_float16": (
        _gmm,
        lambda m: grouped_int8(
            m,
            scale=[steps(*_bias)],
            bias=[torch.randint(-9, 9, _bias, dtype=INT32)],
            output_dtype=FP16_NUMBER,
            group_list=pairs(m),
            group_list_type=2,
        ),
    ),
    "grouped_int32": (_gmm, lambda m: grouped_int8(m, output_dtype=3)),
    "grouped_w4a8": (_gmm, lambda m: grouped_w4a8(m, BF16_NUMBER, 1)),
    "grouped_w4a8_groups": (_gmm, lambda m: grouped_w4a8(m, FP16_NUMBER, 2)),
    "swiglu_quant": (
        npu.npu_grouped_matmul_swiglu_quant_v2,
        lambda m: swiglu_quant(m, int8s(EXPERTS, INPUTS, OUTPUTS), reals(*_bias, dtype=FP32)),
    ),
    "swiglu_quant_ends": (
        npu.npu_grouped_matmul_swiglu_quant_v2,
        lambda m: swiglu_quant(
            m,
            int8s(EXPERTS, INPUTS, OUTPUTS),
            reals(*_bias),
            group_list=counts(m).cumsum(0),
            group_list_type=0,
        ),
    ),
    "swiglu_quant_w4a8": (
        npu.npu_grouped_matmul_swiglu_quant_v2,
        lambda m: swiglu_quant(
            m,
            words(EXPERTS, INPUTS, OUTPUTS // 8),
            full(*_bias),
            weight_assist_matrix=[reals(*_bias, dtype=FP32)],
        ),
    ),
}
