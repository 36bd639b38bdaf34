"""What the passes beside those that choose codes do with a mixture of experts."""

from __future__ import annotations

import pytest
import torch

import panguq
from panguq.errors import LoweringError, RecipeError
from panguq.ir.edit import find_label, get_tensor, label, module_path, set_tensor
from panguq.ir.node_meta import scheme_of, statistics_of
from panguq.ir.views import ExpertLinear, Linear
from panguq.lowering.cpu.target import CPU, CpuTarget
from panguq.lowering.lower_matmuls import check_lowerable
from panguq.passes.assign_schemes import AssignSchemes, gives_logits
from panguq.passes.calibrate import Calibrate
from panguq.passes.mixed_precision import MixedPrecision, stored_bits
from panguq.passes.outliers import Outliers
from panguq.passes.pipeline.base import matmuls
from tests.model_shelf import EXPERTS, canonical, family_context, shared_model, token_ids

CHOICES = ("W4A16-g32", "W6A16-g32", "W8A16")
LAYER = "model.layers.1.mlp.experts."


def test_experts_of_a_layer_share_a_scheme_and_those_that_do_not_matter_get_few_bits() -> None:
    gm, _ = canonical(EXPERTS)
    ctx = family_context(EXPERTS, sequences=2, tokens=12)
    AssignSchemes(schemes=(("*", "W4A16-g32"),)).run(gm, ctx)
    set_tensor(gm, LAYER + "down_proj", torch.zeros_like(get_tensor(gm, LAYER + "down_proj")))
    result = MixedPrecision(choices=CHOICES, bits=7.0).run(gm, ctx)
    schemes = {
        module_path(n): scheme_of(n).name for n in matmuls(gm) if ExpertLinear.match(n) is not None
    }
    first, second = (
        {scheme for path, scheme in schemes.items() if f"layers.{layer}." in path}
        for layer in (0, 1)
    )
    assert len(first) == 1 and first != {"W4A16-g32"} and second == {"W4A16-g32"}
    nodes = [n for n in matmuls(gm) if not gives_logits(n)]
    weights = sum(Linear.of(n).weight.meta["val"].numel() for n in nodes)
    assert 5.0 < sum(stored_bits(n, scheme_of(n)) for n in nodes) / weights <= 7.0
    table = result.tables["allocation"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    (row,) = (row for row in rows if LAYER in row["group"])
    assert row["experts"] == 6 and "gate_up_proj" in row["group"] and "down_proj" in row["group"]
    assert {float(row[f"kl_{scheme}"]) for scheme in CHOICES} == {0.0}
    (other,) = (row for row in rows if "layers.0.mlp.experts." in row["group"])
    parts = [row for row in result.tables["experts"].rows if "layers.0." in row[0]]
    assert len(parts) == 2 * 6  # two matmuls of six experts
    whole = sum(float(row[2]) for row in parts)  # four digits each
    assert whole == pytest.approx(float(other[f"kl_{CHOICES[0]}"]), rel=1e-3)


def test_static_inputs_that_experts_read_badly_are_quantized_per_token_and_never_split() -> None:
    gm, _ = canonical(EXPERTS)
    ctx = family_context(EXPERTS, sequences=2, tokens=12)
    AssignSchemes(schemes=(("*", "W8A8"),)).run(gm, ctx)
    Calibrate().run(gm, ctx)
    node = find_label(gm, LAYER + "gate_up_proj:expert_linear")
    statistics_of(node).channel_amax[3] = 1e6
    left = Outliers(treatment="split").run(gm, ctx)
    value = label(Linear.of(node).input)
    assert [s.reason for s in left.skipped if s.node == value] == [
        "experts read it, whose side matmuls no kernel takes together"
    ]
    Outliers(treatment="per-token", floor_db=999.0, max_share=1.0).run(gm, ctx)
    assert scheme_of(node).name == "W8A8_DYNAMIC"


@pytest.mark.parametrize(
    ("family", "step", "scheme", "said"),
    [
        (EXPERTS, "slim-llm", "W2A16", "slim-llm does not choose the codes of experts: model"),
        (EXPERTS, "billm", "W1A16", "billm does not choose the codes of experts: model"),
        ("llama", "slim-llm", "W8A16", "and the scheme of model.layers.0.self_attn.q_proj"),
        ("llama", "billm", "W4A16", "billm makes 1-bit weights, and the scheme of model"),
    ],
)
def test_a_method_that_cannot_take_a_matmul_says_so_before_any_data_is_read(
    family: str, step: str, scheme: str, said: str
) -> None:
    recipe = {"schemes": {"*": scheme}, "passes": ["insert-fake-quant", step]}
    with pytest.raises(RecipeError, match=said):
        panguq.compile(shared_model(family), recipe, calibration=token_ids(1, 8))
    assert any(said in refusal for refusal in panguq.plan(shared_model(family), recipe).refusals)


class NoExperts(CpuTarget):
    """A CPU without kernels for experts."""

    takes_experts = False


def test_a_target_without_kernels_for_experts_says_so() -> None:
    gm, _ = canonical(EXPERTS)
    AssignSchemes(schemes=(("*", "W8A8_DYNAMIC"),)).run(gm, family_context(EXPERTS))
    with pytest.raises(LoweringError, match=r"experts.*has no kernels for matmuls of experts") as e:
        check_lowerable(gm, NoExperts("bare", kernels=CPU.kernels), "bfloat16")
    assert "leave them in float" in e.value.hint
