"""Give each group of matmuls its own scheme: the least expected KL within a budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import label, module_path
from panguq.ir.expert_groups import give_schemes
from panguq.ir.node_meta import meta_of, scheme_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES, Scheme, parse_scheme
from panguq.ir.run.reroute import routing_of
from panguq.ir.views import ExpertLinear, Linear, by_input
from panguq.passes.assign_schemes import gives_logits
from panguq.passes.codes.weight_scales import clip_ratios
from panguq.passes.pipeline.base import (
    GRADIENT_SWEEPS,
    MatmulRules,
    Pass,
    PassContext,
    PassResult,
    matmuls,
)
from panguq.passes.pipeline.module_globs import check_globs
from panguq.passes.statistics.allocate import Budget, allocate
from panguq.passes.statistics.allocation_tables import (
    LinearGroup,
    allocation_table,
    budgets_table,
    experts_table,
    stored_bits,
)
from panguq.passes.statistics.sensitivity import measure
from panguq.tensors.work_folder import Finished

TIME_UNITS = 100_000  # predicted times count in this part of their budget, rounded up


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Before: linears with the recipe's schemes.  After: with those of `choices` that fit best.

        minimize    sum over groups g of KL[g, scheme of g]        (`sensitivity.measure`)
        subject to  stored bits of all matmuls / their weights              <= bits
                    predicted time of all matmuls / the same, all in float  <= relative_time

    solved to optimality (`allocate`). A group is what reads one tensor (q, k, v; gate, up):
    servers fuse it, so it has one scheme; and all matmuls of one layer's experts, since servers
    take the type of all of them from the first. An expert counts by what the tokens lose that reach
    it, so that a layer whose experts are rarely asked for gets few bits. With `by_expert`, each
    expert is a group of its own, which takes an equal share of its layer's predicted time: one
    that is rarely asked for gets few bits, in a layer whose others keep more. Stored bits count
    codes, scales and zero points, and matmuls that the pass leaves alone as they are, all but the
    one that gives the logits. The time is the cost model's for the target, over its mix of decoding
    and prompts.

    Left alone: matmuls that are FLOAT already, those whose module path matches a glob of `keep`,
    and the one that gives the logits. Not chosen: what the target cannot run on the shape.
    The estimate quantizes weights by round to nearest with a clip search of `clip_steps` ratios.
    """

    name: ClassVar[str] = "mixed-precision"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS, Property.FLOAT_CACHE}
    )
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    choices: tuple[str, ...] = ("W4A16", "W6A16", "W8A16")
    bits: float | None = None
    relative_time: float | None = None
    keep: tuple[str, ...] = ()
    clip_steps: int = 5
    by_expert: bool = False

    def __post_init__(self) -> None:
        names = [scheme.name for scheme in self.schemes]
        if len(set(names)) < max(len(names), 1):
            raise RecipeError(
                f"mixed-precision: choices {list(self.choices)} must be schemes that differ"
            )
        for option, limit in (("bits", self.bits), ("relative_time", self.relative_time)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise RecipeError(f"mixed-precision: {option} is {limit}", "give a number above 0")
        if self.clip_steps < 1:
            raise RecipeError(f"mixed-precision: clip_steps is {self.clip_steps}, not at least 1")
        if self.by_expert and len({s.activation for s in self.schemes if not s.is_float}) > 1:
            raise RecipeError(
                f"mixed-precision: by_expert with choices {list(self.choices)}, which quantize "
                "inputs in several ways",
                "experts of one layer may differ in their weights alone: W4A16, W6A16 and W8A16",
            )

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The choices."""
        return tuple(parse_scheme(name) for name in self.choices)

    @property
    def globs(self) -> tuple[str, ...]:
        return self.keep

    @property
    def given_schemes(self) -> tuple[Scheme, ...]:
        return self.schemes

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """As declared. Raises RecipeError without a budget, before anything has run."""
        if self.bits is None and self.relative_time is None:
            raise RecipeError(
                "mixed-precision: there is no budget", "give bits: 4.75, or relative_time: 0.5"
            )
        return self.requires

    @property
    def divides_experts(self) -> bool:
        return self.by_expert

    @property
    def sweeps(self) -> float:
        return GRADIENT_SWEEPS

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        check_globs(f"{self.name}: keep", self.globs, gm, ctx.allow_unmatched)
        groups, others = self._groups(gm)
        options = {g: self._fitting(g, ctx.matmul_rules, result) for g in groups}
        options = {g: schemes for g, schemes in options.items() if schemes}
        others += [n for g in groups if g not in options for n in g]
        if not options:
            return result
        budgets = self._budgets(options, others, ctx.matmul_rules)
        for option, (budget, _) in budgets.items():
            if budget.smallest > budget.limit:
                raise self._infeasible(f"{option}: {getattr(self, option)}", budgets)
        losses, of_experts = self._losses(gm, ctx, options)
        units = [
            (unit, kls)
            for group in options
            for unit, kls in self._units(group, losses[group], of_experts)
        ]
        solved = allocate([kls for _, kls in units], [budget for budget, _ in budgets.values()])
        if solved is None:
            raise self._infeasible("these budgets together", budgets)
        chosen: dict[LinearGroup, list[Scheme]] = defaultdict(list)
        for (group, _), index in zip(units, solved.chosen, strict=True):
            chosen[group].append(options[group][index])
        for group, schemes in chosen.items():
            for node in group:
                before = scheme_of(node), meta_of(node).expert_schemes
                give_schemes(node, schemes)
                result.changed += before != (scheme_of(node), meta_of(node).expert_schemes)
        names = tuple(scheme.name for scheme in self.schemes)
        kls = {
            group: {s.name: loss for s, loss in zip(schemes, losses[group], strict=True)}
            for group, schemes in options.items()
        }
        result.tables["allocation"] = allocation_table(names, kls, chosen, ctx.matmul_rules)
        limits = {option: getattr(self, option) for option in budgets}
        result.tables["budgets"] = budgets_table(limits, budgets, solved)
        if of_experts:
            result.tables["experts"] = experts_table(names, kls, of_experts)
        return result

    def _experts(self, group: LinearGroup) -> int:
        """How many units of choice the group is: one, or as many as there are experts."""
        view = ExpertLinear.match(group[0])
        return view.experts if self.by_expert and view is not None else 1

    def _units(
        self, group: LinearGroup, losses: list[float], of_experts: dict[fx.Node, Tensor]
    ) -> Iterator[tuple[LinearGroup, list[float]]]:
        """The group with its losses, or with those of each expert."""
        if self._experts(group) == 1:
            yield group, losses
            return
        none = torch.zeros(len(losses), self._experts(group), dtype=torch.float64)
        every = sum((of_experts[node] for node in group if node in of_experts), none)
        for kls in every.T.tolist():
            yield group, kls

    def _groups(self, gm: fx.GraphModule) -> tuple[list[LinearGroup], list[fx.Node]]:
        """What shares a choice, and the matmuls that keep their schemes but count as well."""
        together: dict[fx.Node, list[fx.Node]] = {}
        for value, readers in by_input(matmuls(gm)).items():
            routed = ExpertLinear.match(readers[0]) is not None
            together.setdefault(routing_of(readers[0]) if routed else value, []).extend(readers)
        groups, others = [], []
        for siblings in together.values():
            if any(self._is_kept(node) for node in siblings):
                others += [node for node in siblings if not gives_logits(node)]
            else:
                groups.append(tuple(siblings))
        return groups, others

    def _is_kept(self, node: fx.Node) -> bool:
        kept = any(fnmatchcase(module_path(node), glob) for glob in self.keep)
        return kept or scheme_of(node).is_float or gives_logits(node)

    def _fitting(
        self, group: LinearGroup, rules: MatmulRules | None, result: PassResult
    ) -> tuple[Scheme, ...]:
        """The choices that every matmul of the group can have; the reasons against the rest."""
        found = []
        for scheme in self.schemes:
            refusals = [(n, why) for n in group if (why := _refusal(n, scheme, rules)) is not None]
            for node, why in refusals:
                result.skip(node, f"{scheme.name} is no choice: {why}")
            if not refusals:
                found.append(scheme)
        return tuple(found)

    def _budgets(
        self,
        options: dict[LinearGroup, tuple[Scheme, ...]],
        others: list[fx.Node],
        rules: MatmulRules | None,
    ) -> dict[str, tuple[Budget, float]]:
        """Each budget by option, and how many of its units make 1 of the option."""
        nodes = [*others, *(node for group in options for node in group)]
        found: dict[str, tuple[Budget, float]] = {}
        if self.bits is not None:
            weights = sum(Linear.of(node).weight.meta["val"].numel() for node in nodes)
            fixed = sum(stored_bits(node, scheme_of(node)) for node in others)
            limit = self.bits * weights
            found["bits"] = (self._budget(options, stored_bits, fixed, limit), weights)
        if self.relative_time is not None:
            if rules is None:
                raise RecipeError("mixed-precision: relative_time needs a target to predict for")
            in_float = sum(rules.predicted_us(node, SCHEMES["FLOAT"]) for node in nodes)
            unit = self.relative_time * in_float / TIME_UNITS

            def time(node: fx.Node, scheme: Scheme) -> int:
                return math.ceil(rules.predicted_us(node, scheme) / unit)

            fixed = sum(time(node, scheme_of(node)) for node in others)
            found["relative_time"] = (
                self._budget(options, time, fixed, TIME_UNITS),
                in_float / unit,
            )
        return found

    def _budget(
        self,
        options: dict[LinearGroup, tuple[Scheme, ...]],
        cost: Callable[[fx.Node, Scheme], int],
        fixed: int,
        limit: float,
    ) -> Budget:
        costs = []
        for group, schemes in options.items():
            units = self._experts(group)
            whole = (sum(cost(node, scheme) for node in group) for scheme in schemes)
            costs += [tuple(-(-total // units) for total in whole)] * units
        return Budget(tuple(costs), math.floor(limit), fixed)

    def _losses(
        self, gm: fx.GraphModule, ctx: PassContext, options: dict[LinearGroup, tuple[Scheme, ...]]
    ) -> tuple[dict[LinearGroup, list[float]], dict[fx.Node, Tensor]]:
        """The expected KL of each group's schemes, and each expert's part `[schemes, experts]`.

        A compile that was killed measures once.
        """

        def compute() -> Finished:
            ratios, experts = clip_ratios(steps=self.clip_steps), dict[fx.Node, Tensor]()
            found = measure(gm, ctx, options, ratios, experts)
            every = [kl for group in options for kl in found[group]]
            parts = {f"experts.{label(node)}": kls for node, kls in experts.items()}
            return Finished({"kl": torch.tensor(every, dtype=torch.float64), **parts})

        tensors = ctx.once("sensitivity", compute).tensors
        kls = iter(tensors["kl"].tolist())
        losses = {group: [next(kls) for _ in schemes] for group, schemes in options.items()}
        nodes = {f"experts.{label(node)}": node for group in options for node in group}
        return losses, {nodes[name]: kept for name, kept in tensors.items() if name in nodes}

    def _infeasible(self, what: str, budgets: dict[str, tuple[Budget, float]]) -> RecipeError:
        smallest = " and ".join(
            f"{option}: {math.ceil(1000 * budget.smallest / unit) / 1000:g}"
            for option, (budget, unit) in budgets.items()
        )
        apart = ", each by itself" if len(budgets) > 1 else ""
        return RecipeError(
            f"mixed-precision: no assignment of {', '.join(self.choices)} keeps {what}",
            f"the smallest possible is {smallest}{apart}; or add a smaller choice",
        )


def _refusal(node: fx.Node, scheme: Scheme, rules: MatmulRules | None) -> str | None:
    if scheme.weight is not None:
        try:
            scheme.weight.group_size_for(Linear.of(node).shape[1])
        except ValueError as error:
            return str(error)
    return None if rules is None else rules.refusal(node, scheme)
