"""The solver finds what trying everything finds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panguq.errors import NumericsError
from panguq.passes.statistics.allocate import Budget, allocate

# Losses of real models span many orders of magnitude; many are equal or zero.
LOSSES = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.sampled_from([0.25, 0.5]))


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    losses = [draw(st.lists(LOSSES, min_size=s, max_size=s)) for s in sizes]
    budgets = []
    for unit in draw(st.lists(st.sampled_from([1, 64, 36864]), min_size=1, max_size=2)):
        costs = tuple(
            tuple(unit * c for c in draw(st.lists(st.integers(0, 40), min_size=s, max_size=s)))
            for s in sizes
        )
        limit = draw(st.integers(0, 40 * unit * len(sizes)))
        budgets.append(Budget(costs, limit, draw(st.integers(0, 10 * unit))))
    return losses, budgets


def brute_force(losses, budgets) -> float | None:
    every = itertools.product(*(range(len(row)) for row in losses))
    kept = [c for c in every if all(b.spent(c) <= b.limit for b in budgets)]
    totals = [sum(row[i] for row, i in zip(losses, c, strict=True)) for c in kept]
    return min(totals, default=None)


@given(problems())
@settings(max_examples=80, deadline=None)
def test_it_finds_the_least_loss(problem) -> None:
    losses, budgets = problem
    found, least = allocate(losses, budgets), brute_force(losses, budgets)
    assert (found is None) == (least is None)
    if found is not None:
        assert all(budget.spent(found.chosen) <= budget.limit for budget in budgets)
        assert found.loss == pytest.approx(least, rel=1e-9, abs=0.0)
        assert (found.status, found.gap) == ("optimal", 0.0)


def test_a_budget_may_be_met_exactly() -> None:
    costs = ((1, 4), (1, 4), (1, 4))
    losses = [[9.0, 1.0], [7.0, 1.0], [8.0, 1.0]]
    assert allocate(losses, [Budget(costs, 9)]).chosen == (1, 0, 1)
    assert allocate(losses, [Budget(costs, 8)]).chosen == (1, 0, 0)
    assert allocate(losses, [Budget(costs, 8, fixed=-1)]).chosen == (1, 0, 1)
    assert allocate(losses, [Budget(costs, 3)]).chosen == (0, 0, 0)
    assert allocate(losses, [Budget(costs, 2)]) is None


def test_greedy_would_be_wrong() -> None:
    """The best gain per unit first (option 1 of the first group) leaves no room for the second."""
    losses = [[10.0, 0.0], [9.0, 0.0], [9.0, 0.0]]
    budget = Budget(((0, 6), (0, 5), (0, 5)), 10)
    assert allocate(losses, [budget]).chosen == (0, 1, 1)


def test_nothing_to_choose() -> None:
    assert allocate([], [Budget((), 0)]).chosen == ()
    assert allocate([], [Budget((), 3, fixed=4)]) is None


@pytest.mark.parametrize("loss", [-1.0, float("nan"), float("inf")])
def test_losses_that_are_none(loss: float) -> None:
    with pytest.raises(NumericsError, match="negative or not finite"):
        allocate([[1.0, loss]], [])


def test_a_large_problem_is_proved_optimal() -> None:
    """192 groups of a 7B's sizes, five options each."""
    import random

    draw = random.Random(0)
    bits = [3.375, 4.125, 4.5, 6.125, 8.01]
    sizes = [6144 * 4096, 4096 * 4096, 2 * 12800 * 4096, 12800 * 4096] * 48
    costs = tuple(tuple(int(b * size) for b in bits) for size in sizes)
    losses = [[draw.lognormvariate(0, 1.5) * 4**-b for b in bits] for _ in sizes]
    budget = Budget(costs, int(4.75 * sum(sizes)))
    found = allocate(losses, [budget])
    assert (found.status, found.gap) == ("optimal", 0.0)
    assert budget.spent(found.chosen) <= budget.limit
