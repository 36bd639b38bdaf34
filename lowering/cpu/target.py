"""The target `cpu`: this machine's integer and 4-bit kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import fx

from panguq.ir.quant_spec import Scheme
from panguq.kernels.cpu.expert_linear import expert_int4_kernel_scales, expert_int4_kernel_weight
from panguq.kernels.cpu.int4_linear import int4_kernel_scales, int4_kernel_weight
from panguq.kernels.cpu.int8_linear import weight_row_sums
from panguq.lowering.choice import Choice, TokenMix
from panguq.lowering.cpu.calls import lower_on_cpu
from panguq.lowering.cpu.candidates import cpu_candidates
from panguq.lowering.cpu.cost import cpu_cost
from panguq.lowering.cpu.notes import cpu_notes
from panguq.lowering.cpu.select import select_cpu
from panguq.lowering.fuse_latent_attention import FuseLatentAttention
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.target import Calls, Cost, Floats, KernelCost, Target
from panguq.passes.pipeline.base import Pass
from panguq.tensors.weight_store import WeightStore


@dataclass(frozen=True)
class CpuTarget(Target):
    """A CPU, with one affine cost a kernel."""

    kind = "cpu"
    takes_experts = True
    takes_mixed_experts = True
    float_follows_machine = True
    kernel_names = (
        "linear",
        "int8_linear",
        "int8_weight_linear",
        "int8_weight_linear (converted)",
        "int4_linear",
        "dequantized_linear",
    )
    prepacking = (
        int4_kernel_weight,
        int4_kernel_scales,
        expert_int4_kernel_weight,
        expert_int4_kernel_scales,
        weight_row_sums,
    )
    terms = MappingProxyType(
        {
            "launch": "starting kernels",
            "weight_traffic": "reading the weight",
            "multiply": "multiplying",
        }
    )

    def candidates(self, problem: MatmulProblem, allow_float: bool = False) -> list[Candidate]:
        return cpu_candidates(problem)

    def total_us(
        self, candidates: Sequence[Candidate], problem: MatmulProblem, tokens: NDArray[np.int64]
    ) -> Floats:
        problems = [replace(problem, m=int(m)) for m in tokens]
        return np.array([[self.cost(c, p).total_us for p in problems] for c in candidates])

    def cost(self, candidate: Candidate, problem: MatmulProblem) -> Cost:
        return cpu_cost(candidate, problem, self)

    def select(
        self, problem: MatmulProblem, mix: TokenMix, allow_float: bool, hysteresis: float
    ) -> Choice:
        """One kernel for every m, whatever the mix."""
        return select_cpu(replace(problem, m=None), self)

    def passes_before(self, options: AscendOptions) -> tuple[Pass, ...]:
        return (FuseLatentAttention(),)

    def calls(self, gm: fx.GraphModule, store: WeightStore) -> Calls:
        return lower_on_cpu

    def notes(self, node: fx.Node, scheme: Scheme | None, predict: bool) -> dict[str, str]:
        return cpu_notes(node, scheme, self if predict else None)


# Written by hand from what `panguq tune` fits; docs/cpu-target.md has its figures. They rank
# kernels; nothing else depends on them.
_SOURCE = (
    "fitted to medians of panguq tune on AMD EPYC (Zen 4, AVX512 with VNNI and BF16), 1 thread, "
    "PyTorch 2.13.0, cpu clock"
)
CPU = CpuTarget(
    name="cpu",
    kernels={
        "linear": KernelCost(10.7, 11.1, 46.0, 4.0, _SOURCE),
        "int8_linear": KernelCost(20.6, 6.21, 173.0, 1.0, _SOURCE),
        "int8_weight_linear": KernelCost(27.1, 9.65, 34.6, 1.0, _SOURCE),
        "int8_weight_linear (converted)": KernelCost(65.8, 3.82, 87.4, 1.0, _SOURCE),
        "int4_linear": KernelCost(18.2, 18.3, 41.2, 0.5, _SOURCE),
        "dequantized_linear": KernelCost(152.0, 0.522, 86.9, 0.5, _SOURCE),
    },
)
