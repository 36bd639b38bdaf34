"""Which operands CANN's operators take on 910B, for the ops that a lowered graph calls.

From the operator tables of CANN in the test resources of hicann/ge (commit ffdcbc9f): operators,
dtypes and formats alone, in a form of its own, and only of operands that decide. A torch tensor of
int32 in the place of a 4-bit operand holds eight of its codes. `:NZ` is the cube's own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Operators:
    """The operators behind a torch_npu op; `operands` are its parameters, `rows` their dtypes."""

    names: str
    operands: tuple[str, ...]
    rows: tuple[str, ...]


OPERATORS_910B: Mapping[str, Operators] = {
    "npu_add_rms_norm": Operators(
        "AddRmsNorm",
        ("x1", "x2", "gamma"),
        (
            "bfloat16 bfloat16 bfloat16",
            "float16 float16 float16",
            "float32 float32 float32",
        ),
    ),
    "npu_add_rms_norm_dynamic_quant": Operators(
        "AddRmsNormDynamicQuant",
        ("x1", "x2", "gamma"),
        (
            "bfloat16 bfloat16 bfloat16",
            "float16 float16 float16",
        ),
    ),
    "npu_add_rms_norm_quant": Operators(
        "AddRmsNormQuant",
        ("x1", "x2", "gamma", "scales1"),
        (
            "bfloat16 bfloat16 bfloat16 bfloat16",
            "bfloat16 bfloat16 bfloat16 float32",
            "float16 float16 float16 float32",
        ),
    ),
    "npu_dynamic_quant": Operators(
        "DynamicQuant",
        ("input",),
        (
            "bfloat16",
            "float16",
        ),
    ),
    "npu_fused_infer_attention_score": Operators(
        "FusedInferAttentionScore",
        ("query", "key", "value"),
        (
            "bfloat16 bfloat16 bfloat16",
            "bfloat16 int4 int4",
            "bfloat16 int8 int8",
            "float16 float16 float16",
            "float16 int4 int4",
            "float16 int8 int8",
            "int8 int8 int8",
        ),
    ),
    "npu_grouped_matmul": Operators(
        "GroupedMatmul",
        ("x", "weight"),
        (
            "bfloat16 bfloat16",
            "bfloat16 bfloat16:NZ",
            "bfloat16 int4",
            "bfloat16 int8",
            "float16 float16",
            "float16 float16:NZ",
            "float16 int4",
            "float16 int8",
            "float32 float32",
            "int4 int4",
            "int4 int4:NZ",
            "int8 int4",
            "int8 int4:NZ",
            "int8 int8",
            "int8 int8:NZ",
        ),
    ),
    "npu_grouped_matmul_swiglu_quant_v2": Operators(
        "GroupedMatmulSwigluQuantV2",
        ("x", "weight"),
        (
            "int4 int4:NZ",
            "int8 int4",
            "int8 int4:NZ",
            "int8 int8:NZ",
        ),
    ),
    "npu_kronecker_quant": Operators(
        "FlatQuant",
        ("x", "kronecker_p1", "kronecker_p2"),
        (
            "bfloat16 bfloat16 bfloat16",
            "float16 float16 float16",
        ),
    ),
    "npu_moe_finalize_routing": Operators(
        "MoeFinalizeRoutingV2",
        ("expanded_permuted_rows",),
        (
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    "npu_moe_gating_top_k": Operators(
        "MoeGatingTopK",
        ("x",),
        (
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    "npu_moe_gating_top_k_softmax": Operators(
        "MoeGatingTopKSoftmax",
        ("x",),
        (
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    "npu_moe_init_routing_v2": Operators(
        "MoeInitRoutingV3",
        ("x",),
        (
            "bfloat16",
            "float16",
            "float32",
            "int8",
        ),
    ),
    "npu_moe_token_unpermute": Operators(
        "MoeTokenUnpermute",
        ("permuted_tokens",),
        (
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    "npu_quant_matmul": Operators(
        "QuantBatchMatmulV3 QuantBatchMatmulV4",
        ("x1", "x2"),
        (
            "int4 int4",
            "int8 int8",
            "int8 int8:NZ",
            "int8:NZ int8:NZ",
        ),
    ),
    "npu_quantize": Operators(
        "AscendQuantV2",
        ("input",),
        (
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    "npu_rms_norm": Operators(
        "RmsNorm",
        ("input", "gamma"),
        (
            "bfloat16 bfloat16",
            "bfloat16 float32",
            "float16 float16",
            "float16 float32",
            "float32 float32",
        ),
    ),
    "npu_rotary_mul": Operators(
        "RotaryMul",
        ("input", "r1", "r2"),
        (
            "bfloat16 bfloat16 bfloat16",
            "float16 float16 float16",
            "float32 float32 float32",
        ),
    ),
    "npu_swiglu": Operators(
        "SwiGlu",
        ("input",),
        (
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    "npu_trans_quant_param": Operators(
        "TransQuantParamV2",
        ("scale",),
        ("float32",),
    ),
    "npu_weight_quant_batchmatmul": Operators(
        "WeightQuantBatchMatmulV2",
        ("x", "weight", "antiquant_scale"),
        (
            "bfloat16 int32 bfloat16",
            "bfloat16 int32:NZ bfloat16",
            "bfloat16 int4 bfloat16",
            "bfloat16 int4:NZ bfloat16",
            "bfloat16 int8 bfloat16",
            "bfloat16 int8:NZ bfloat16",
            "float16 int32 float16",
            "float16 int32:NZ float16",
            "float16 int4 float16",
            "float16 int4:NZ float16",
            "float16 int8 float16",
            "float16 int8 int64",
            "float16 int8 uint64",
            "float16 int8:NZ float16",
        ),
    ),
}
"""By torch_npu's op."""
DOCUMENTED: Mapping[str, Mapping[str, str]] = {
    "npu_quant_matmul": {"int8 int4": "aclnnQuantMatmulV5, groups, which eager mode calls"},
}
"""Rows that are not in those tables and that CANN documents all the same, with the page."""


SOURCE = "CANN's operator tables for 910B, hicann/ge ffdcbc9f"


def unlisted(
    op: str, dtypes: Mapping[str, str], formats: Mapping[str, str] | None = None
) -> str | None:
    """Why CANN has no operator for a call on 910B; None if it has one, or the op is not listed.

    `dtypes` are those of the given operands by parameter, as torch names them; `formats` says which
    are "NZ", the others being ND. None: formats are not known, and any fits.
    """
    found = OPERATORS_910B.get(op)
    if found is None or any(name not in dtypes for name in found.operands):
        return None
    given = [(dtypes[name], (formats or {}).get(name, "ND")) for name in found.operands]
    rows = (*found.rows, *DOCUMENTED.get(op, {}))
    if any(_fits(row, given, formats is not None) for row in rows):
        return None
    spelled = ", ".join(
        f"{name} {dtype}{' in NZ' if layout == 'NZ' else ''}"
        for name, (dtype, layout) in zip(found.operands, given, strict=True)
    )
    kinds = "; ".join(rows)
    return f"{found.names} takes no {spelled}: it takes {' and '.join(found.operands)} as {kinds}"


def _fits(row: str, given: list[tuple[str, str]], by_format: bool) -> bool:
    for listed, (dtype, layout) in zip(row.split(), given, strict=True):
        name, _, form = listed.partition(":")
        packed = name == "int4" and dtype == "int32"
        if not (packed or name == dtype) or (by_format and layout != (form or "ND")):
            return False
    return True
