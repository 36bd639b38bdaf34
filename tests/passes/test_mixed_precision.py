"""Budgets are kept to the bit, groups stay together, and what cannot be done is said."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
from torch import fx

import panguq
from panguq.errors import RecipeError
from panguq.evaluation import weight_figures
from panguq.ir.edit import label, module_path
from panguq.ir.node_meta import scheme_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES, Scheme, parse_scheme
from panguq.ir.text.printer import Hasher, print_graph
from panguq.passes import mixed_precision
from panguq.passes.assign_schemes import AssignSchemes, gives_logits
from panguq.passes.calibrate import Calibrate
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.mixed_precision import MixedPrecision, stored_bits
from panguq.passes.pipeline.base import PassResult, linears
from panguq.schedule import check_passes
from tests.model_shelf import canonical, family_context, shared_model, token_ids

CHOICES = ("W4A16-g32", "W6A16-g32", "W8A16")


def assigned(
    step: MixedPrecision,
    schemes: tuple[tuple[str, str], ...] = (("*", "W4A16-g32"),),
    **context: object,
) -> tuple[fx.GraphModule, PassResult]:
    gm, _ = canonical("llama")
    ctx = replace(family_context("llama", sequences=2, tokens=12), **context)
    AssignSchemes(schemes=schemes).run(gm, ctx)
    return gm, step.run(gm, ctx)


def chosen(gm: fx.GraphModule) -> dict[str, str]:
    return {module_path(n): scheme_of(n).name for n in linears(gm)}


def mean_bits(gm: fx.GraphModule) -> float:
    nodes = [n for n in linears(gm) if not gives_logits(n)]
    weights = sum(n.args[1].meta["val"].numel() for n in nodes)
    return sum(stored_bits(n, scheme_of(n)) for n in nodes) / weights


def rows(result: PassResult, name: str) -> list[dict[str, object]]:
    table = result.tables[name]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@pytest.mark.parametrize("bits", [4.5, 4.75, 5.5, 7.0])
def test_the_budget_is_kept_and_used(bits: float) -> None:
    gm, result = assigned(MixedPrecision(choices=CHOICES, bits=bits))
    assert bits - 0.5 < mean_bits(gm) <= bits  # one more step up of any group would break it
    (budget,) = rows(result, "budgets")
    assert float(budget["used"]) == pytest.approx(mean_bits(gm), abs=1e-6)
    assert (budget["limit"], budget["status"], budget["gap"]) == (bits, "optimal", 0.0)


def test_no_other_assignment_is_better() -> None:
    """Every assignment in turn, with the losses and bits of the pass's own table."""
    _, result = assigned(MixedPrecision(choices=CHOICES, bits=5.5))
    table = rows(result, "allocation")
    weights = [int(row["n"]) * int(row["k"]) for row in table]
    bits = [stored_bits_of(row) for row in table]
    kls = [[float(row[f"kl_{name}"]) for name in CHOICES] for row in table]
    least = min(
        sum(kl[i] for kl, i in zip(kls, pick, strict=True))
        for pick in itertools.product(range(3), repeat=len(table))
        if sum(b[i] for b, i in zip(bits, pick, strict=True)) <= 5.5 * sum(weights)
    )
    mine = sum(kl[CHOICES.index(str(row["scheme"]))] for kl, row in zip(kls, table, strict=True))
    assert mine == pytest.approx(least, rel=1e-3)  # the table has four digits


