"""A target in one file of somebody else's: compiled for, run, saved, loaded, planned, refused."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import nn

import panguq
from panguq.errors import LoweringError, StorageError
from panguq.ir.ops import opset
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.targets import TARGETS, add_target, find_target
from tests.test_docs import DOCS, examples

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The first example of the page, as a file that a user has; nothing of panguq is edited."""
    folder = tmp_path_factory.mktemp("somebody")
    source, _ = examples(DOCS / "contributing/add-a-target.md")[0]
    # The page itself may run in this process, too, and an op is defined once.
    source = source.replace('namespace="tiny"', 'namespace="in_a_file"')
    (folder / "tiny_target.py").write_text(source, encoding="utf-8")
    with patch.dict(TARGETS), patch.object(sys, "path", [str(folder), *sys.path]):
        yield importlib.import_module("tiny_target")
        del sys.modules["tiny_target"]


@pytest.fixture(scope="module")
def compiled(module: ModuleType) -> panguq.CompiledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    return panguq.compile(model, "w8a8-dynamic", example_inputs=(X,), target="tiny1")


def test_its_kernel_computes_what_was_quantized(compiled) -> None:
    called = [str(n.target) for n in compiled.graph.graph.nodes if "int8_matmul" in str(n.target)]
    assert called == ["in_a_file.int8_matmul.default"] * 2
    assert compiled.report.target == "tiny1"
    torch.testing.assert_close(compiled(X), compiled.at_stage("fake-quant")(X))


def test_it_is_saved_and_loaded_with_the_same_bits(compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model")
    assert torch.equal(panguq.load(tmp_path / "model")(X), compiled(X))
    known = {n: op for n, op in opset._own_ops.items() if not n.startswith("in_a_file")}
    with patch.object(opset, "_own_ops", known), pytest.raises(StorageError) as caught:
        panguq.load(tmp_path / "model")
    assert "import what defines the op if it is your own" in caught.value.hint


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_everything_else_is_refused_in_one_sentence(module, recipe) -> None:
    sentence = (
        f"no kernel of target tiny1 can run {recipe.upper()} for n=8, k=32: int8_matmul: it takes "
        "int8 weights and int8 inputs, a scale for each token"
    )
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(LoweringError, match=re.escape(sentence)):
        panguq.compile(model, recipe, example_inputs=(X,), target="tiny1")
    plan = panguq.plan(model, recipe, example_inputs=(X,), target="tiny1")
    assert [r for r in plan.refusals if sentence in r]


def test_of_legal_kernels_the_cheapest_is_taken(module) -> None:
    class TwoKernels(module.TinyTarget):
        def candidates(self, problem, allow_float=False):
            return [Candidate("slow"), Candidate("fast"), Candidate("neither", "it is broken")]

        def total_us(self, candidates, problem, tokens):
            factors = [[{"slow": 2.0, "fast": 1.0}[c.kernel]] for c in candidates]
            return factors * super().total_us(candidates[:1], problem, tokens)

    problem = MatmulProblem(None, 8, 32, SCHEMES["W8A8_DYNAMIC"])
    choice = select_kernel(problem, TwoKernels("two", constants=module.TINY.constants))
    assert choice.kernel == "fast"
    assert choice.losers == (("slow", "10 us at m=1, 10 us at m=512"), ("neither", "it is broken"))


def test_other_commands_know_it(module, compiled) -> None:
    with pytest.raises(LoweringError) as caught:
        find_target("tiny2")
    assert caught.value.hint.startswith("did you mean tiny1?")
    with pytest.raises(panguq.InputError, match="compiled for tiny1 does not run on npu"):
        compiled.to("npu")


@pytest.mark.parametrize("name", ["tiny1", "cpu", "", "a/b", "tiny.yaml"])
def test_a_name_that_cannot_be(module, name) -> None:
    with pytest.raises(LoweringError, match=r"already|is no name for a target"):
        add_target(module.TinyTarget(name, constants=module.TINY.constants))


def test_numbers_are_checked(module) -> None:
    with pytest.raises(LoweringError, match=r"target tiny3: constants\.launch_us: is missing"):
        add_target(module.TinyTarget("tiny3"))
