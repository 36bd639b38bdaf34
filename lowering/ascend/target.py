"""The Ascend targets: what CANN's kernels and panguq's own make of a matmul on an NPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from panguq.ir.edit import call
from panguq.ir.number_format import INT8
from panguq.ir.quant_spec import SCHEMES, Scheme
from panguq.kernels.ascend.limits import LARGEST_DIMENSION
from panguq.kernels.ascend.own.int4_weight import int4_weight
from panguq.lowering.ascend.calls import AscendCalls
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.model import cost, total_us
from panguq.lowering.ascend.cost.terms import MEANING, OVERLAPPED
from panguq.lowering.ascend.dispatch import NO_LIMIT
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.ascend.inputs import AscendInputs
from panguq.lowering.ascend.machine import ASCEND_UNITS, AscendMachine
from panguq.lowering.ascend.merge_gate_up import MergeGateUp
from panguq.lowering.ascend.notes import ascend_notes
from panguq.lowering.ascend.rules import fallback_names
from panguq.lowering.ascend.select import select_ascend
from panguq.lowering.choice import Choice, TokenMix
from panguq.lowering.graph_problems import output_parts
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Candidate, FormatOption, MatmulProblem, WeightFormat
from panguq.lowering.target import Calls, Constant, Cost, Floats, Peaks
from panguq.passes.pipeline.base import Pass
from panguq.tensors.weight_store import WeightStore

aten = torch.ops.aten
CUBE_MACS = 4096  # of float16 a cycle and core: 16 x 16 x 16


@dataclass(frozen=True)
class AscendTarget(AscendMachine):
    """An Ascend NPU."""

    float_dtype = torch.bfloat16
    devices = ("cpu", "npu")
    takes_empty_masks = False  # the fused attention reads its mask in full
    fits_schemes = True
    prepacking = (int4_weight,)
    terms = MEANING
    overlapped = OVERLAPPED

    def candidates(self, problem: MatmulProblem, allow_float: bool = False) -> list[Candidate]:
        return ascend_candidates(problem, self, allow_float)

    def fallbacks(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """See `rules.fallback_names` for the order and its reasons."""
        return tuple(SCHEMES[name] for name in fallback_names(scheme))

    @property
    def largest_n(self) -> int:
        return LARGEST_DIMENSION

    def weight_formats(
        self, problem: MatmulProblem, option: FormatOption
    ) -> tuple[WeightFormat, ...]:
        """Formats are compared for int8 weights of integer matmuls; other weights are ND: the
        vendor documents NZ for weight-only matmuls in graph mode alone."""
        weight, activation = problem.scheme.weight, problem.scheme.activation
        fractal = weight is not None and weight.format == INT8 and activation is not None
        if not fractal or option == "ND":
            return ("ND",)
        return ("NZ",) if option == "NZ" else ("ND", "NZ")

    def total_us(
        self, candidates: Sequence[Candidate], problem: MatmulProblem, tokens: NDArray[np.int64]
    ) -> Floats:
        return total_us(candidates, problem, self, tokens)

    def cost(self, candidate: Candidate, problem: MatmulProblem) -> Cost:
        return cost(candidate, problem, self)

    def select(
        self, problem: MatmulProblem, mix: TokenMix, allow_float: bool, hysteresis: float
    ) -> Choice:
        return select_ascend(problem, self, mix, allow_float, hysteresis)

    @property
    def peaks(self) -> Peaks:
        macs_per_us = CUBE_MACS * self["cube_cores"] * self["clock_mhz"]
        return Peaks(self["hbm_gb_per_s"] * 1000, macs_per_us)

    def passes_before(self, options: AscendOptions) -> tuple[Pass, ...]:
        return (MergeGateUp(),)

    def calls(self, gm: fx.GraphModule, store: WeightStore) -> Calls:
        calls = AscendCalls(gm, AscendInputs(gm, store))

        def lower(node: fx.Node, choice: Choice) -> fx.Node:
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


# Fitted constants are written by hand from the output of `python -m bench.cost_model`, which fits
# them anew at every run and compares; docs/cost-model.md has its figures.
_SPLIT_K_TIMINGS = (
    "fitted to the 8 published timings of CATLASS examples 12 and 52 (W8A8, 910B3, CANN 8.5.0)"
)
_COMMON: dict[str, tuple[float, str]] = {
    "l2_read_bytes_per_cycle": (110, "CANN 8.1 platform_config, l2_read_rate"),
    "l2_write_bytes_per_cycle": (86, "CANN 8.1 platform_config, l2_write_rate"),
    "vector_bytes_per_cycle": (64, "CANN 8.1 platform_config, ub_to_l2_rate"),
    "vector_lanes": (128, "CANN 8.1 platform_config, vec_calc_size"),
    "dequantize_instructions": (
        10,
        "counted in panguq's W4A16 kernel: 3 shifts, interleave, 2 casts, multiply in float32",
    ),
    "memory_unit_bytes": (
        512,
        "CATLASS matmul optimization guide: rows of a multiple of 512 B move fastest; a 640 B row "
        "took as long as a 1024 B one",
    ),
    "float32_macs_per_cycle": (
        1024,
        "assumed a quarter of float16's 4096; platform_config has no float32 entry",
    ),
    "vector_start_us": (1, "CATLASS example 102, cost of a kernel that also uses vector cores"),
    "vector_start_per_wave_us": (
        7,
        "CATLASS example 102, cost of a kernel that also uses vector cores: 7 us x blocks / cores",
    ),
    "launch_us": (13.25, _SPLIT_K_TIMINGS),
    "core_load_bytes_per_cycle": (93.9, _SPLIT_K_TIMINGS),
    "vendor_dequantize_bytes_per_cycle": (
        2.76,
        "fitted to 2 published W4A16 timings (group 32, m = 1, 910B1, CANN 9.0.0-beta.2, "
        "GPTQModel's Ascend notes)",
    ),
}


def _ascend(
    name: str, part: str, cores: int, clock_mhz: int, l2_mib: int, hbm: int
) -> AscendTarget:
    file = f"CANN 8.1 platform_config, {part}.ini"
    hbm_source = (
        "comment in CANN's matmul_v3_base_tiling: 1.6 TB/s"
        if hbm == 1600
        else "third-party notes on 910B4; half of 910B1's 1.6 TB/s, as its memory is half"
    )
    values = _COMMON | {
        "cube_cores": (cores, file),
        "vector_cores": (2 * cores, file),
        "clock_mhz": (clock_mhz, file),
        "l2_mib": (l2_mib, file),
        "hbm_gb_per_s": (hbm, hbm_source),
    }
    constants = {
        key: Constant(values[key][0], unit, values[key][1]) for key, unit in ASCEND_UNITS.items()
    }
    return AscendTarget(name, constants=MappingProxyType(constants))


ASCEND_TARGETS = (
    _ascend("ascend910b1", "Ascend910B1", 24, 1850, 192, 1600),
    _ascend("ascend910b2", "Ascend910B2", 24, 1800, 192, 1600),
    _ascend("ascend910b3", "Ascend910B3", 20, 1800, 192, 1600),
    _ascend("ascend910b4", "Ascend910B4", 20, 1500, 96, 800),
)
