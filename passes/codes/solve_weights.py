"""What all passes share that choose a weight's codes from the inputs that meet it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.ir.edit import get_tensor, label, module_path
from panguq.ir.node_meta import meta_of, weight_spec_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.run.reroute import Reroute, routing_of
from panguq.ir.run.sweep import Chosen, ExpertPause, Pause, solving_sweep
from panguq.ir.views import (
    DequantizedWeight,
    ExpertLinear,
    Linear,
    QuantizedWeight,
    by_input,
    matmul_of,
)
from panguq.passes.codes.gram import InputMoments
from panguq.passes.codes.stored_codes import packed_codes, read_packed, set_grid, store_codes
from panguq.passes.codes.weight_scales import weight_values
from panguq.passes.pipeline.base import ExpertTokens, Pass, PassContext, PassResult, Table
from panguq.passes.statistics.expert_tokens import FEW_TOKENS, count_tokens, tokens_table
from panguq.tensors.folded_weight import materialized
from panguq.tensors.weight_store import WeightStore
from panguq.tensors.work_folder import Finished

panguq = torch.ops.panguq


@dataclass(frozen=True)
class WeightProblem:
    """The weights that read one value, row by row under each other, and that value.

    `weight` float32 `[n, k]`; `inputs` one tensor `[..., k]` a batch, as the matmuls meet it: every
    weight before them is quantized, and so is the value itself where the scheme says so; after
    weigh-tokens, times the root of each token's weight.
    `moments` are those of `inputs`, where other problems have the same inputs.
    `float_inputs` is the same value in the float model, empty unless the pass asks for it.
    `dtype` is that of the stored weights; scales of 8-bit codes must be values of it.
    """

    names: tuple[str, ...]
    weight: Tensor
    spec: QuantSpec
    group_size: int
    dtype: torch.dtype
    inputs: Sequence[Tensor]
    float_inputs: Sequence[Tensor] = ()
    moments: InputMoments | None = None


@dataclass(frozen=True)
class Solution:
    """Codes, mostly int8, `[n, k]`, scale and zero point int8 `[n, groups]` for a problem.

    `extra` holds what else a method stores, by name, each with n rows; `shared` what they share.
    `notes` are the method's own columns of the pass's table.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str | int | float | None, ...] = ()

    def rows(self, start: int, stop: int) -> Solution:
        """The solution for these rows alone."""
        zero = None if self.zero_point is None else self.zero_point[start:stop]
        extra = {name: tensor[start:stop] for name, tensor in self.extra.items()}
        return Solution(
            self.codes[start:stop], self.scale[start:stop], zero, extra, self.shared, self.notes
        )


@dataclass(frozen=True)
class SolveWeights(Pass):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: codes that `solve` chose.

    One sweep: where the value that matmuls read is ready for all batches, their weights are solved
    together, and everything behind them is computed with the quantized weights (true-sequential by
    data flow; q, k, v share one problem, gate and up another). Every expert's weights are a problem
    of their own, with the rows that it meets; an expert that fewer than `least_tokens` calibration
    tokens reach meets all of them, 0 follows the router alone.
    """

    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ, Property.UNSOLVED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.WEIGHT_CODES})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.UNSOLVED})
    needs_calibration: ClassVar[bool] = True
    beside_float: ClassVar[bool] = False
    note_columns: ClassVar[tuple[str, ...]] = ()
    integers_only: ClassVar[bool] = False
    """Whether it counts on codes that are integers."""
    takes_experts: ClassVar[bool] = False
    """Whether codes and grids of experts' weights, stacked, are all that it stores."""
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
        solved: list[tuple[fx.Node, Solution]] = []
        rows: list[tuple[object, ...]] = []
        experts = ExpertSolver(self, gm, ctx, rows)
        pauses: dict[fx.Node, Pause | ExpertPause] = experts.pauses(groups)
        pauses |= {
            value: partial(self._pause, gm, ctx, matmuls, solved, rows)
            for value, matmuls in groups.items()
            if value not in pauses
        }
        solving_sweep(gm, ctx.batches, pauses, ctx.progress, self.beside_float)
        for node, solution in solved:
            self.store(gm, ctx.store, node, solution)
        for stacked in experts.solved:
            stacked.store(gm, ctx.store)
        result.changed = len(solved) + len(experts.solved)
        columns = ("weight", "bits", "group_size", "weight_sqnr_db", *self.note_columns)
        result.tables["weights"] = Table(columns, tuple(rows))
        if experts.tokens:
            result.tables["experts"] = tokens_table(experts.tokens)
        for node in experts.tokens if self.beside_float else ():
            result.skip(
                node, "experts meet other rows in the float model: the quantized ones count"
            )
        return result

    def _pause(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        matmuls: list[fx.Node],
        solved: list[tuple[fx.Node, Solution]],
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
                inputs=_weighted(values, same[0]),
                float_inputs=_weighted(float_values, same[0]),
            )
            solution = self.solved(ctx, problem)
            weight = self.dequantize(problem, solution)
            start = 0
            for matmul, quantizer, tensor in zip(same, quantizers, stored, strict=True):
                stop = start + len(tensor)
                solved.append((quantizer.node, solution.rows(start, stop)))
                chosen[Linear.of(matmul).weight] = weight[start:stop].contiguous()
                sqnr_db = _sqnr_db(tensor, weight[start:stop])
                rows.append(
                    (label(matmul), spec.bits, problem.group_size, sqnr_db, *solution.notes)
                )
                start = stop
        return chosen

    def solved(self, ctx: PassContext, problem: WeightProblem) -> Solution:
        """`solve`, its tensors in files: a model's codes need no memory until the end."""

        def compute() -> Finished:
            found = self.solve(problem)
            tensors = {"codes": found.codes, "scale": found.scale}
            if found.zero_point is not None:
                tensors["zero_point"] = found.zero_point
            tensors |= {f"extra.{name}": tensor for name, tensor in found.extra.items()}
            tensors |= {f"shared.{name}": tensor for name, tensor in found.shared.items()}
            return Finished(tensors, {str(i): note for i, note in enumerate(found.notes)})

        done = ctx.once(problem.names[0], compute)

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


