"""The order of passes is checked before anything runs; instruments see all that happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import fx

from panguq.errors import NumericsError, RecipeError
from panguq.ir.edit import set_tensor
from panguq.ir.properties import TRACED, Property
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.calibrate import Calibrate
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.outliers import Outliers
from panguq.passes.pipeline.base import Pass, PassContext, PassResult
from panguq.passes.pipeline.runner import PassRecord
from panguq.passes.quantize_kv_cache import QuantizeKvCache
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.smoothquant import SmoothQuant
from panguq.recipe import Recipe, preset_names
from panguq.registry import RECIPE_PASSES
from panguq.schedule import check_passes
from tests.model_shelf import TwoLinears, run_passes, run_pipeline, tiny_context, trace_tiny

STATIC = AssignSchemes(schemes=(("*", "W8A8"),))
DYNAMIC = AssignSchemes(schemes=(("*", "W8A8_DYNAMIC"),))
WEIGHT_ONLY = AssignSchemes(schemes=(("*", "W4A16"),))
FLOAT = AssignSchemes(schemes=(("*", "FLOAT"),))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_in_order(preset) -> None:
    check_passes([*Recipe.named(preset).build(), LowerMatmuls()])


@pytest.mark.parametrize(
    "passes",
    [
        (Canonicalize(), DYNAMIC, InsertFakeQuant(), QuantizeWeights(), LowerMatmuls()),
        (Canonicalize(), WEIGHT_ONLY, InsertFakeQuant(), QuantizeWeights(), LowerMatmuls()),
        (Canonicalize(), WEIGHT_ONLY, InsertFakeQuant(),
         QuantizeWeights(clip_search=True, importance="none")),
        (Canonicalize(), FLOAT, LowerMatmuls()),
        (Canonicalize(), STATIC, Calibrate(), Outliers(), Outliers(treatment="float"),
         InsertFakeQuant()),
    ],
)  # fmt: skip
def test_orders_that_need_no_more(passes) -> None:
    check_passes(passes)


@pytest.mark.parametrize(
    ("passes", "message", "hint"),
    [
        ((STATIC,), "pass 01 assign-schemes needs CANONICAL", "put canonicalize before it"),
        ((Canonicalize(), InsertFakeQuant()),
         "pass 02 insert-fake-quant needs SCHEMES", "put assign-schemes before it"),
        ((Canonicalize(), STATIC, InsertFakeQuant()),
         "pass 03 insert-fake-quant needs CALIBRATED", "put calibrate before it"),
        ((Canonicalize(), STATIC, Calibrate(), SmoothQuant(), InsertFakeQuant()),
         "pass 05 insert-fake-quant needs CALIBRATED, and pass 04 smoothquant broke it",
         "put calibrate before it"),
        ((Canonicalize(), STATIC, Outliers()),
         "pass 03 outliers needs STATISTICS", "put calibrate before it"),
        ((Canonicalize(), WEIGHT_ONLY, InsertFakeQuant(), QuantizeWeights(clip_search=True)),
         "pass 04 quantize-weights needs STATISTICS", "put calibrate before it"),
        ((Canonicalize(), DYNAMIC, QuantizeWeights()),
         "pass 03 quantize-weights needs QDQ", "put insert-fake-quant before it"),
        ((Canonicalize(), DYNAMIC, InsertFakeQuant(), LowerMatmuls()),
         "pass 04 lower-matmuls needs WEIGHT_CODES",
         "put quantize-weights or gptq or gptaq or slim-llm or billm or learned-rounding "
         "or progressive-rounding before it"),
        ((Canonicalize(), WEIGHT_ONLY, LowerMatmuls()),
         "pass 03 lower-matmuls needs QDQ", "put insert-fake-quant before it"),
        ((Canonicalize(), DYNAMIC, InsertFakeQuant(), Calibrate()),
         "pass 04 calibrate needs FLOAT_MATMULS, and pass 03 insert-fake-quant broke it",
         "FLOAT_MATMULS: every matmul reads floating-point weights: nothing is quantized yet; put "
         "calibrate before pass 03 insert-fake-quant, or leave one out"),
        ((Canonicalize(), WEIGHT_ONLY, InsertFakeQuant(), QuantizeWeights(), Gptq()),
         "pass 05 gptq needs UNSOLVED, and pass 04 quantize-weights broke it",
         "UNSOLVED: no code of a weight is chosen yet: the graph computes them from float "
         "weights; put gptq before pass 04 quantize-weights, or leave one out"),
        ((Canonicalize(), QuantizeKvCache(), QuantizeKvCache()),
         "pass 03 quantize-kv-cache needs FLOAT_CACHE, and pass 02 quantize-kv-cache broke it",
         "FLOAT_CACHE: the cache of keys and values is in floating point; put quantize-kv-cache "
         "before pass 02 quantize-kv-cache, or leave one out"),
    ],
)  # fmt: skip
def test_wrong_orders_are_refused(passes, message, hint) -> None:
    with pytest.raises(RecipeError) as caught:
        check_passes(passes)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_nothing_runs_when_the_order_is_wrong() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 8, 4), torch.randn(3, 8))
    watcher = Watcher()
    with pytest.raises(RecipeError):
        run_pipeline(gm, [Canonicalize(), InsertFakeQuant()], tiny_context(interface), [watcher])
    assert watcher.seen == []


def test_names_are_unique_and_kebab_case() -> None:
    names = [cls.name for cls in RECIPE_PASSES]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and "_" not in name for name in names)


@pytest.mark.parametrize("cls", RECIPE_PASSES)
def test_every_pass_says_before_and_after(cls) -> None:
    assert "Before" in cls.__doc__ and "After" in cls.__doc__


# --- the runner ---------------------------------------------------------------------------------


@dataclass
class Watcher:
    seen: list[str] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)

    def before_pass(self, index: int, step: Pass, gm: fx.GraphModule) -> None:
        self.seen.append(f"before {index} {step.name}")

    def after_pass(self, record: PassRecord, gm: fx.GraphModule) -> None:
        self.seen.append(f"after {record.folder}")
        self.records.append(record)

    def failed_pass(self, index: int, step: Pass, error: BaseException) -> None:
        self.seen.append(f"failed {index} {step.name}: {type(error).__name__}")


@dataclass(frozen=True)
class Fail(Pass):
    name: ClassVar[str] = "fail"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        raise ZeroDivisionError


def test_instruments_see_every_pass() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 8, 4), torch.randn(3, 8))
    watcher = Watcher()
    with pytest.raises(ZeroDivisionError):
        run_pipeline(gm, [Canonicalize(), DYNAMIC, Fail()], tiny_context(interface), [watcher])
    assert watcher.seen == [
        "before 1 canonicalize", "after 01_canonicalize",
        "before 2 assign-schemes", "after 02_assign-schemes",
        "before 3 fail", "failed 3 fail: ZeroDivisionError",
    ]  # fmt: skip


def test_exact_passes_carry_their_proof_and_lossy_ones_none() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 8, 4), torch.randn(3, 8))
    ctx = tiny_context(interface, torch.randn(16, 8))
    records = run_passes(gm, ctx, "W8A8", Calibrate(), InsertFakeQuant(), QuantizeWeights())
    assert [r.proved_difference for r in records] == [0.0, 0.0, 0.0, None, None]
    assert [r.result.changed for r in records] == [0, 2, 2, 2, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("scheme", "passes", "first"),
    [
        ("W8A8", (Calibrate(), InsertFakeQuant()), "03 calibrate"),
        ("W8A8", (SmoothQuant(), Calibrate()), "03 smoothquant"),
        ("W8A16", (InsertFakeQuant(), QuantizeWeights()), "03 insert-fake-quant"),
    ],
)
def test_a_bad_weight_is_named_with_the_first_pass_that_saw_it(bad, scheme, passes, first) -> None:
    gm, interface = trace_tiny(TwoLinears(8, 8, 4), torch.randn(3, 8))
    ctx = tiny_context(interface, torch.randn(16, 8))
    run_passes(gm, ctx, scheme)
    weight = torch.ones(8, 8)
    weight[2, 3] = bad
    set_tensor(gm, "first.weight", weight)
    held = TRACED | {Property.CANONICAL, Property.SCHEMES}
    with pytest.raises(NumericsError) as caught:
        run_pipeline(gm, passes, ctx, first_index=3, held=held)
    assert caught.value.message == (
        "weight first.weight [8, 8] holds 1 values that are NaN or Inf; "
        f"first seen by pass {first}"
    )  # fmt: skip


def test_a_bad_activation_is_named_with_the_first_pass_that_saw_it() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 8, 4), torch.randn(3, 8))
    batch = torch.randn(16, 8)
    batch[5] = float("nan")
    with pytest.raises(NumericsError, match=r"activation x \[16, 8\] .* by pass 03 calibrate"):
        run_passes(gm, tiny_context(interface, batch), "W8A8", Calibrate())
