"""A cell's figures against float's, and its status in a word with the reason in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from panguq.evaluation import COLLAPSED
from panguq.tasks import statistics
from panguq.tasks.outcome import ScoredItem
from panguq.tasks.statistics import pass_at_k
from panguq.tasks.task_list import Task

Figures = dict[str, Any]
STATUSES = (
    "ok", "degraded", "collapsed", "non-finite", "repetitive", "refused", "chance", "failed",
)  # fmt: skip
SIGNIFICANT = 0.05
REPETITIVE = 0.5
"""The share of answers that loop, from which on a cell is repetitive if float's share is below."""


def item_figures(task: Task, items: Sequence[ScoredItem]) -> Figures:
    """What a model's items alone say: value, standard error, and what answers cost."""
    scores = [item.score for item in items]
    if task.kind == "perplexity":
        value = float(statistics.exp_mean(np.asarray(scores)))
        spread = value * statistics.standard_error(scores)  # d exp(x) = exp(x) dx
    else:
        value, spread = float(np.mean(scores)), statistics.standard_error(scores)
    found: Figures = {"value": value, "stderr": spread, "items": len(items)}
    if task.is_generated:
        tokens = [item.tokens for item in items]
        found |= {
            "tokens_mean": float(np.mean(tokens)),
            "tokens_p90": float(np.quantile(tokens, 0.9)),
            "cut_off": float(np.mean([item.cut_off for item in items])),
            "loops": float(np.mean([item.loops for item in items])),
            "ties": sum(item.ties for item in items),
        }
        samples = items[0].samples
        found["pass_at_k"] = {
            str(k): float(np.mean([pass_at_k(samples, item.passed, k) for item in items]))
            for k in (1, 10, 100)
            if task.kind == "code" and k <= samples
        }
    return found


def compared(task: Task, before: Sequence[ScoredItem], after: Sequence[ScoredItem]) -> Figures:
    """The paired difference of `after` to `before`, float's, over the same items."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} items are not the same ones")
    x, y = [item.score for item in before], [item.score for item in after]
    perplexity = task.kind == "perplexity"
    value = statistics.exp_mean if perplexity else statistics.mean
    low, high = statistics.paired_interval(x, y, value)
    float_value = float(value(np.asarray(x)))
    found: Figures = {
        "float_value": float_value,
        "difference": float(value(np.asarray(y))) - float_value,
        "low": low,
        "high": high,
    }
    if perplexity:
        return found | {
            "p": statistics.paired_p(x, y),
            "right_to_wrong": None,
            "wrong_to_right": None,
        }
    lost, won = statistics.flips(x, y)
    whole = all(score in (0, 1) for score in (*x, *y))
    p = statistics.mcnemar(lost, won) if whole else statistics.paired_p(x, y)
    return found | {"p": p, "right_to_wrong": lost, "wrong_to_right": won}


def at_chance(task: Task, value: float, items: int) -> bool:
    """Whether an accuracy is within two standard errors of that of who guesses.

    The error is the larger of the measured one and a guesser's.
    """
    spread = max(value * (1 - value), task.chance * (1 - task.chance))
    return value - task.chance <= 2 * math.sqrt(spread / max(items, 1))


def status_of(
    task: Task, cell: Figures, float_cell: Figures, matmul: str | None
) -> tuple[str, str]:
    """(status, reason) of a cell with figures of its own, of the comparison, and kl and top1.

    matmul: the first that keeps next to nothing of its float result.
    """
    named = f"; first broken matmul: {matmul}" if matmul else ""
    value, floats = cell["value"], cell["float_value"]
    if cell.get("broken"):
        return "non-finite", f"NaN or Inf first at {cell['broken']}"
    if not math.isfinite(value):
        return "non-finite", "the value is not finite"
    loops, before = cell.get("loops", 0.0), float_cell.get("loops", 0.0)
    if loops >= REPETITIVE and loops > before:
        return "repetitive", f"{loops:.0%} of the answers loop, {before:.0%} of float's{named}"
    significant = cell["p"] < SIGNIFICANT
    if task.kind == "perplexity":
        if value >= COLLAPSED * floats:
            return "collapsed", f"{value / floats:.1f} times float's perplexity{named}"
        if significant and value > floats:
            return "degraded", f"perplexity {value / floats - 1:+.1%}, p = {cell['p']:.2g}"
        return "ok", ""
    if at_chance(task, floats, cell["items"]):
        near = "" if cell.get("kl") is None else f": KL {cell['kl']:.3g}, top-1 {cell['top1']:.1%}"
        return "chance", f"float itself is at chance ({floats:.1%} of {cell['items']}){near}"
    if at_chance(task, value, cell["items"]):
        few = "" if significant else f"; too few items to tell it from float, p = {cell['p']:.2g}"
        return "collapsed", f"{value:.1%} is within two standard errors of chance{few}{named}"
    if significant and value < floats:
        lost, won = cell["right_to_wrong"], cell["wrong_to_right"]
        return "degraded", f"{lost} right to wrong, {won} wrong to right, p = {cell['p']:.2g}"
    return "ok", ""
