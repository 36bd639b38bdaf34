"""The codes of experts' weights: solved one expert after the other, stored stacked."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import get_tensor, label, module_path
from panguq.ir.node_meta import meta_of, weight_spec_of
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.run.reroute import Reroute, order_of, routing_of
from panguq.ir.run.sweep import Chosen, ExpertPause, Pause
from panguq.ir.views import ExpertLinear, Linear
from panguq.passes.codes.gram import InputMoments
from panguq.passes.codes.stored_codes import packed_codes, read_packed, set_grid
from panguq.passes.codes.weight_problem import Solution, WeightProblem, quantizer_of, weight_sqnr_db
from panguq.passes.pipeline.base import ExpertTokens, PassContext
from panguq.passes.statistics.expert_tokens import count_tokens
from panguq.tensors.folded_weight import materialized
from panguq.tensors.weight_store import WeightStore

if TYPE_CHECKING:
    from panguq.passes.codes.solve_weights import SolveWeights


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

    def add(self, solution: Solution, weight: Tensor) -> None:
        """Take the next expert's solution, and the weight `[n, k]` that it stands for."""
        place = len(self.scales)
        self.codes[place] = packed_codes(solution.codes, weight_spec_of(self.matmul).bits)
        self.weight[place] = weight
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
    _orders: dict[fx.Node, Sequence[Tensor]] = field(default_factory=dict)

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
            if meta_of(node).token_weights is not None:
                order, _ = order_of(node)

                def keep_order(values: Sequence[Tensor], _: object, of: fx.Node = order) -> Chosen:
                    self._orders[of] = values
                    return {}

                pauses[order] = keep_order
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
        roots = self._roots(matmuls[0], values[0].dtype) if values else None
        if roots is not None:
            values = _times(values, self._sorted(matmuls[0], roots))
        counts = lengths[first.counts]
        rows = [value.split(count) for value, count in zip(values, counts, strict=True)]
        weights = [materialized(self._stored(matmul)) for matmul in matmuls]
        stacked = [
            StackedSolution.of(m, w, self.ctx.store) for m, w in zip(matmuls, weights, strict=True)
        ]
        readers: dict[int, list[tuple[Tensor, StackedSolution]]] = defaultdict(list)
        for weight, into in zip(weights, stacked, strict=True):
            for place, expert in enumerate(ExpertLinear.of(into.matmul).each):
                readers[expert].append((weight[place], into))
        underfed = [e for e in self.tokens[matmuls[0]].underfed if e in readers]
        is_shared = reroute.is_shared(first.input)
        everything = _everything(all_tokens, underfed, is_shared, roots)
        for expert, own in sorted(readers.items()):
            if expert in underfed:
                moments = next(everything)
            else:
                moments = InputMoments(_joined([batch[expert] for batch in rows]))
            for matrix, into in own:
                self._solve(expert, matrix, moments, into)
        self.solved += stacked
        return {Linear.of(into.matmul).weight: into.weight for into in stacked}

    def _roots(self, matmul: fx.Node, dtype: torch.dtype) -> Sequence[Tensor] | None:
        """The roots `[tokens, 1]` of each batch's weights, where weigh-tokens gave it some."""
        weights = meta_of(matmul).token_weights
        return None if weights is None else [w.sqrt().to(dtype)[:, None] for w in weights]

    def _sorted(self, matmul: fx.Node, roots: Sequence[Tensor]) -> Iterator[Tensor]:
        """The same for each row of the batches, sorted by expert as they are."""
        order, top_k = order_of(matmul)
        for root, at in zip(roots, self._orders[order], strict=True):
            yield root[at.div(top_k, rounding_mode="floor")]

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
        into.add(solution, values)
        quality = (spec.bits, problem.group_size, weight_sqnr_db(weight, values))
        self.rows.append((problem.names[0], *quality, *solution.notes))


RowsOfAll = Callable[[Sequence[int]], Mapping[int, list[Tensor]]]
"""Experts -> for each of them, the rows `[tokens, k]` of every batch if all tokens went to it."""


EXPERTS_AT_ONCE = 8
"""Of whom the rows that all tokens make are computed together."""


ROWS_AT_ONCE = 2048
"""Rows that are multiplied at once: an expert gets few of each batch."""


def _everything(
    all_tokens: RowsOfAll,
    experts: Sequence[int],
    is_shared: bool,
    roots: Sequence[Tensor] | None,
) -> Iterator[InputMoments]:
    """What these experts meet, one after the other, if all tokens go to each, times `roots`."""
    if is_shared and experts:
        shared = InputMoments(_joined(_times(all_tokens(experts[:1])[experts[0]], roots)))
        yield from itertools.repeat(shared, len(experts))
        return
    for start in range(0, len(experts), EXPERTS_AT_ONCE):
        some = experts[start : start + EXPERTS_AT_ONCE]
        found = dict(all_tokens(some))
        for expert in some:
            yield InputMoments(_joined(_times(found.pop(expert), roots)))


def _times(batches: Sequence[Tensor], roots: Iterable[Tensor] | None) -> Sequence[Tensor]:
    """The rows of every batch, each times its root; as they are where there are none."""
    if roots is None:
        return batches
    return [rows * root for rows, root in zip(batches, roots, strict=True)]


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
    return [some[0] if len(some) == 1 else torch.cat(some) for some in joined]
