"""Calls of a mixture of experts: as lowered graphs make them, and ones that are wrong on purpose.

The shapes are those of Qwen3-30B-A3B: 128 experts, 8 for each token. In grouped matmuls m is the
number of rows, 8 for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conformance.calls import BFLOAT16, FLOAT16, Call, call

EXPERTS, CHOSEN, HIDDEN, FFN = 128, 8, 2048, 768
GROUP, W4A8_GROUP = 128, 256
OUTPUT = {"bfloat16": BFLOAT16, "float16": FLOAT16}


def routing_calls(dtype: str) -> list[Call]:
    """From the router's logits to rows sorted by expert, and back."""
    rows, places = f"{dtype}[m, {HIDDEN}]", f"int32[m, {CHOSEN}]"
    counted: dict[str, Any] = {
        "expert_num": EXPERTS,
        "expert_tokens_num_type": 0,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, EXPERTS],  # which torchair cannot do without
    }
    combined = f"{dtype}[m, 1]"  # a single choice, so that there are as many rows as tokens
    return [
        call("npu_moe_gating_top_k_softmax", f"float32[m, {EXPERTS}]", None, CHOSEN),
        call("npu_moe_gating_top_k", f"{dtype}[m, {EXPERTS}]", CHOSEN),
        call(
            "npu_moe_gating_top_k", "float32[m, 256]", CHOSEN, bias="float32[256]", k_group=4,
            group_count=8, group_select_mode=1, norm_type=1, routed_scaling_factor=2.5,
        ),
        call("npu_moe_init_routing_v2", rows, places, **counted),
        call(
            "npu_moe_init_routing_v2", f"int8[m, {HIDDEN}]", places, scale="float32[m]", **counted
        ),
        call("npu_moe_init_routing_v2", rows, places, quant_mode=1, **counted),
        call("npu_moe_token_unpermute", rows, "int32[m]", combined),
        call("npu_moe_finalize_routing", rows, None, None, None, combined, "int32[m]", None, 2),
        call("npu_moe_finalize_routing", rows, rows, None, None, combined, "int32[m]", None, 2),
    ]  # fmt: skip


def grouped_calls(dtype: str) -> Iterator[tuple[str, Call]]:
    """The matmuls of all experts in every scheme, by name."""
    for layer, k, n in (("gate and up", HIDDEN, 2 * FFN), ("down", FFN, HIDDEN)):
        floats, per_channel = f"{dtype}[m, {k}]", f"{dtype}[{EXPERTS}, {n}]"
        packed, groups = (
            f"int32[{EXPERTS}, {k}, {n // 8}]",
            f"{dtype}[{EXPERTS}, {k // GROUP}, {n}]",
        )
        yield f"FLOAT {dtype} {layer}", grouped(floats, f"{dtype}[{EXPERTS}, {k}, {n}]")
        weight = f"int8[{EXPERTS}, {k}, {n}]"
        yield (
            f"W8A16 {dtype} {layer}",
            grouped(floats, weight, antiquant_scale=[per_channel], antiquant_offset=[per_channel]),
        )
        yield (
            f"W4A16 {dtype} {layer}",
            grouped(floats, packed, antiquant_scale=[groups], antiquant_offset=[groups]),
        )
        scale = f"{'bfloat16' if dtype == 'bfloat16' else 'float32'}[{EXPERTS}, {n}]"
        quantized = {"per_token_scale": ["float32[m]"], "output_dtype": OUTPUT[dtype]}
        yield (
            f"W8A8_DYNAMIC {dtype} {layer}",
            grouped(f"int8[m, {k}]", weight, scale=[scale], **quantized),
        )
        for name, count in (("W4A8", 1), ("W4A8 grouped", k // W4A8_GROUP)):
            yield f"{name} {dtype} {layer}", grouped(
                f"int8[m, {k}]", packed, scale=[f"int64[{EXPERTS}, {count}, {n}]"],
                bias=[f"float32[{EXPERTS}, {n}]"], **quantized,
            )  # fmt: skip
    yield (
        f"W8A8_DYNAMIC {dtype} fused",
        swiglu_quant(f"int8[{EXPERTS}, {HIDDEN}, {2 * FFN}]", f"{dtype}[{EXPERTS}, {2 * FFN}]"),
    )
    yield f"W4A8 {dtype} fused", swiglu_quant(
        f"int32[{EXPERTS}, {HIDDEN}, {2 * FFN // 8}]", f"int64[{EXPERTS}, {2 * FFN}]",
        weight_assist_matrix=[f"float32[{EXPERTS}, {2 * FFN}]"],
    )  # fmt: skip


def grouped(x: str, weight: str, **rest: Any) -> Call:
    """The rows of all experts in one tensor, divided by their number, into one result."""
    how: dict[str, Any] = {
        "group_list": f"int64[{EXPERTS}]",
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 1,
    }
    return call("npu_grouped_matmul", [x], [weight], **how | rest)


def swiglu_quant(weight: str, scale: str, **rest: Any) -> Call:
    """Gate and up projection with what follows, the rows divided by their number."""
    return call(
        "npu_grouped_matmul_swiglu_quant_v2", f"int8[m, {HIDDEN}]", [weight], [scale],
        "float32[m]", f"int64[{EXPERTS}]", group_list_type=1, **rest,
    )  # fmt: skip
