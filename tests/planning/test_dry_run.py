"""The dry run: the same answers that compile gives, without weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import panguq
from panguq.errors import LoweringError, RecipeError
from panguq.recipe import Recipe
from tests.model_folders import make_folder, make_model, with_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose weights are gone: planning must not miss them."""
    path = make_folder(tmp_path_factory.mktemp("models") / "llama")
    (path / "model.safetensors").unlink()
    return path


def test_a_plan_names_every_matmul_with_scheme_and_kernel(folder: Path) -> None:
    plan = panguq.plan(folder, "w4a16")
    assert plan.refusals == ()
    assert len(plan.matmuls) == 15
    down = next(m for m in plan.matmuls if m.name == "model.layers.1.mlp.down_proj")
    assert (down.n, down.k, down.scheme, down.group_size) == (128, 192, "W4A16", 64)
    assert "128 does not divide k = 192" in down.note
    assert down.kernel is not None
    assert set(down.others) >= {"dequantized_linear"} - {down.kernel}
    assert down.decode_us and down.prefill_us and down.prefill_us > down.decode_us
    head = next(m for m in plan.matmuls if m.gives_logits)
    assert (head.scheme, head.kernel) == ("FLOAT", "linear")
    assert "gives the logits" in head.note


def test_a_plan_agrees_with_the_compile(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    plan = panguq.plan(model, "w8a16")
    compiled = panguq.compile(model, "w8a16", calibration=torch.randint(3, 200, (1, 32)))
    planned = {m.name: (m.scheme, m.kernel) for m in plan.matmuls if m.scheme != "FLOAT"}
    done = {
        m.name.removesuffix(":linear"): (m.scheme, m.kernel.rpartition(".")[2].rpartition("::")[2])
        for m in compiled.report.matmuls
        if m.scheme != "FLOAT"
    }
    assert planned == done
    compiled.save(tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert plan.disk_bytes == pytest.approx(size, rel=0.25)


def test_a_plan_finds_smoothing_sites_only_where_the_recipe_smooths(folder: Path) -> None:
    smoothed = panguq.plan(folder, "w8a8")
    assert smoothed.smoothing_sites == {"norm_linear": 4}
    assert smoothed.smoothing_blocked
    assert panguq.plan(folder, "w4a16").smoothing_sites == {}


def test_what_compile_would_refuse_is_listed_and_the_rest_planned(folder: Path) -> None:
    recipe = Recipe.named("w4a16").with_schemes({"*.down_prj": "W8A16", "*.q_proj": "W8A16"})
    plan = panguq.plan(folder, recipe)
    assert len(plan.refusals) == 2
    assert "'*.down_prj' matches no matmul" in plan.refusals[0]
    assert "must share a scheme" in plan.refusals[1]
    assert len(plan.matmuls) == 15
    assert "refused:" in plan.render()
    with pytest.raises(RecipeError, match="matches no matmul"):
        panguq.compile(make_model(), recipe)


def test_a_wrong_pass_order_is_listed(folder: Path) -> None:
    recipe = Recipe.of({"schemes": {"*": "W8A8"}, "passes": ["insert-fake-quant"]})
    (refusal,) = panguq.plan(folder, recipe).refusals
    assert "insert-fake-quant needs CALIBRATED" in refusal
    assert "put calibrate before it" in refusal


def test_a_matmul_without_kernel_is_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise LoweringError("no kernel of target cpu can run it")

    plan_module = sys.modules["panguq.planning.dry_run"]  # panguq.plan is a function
    monkeypatch.setattr(plan_module.Choices, "choose", none)
    plan = panguq.plan(folder, "w8a8")
    assert len(plan.refusals) == 15
    assert plan.matmuls[0].kernel is None
    assert "(2 times)" in plan.render()


def test_an_unknown_target_is_raised(folder: Path) -> None:
    with pytest.raises(LoweringError, match="unknown target 'cpuu'") as caught:
        panguq.plan(folder, "w8a8", target="cpuu")
    assert "did you mean cpu" in caught.value.hint


def test_the_text_groups_layers_and_the_json_round_trips(folder: Path) -> None:
    plan = panguq.plan(folder, "w8a8")
    text = plan.render()
    (line,) = (line for line in text.splitlines() if "mlp.down_proj" in line)
    assert line.split()[:5] == ["model.layers.*.mlp.down_proj", "2", "128", "192", "W8A8"]
    assert "model.layers.1." not in text
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan


def test_more_calibration_data_costs_more(folder: Path) -> None:
    few = panguq.plan(folder, "w8a8", windows=1, window=64)
    many = panguq.plan(folder, "w8a8", windows=1000, window=512)
    assert many.peak_bytes > few.peak_bytes
    assert many.compile_seconds - many.trace_seconds > few.compile_seconds - few.trace_seconds


def test_an_expert_costs_what_its_tokens_cost_and_one_matmul_of_them_is_held(
    tmp_path: Path,
) -> None:
    """Sixteen experts, one a token: as many products as of one, and sixteen times the memory."""
    sizes = dict(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=4096,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=1,
    )  # fmt: skip
    plans = []
    for experts in (1, 16):
        place = tmp_path / str(experts)
        transformers.Qwen3MoeConfig(**sizes, num_experts=experts).save_pretrained(place)
        plans.append(panguq.plan(place, "w8a8-dynamic", windows=100_000, window=512))
    one, many = (plan.compile_seconds - plan.trace_seconds for plan in plans)
    assert one <= many < 1.2 * one
    held = 2 * 64 * 4096 * 4
    assert plans[1].peak_bytes - plans[0].peak_bytes == 15 * held
    weights = 2 * 3 * 64 * 4096 * 4  # merged in files
    assert [plan.temporary_bytes for plan in plans] == [weights, 16 * weights]
    assert "and 96.0 MiB more while it compiles" in plans[1].render()


def test_large_experts_lie_in_files_and_gptq_keeps_its_codes(tmp_path: Path) -> None:
    """A layer of Qwen3-30B-A3B: 768 MiB for gate and up of all experts, 384 MiB for down."""
    sizes = dict(
        vocab_size=96, hidden_size=2048, moe_intermediate_size=768, num_experts=128,
        num_hidden_layers=1, num_experts_per_tok=8, dtype="bfloat16",
    )  # fmt: skip
    transformers.Qwen3MoeConfig(**sizes).save_pretrained(tmp_path)
    nearest, solved = (panguq.plan(tmp_path, recipe) for recipe in ("w4a16", "w4a16-gptq"))
    experts = (768 + 384) << 20
    assert nearest.temporary_bytes == 3 * experts
    attention = solved.temporary_bytes - 3 * experts - experts // 2
    assert attention == sum(row.n * row.k for row in solved.matmuls if "self_attn" in row.name)
    assert max(nearest.peak_bytes, solved.peak_bytes) < 2 << 30
    assert solved.peak_bytes > nearest.peak_bytes


def test_gradients_cost_more_than_forward_passes(folder: Path) -> None:
    recipe = {"name": "x", "schemes": {"*": "W4A16"}}
    forward, tuned = (
        panguq.plan(folder, {**recipe, "passes": ["insert-fake-quant", *passes]}, windows=100_000)
        for passes in (["gptq"], ["gptq", "tune-scales"])
    )
    seconds = [plan.compile_seconds - plan.trace_seconds for plan in (forward, tuned)]
    assert seconds[1] > 3 * seconds[0]


def test_any_module_can_be_planned() -> None:
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    plan = panguq.plan(module, "w8a8-dynamic", example_inputs=(torch.randn(3, 64),))
    assert [m.scheme for m in plan.matmuls] == ["W8A8_DYNAMIC", "W8A8_DYNAMIC"]


def test_a_large_model_is_planned_without_its_memory(folder: Path, tmp_path: Path) -> None:
    """Four layers of a 7B in bfloat16: 3.4 GiB of weights, which are nowhere."""
    sizes = dict(hidden_size=4096, intermediate_size=12800, num_attention_heads=32, head_dim=128)
    more = dict(num_key_value_heads=8, vocab_size=153376, num_hidden_layers=4, dtype="bfloat16")
    large = with_config(folder, tmp_path / "large", **sizes, **more)
    plan = panguq.plan(large, "w4a16")
    assert plan.weight_bytes > 3 << 30
    assert plan.disk_bytes < plan.weight_bytes
    assert plan.trace_seconds < 60
