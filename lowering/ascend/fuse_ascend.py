"""Replace what surrounds the matmuls of an Ascend graph by the vendor's fused ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from panguq.ir.call_arguments import operand
from panguq.ir.edit import op_name, replace
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.ir.ops import quantize  # noqa: F401  (registers the quantize ops)
from panguq.ir.properties import Property
from panguq.lowering.ascend.fusions.aten import SPELLINGS
from panguq.lowering.ascend.fusions.attention import fuse_attention, fuse_rotary
from panguq.lowering.ascend.fusions.cache import (
    fuse_dequantize,
    fuse_quantize_per_channel,
    fuse_quantize_per_tensor,
    fuse_quantize_per_token,
)
from panguq.lowering.ascend.fusions.experts import lower_experts
from panguq.lowering.ascend.fusions.gated import fuse_geglu, fuse_gelu, fuse_swiglu
from panguq.lowering.ascend.fusions.grouped_swiglu import fuse_grouped_swiglu
from panguq.lowering.ascend.fusions.latent_attention import fuse_latent_attention
from panguq.lowering.ascend.fusions.norm import fuse_layer_norm, fuse_quantizer, fuse_rms_norm
from panguq.lowering.ascend.fusions.shared import FusionState
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq

Fusion = Callable[[fx.Node, FusionState], fx.Node | str]


@dataclass(frozen=True)
class FuseAscend(Pass):
    """Before: panguq's canonical ops around Ascend matmuls.  After: npu and aten ops alone.

    - `rms_norm(x, w, eps)` becomes `npu_rms_norm(x, w, eps)[0]`; where x is a sum `a + b`,
      `npu_add_rms_norm(a, b, w, eps)` gives the norm (0) and the sum for its other readers (2).
      With `w + 1` for the weight, x is no sum and that is a float32 weight of `npu_rms_norm`.
    - `swiglu(y[..., :f], y[..., f:])` becomes `npu_swiglu(y)`: silu of the first half times the
      second; `geglu` of the same becomes `npu_geglu(y, -1, approximate, True)[0]`, and
      `aten.gelu(x)` `npu_gelu(x)`: on an NPU aten's has the tanh form alone.
    - `rotary(x, cos, sin)` becomes `npu_rotary_mul(x, cos, sin, "half")` on x
      `[batch, seq, heads, d]` and tables `[batch, seq, 1, d]`, between two transpositions.
    - `attention(q, k, v, mask, scale)` becomes `npu_fused_infer_attention_score` in layout BNSD
      with grouped heads; its mask is the negated one (True hides a key). A mask that is empty in
      the graph, plain causal attention, is built from the sizes. The KV cache stays the
      concatenation that it was, a graph input and output. Codes of a quantized one are made and
      read by `npu_dynamic_quant` or aten ops.
    - `latent_attention` becomes `panguq_npu.latent_attention`, which calls the same op in the form
      that multiplies less for a call's sizes (`kernels/ascend/own/latent_attention.py`). The scale
      of the latents, where they are quantized, is read back in aten ops.
    - a mixture of experts becomes routing, grouped matmuls and weighted sums
      (`fusions/experts.py`).
    - with `allow_inexact`, `npu_add_rms_norm` and the one `npu_quantize` or `npu_dynamic_quant`
      that reads its norm become `npu_add_rms_norm_quant` or `npu_add_rms_norm_dynamic_quant`, and
      8-bit gate and up projections of experts, their SwiGLU and its quantizer become
      `npu_grouped_matmul_swiglu_quant_v2`.
    A call that an op's documented limits exclude is spelled in aten ops instead, with the reason.

    Exactness: each rewrite computes the formula that the op's documentation gives, which is
    the canonical op's. Both keep float32 inside one op and may round there at other points
    (`npu_rms_norm` rounds once, the canonical op also before the weight). The last rewrite is
    not: the documented formula does not round the norm to 16 bits before it is quantized, so that
    codes change, and a matmul would read others than its fake-quant twin. Measured on the ops'
    reference bodies, normal sums of 1024 columns: in bfloat16 3.5 % of the static codes by 1, 8 %
    of the dynamic ones by up to 2; in float16 none and 1 %.

    A graph input that is the mask must be passed in full afterwards: the convention that one
    without elements means plain causal attention is the canonical op's alone.
    Formulas and limits: op-plugin docs of the ops named.
    """

    name: ClassVar[str] = "fuse-ascend"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.LOWERED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.ASCEND_OPS})
    allow_inexact: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        counts: Counter[str] = Counter()
        state = FusionState(result)
        counts.update(lower_experts(gm, result))
        for op, fuse in _FUSIONS:
            for node in [n for n in gm.graph.nodes if n.target is op]:
                outcome = fuse(node, state)
                if isinstance(outcome, str):
                    result.skip(node, outcome)
                    counts[f"{op_name(node)} -> aten"] += 1
                    replace(node, SPELLINGS[op](node, state))
                else:
                    counts[f"{op_name(node)} -> {_op_behind(outcome)}"] += 1
                    replace(node, outcome)
        state.erase_unread()
        for node in [n for n in gm.graph.nodes if n.target in _QUANTIZERS]:
            fused = fuse_grouped_swiglu(node, self.allow_inexact)
            if fused is None:
                fused = fuse_quantizer(node, self.allow_inexact)
            if isinstance(fused, fx.Node):
                counts[f"{op_name(node)} -> {op_name(fused)}"] += 1
            elif fused is not None:
                result.skip(node, fused)
        result.changed = sum(counts.values())
        rows = tuple(sorted(counts.items()))
        result.tables["fusions"] = Table(("rewrite", "count"), rows)
        return result


def fuse_kronecker(node: fx.Node, state: FusionState) -> fx.Node | str:
    """Never: what a 4-bit matmul alone reads has become part of its quantizer."""
    return "npu_kronecker_quant makes 4-bit codes, and this value is read as it is"


_FUSIONS: tuple[tuple[OpOverload, Fusion], ...] = (
    (panguq.swiglu.default, fuse_swiglu),
    (panguq.geglu.default, fuse_geglu),
    (aten.gelu.default, fuse_gelu),
    (panguq.rotary.default, fuse_rotary),
    (panguq.attention.default, fuse_attention),
    (panguq.latent_attention.default, fuse_latent_attention),
    (panguq.rms_norm.default, fuse_rms_norm),
    (panguq.layer_norm.default, fuse_layer_norm),
    (panguq.kronecker.default, fuse_kronecker),
    (panguq.quantize_per_channel.default, fuse_quantize_per_channel),
    (panguq.quantize_per_tensor.default, fuse_quantize_per_tensor),
    (panguq.quantize_per_token.default, fuse_quantize_per_token),
    (panguq.dequantize.default, fuse_dequantize),
)
_QUANTIZERS = (npu.npu_quantize.default, npu.npu_dynamic_quant.default)


def _op_behind(node: fx.Node) -> str:
    """The vendor's op that gives this value, an item of its results or a transposition of one."""
    spaces = ("npu", "panguq_npu")
    direct = isinstance(node.target, OpOverload) and node.target.namespace in spaces
    return op_name(node if direct else operand(node, 0))
