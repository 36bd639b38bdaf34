"""Every way in which codes are stored, lowered for every target: the same matmul or a refusal.

The matmul of a target reads bytes; what they are is said by the ops in front of them alone. What
takes one kind of bytes for another is found here.
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

from panguq.decibels import sqnr_db
from panguq.errors import LoweringError, RecipeError
from panguq.ir.edit import clone, op_name
from panguq.ir.ops import binary, mixed_packing, packing
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES, parse_scheme
from panguq.ir.run.interpret import run
from panguq.lowering.options import AscendOptions
from panguq.lowering.run.prepack import prepack
from panguq.lowering.stages import fitting, lowering_passes
from panguq.passes.billm import BiLlm
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.slim_llm import SlimLlm
from tests.model_shelf import OneLinear, run_passes, run_pipeline, tiny_context, trace_tiny

K = 128
TARGETS = ("cpu", "ascend910b1")
ENDINGS = ("", "-g32", "-per_channel", "-sym", "-asym", "-g32-asym")
NEAR_DB = {torch.float32: 30.0, torch.bfloat16: 25.0}
QUANTIZED = frozenset({Property.CANONICAL, Property.SCHEMES, Property.QDQ, Property.WEIGHT_CODES})
_seen: set[str] = set()


def names(ending: str) -> list[str]:
    """The schemes that take this ending."""
    found = []
    for scheme in SCHEMES:
        try:
            found.append(parse_scheme(scheme + ending).name)
        except RecipeError:
            continue
    return found


NOT_ON_CPU = {"FLOAT", "W8A8_FP8"}
SCHEME_NAMES = sorted({name for ending in ENDINGS for name in names(ending)} - NOT_ON_CPU)
MIXED = SlimLlm(damping=0.0, steps=1, least_gain_db=0.0)
CASES: list[tuple[str, Pass]] = [
    *((scheme, QuantizeWeights()) for scheme in SCHEME_NAMES),
    *((scheme, MIXED) for scheme in ("W4A16-g32", "W4A16_ASYM-g32", "W3A16-g32", "W2A16-g32")),
    *((scheme, BiLlm(block_size=32)) for scheme in ("W1A16", "W1A16-g32")),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("scheme", "solver"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_lowered_matmul_is_the_quantized_one(scheme: str, solver: Pass, target: str) -> None:
    dtypes = (torch.float32, torch.bfloat16) if target == "cpu" else (torch.bfloat16,)
    for dtype in dtypes:
        try:
            quantized, lowered = compiled(scheme, solver, target, dtype)
        except (LoweringError, RecipeError) as refused:
            assert target != "cpu", refused  # which has kernels for all of these
            assert "no kernel for" in refused.message or solver is MIXED
            continue
        for tokens in (1, 70):
            x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            (wanted,), (found,) = run(quantized, {"x": x}), run(lowered, {"x": x})
            near = sqnr_db(wanted, found)
            assert near > NEAR_DB[dtype], (dtype, tokens, near)


def compiled(
    scheme: str, solver: Pass, target: str, dtype: torch.dtype
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The quantized graph of one matmul `[64, K]`, and the one that runs on the target."""
    gm, interface = trace_tiny(OneLinear(K, 64).to(dtype), torch.randn(3, K).to(dtype))
    # A few inputs are large, so that slim-llm's groups differ in width.
    given = torch.randn(96, K, generator=torch.Generator().manual_seed(0))
    given[:, : K // 3] *= 6
    ctx = tiny_context(interface, given.to(dtype))
    options = AscendOptions()
    fit = fitting(target, options)
    run_passes(gm, ctx, scheme, *fit, Calibrate(), InsertFakeQuant(), solver)
    quantized = clone(gm)
    _seen.update(op_name(node) for node in gm.graph.nodes)
    run_pipeline(gm, lowering_passes(target, "bfloat16", options), ctx, held=QUANTIZED)
    return quantized, prepack(gm)


def test_every_op_that_stores_codes_was_there() -> None:
    """Run after the others: a way of storage that no case reaches is not checked."""
    if len(_seen) < 2:
        pytest.skip("the cases did not run")
    assert {"unpack_int4", "unpack_codes", "unpack_mixed_codes", "dequantize_binary"} <= _seen
    assert all(module.__doc__ for module in (binary, mixed_packing, packing))
