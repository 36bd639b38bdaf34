"""What an allocation of schemes spends, and the tables that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from panguq.ir.edit import label
from panguq.ir.ops.packing import packed_columns
from panguq.ir.quant_spec import QuantSpec, Scheme
from panguq.ir.views import ExpertLinear, Linear
from panguq.passes.codes.weight_scales import scale_dtype
from panguq.passes.pipeline.base import MatmulRules, Table
from panguq.passes.statistics.allocate import Allocation, Budget

LinearGroup = tuple[fx.Node, ...]
"""Matmuls that share a scheme, or those of one layer's experts."""
Kls = Mapping[LinearGroup, Mapping[str, float]]
"""The estimated KL of a group under each scheme that it can have, by the scheme's name."""


def allocation_table(
    names: Sequence[str],
    kls: Kls,
    chosen: Mapping[LinearGroup, Sequence[Scheme]],
    rules: MatmulRules | None,
) -> Table:
    """A row a group; of experts that were chosen for one by one, a row for each scheme that some
    of them have, with their number and their share of the predicted time."""
    rows = []
    for group, schemes in chosen.items():
        shapes = [Linear.of(node).shape for node in group]
        weights = sum(Linear.of(node).weight.meta["val"].numel() for node in group)
        view = ExpertLinear.match(group[0])
        for scheme, units in Counter(schemes).items():
            share = units / len(schemes)
            experts = 1 if view is None else round(view.experts * share)
            bits = sum(stored_bits(n, scheme) for n in group) / weights
            time = ""
            if rules is not None:
                time = f"{share * sum(rules.predicted_us(n, scheme) for n in group):.0f}"
            rows.append((
                " ".join(label(node) for node in group), sum(n for n, _ in shapes), shapes[0][1],
                experts, scheme.name, f"{bits:.4f}", time, *_listed(names, kls[group]),
            ))  # fmt: skip
    columns = ("group", "n", "k", "experts", "scheme", "bits", "predicted_us")
    return Table((*columns, *(f"kl_{name}" for name in names)), tuple(rows))


def budgets_table(
    limits: Mapping[str, float], budgets: Mapping[str, tuple[Budget, float]], solved: Allocation
) -> Table:
    """What each budget allows and what is spent, in units of the pass's option."""
    rows = tuple(
        (option, limits[option], f"{budget.spent(solved.chosen) / unit:.6f}",
         f"{budget.smallest / unit:.6f}", f"{solved.loss:.6g}", solved.status, solved.gap)
        for option, (budget, unit) in budgets.items()
    )  # fmt: skip
    return Table(("budget", "limit", "used", "smallest_possible", "kl", "status", "gap"), rows)


def experts_table(names: Sequence[str], kls: Kls, of_experts: Mapping[fx.Node, Tensor]) -> Table:
    """What each expert's weight adds to its group's KL under each scheme, from `[schemes,
    experts]` by matmul."""
    group_of = {node: group for group in kls for node in group}
    rows = []
    for node, parts in of_experts.items():
        own = tuple(kls[group_of[node]])
        for expert, column in enumerate(parts.T.tolist()):
            every = _listed(names, dict(zip(own, column, strict=True)))
            rows.append((label(node), expert, *every))
    return Table(("matmul", "expert", *(f"kl_{name}" for name in names)), tuple(rows))


def _listed(names: Sequence[str], kls: Mapping[str, float]) -> list[str]:
    return [f"{kls[name]:.4g}" if name in kls else "" for name in names]


def stored_bits(node: fx.Node, scheme: Scheme) -> int:
    """Bits that this linear's weight takes under a scheme: codes, scales and zero points."""
    k = Linear.of(node).shape[1]
    n = Linear.of(node).weight.meta["val"].numel() // k
    spec: QuantSpec | None = scheme.weight
    if spec is None:
        return 8 * n * k * int(Linear.of(node).weight.meta["val"].dtype.itemsize)
    row = k if spec.bits == 8 else k // 2 if spec.bits == 4 else packed_columns(k, spec.bits)
    zero_point = torch.int8.itemsize if not spec.symmetric else 0
    groups = k // spec.group_size_for(k)
    return 8 * n * (row + groups * (scale_dtype(spec).itemsize + zero_point))
