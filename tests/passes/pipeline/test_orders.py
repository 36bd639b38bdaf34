"""Every order of up to four passes is refused, or makes a model that is near the float one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import clone
from panguq.ir.properties import TRACED, Property
from panguq.ir.run import interpret
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.pass_options import make_pass, passes_by_name
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.pipeline.runner import Runner, check_order
from tests.model_shelf import canonical, family_context

LONGEST = 4
OPTIONS = {
    "mixed-precision": {"bits": 8.5, "choices": ["W8A8", "W8A16"]},
    "progressive-rounding": {"steps": 2},
}
PASSES = {
    name: make_pass(cls, OPTIONS.get(name, {}), name) for name, cls in passes_by_name().items()
}
BEFORE = (Canonicalize(), AssignSchemes(schemes=(("*", "W8A8"), ("lm_head", "FLOAT"))))
LEAST_DB = 22.0
"""Quantized against float: W8A8 of this model is far above it, a broken graph below."""
SAME_DB = 35.0
"""Lowered against quantized: bfloat16 and the order of sums."""


def accepted() -> Iterator[tuple[str, ...]]:
    for length in range(LONGEST + 1):
        for order in itertools.permutations(PASSES, length):
            try:
                check_order([*BEFORE, *(PASSES[name] for name in order), LowerMatmuls()])
            except RecipeError:
                continue
            yield order


def test_an_order_that_makes_sense_calibrates_quantizes_and_solves_once() -> None:
    """Of all 99,200; each rule is said in words here, and as properties by the passes."""
    orders = list(accepted())
    assert len(orders) == 105
    solvers = {name for name, step in PASSES.items() if Property.WEIGHT_CODES in step.establishes}
    first_to_last = [
        ("rotate", "calibrate"), ("smoothquant", "calibrate"), ("awq", "calibrate"),
        ("mixed-precision", "calibrate"), ("weigh-tokens", "insert-fake-quant"),
        ("calibrate", "outliers"), ("outliers", "insert-fake-quant"),
        ("calibrate", "insert-fake-quant"),
    ]  # fmt: skip
    for order in orders:
        (solver,) = solvers & set(order)
        rules = [*first_to_last, ("insert-fake-quant", solver), (solver, "tune-scales")]
        for early, late in rules:
            if {early, late} <= set(order):
                assert order.index(early) < order.index(late)


@dataclass(frozen=True)
class Stage:
    """A graph after some passes. Orders that begin alike share it."""

    gm: fx.GraphModule
    ctx: PassContext
    held: frozenset[Property]

    def after(self, step: Pass) -> Stage:
        gm, ctx = clone(self.gm), replace(self.ctx, batches=list(self.ctx.batches))
        runner = Runner(ctx, held=self.held, prove=False)
        runner.run(gm, [step])
        return Stage(gm, ctx, runner.held)

    def logits(self) -> Tensor:
        assert self.ctx.probe is not None
        return interpret.run(self.gm, self.ctx.probe)[0]


def test_every_order_that_is_accepted_stays_near_the_float_model() -> None:
    gm, _ = canonical("llama")
    ctx = replace(family_context("llama", sequences=2, tokens=24), reference=gm)
    stages = {(): Stage(gm, ctx, TRACED | {Property.CANONICAL}).after(BEFORE[1])}
    wanted = stages[()].logits()
    for order in accepted():
        if {"billm", "slim-llm"} & set(order):  # they refuse weights of 8 bits
            continue
        for end in range(1, len(order) + 1):
            if order[:end] not in stages:
                stages[order[:end]] = stages[order[: end - 1]].after(PASSES[order[end - 1]])
        lowered = stages[order].after(LowerMatmuls())
        quantized = sqnr_db(wanted, stages[order].logits())
        assert quantized > LEAST_DB, (order, quantized)
        same = sqnr_db(stages[order].logits(), lowered.logits())
        assert same > SAME_DB, (order, quantized, same)


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    noise = (wanted - found).double().square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise.clamp_min(1e-30)))