def stored_bits_of(row: dict[str, object]) -> list[int]:
    n, k = int(row["n"]), int(row["k"])
    return [n * k * 4 + 16 * n * k // 32, n * k * 6 + 16 * n * k // 32, n * k * 8 + 32 * n]


def test_more_budget_never_hurts() -> None:
    results = [assigned(MixedPrecision(choices=CHOICES, bits=b))[1] for b in (4.5, 5.0, 6.0, 9.0)]
    kls = [float(rows(result, "budgets")[0]["kl"]) for result in results]
    assert kls == sorted(kls, reverse=True) and kls[0] > kls[-1]


def test_the_loosest_and_the_tightest_budget() -> None:
    gm, _ = assigned(MixedPrecision(choices=CHOICES, bits=100.0))
    assert set(chosen(gm).values()) == {"W8A16", "FLOAT"}  # lm_head
    gm, result = assigned(MixedPrecision(choices=CHOICES, bits=4.5))
    assert set(chosen(gm).values()) == {"W4A16-g32", "FLOAT"}
    assert result.changed == 0


def test_what_reads_one_tensor_shares_a_scheme() -> None:
    gm, result = assigned(MixedPrecision(choices=CHOICES, bits=5.5))
    names = chosen(gm)
    assert len(set(names.values()) - {"FLOAT"}) > 1
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({names[f"{layer}.self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert len({names[f"{layer}.mlp.{p}_proj"] for p in ("gate", "up")}) == 1
    table = rows(result, "allocation")
    assert len(table) == 8  # q k v, o, gate up, down of two layers
    assert table[0]["group"] == " ".join(f"model.layers.0.self_attn.{p}_proj:linear" for p in "qkv")
    assert (table[0]["n"], table[0]["k"]) == (128, 64)


def test_what_is_pinned_stays_and_counts() -> None:
    schemes = (("*", "W4A16-g32"), ("*.1.mlp.down_proj", "FLOAT"), ("*.0.mlp.down_proj", "W8A16"))
    step = MixedPrecision(choices=CHOICES, bits=8.0, keep=("*.0.mlp.down_proj", "*.1.*.q_proj"))
    gm, result = assigned(step, schemes)
    names = chosen(gm)
    assert names["model.layers.1.mlp.down_proj"] == "FLOAT"
    assert names["model.layers.0.mlp.down_proj"] == "W8A16"
    assert {names[f"model.layers.1.self_attn.{p}_proj"] for p in "qkv"} == {"W4A16-g32"}
    assert names["lm_head"] == "FLOAT"
    assert len(rows(result, "allocation")) == 5
    assert 7.7 < mean_bits(gm) <= 8.0
    assert float(rows(result, "budgets")[0]["used"]) == pytest.approx(mean_bits(gm), abs=1e-6)


def test_logits_that_the_recipe_quantizes_keep_their_scheme() -> None:
    schemes = (("*", "W4A16-g32"), ("lm_head", "W8A16"))
    gm, _ = assigned(MixedPrecision(choices=CHOICES, bits=4.5), schemes)
    assert chosen(gm)["lm_head"] == "W8A16"


def test_a_float_model_is_left_alone() -> None:
    gm, result = assigned(MixedPrecision(choices=CHOICES, bits=4.5), (("*", "FLOAT"),))
    assert result.changed == 0 and not result.tables
    assert set(chosen(gm).values()) == {"FLOAT"}


def test_only_schemes_change() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=1, tokens=6)
    AssignSchemes(schemes=(("*", "W8A16"),)).run(gm, ctx)
    before = print_graph(gm, Hasher()).replace("W8A16", "")
    MixedPrecision(choices=("W4A16-g32",), bits=4.5).run(gm, ctx)
    assert print_graph(gm, Hasher()).replace("W4A16-g32", "") == before


def test_the_same_twice() -> None:
    step = MixedPrecision(choices=CHOICES, bits=5.2)
    (gm, first), (again, second) = assigned(step), assigned(step)
    assert chosen(gm) == chosen(again)
    assert first.tables == second.tables


# --- budgets ------------------------------------------------------------------------------------


def test_a_budget_that_nothing_keeps() -> None:
    with pytest.raises(RecipeError, match=r"keeps bits: 4\.4\n.*smallest possible is bits: 4\.5;"):
        assigned(MixedPrecision(choices=CHOICES, bits=4.4))
    with pytest.raises(RecipeError, match=r"smallest possible is bits: 8\.467;"):
        assigned(MixedPrecision(choices=("W8A16",), bits=8.0))
    assigned(MixedPrecision(choices=("W8A16",), bits=8.467))  # what the hint says is enough


@dataclass
class Rules:
    """A target on which bits are time, and which has no kernel for 6-bit weights of few outputs."""

    def refusal(self, node: fx.Node, scheme: Scheme) -> str | None:
        few = node.args[1].meta["val"].shape[0] < 64
        return "too few outputs" if few and scheme.name.startswith("W6") else None

    def predicted_us(self, node: fx.Node, scheme: Scheme) -> float:
        return stored_bits(node, scheme) / 1000


def test_a_budget_of_predicted_time() -> None:
    gm, result = assigned(MixedPrecision(choices=CHOICES, relative_time=0.2), matmul_rules=Rules())
    assert 0.18 < mean_bits(gm) / 32 <= 0.2
    (budget,) = rows(result, "budgets")
    assert float(budget["used"]) == pytest.approx(mean_bits(gm) / 32, abs=1e-4)
    table = rows(result, "allocation")
    first = next(n for n in linears(gm) if label(n).endswith("o_proj:linear"))
    assert float(table[1]["predicted_us"]) == round(Rules().predicted_us(first, scheme_of(first)))
    with pytest.raises(RecipeError, match=r"smallest possible is relative_time: 0\.14"):
        assigned(MixedPrecision(choices=CHOICES, relative_time=0.1), matmul_rules=Rules())
    with pytest.raises(RecipeError, match="needs a target"):
        assigned(MixedPrecision(choices=CHOICES, relative_time=0.2))


def test_two_budgets_at_once() -> None:
    step = MixedPrecision(choices=CHOICES, bits=8.0, relative_time=0.15)
    gm, result = assigned(step, matmul_rules=Rules())
    assert mean_bits(gm) <= 0.15 * 32
    assert [row["budget"] for row in rows(result, "budgets")] == ["bits", "relative_time"]


def test_two_budgets_that_only_work_apart() -> None:
    class Slow(Rules):
        """Fewer bits take longer."""

        def predicted_us(self, node: fx.Node, scheme: Scheme) -> float:
            return 1e9 / stored_bits(node, scheme)

    assigned(MixedPrecision(choices=CHOICES, relative_time=4.0), matmul_rules=Slow())
    step = MixedPrecision(choices=CHOICES, bits=4.6, relative_time=4.0)
    with pytest.raises(RecipeError, match=r"keeps these budgets together\n.*each by itself"):
        assigned(step, matmul_rules=Slow())


def test_what_the_target_cannot_run_is_not_chosen() -> None:
    gm, result = assigned(MixedPrecision(choices=CHOICES, bits=100.0), matmul_rules=Rules())
    six = MixedPrecision(choices=("W4A16-g32", "W6A16-g32"), bits=6.5)
    gm, result = assigned(six, matmul_rules=Rules())
    names = chosen(gm)
    assert {names[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"} == {"W4A16-g32"}  # k: 32
    assert names["model.layers.0.mlp.down_proj"] == "W6A16-g32"
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["model.layers.0.self_attn.k_proj:linear"] == (
        "W6A16-g32 is no choice: too few outputs"
    )


def test_where_no_choice_fits_the_scheme_stays() -> None:
    step = MixedPrecision(choices=("W6A16-g32",), bits=7.0)
    gm, _ = assigned(step, matmul_rules=Rules())
    names = chosen(gm)
    assert names["model.layers.0.self_attn.k_proj"] == "W4A16-g32"
    assert names["model.layers.0.self_attn.o_proj"] == "W6A16-g32"


# --- in a recipe --------------------------------------------------------------------------------


def test_the_bits_are_those_that_the_compiled_model_stores() -> None:
    choices = ["W3A16-g32", "W4A16_ASYM-g32", "W4A16-g32", "W6A16-g32", "W8A16"]
    recipe = {
        "schemes": {"*": "W4A16-g32"},
        "passes": [
            {"mixed-precision": {"choices": choices, "bits": 5.25, "keep": ["*.0.mlp.down_proj"]}},
            "insert-fake-quant",
            "quantize-weights",
        ],
    }
    model = panguq.compile(shared_model("llama"), recipe, calibration=token_ids(2, 12))
    figures = weight_figures(model)
    assert 4.75 < figures["bits_per_weight"] <= 5.25
    schemes = {m.name: m.scheme for m in model.report.matmuls}
    assert len(set(schemes.values()) - {"FLOAT"}) >= 3
    stored = {m.name: 8 * m.stored_bytes for m in model.report.matmuls if not m.gives_logits}
    gm, _ = canonical("llama")
    for node in linears(gm):
        if label(node) in stored:
            expected = stored_bits(node, parse_scheme(schemes[label(node)]))
            assert stored[label(node)] == expected, label(node)


def test_a_compile_that_goes_on_does_not_measure_again(tmp_path, monkeypatch) -> None:
    recipe = {
        "schemes": {"*": "W4A16-g32"},
        "passes": [
            {"mixed-precision": {"choices": list(CHOICES), "bits": 5.5}},
            "insert-fake-quant",
            "quantize-weights",
        ],
    }

    def schemes() -> list[str]:
        model = panguq.compile(
            shared_model("llama"), recipe, calibration=token_ids(2, 12), work_dir=tmp_path
        )
        return [m.scheme for m in model.report.matmuls]

    def never(*_: object) -> None:
        raise AssertionError("measured twice")

    first = schemes()
    monkeypatch.setattr(mixed_precision, "measure", never)
    assert schemes() == first and len(set(first)) > 2


def test_the_built_in_recipe() -> None:
    recipe = panguq.Recipe.named("mixed-4.75")
    recipe = recipe.with_schemes({"*.0.mlp.down_proj": "FLOAT"})
    (step,) = (p for p in recipe.passes if isinstance(p, MixedPrecision))
    assert step.bits == 4.75
    with pytest.raises(RecipeError, match="smallest possible"):  # 32 float bits in a tiny model
        panguq.compile(shared_model("llama"), recipe, calibration=token_ids(2, 12))


def test_static_activations_among_the_choices_need_ranges() -> None:
    start = (Canonicalize(), AssignSchemes(schemes=(("*", "W8A16"),)))
    static = MixedPrecision(choices=("W8A8", "W8A16"), bits=9.0)
    with pytest.raises(RecipeError, match="CALIBRATED"):
        check_passes([*start, static, InsertFakeQuant()])
    check_passes([*start, static, Calibrate(), InsertFakeQuant()])
    check_passes([*start, MixedPrecision(bits=5.0), InsertFakeQuant()])
    with pytest.raises(RecipeError, match="mixed-precision broke it"):
        check_passes([*start, Calibrate(), static, InsertFakeQuant()])
    assert Property.CALIBRATED in MixedPrecision.breaks


def test_options_that_are_none() -> None:
    for wrong, message in (
        ({"bits": 0.0}, "bits is 0"),
        ({"bits": float("nan")}, "bits is nan"),
        ({"relative_time": -1.0}, "relative_time is -1"),
        ({"bits": 5.0, "choices": ()}, "must be schemes that differ"),
        ({"bits": 5.0, "choices": ("W4A16", "w4a16")}, "must be schemes that differ"),
        ({"bits": 5.0, "choices": ("W4A61",)}, "unknown scheme"),
        ({"bits": 5.0, "clip_steps": 0}, "clip_steps is 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            MixedPrecision(**wrong)
    with pytest.raises(RecipeError, match="no budget"):
        check_passes([Canonicalize(), AssignSchemes(), MixedPrecision()])
    with pytest.raises(RecipeError, match="matches no matmul"):
        assigned(MixedPrecision(bits=5.0, keep=("*.no_proj",)))


def test_float_may_be_a_choice() -> None:
    step = MixedPrecision(choices=("W4A16-g32", "FLOAT"), bits=16.0)
    gm, result = assigned(step)
    assert {"W4A16-g32", "FLOAT"} == set(chosen(gm).values())
    assert rows(result, "allocation")[0]["kl_FLOAT"] == "0"
    assert mean_bits(gm) <= 16.0
    assert stored_bits(linears(gm)[0], SCHEMES["FLOAT"]) == 32 * 64 * 64
