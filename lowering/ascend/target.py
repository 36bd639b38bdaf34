"""The Ascend targets: what CANN's kernels and panguq's own make of a matmul on an NPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from panguq.ir.edit import call
from panguq.ir.number_format import INT8
from panguq.ir.quant_spec import SCHEMES, Scheme
from panguq.ir.views import ExpertLinear
from panguq.kernels.ascend.chip import Chip, Number
from panguq.kernels.ascend.own.int4_weight import int4_quarters, int4_weight
from panguq.lowering.ascend.calls import AscendCalls
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.model import cost, total_us
from panguq.lowering.ascend.cost.terms import MEANING, OVERLAPPED
from panguq.lowering.ascend.dispatch import NO_LIMIT
from panguq.lowering.ascend.expert_calls import ExpertCalls
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.ascend.inputs import AscendInputs
from panguq.lowering.ascend.machine import ASCEND_UNITS, AscendMachine
from panguq.lowering.ascend.merge_gate_up import MergeGateUp
from panguq.lowering.ascend.notes import ascend_notes
from panguq.lowering.ascend.rules import fallback_names
from panguq.lowering.ascend.select import select_ascend
from panguq.lowering.ascend.select_experts import select_experts, typical_us
from panguq.lowering.choice import Choice, TokenMix
from panguq.lowering.fuse_latent_attention import FuseLatentAttention
from panguq.lowering.graph_problems import output_parts
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Candidate, FormatOption, MatmulProblem, WeightFormat
from panguq.lowering.target import Calls, Constant, Cost, Floats, Peaks
from panguq.passes.pipeline.base import Pass
from panguq.tensors.weight_store import WeightStore

aten = torch.ops.aten


@dataclass(frozen=True)
class AscendTarget(AscendMachine):
    """An Ascend NPU."""

    float_dtype = torch.bfloat16
    devices = ("cpu", "npu")
    takes_empty_masks = False  # the fused attention reads its mask in full
    takes_experts = True
    fits_schemes = True
    prepacking = (int4_weight, int4_quarters)
    terms = MEANING
    overlapped = OVERLAPPED

    def candidates(self, problem: MatmulProblem, allow_float: bool = False) -> list[Candidate]:
        return ascend_candidates(problem, self, allow_float)

    def fallbacks(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """See `rules.fallback_names` for the order and its reasons."""
        return tuple(SCHEMES[name] for name in fallback_names(scheme))

    @property
    def largest_n(self) -> int:
        return self.chip.largest_dimension

    def weight_formats(
        self, problem: MatmulProblem, option: FormatOption
    ) -> tuple[WeightFormat, ...]:
        """Formats are compared for int8 weights of integer matmuls; other weights are ND: the
        vendor documents NZ for weight-only matmuls in graph mode alone."""
        weight, activation = problem.scheme.weight, problem.scheme.activation
        fractal = weight is not None and weight.format == INT8 and activation is not None
        if fractal and problem.experts and problem.biased:
            return ("NZ",)  # a bfloat16 bias is taken beside such weights alone
        if not fractal or option == "ND":
            return ("ND",)
        return ("NZ",) if option == "NZ" or problem.experts else ("ND", "NZ")

    def total_us(
        self, candidates: Sequence[Candidate], problem: MatmulProblem, tokens: NDArray[np.int64]
    ) -> Floats:
        if problem.experts:
            times = [typical_us(int(m), problem, self) for m in tokens]
            return np.array([times] * len(candidates))
        return total_us(candidates, problem, self, tokens)

    def cost(self, candidate: Candidate, problem: MatmulProblem) -> Cost:
        return cost(candidate, problem, self)

    def select(
        self, problem: MatmulProblem, mix: TokenMix, allow_float: bool, hysteresis: float
    ) -> Choice:
        if problem.experts:
            return select_experts(problem, self, mix)
        return select_ascend(problem, self, mix, allow_float, hysteresis)

    @property
    def peaks(self) -> Peaks:
        macs_per_us = self.chip.cube_macs * self["cube_cores"] * self["clock_mhz"]
        return Peaks(self["hbm_gb_per_s"] * 1000, macs_per_us)

    def passes_before(self, options: AscendOptions) -> tuple[Pass, ...]:
        return (FuseLatentAttention(), MergeGateUp(self.largest_n))

    def calls(self, gm: fx.GraphModule, store: WeightStore) -> Calls:
        inputs = AscendInputs(gm, store, self.chip)
        calls, expert_calls = AscendCalls(gm, inputs, self.chip), ExpertCalls(gm, inputs, self.chip)

        def lower(node: fx.Node, choice: Choice) -> fx.Node:
            if ExpertLinear.match(node) is not None:
                return expert_calls.lower(node, choice.weight_format)
            table = [(entry.last_m or NO_LIMIT, entry.candidate) for entry in choice.table]
            parts = [
                calls.lower(node, table, rows, choice.weight_format)
                for rows in output_parts(node, self.largest_n)
            ]
            if len(parts) == 1:
                return parts[0]
            return call(node, aten.cat.default, (parts, -1), origin=node)

        return lower

    def passes_after(self, options: AscendOptions) -> tuple[Pass, ...]:
        return (FuseAscend(options.allow_inexact),)

    def notes(self, node: fx.Node, scheme: Scheme | None, predict: bool) -> dict[str, str]:
        return ascend_notes(node, scheme, self if predict else None)


def targets_of(chip: Chip) -> tuple[AscendTarget, ...]:
    """A target for each part of the chip."""
    return tuple(
        AscendTarget(name, constants=_constants({**chip.constants, **part}), chip=chip)
        for name, part in chip.parts.items()
    )


def _constants(numbers: Mapping[str, Number]) -> Mapping[str, Constant]:
    found = {
        key: Constant(numbers[key][0], unit, numbers[key][1]) for key, unit in ASCEND_UNITS.items()
    }
    return MappingProxyType(found)
