"""What a target says about a matmul under any scheme, for passes that choose schemes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from panguq.ir.quant_spec import Scheme
from panguq.lowering.graph_problems import matmul_problem
from panguq.lowering.options import DEFAULT_OPTIONS, AscendOptions
from panguq.lowering.problem import MatmulProblem, Precision
from panguq.lowering.select_format import select_format
from panguq.lowering.select_kernel import scheme_refusal
from panguq.lowering.target import Target


@dataclass(frozen=True)
class TargetRules:
    """Legality and predicted time on one target; equal problems are solved once."""

    target: Target
    precision: Precision = "bfloat16"
    ascend: AscendOptions = DEFAULT_OPTIONS
    known: dict[MatmulProblem, float] = field(default_factory=dict, compare=False)

    def refusal(self, node: fx.Node, scheme: Scheme) -> str | None:
        """Why the target has no kernel for this linear under the scheme; None if it has one."""
        return scheme_refusal(self._problem(node, scheme), self.target)

    def predicted_us(self, node: fx.Node, scheme: Scheme) -> float:
        """The cost of the kernels that would be selected.

        On an Ascend target over `ascend.tokens`, elsewhere over 256 decoding steps and one
        prompt of 512 tokens. Raises LoweringError if no kernel is legal.
        """
        problem = self._problem(node, scheme)
        if problem not in self.known:
            self.known[problem] = self._cost(problem)
        return self.known[problem]

    def _problem(self, node: fx.Node, scheme: Scheme) -> MatmulProblem:
        problem = matmul_problem(node, scheme, self.precision, self.target.largest_n)
        return replace(problem, own_kernels=self.ascend.own_kernels)

    def _cost(self, problem: MatmulProblem) -> float:
        options = self.ascend
        chosen = select_format(problem, self.target, options.weight_format, options.tokens)
        return chosen.mix_us
