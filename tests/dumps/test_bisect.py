"""A planted fault must be named: exactly that pass, and exactly that matmul."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from panguq.dumps.bisect import BisectResult, bisect
from panguq.dumps.reader import DumpReader
from panguq.dumps.replay import run_stage
from panguq.files.checksums import CHECKSUMS
from panguq.ir.edit import find_label, get_tensor, label, set_tensor
from panguq.passes.pipeline import runner as pipeline
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Region, linears

VICTIM = "model.layers.1.mlp.up_proj:linear"
panguq = torch.ops.panguq


def weight_of(gm: fx.GraphModule, name: str) -> fx.Node:
    return find_label(gm, name).args[1]  # type: ignore[return-value]


@dataclass(frozen=True)
class DoubleScale(Pass):
    """Doubles one weight's scale."""

    name: ClassVar[str] = "double-scale"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        name = str(weight_of(gm, VICTIM).args[1].target)
        set_tensor(gm, name, get_tensor(gm, name) * 2)
        return PassResult(changed=1)


@dataclass(frozen=True)
class TwoBits(Pass):
    """Rounds one float weight to two bits."""

    name: ClassVar[str] = "two-bits"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        name = str(weight_of(gm, VICTIM).target)
        weight = get_tensor(gm, name)
        step = weight.abs().max() / 2
        set_tensor(gm, name, (weight / step).round().clamp(-2, 1) * step)
        return PassResult(changed=1)


@dataclass(frozen=True)
class NotExact(Pass):
    """Claims to be exact and changes one weight a little; with a site, within that."""

    name: ClassVar[str] = "not-exact"
    exact: ClassVar[bool] = True
    with_site: bool = False
    factor: float = 1.001

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        node = find_label(gm, VICTIM)
        name = str(node.args[1].target)  # type: ignore[union-attr]
        set_tensor(gm, name, get_tensor(gm, name) * self.factor)
        result = PassResult(changed=1)
        if self.with_site:
            result.sites.append(Region((label(node.args[0]),), (VICTIM,)))  # type: ignore[arg-type]
        return result


@dataclass(frozen=True)
class BadNorm(Pass):
    """Changes something that is no matmul."""

    name: ClassVar[str] = "bad-norm"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        name = "model.layers.1.input_layernorm.weight"
        set_tensor(gm, name, get_tensor(gm, name) * 3)
        return PassResult(changed=1)


@dataclass(frozen=True)
class Poison(Pass):
    """Puts NaN into one scale."""

    name: ClassVar[str] = "poison"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        name = str(weight_of(gm, VICTIM).args[1].target)
        set_tensor(gm, name, get_tensor(gm, name) * float("nan"))
        return PassResult(changed=1)


def found(result: BisectResult) -> tuple[Any, ...]:
    return result.verdict, result.stage, result.node


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16"])
@pytest.mark.parametrize("floor", [None, 8.0])
def test_a_doubled_scale(dump_into: Any, tmp_path: Path, recipe: str, floor: float | None) -> None:
    reader, _, graphs = dump_into(tmp_path / "dump", recipe, [DoubleScale()])
    stage = next(name for name in graphs if name.endswith("double-scale"))
    result = bisect(reader, floor)
    verdict = "largest_drop" if floor is None else "below_floor"
    assert found(result) == (verdict, stage, VICTIM)
    assert result.db is not None and result.before_db is not None
    assert result.db < 1 and result.before_db > 10 and not result.clean
    assert f"{stage}: {VICTIM}" in result.render()
    assert json.loads(result.model_dump_json())["node"] == VICTIM


@pytest.mark.parametrize("floor", [None, 20.0])
def test_a_matmul_in_two_bits(dump_into: Any, tmp_path: Path, floor: float | None) -> None:
    reader, _, _ = dump_into(tmp_path / "dump", "w8a8", [TwoBits()], at=5)
    result = bisect(reader, floor)
    verdict = "largest_drop" if floor is None else "below_floor"
    assert found(result) == (verdict, "06_two-bits", VICTIM)
    assert result.reference == "05_outliers" and result.before_db == 999.0


@pytest.mark.parametrize("with_site", [False, True])
@pytest.mark.parametrize("at", [2, 6])
def test_an_exact_pass_that_is_not(
    dump_into: Any, tmp_path: Path, monkeypatch: Any, with_site: bool, at: int
) -> None:
    monkeypatch.setattr(pipeline, "_prove", lambda *_: 0.0)  # else the proof refuses it
    reader, _, _ = dump_into(tmp_path / "dump", "w8a8", [NotExact(with_site=with_site)], at=at)
    for floor in (None, 10.0):
        result = bisect(reader, floor)
        assert found(result) == ("not_exact", f"{at + 1:02d}_not-exact", VICTIM)
        assert "must be exact" in result.render()
        assert result.db == pytest.approx(60, abs=0.1)