@dataclass
class StackedSolution:
    """The solutions for all experts' weights of a matmul, filled in one by one.

    `codes` packed as they are stored and `weight` as the codes have it, `[experts, n, k]`, both in
    files; scale and zero point of each expert.
    """

    matmul: fx.Node
    codes: Tensor
    weight: Tensor
    scales: list[Tensor] = field(default_factory=list)
    zeros: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, matmul: fx.Node, weight: Tensor, store: WeightStore) -> StackedSolution:
        """Room for the solutions of a matmul whose experts' weights `[experts, n, k]` these are."""
        spec = weight_spec_of(matmul)
        one = packed_codes(torch.empty(weight.shape[1:], dtype=spec.format.storage), spec.bits)
        codes = store.empty((len(weight), *one.shape), one.dtype)
        return cls(matmul, codes, store.empty(weight.shape, weight.dtype))

    def add(self, expert: int, solution: Solution, weight: Tensor) -> None:
        """Take the next expert's solution, and the weight `[n, k]` that it stands for."""
        self.codes[expert] = packed_codes(solution.codes, weight_spec_of(self.matmul).bits)
        self.weight[expert] = weight
        self.scales.append(solution.scale)
        if solution.zero_point is not None:
            self.zeros.append(solution.zero_point)

    def store(self, gm: fx.GraphModule, store: WeightStore) -> None:
        """Let the matmul read these codes."""
        node = quantizer_of(self.matmul).node
        zero = torch.stack(self.zeros) if self.zeros else None
        set_grid(gm, node, store.put, torch.stack(self.scales), zero)
        read_packed(node, self.codes, weight_spec_of(self.matmul).bits)


