"""Choose one of several options for each group: least total loss within budgets, proved optimal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from panguq.errors import NumericsError

PROVED_GROUPS = 1000  # of more, as of single experts, the last digits of a proof take minutes
OBJECTIVE = 1e6  # HiGHS stops at an absolute gap of 1e-6: losses are scaled far above it


@dataclass(frozen=True)
class Budget:
    """`costs[group][option]` in whole units, and how many units may be spent.

    `fixed` units are spent in any case.
    """

    costs: tuple[tuple[int, ...], ...]
    limit: int
    fixed: int = 0

    @property
    def smallest(self) -> int:
        """What the cheapest option of every group costs together."""
        return self.fixed + sum(min(row) for row in self.costs)

    def spent(self, chosen: Sequence[int]) -> int:
        """What these options cost, one index a group."""
        return self.fixed + sum(row[index] for row, index in zip(self.costs, chosen, strict=True))


@dataclass(frozen=True)
class Allocation:
    """An option's index for each group, their total loss, and what the solver says about it.

    `gap`: how far, relative to the loss, a better choice is not ruled out; 0 is proved optimal.
    """

    chosen: tuple[int, ...]
    loss: float
    status: str
    gap: float


def allocate(losses: Sequence[Sequence[float]], budgets: Sequence[Budget]) -> Allocation | None:
    """Minimize sum of losses[group][chosen] with every budget kept; None if no choice keeps them.

    The multiple-choice knapsack problem as an integer program, solved by HiGHS's branch and cut
    (Huangfu and Hall, Mathematical Programming Computation 10, 2018) to a gap of zero, of more than
    `PROVED_GROUPS` groups to one of 1e-4.
    losses: not negative, finite. Raises NumericsError if the solver gives up.
    """
    if any(not math.isfinite(loss) or loss < 0 for row in losses for loss in row):
        raise NumericsError("a loss to allocate by is negative or not finite")
    if not losses:
        kept = all(budget.smallest <= budget.limit for budget in budgets)
        return Allocation((), 0.0, "nothing to choose", 0.0) if kept else None
    worst = sum(max(row) for row in losses)
    first = _solve(losses, budgets, math.inf, worst)
    if first is None or first.loss == 0.0:
        return first
    # No option whose loss alone exceeds what all groups together can have is part of the optimum.
    # Without those the losses left are of one order, and the solver's tolerances mean little.
    return _solve(losses, budgets, first.loss, first.loss)


def _solve(
    losses: Sequence[Sequence[float]], budgets: Sequence[Budget], largest: float, unit: float
) -> Allocation | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [(g, o) for g, row in enumerate(losses) for o in range(len(row))]
    objective = np.array([losses[g][o] for g, o in options])
    allowed = (objective <= largest).astype(float)
    ones = (np.ones(len(options)), ([g for g, _ in options], np.arange(len(options))))
    one_each = csr_array(ones, shape=(len(losses), len(options)))  # of experts there are thousands
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    for budget in budgets:
        row, limit = _reduced(budget, options)
        constraints.append(LinearConstraint(np.array([row], dtype=float), -np.inf, limit))
    found = milp(
        np.where(allowed > 0, objective, 0.0) * (OBJECTIVE / (unit or 1.0)),
        integrality=np.ones(len(options)),
        bounds=Bounds(0.0, allowed),
        constraints=constraints,
        options={"mip_rel_gap": 0.0 if len(losses) <= PROVED_GROUPS else 1e-4},
    )
    if found.status == 2:  # infeasible
        return None
    if found.x is None:
        raise NumericsError(f"the allocation was not solved: {found.message}")
    chosen = tuple(o for (_, o), x in zip(options, found.x, strict=True) if x > 0.5)
    if len(chosen) != len(losses) or any(b.spent(chosen) > b.limit for b in budgets):
        raise NumericsError("the allocation that the solver returned breaks a constraint")
    loss = math.fsum(row[index] for row, index in zip(losses, chosen, strict=True))
    status = "optimal" if found.status == 0 else str(found.message)
    return Allocation(chosen, loss, status, float(found.mip_gap or 0.0))


def _reduced(budget: Budget, options: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """The same constraint in the smallest whole numbers, counted from each cheapest option."""
    above = [budget.costs[g][o] - min(budget.costs[g]) for g, o in options]
    unit = math.gcd(*above) or 1
    return [cost // unit for cost in above], (budget.limit - budget.smallest) // unit
