"""Legal calls of the ops for mixtures of experts; m is the number of rows, one expert has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panguq.ir.ops import experts
from panguq.ir.ops.packing import pack_int4
from panguq.kernels.cpu import expert_linear as kernels
from tests.kernels.ascend.own.own_calls import (
    FEW,
    FP32,
    GROUP,
    Call,
    K,
    N,
    codes,
    floats,
    scales,
)

EXPERTS, TOP_K = 3, 2


def counts(m: int) -> Tensor:
    """Rows of each expert: the second one has none."""
    return torch.tensor([m // 2, 0, m - m // 2])


def grouped() -> dict[str, Any]:
    zero_point = codes(EXPERTS, N, K // GROUP, bits=4)
    return {"scale": scales(EXPERTS, N, K // GROUP), "zero_point": zero_point}


def int4(m: int) -> dict[str, Any]:
    packed, weight = pack_int4(codes(EXPERTS, N, K, bits=4)), grouped()
    return {
        "x": floats(m, K),
        "kernel_weight": kernels.expert_int4_kernel_weight(packed),
        "kernel_scales": kernels.expert_int4_kernel_scales(**weight),
        "packed": packed,
        **weight,
        "group_size": GROUP,
        "bias": floats(EXPERTS, N),
        "few_tokens": FEW,
        "counts": counts(m),
    }


EXPERT_CALLS: dict[str, Call] = {
    "route_tokens": (
        experts.route_tokens,
        lambda m: {"expert_ids": torch.randint(0, EXPERTS, (m, TOP_K)), "experts": EXPERTS},
    ),
    "permute_tokens": (
        experts.permute_tokens,
        lambda m: {"x": floats(m, K), "order": torch.randperm(m * TOP_K), "top_k": TOP_K},
    ),
    "expert_linear": (
        experts.expert_linear,
        lambda m: {
            "x": floats(m, K),
            "weight": floats(EXPERTS, N, K),
            "bias": floats(EXPERTS, N),
            "counts": counts(m),
        },
    ),
    "combine_experts": (
        experts.combine_experts,
        lambda m: {
            "rows": floats(m * TOP_K, N),
            "order": torch.randperm(m * TOP_K),
            "routing_weights": floats(m, TOP_K),
        },
    ),
    "expert_int8_linear": (
        kernels.expert_int8_linear,
        lambda m: {
            "codes": codes(m, K),
            "act_scale": scales(m, 1),
            "act_zero_point": None,
            "weight": codes(EXPERTS, N, K),
            "weight_scale": scales(EXPERTS, N),
            "row_sums": None,
            "bias": floats(EXPERTS, N),
            "dtype": FP32,
            "counts": counts(m),
        },
    ),
    "expert_int8_weight_linear": (
        kernels.expert_int8_weight_linear,
        lambda m: {
            "x": floats(m, K),
            "weight": codes(EXPERTS, N, K),
            "weight_scale": scales(EXPERTS, N),
            "bias": floats(EXPERTS, N),
            "few_tokens": FEW,
            "counts": counts(m),
        },
    ),
    "expert_int4_kernel_weight": (
        kernels.expert_int4_kernel_weight,
        lambda m: {"packed": pack_int4(codes(EXPERTS, m * 16, K, bits=4))},
    ),
    "expert_int4_kernel_scales": (kernels.expert_int4_kernel_scales, lambda m: grouped()),
    "expert_int4_linear": (kernels.expert_int4_linear, int4),
    "expert_dequantized_linear": (
        kernels.expert_dequantized_linear,
        lambda m: {
            "x": floats(m, K),
            "codes": codes(EXPERTS, N, K),
            **grouped(),
            "group_size": GROUP,
            "bias": floats(EXPERTS, N),
            "compute_dtype": FP32,
            "counts": counts(m),
        },
    ),
}
