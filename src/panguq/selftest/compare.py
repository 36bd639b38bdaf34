"""Whether what a device computed is what the CPU body did, within the documented rounding.

Integers must be equal. Floats that are summed in float32 and rounded once differ by at most one
unit in the last place, of the number or of its row's root mean square, since sums may cancel. Ops
that CANN computes in 16 bits in between, or by series, are held to 45 dB, as lowered graphs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from panguq.decibels import sqnr_db

LEAST_DECIBELS = 45.0
# Whose floats CANN does not round once; see docs/ascend.md for each.
LOOSE = frozenset(
    {
        "npu_fused_infer_attention_score",
        "npu_geglu",
        "npu_gelu",
        "npu_grouped_matmul",
        "npu_moe_gating_top_k",
        "npu_moe_gating_top_k_softmax",
        "npu_swiglu",
        "npu_weight_quant_batchmatmul",
    }
)
# Whose codes may differ by one, since the op does not round to 16 bits first, or rounds twice.
CODES_WITHIN_ONE = frozenset(
    {
        "npu_add_rms_norm_dynamic_quant",
        "npu_add_rms_norm_quant",
        "npu_grouped_matmul_swiglu_quant_v2",
        "npu_moe_init_routing_v2",
    }
)


@dataclass(frozen=True)
class Difference:
    """Whether results agree, and by how much they differ, as a phrase."""

    agrees: bool
    said: str


def compare(
    op: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]
) -> Difference:
    """All results of a call of `op`; both on the CPU. An output of no values is not compared."""
    parts = [
        _compare(op, a, b)
        for a, b in zip(found, expected, strict=True)
        if a is not None and b is not None and b.numel()
    ]
    if not parts:
        return Difference(False, "no results to compare")
    worst = [part for part in parts if not part.agrees] or parts
    return Difference(
        all(part.agrees for part in parts), "; ".join(dict.fromkeys(p.said for p in worst))
    )


def _compare(op: str, found: Tensor, expected: Tensor) -> Difference:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        types = [f"{str(t.dtype)[6:]}{list(t.shape)}" for t in (found, expected)]
        return Difference(False, f"{types[0]} where the CPU body makes {types[1]}")
    if not expected.is_floating_point():
        return _integers(op, found, expected)
    strange = found.isfinite() != expected.isfinite()
    if strange.any():
        return Difference(
            False, f"{int(strange.sum())} values are infinite or NaN on one side alone"
        )
    kept = expected.isfinite()
    a, b = found[kept].double(), expected[kept].double()
    if op in LOOSE:
        decibels = sqnr_db(b, a)
        return Difference(decibels >= LEAST_DECIBELS, f"{decibels:.0f} dB")
    size = expected.double().where(kept, 0.0).square().mean(-1, keepdim=True).sqrt()
    unit = torch.finfo(expected.dtype).eps * torch.maximum(expected.double().abs(), size)[kept]
    units = float(((a - b).abs() / unit.clamp(min=torch.finfo(expected.dtype).tiny)).max())
    return Difference(units <= 1.0, f"at most {units:.2f} units in the last place")


def _integers(op: str, found: Tensor, expected: Tensor) -> Difference:
    apart = (found.long() - expected.long()).abs()
    count, most = int((apart > 0).sum()), int(apart.max())
    if not count:
        return Difference(True, "equal")
    within = 1 if op in CODES_WITHIN_ONE and expected.dtype == torch.int8 else 0
    share = count / expected.numel()
    return Difference(most <= within, f"{share:.2%} of integers differ, by {most} at most")
