"""Give each matmul a scheme that the target has a kernel for, before anything is calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from panguq.errors import LoweringError
from panguq.ir.edit import label
from panguq.ir.node_meta import annotate, is_quantized, scheme_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES, Scheme
from panguq.ir.views import ExpertLinear, by_input
from panguq.lowering.graph_problems import matmul_problem
from panguq.lowering.options import DEFAULT_OPTIONS, AscendOptions
from panguq.lowering.select_format import select_format
from panguq.lowering.select_kernel import scheme_refusal
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table, matmuls


@dataclass(frozen=True)
class FitSchemes(Pass):
    """Before: matmuls with the recipe's schemes.  After: with schemes that the target can run.

    A scheme whose kernels all refuse a matmul's shape is replaced by the first of its documented
    fallbacks that fits (W4A8 -> W8A8_DYNAMIC -> FLOAT, see `Target.fallbacks`). Matmuls that
    read one tensor keep one scheme: if one of them falls back, all do. With `ascend.allow_float`,
    matmuls that are predicted to take longer quantized than in float, over the mix
    `ascend.tokens`, stay float. Raises LoweringError if the target has no kernel for a scheme.
    """

    name: ClassVar[str] = "fit-schemes"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.SCHEMES})
    exact: ClassVar[bool] = True
    target: str = "cpu"
    ascend: AscendOptions = DEFAULT_OPTIONS

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        target = find_target(self.target)
        result = PassResult()
        rows: list[tuple[object, ...]] = []
        for siblings in _siblings(gm):
            scheme = scheme_of(siblings[0])
            chosen, reasons = fit(siblings, target)
            if self.ascend.allow_float and not chosen.is_float:
                quantized_us, float_us = self._predicted_us(siblings, chosen, target)
                if float_us < quantized_us:
                    reasons.append(
                        f"float is predicted to be faster: {float_us:.0f} us against "
                        f"{quantized_us:.0f} us over the mix of tokens"
                    )
                    chosen = SCHEMES["FLOAT"]
            for node in siblings if chosen != scheme else ():
                annotate(node, scheme=chosen)
                reason = f"{scheme.name} -> {chosen.name}: {'; '.join(reasons)}"
                result.skip(node, reason)
                rows.append((label(node), scheme.name, chosen.name, "; ".join(reasons)))
                result.changed += 1
        columns = ("matmul", "scheme", "fallback", "reason")
        result.tables["fallbacks"] = Table(columns, tuple(rows))
        return result

    def _predicted_us(
        self, siblings: list[fx.Node], scheme: Scheme, target: Target
    ) -> tuple[float, float]:
        """What the mix costs quantized and in float, summed over the siblings."""
        totals = [0.0, 0.0]
        for node in siblings:
            problem = matmul_problem(node, scheme, largest_n=target.largest_n)
            options = self.ascend
            choice = select_format(
                problem, target, options.weight_format, options.tokens, allow_float=True
            )
            costs = dict(choice.storage_us)
            totals[1] += costs.pop("float", 0.0)
            totals[0] += min(costs.values(), default=0.0)
        return totals[0], totals[1]


def fit(siblings: list[fx.Node], target: Target) -> tuple[Scheme, list[str]]:
    """The scheme for matmuls that read one tensor, and why not those before it in the order."""
    scheme = scheme_of(siblings[0])
    if not target.takes_experts and any(ExpertLinear.match(n) is not None for n in siblings):
        return SCHEMES["FLOAT"], [f"target {target.name} has no kernels for matmuls of experts"]
    reasons: list[str] = []
    for candidate in (scheme, *target.fallbacks(scheme)):
        refusals = []
        for node in siblings:
            problem = matmul_problem(node, candidate, largest_n=target.largest_n)
            refusal = scheme_refusal(problem, target)
            if refusal is not None:
                refusals.append(f"{label(node)} (n={problem.n}, k={problem.k}): {refusal}")
        if not refusals:
            return candidate, reasons
        reasons += [f"{candidate.name} does not fit {refusal}" for refusal in refusals]
    raise LoweringError(
        f"target {target.name} has no kernel for {scheme.name}: {'; '.join(reasons)}",
        "choose another scheme in the recipe",
    )


def _siblings(gm: fx.GraphModule) -> list[list[fx.Node]]:
    return list(by_input(filter(is_quantized, matmuls(gm))).values())
