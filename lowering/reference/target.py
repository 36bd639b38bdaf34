"""The target `reference`: no kernels, so that the fake-quantized model itself is what runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from panguq.ir.number_format import NumberFormat
from panguq.ir.ops import encode, quantize  # noqa: F401  (define ops that its graphs name)
from panguq.lowering.problem import FLOAT_OP, Candidate, MatmulProblem
from panguq.lowering.target import Calls, Target
from panguq.tensors.weight_store import WeightStore


@dataclass(frozen=True)
class ReferenceTarget(Target):
    """Codes of any format, read back to floats that an ordinary matmul multiplies."""

    kind = "reference"
    takes_experts = True
    takes_mixed_experts = True
    lowers = False

    def reads(self, number_format: NumberFormat) -> bool:
        return True

    def candidates(self, problem: MatmulProblem, allow_float: bool = False) -> list[Candidate]:
        return [Candidate(FLOAT_OP)]

    def calls(self, gm: fx.GraphModule, store: WeightStore) -> Calls:
        raise TypeError("the target reference has no kernels to call")


REFERENCE = ReferenceTarget("reference")
