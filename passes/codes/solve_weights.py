"""What all passes share that choose a weight's codes from the inputs that meet it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import get_tensor, label
from panguq.ir.node_meta import meta_of, weight_spec_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.run.sweep import ExpertPause, Pause, solving_sweep
from panguq.ir.views import DequantizedWeight, ExpertLinear, Linear, by_input, matmul_of
from panguq.passes.codes.expert_solver import ExpertSolver
from panguq.passes.codes.stored_codes import set_grid, store_codes
from panguq.passes.codes.weighed_rows import joined_solutions, weighed_rows
from panguq.passes.codes.weight_problem import Solution, WeightProblem, quantizer_of, weight_sqnr_db
from panguq.passes.codes.weight_scales import weight_values
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table
from panguq.passes.statistics.expert_tokens import FEW_TOKENS, tokens_table
from panguq.ranks import ranks
from panguq.tensors.folded_weight import materialized
from panguq.tensors.weight_store import WeightStore
from panguq.tensors.work_folder import Finished

Solved = dict[fx.Node, Solution]
"""The solutions so far, by `quantize_weight`."""


@dataclass(frozen=True)
class SolveWeights(Pass):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: codes that `solve` chose.

    One sweep: where the value that matmuls read is ready for all batches, their weights are solved
    together, and everything behind them is computed with the quantized weights (true-sequential by
    data flow; q, k, v share one problem, gate and up another). Where weigh-tokens weighs tokens for
    groups of outputs, each group's rows are a problem of their own. Every expert's weights are one,
    with the rows that it meets; an expert that fewer than `least_tokens` calibration tokens reach
    meets all of them, 0 follows the router alone.
    """

    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ, Property.UNSOLVED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.WEIGHT_CODES})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.UNSOLVED})
    needs_calibration: ClassVar[bool] = True
    beside_float: ClassVar[bool] = False
    note_columns: ClassVar[tuple[str, ...]] = ()
    integers_only: ClassVar[bool] = False
    """Whether it counts on codes that are integers."""
    expert_note: ClassVar[str] = (
        "experts meet other rows in the float model: the quantized ones count"
    )
    """What is said of each matmul of experts where the float model runs along."""
    takes_experts: ClassVar[bool] = False
    """Whether codes and grids of experts' weights, stacked, are all that it stores."""
    divides_rows: ClassVar[bool] = False
    """Whether rows of a weight can be solved apart, as their solutions share nothing."""
    least_tokens: int = FEW_TOKENS

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """As declared. Raises RecipeError for a scheme whose codes the pass cannot choose."""
        for scheme in (s for p in earlier for s in p.given_schemes):
            if self.integers_only and scheme.weight and not scheme.weight.is_integer:
                raise RecipeError(
                    f"{self.name} chooses among integers, and {scheme.name} has codes "
                    f"of {scheme.weight.format}",
                    "use quantize-weights or gptq in its place",
                )
        guide = next((p.name for p in earlier if p.divides_outputs), None)
        if guide is not None and not self.divides_rows:
            raise RecipeError(
                f"{self.name} solves all outputs of a matmul together, and {guide} weighs tokens "
                "by groups of outputs",
                f"leave out {guide}'s groups, or use gptq",
            )
        return self.requires

    def solve(self, problem: WeightProblem) -> Solution:
        """The codes for a problem; raises NumericsError where the inputs allow none."""
        raise NotImplementedError

    def dequantize(self, problem: WeightProblem, solution: Solution) -> Tensor:
        """The weights `[n, k]` that a solution stands for, in the stored dtype."""
        grid = (solution.scale, solution.zero_point, problem.group_size, problem.spec)
        return weight_values(solution.codes, *grid, problem.dtype)

    def store(
        self, gm: fx.GraphModule, store: WeightStore, node: fx.Node, solution: Solution
    ) -> None:
        """Replace `node`, a `quantize_weight`, by the stored solution of its rows."""
        set_grid(gm, node, store.put, solution.scale, solution.zero_point)
        bits = weight_spec_of(matmul_of(node)).bits
        store_codes(node, store, solution.codes, bits)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        groups = _weights_by_input(gm, result)
        if groups:
            ctx.require_batches()
        nodes = [node for some in groups.values() for node in some]
        divided = self.divided and not any(map(ExpertLinear.match, nodes))
        solved: Solved = {}
        rows: list[tuple[object, ...]] = []
        experts = ExpertSolver(self, gm, ctx, rows)
        pauses: dict[fx.Node, Pause | ExpertPause] = experts.pauses(groups)
        pauses |= {
            value: partial(self._pause, gm, ctx, matmuls, divided, solved, rows)
            for value, matmuls in groups.items()
            if value not in pauses
        }
        batches = ranks().share(ctx.batches) if divided else ctx.batches
        self.sweep(gm, ctx, batches, pauses, solved, result)
        for node, solution in solved.items():
            self.store(gm, ctx.store, node, solution)
        for stacked in experts.solved:
            stacked.store(gm, ctx.store)
        result.changed = len(solved) + len(experts.solved)
        columns = ("weight", "bits", "group_size", "weight_sqnr_db", *self.note_columns)
        result.tables["weights"] = Table(columns, tuple(rows))
        if experts.tokens:
            result.tables["experts"] = tokens_table(experts.tokens)
        for node in experts.tokens if self.beside_float else ():
            result.skip(node, self.expert_note)
        return result

    def sweep(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        batches: Sequence[dict[str, Tensor]],
        pauses: Mapping[fx.Node, Pause | ExpertPause],
        solved: Solved,
        result: PassResult,
    ) -> None:
        """Pause wherever weights are solved; `batches` are those that this rank runs."""
        solving_sweep(gm, batches, pauses, ctx.progress, self.beside_float)

    def _pause(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        matmuls: list[fx.Node],
        divided: bool,
        solved: Solved,
        rows: list[tuple[object, ...]],
        values: Sequence[Tensor],
        float_values: Sequence[Tensor],
    ) -> dict[fx.Node, Tensor]:
        for value in values:
            ensure_finite(label(Linear.of(matmuls[0]).input), value, "activation")
        chosen = {}
        for same in _alike(matmuls):
            quantizers = [quantizer_of(matmul) for matmul in same]
            stored = [materialized(get_tensor(gm, q.weight_name)) for q in quantizers]
            for quantizer, tensor in zip(quantizers, stored, strict=True):
                ensure_finite(quantizer.weight_name, tensor)
            spec = weight_spec_of(same[0])
            problem = WeightProblem(
                names=tuple(label(matmul) for matmul in same),
                weight=torch.cat([tensor.float() for tensor in stored]),
                spec=spec,
                group_size=spec.group_size_for(int(stored[0].shape[1])),
                dtype=stored[0].dtype,
                inputs=(),
            )
            parts = weighed_rows(same)
            solutions = []
            for part in parts:
                own = replace(
                    problem,
                    names=problem.names if len(parts) == 1 else (part.name,),
                    weight=problem.weight[part.rows],
                    inputs=part.weighted(values, divided),
                    float_inputs=part.weighted(float_values, divided),
                )
                solutions.append(self.solved(ctx, own, divided))
            solution = joined_solutions(solutions)
            weight = self.dequantize(problem, solution)
            start = 0
            for matmul, quantizer, tensor in zip(same, quantizers, stored, strict=True):
                stop = start + len(tensor)
                solved[quantizer.node] = solution.rows(slice(start, stop))
                chosen[Linear.of(matmul).weight] = weight[start:stop].contiguous()
                sqnr_db = weight_sqnr_db(tensor, weight[start:stop])
                rows.append(
                    (label(matmul), spec.bits, problem.group_size, sqnr_db, *solution.notes)
                )
                start = stop
        return chosen

    def solved(self, ctx: PassContext, problem: WeightProblem, divided: bool = False) -> Solution:
        """`solve`, its tensors in files: a model's codes need no memory until the end.

        `divided`: each rank has its share of the inputs, and calls `solve` with it.
        """

        def compute() -> Finished:
            found = self.solve(problem)
            tensors = {"codes": found.codes, "scale": found.scale}
            if found.zero_point is not None:
                tensors["zero_point"] = found.zero_point
            tensors |= {f"extra.{name}": tensor for name, tensor in found.extra.items()}
            tensors |= {f"shared.{name}": tensor for name, tensor in found.shared.items()}
            return Finished(tensors, {str(i): note for i, note in enumerate(found.notes)})

        once = ctx.together if divided else ctx.once
        done = once(problem.names[0], compute)

        def named(kind: str) -> dict[str, Tensor]:
            items = done.tensors.items()
            return {k.removeprefix(kind): tensor for k, tensor in items if k.startswith(kind)}

        return Solution(
            done.tensors["codes"],
            done.tensors["scale"],
            done.tensors.get("zero_point"),
            named("extra."),
            named("shared."),
            tuple(done.facts.values()),
        )


def _weights_by_input(gm: fx.GraphModule, result: PassResult) -> dict[fx.Node, list[fx.Node]]:
    """Fake-quant matmuls whose codes are still computed, by the value that they read."""
    seen: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        linear = Linear.match(node)
        weight = None if linear is None else DequantizedWeight.match(linear.weight)
        if weight is None or weight.quantizer is None or meta_of(node).scheme is None:
            continue
        if weight.codes in seen:
            result.skip(node, f"its weight is that of {label(seen[weight.codes])}")
        else:
            seen[weight.codes] = node
    return by_input(seen.values())


def _alike(matmuls: list[fx.Node]) -> list[list[fx.Node]]:
    """The matmuls by the quantization of their weights: side matmuls may have another."""
    groups: dict[QuantSpec, list[fx.Node]] = defaultdict(list)
    for matmul in matmuls:
        groups[weight_spec_of(matmul)].append(matmul)
    return list(groups.values())