def test_canonicalize_is_checked_against_the_trace(
    dump_into: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from panguq.passes.canonicalize import Canonicalize

    run = Canonicalize.run

    def wrong(self: Canonicalize, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = run(self, gm, ctx)
        node = find_label(gm, "model.layers.1.post_attention_layernorm:rms_norm")
        node.update_arg(2, 0.1)
        return result

    monkeypatch.setattr(Canonicalize, "run", wrong)
    monkeypatch.setattr(pipeline, "_prove", lambda *_: 0.0)
    reader, _, _ = dump_into(tmp_path / "dump", "float")
    result = bisect(reader)
    assert result.verdict == "not_exact" and result.stage == "01_canonicalize"
    # the first node after the norm that the trace has, too
    assert result.node == "model.layers.1.mlp.gate_proj:linear"


def test_what_is_no_matmul_is_found(dump_into: Any, tmp_path: Path) -> None:
    reader, _, _ = dump_into(tmp_path / "dump", "w8a8", [BadNorm()])
    node = "model.layers.1.input_layernorm:rms_norm"
    for floor in (None, 10.0):
        assert bisect(reader, floor).node == node


def test_nan(dump_into: Any, tmp_path: Path) -> None:
    reader, _, _ = dump_into(tmp_path / "dump", "w8a8-dynamic", [Poison()])
    result = bisect(reader)
    assert (result.node, result.db) == (VICTIM, -999.0)
    assert "not finite after" in result.render()
    run = run_stage(reader)
    assert run.first_non_finite == "model.layers.1.mlp.up_proj.weight_scale"
    assert (run.output_sqnr_db, run.kl, run.top1) == (-999.0, None, None)
    assert not run.top_tokens and run.reference_top_tokens
    assert "first NaN/Inf" in run.render()


def test_a_float_graph_that_is_not_finite(dump_into: Any, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class ExactPoison(Pass):
        name: ClassVar[str] = "exact-poison"
        exact: ClassVar[bool] = False

        def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
            name = str(linears(gm)[3].args[1].target)  # type: ignore[union-attr]
            set_tensor(gm, name, get_tensor(gm, name) * float("inf"))
            return PassResult(changed=1)

    reader, _, _ = dump_into(tmp_path / "dump", "float", [ExactPoison()])
    path = reader.path / "03_exact-poison" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exact": True}))
    path.with_name(CHECKSUMS).unlink()
    result = bisect(DumpReader(reader.path))
    assert result.verdict == "float_not_finite"
    assert result.node == "model.layers.0.self_attn.o_proj.weight"
    assert "itself yields NaN or Inf" in result.render()


def test_a_clean_dump_says_so(w8a8: Any, dump_into: Any, tmp_path: Path) -> None:
    result = bisect(w8a8[0], 10.0)
    assert result.clean and result.render().startswith("Clean: every exact pass is exact and no")
    assert result.reference == "06_outliers" and len(result.stages) == 9
    compared = {entry.stage: entry.compared for entry in result.stages}
    assert compared["01_canonicalize"] > 10 and compared["03_smoothquant"] >= 8
    assert compared["02_assign-schemes"] == compared["04_calibrate"] == 0
    reader, _, _ = dump_into(tmp_path / "dump", "float")
    result = bisect(reader)
    assert result.clean and "nothing else changed" in result.render()
    assert all(stage.exact or stage.worst_db == 999.0 for stage in result.stages)


def test_no_fault_without_a_floor_is_the_largest_drop(w8a8: Any) -> None:
    reader, _ = w8a8
    result = bisect(reader)
    assert (result.verdict, result.stage) == ("largest_drop", "07_insert-fake-quant")
    summary = next(line for line in reader.summary().splitlines() if "07_insert" in line)
    assert f"{result.db:.1f} dB: {result.node}" in summary  # as `compile` itself measured it


def test_the_trace_cannot_always_be_saved(w8a8: Any, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(w8a8[0].path, tmp_path / "dump")
    path = folder / "00_trace" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unsaved": "node x: no such op"}))
    path.with_name(CHECKSUMS).unlink()
    result = bisect(DumpReader(folder), 10.0)
    assert result.clean and result.stages[0].note == "not compared: the trace could not be saved"


# --- run ----------------------------------------------------------------------------------------


def test_run(w8a8: Any) -> None:
    reader, _ = w8a8
    last, same = run_stage(reader), run_stage(reader, "06_outliers")
    assert (last.stage, last.reference) == ("09_lower-matmuls", "06_outliers")
    assert 15 < last.output_sqnr_db < 80 and last.kl is not None and 0 < last.kl < 0.1
    assert last.probe_tokens == 16 and len(last.top_tokens) == 5
    assert same.output_sqnr_db == 999.0 and same.kl == 0.0 and same.top1 == 1.0
    assert same.top_tokens == same.reference_top_tokens
    assert run_stage(reader, "0").output_sqnr_db > 100  # the trace, with its mask spelled out
    assert run_stage(reader, "canonicalize").output_sqnr_db > 100
    text = last.render()
    assert "against the float graph 06_outliers, on 16 tokens" in text and "KL divergence" in text
