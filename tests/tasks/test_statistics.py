"""Paired statistics by hand."""

from __future__ import annotations

import numpy as np
import pytest

from panguq.tasks.outcome import ScoredItem as Item
from panguq.tasks.statistics import exp_mean, flips, mcnemar, paired_interval, paired_p, pass_at_k
from panguq.tasks.task_list import TASKS
from panguq.tasks.verdict import compared, item_figures, status_of


def test_flips_are_counted_both_ways() -> None:
    assert flips([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == (2, 1)


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (1, 0, 1.0), (8, 1, 20 / 512)])
def test_mcnemar_tosses_a_coin_for_each_flip(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p)


@pytest.mark.parametrize(
    ("samples", "passed", "k", "expected"),
    [(1, 1, 1, 1.0), (1, 0, 1, 0.0), (4, 1, 1, 0.25), (4, 1, 4, 1.0), (10, 3, 2, 1 - 42 / 90)],
)
def test_pass_at_k_is_unbiased(samples: int, passed: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(expected)


def test_a_constant_shift_has_an_interval_of_no_width() -> None:
    """Pairing removes what the items have in common."""
    before = np.arange(20.0)
    low, high = paired_interval(before, before + 0.5)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)
    assert paired_p(before, before) == 1.0


def test_a_difference_of_perplexities_is_one_of_exponentials() -> None:
    low, high = paired_interval([1.0] * 5, [2.0] * 5, exp_mean)
    assert low == pytest.approx(np.exp(2) - np.exp(1)) == high


def items(*scores: float) -> list[Item]:
    return [Item(score) for score in scores]


def judged(task: str, before: list[Item], after: list[Item], **more: object) -> tuple[str, str]:
    """The status of a cell whose items are given."""
    found = TASKS[task]
    cell = item_figures(found, after) | compared(found, before, after) | {"kl": 0.1, "top1": 0.9}
    return status_of(found, cell | more, item_figures(found, before), "layers.3.down_proj")


@pytest.mark.parametrize(
    ("task", "before", "after", "status"),
    [
        ("arc_easy", items(*[1] * 40), items(*[1] * 39, 0), "ok"),
        ("arc_easy", items(*[1] * 40), items(*[1] * 30, *[0] * 10), "degraded"),
        ("arc_easy", items(*[1] * 40), items(*[1] * 10, *[0] * 30), "collapsed"),
        ("arc_easy", items(*[1] * 10, *[0] * 30), items(*[0] * 40), "chance"),
        ("wikipedia", items(2.0, 2.1, 2.2), items(2.0, 2.1, 2.2), "ok"),
        ("wikipedia", items(2.0, 2.1, 2.2), items(2.21, 2.3, 2.4), "degraded"),
        ("wikipedia", items(2.0, 2.1, 2.2), items(4.4, 4.5, 4.6), "collapsed"),
        ("wikipedia", items(2.0, 2.1, 2.2), items(float("nan"), 4.5, 4.6), "non-finite"),
    ],
)
def test_statuses(task: str, before: list[Item], after: list[Item], status: str) -> None:
    assert judged(task, before, after)[0] == status


def test_what_collapsed_names_the_first_broken_matmul() -> None:
    assert "layers.3.down_proj" in judged("wikipedia", items(2, 2), items(5, 5))[1]


def test_a_collapse_of_few_items_says_how_few_they_are() -> None:
    status, reason = judged("piqa", items(*[1] * 8), items(*[1] * 6, 0, 0))
    assert status == "collapsed" and "too few items to tell it from float, p = 0.5" in reason


def test_an_op_that_makes_nan_is_named_whatever_the_value() -> None:
    status, reason = judged("arc_easy", items(1, 1), items(1, 1), broken="layers.0.mul")
    assert (status, reason) == ("non-finite", "NaN or Inf first at layers.0.mul")


def test_answers_that_loop_are_repetitive_where_floats_do_not() -> None:
    looping = [Item(0.0, loops=True, tokens=9), Item(1.0, tokens=9)]
    assert judged("gsm8k", [Item(1.0, tokens=5)] * 2, looping)[0] == "repetitive"
    assert judged("gsm8k", looping, looping)[0] == "chance"


def test_chance_says_what_judges_instead() -> None:
    assert "KL 0.1, top-1 90.0%" in judged("copa", items(1, 0, 1, 0), items(1, 0, 0, 0))[1]


def test_different_items_are_never_paired() -> None:
    with pytest.raises(ValueError, match="3 and 2 items"):
        compared(TASKS["copa"], items(1, 1, 1), items(1, 1))