@dataclass
class ExpertSolver:
    """Solves the weights of experts one after the other, each from the rows that it meets.

    Those that calibration sends fewer than `least_tokens` tokens to meet all of them. Where these
    are the same for all such experts, what is computed of them is computed once. Beside files
    there is one expert's problem in memory at a time, with its inputs.
    """

    solver: SolveWeights
    gm: fx.GraphModule
    ctx: PassContext
    rows: list[tuple[object, ...]]
    solved: list[StackedSolution] = field(default_factory=list)
    tokens: Mapping[fx.Node, ExpertTokens] = field(default_factory=dict)

    def pauses(self, groups: Mapping[fx.Node, list[fx.Node]]) -> dict[fx.Node, Pause | ExpertPause]:
        """The pauses at values that experts read, and at what says how their rows lie.

        Raises RecipeError for a method whose solutions cannot be stacked.
        """
        found = {v: m for v, m in groups.items() if ExpertLinear.match(m[0]) is not None}
        nodes = [node for matmuls in found.values() for node in matmuls]
        if nodes and not self.solver.takes_experts:
            raise RecipeError(
                f"{self.solver.name} does not choose the codes of experts: {module_path(nodes[0])}",
                "use gptq or quantize-weights, or leave the experts in float in the recipe",
            )
        self.tokens = count_tokens(self.gm, self.ctx, nodes, self.solver.least_tokens)
        pauses: dict[fx.Node, Pause | ExpertPause] = {}
        lengths: dict[fx.Node, list[list[int]]] = {}
        for node in nodes:
            counts = ExpertLinear.of(node).counts

            def keep(values: Sequence[Tensor], _: object, counts: fx.Node = counts) -> Chosen:
                lengths[counts] = [value.tolist() for value in values]
                return {}

            pauses[counts] = keep
        for value, matmuls in found.items():
            reroute = Reroute(routing_of(matmuls[0]), (value,))
            pauses[value] = ExpertPause(reroute, partial(self._pause, matmuls, lengths, reroute))
        return pauses

    def _pause(
        self,
        matmuls: list[fx.Node],
        lengths: Mapping[fx.Node, list[list[int]]],
        reroute: Reroute,
        values: Sequence[Tensor],
        all_tokens: RowsOfAll,
    ) -> Chosen:
        first = ExpertLinear.of(matmuls[0])
        for value in values:
            ensure_finite(label(first.input), value, "activation")
        counts = lengths[first.counts]
        rows = [value.split(count) for value, count in zip(values, counts, strict=True)]
        weights = [materialized(self._stored(matmul)) for matmul in matmuls]
        stacked = [
            StackedSolution.of(m, w, self.ctx.store) for m, w in zip(matmuls, weights, strict=True)
        ]
        underfed = self.tokens[matmuls[0]].underfed
        is_shared = reroute.is_shared(first.input)
        everything = _everything(all_tokens, underfed, is_shared)
        for expert in range(first.experts):
            if expert in underfed:
                moments = next(everything)
            else:
                moments = InputMoments(_joined([batch[expert] for batch in rows]))
            for weight, into in zip(weights, stacked, strict=True):
                self._solve(expert, weight[expert], moments, into)
        self.solved += stacked
        return {Linear.of(into.matmul).weight: into.weight for into in stacked}

    def _stored(self, matmul: fx.Node) -> Tensor:
        return get_tensor(self.gm, quantizer_of(matmul).weight_name)

    def _solve(
        self, expert: int, weight: Tensor, moments: InputMoments, into: StackedSolution
    ) -> None:
        """Solve one expert's `weight` `[n, k]`."""
        matmul = into.matmul
        ensure_finite(f"{quantizer_of(matmul).weight_name}[{expert}]", weight)
        spec = weight_spec_of(matmul)
        problem = WeightProblem(
            names=(f"{label(matmul)}.{expert}",),
            weight=weight.float(),
            spec=spec,
            group_size=spec.group_size_for(int(weight.shape[1])),
            dtype=weight.dtype,
            inputs=moments.inputs,
            float_inputs=moments.inputs if self.solver.beside_float else (),
            moments=moments,
        )
        solution = self.solver.solved(self.ctx, problem)
        values = self.solver.dequantize(problem, solution)
        into.add(expert, solution, values)
        quality = (spec.bits, problem.group_size, _sqnr_db(weight, values))
        self.rows.append((problem.names[0], *quality, *solution.notes))


RowsOfAll = Callable[[Sequence[int]], Mapping[int, list[Tensor]]]
"""Experts -> for each of them, the rows `[tokens, k]` of every batch if all tokens went to it."""

EXPERTS_AT_ONCE = 8
"""Of whom the rows that all tokens make are computed together."""

ROWS_AT_ONCE = 2048
"""Rows that are multiplied at once: an expert gets few of each batch."""


def _everything(
    all_tokens: RowsOfAll, experts: Sequence[int], is_shared: bool
) -> Iterator[InputMoments]:
    """What these experts meet, one after the other, if all tokens go to each."""
    if is_shared and experts:
        shared = InputMoments(_joined(all_tokens(experts[:1])[experts[0]]))
        yield from itertools.repeat(shared, len(experts))
        return
    for start in range(0, len(experts), EXPERTS_AT_ONCE):
        some = experts[start : start + EXPERTS_AT_ONCE]
        found = dict(all_tokens(some))
        for expert in some:
            yield InputMoments(_joined(found.pop(expert)))


def _joined(batches: Sequence[Tensor]) -> list[Tensor]:
    """The rows `[rows, k]` of all batches in their order, in fewer tensors."""
    joined: list[list[Tensor]] = [[]]
    held = 0
    for batch in batches:
        if held and held + len(batch) > ROWS_AT_ONCE:
            joined.append([])
            held = 0
        joined[-1].append(batch)
        held += len(batch)
    return [torch.cat(some) for some in joined]


def quantizer_of(matmul: fx.Node) -> QuantizedWeight:
    """The `quantize_weight` behind a fake-quant matmul's weight."""
    return QuantizedWeight.of(DequantizedWeight.of(Linear.of(matmul).weight).codes)


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


def _weighted(values: Sequence[Tensor], matmul: fx.Node) -> Sequence[Tensor]:
    """The batches, each token times the root of its weight where weigh-tokens gave it one."""
    weights = meta_of(matmul).token_weights
    if weights is None or not values:
        return values
    return [
        value.reshape(-1, value.shape[-1]) * weight.sqrt().to(value.dtype)[:, None]
        for value, weight in zip(values, weights, strict=True)
    ]


def _alike(matmuls: list[fx.Node]) -> list[list[fx.Node]]:
    """The matmuls by the quantization of their weights: side matmuls may have another."""
    groups: dict[QuantSpec, list[fx.Node]] = defaultdict(list)
    for matmul in matmuls:
        groups[weight_spec_of(matmul)].append(matmul)
    return list(groups.values())


def _sqnr_db(weight: Tensor, quantized: Tensor) -> float:
    noise = (quantized.float() - weight.float()).square().sum()
    return decibels(float(weight.float().square().sum() / noise.clamp_min(1e-30)))
