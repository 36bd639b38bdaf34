"""A fitted model's choices of a schedule, judged on shapes that it was not fitted to."""

from __future__ import annotations

from dataclasses import replace

from conformance.gpu.choice import KERNELS, _predicted_us, _timings, gpu_target, judge
from conformance.gpu.schedules import Row

START = gpu_target(cores=32, clock_mhz=1500, l2_bytes=50 * 2**20)
SHAPES = [(m, n, k) for m in (1, 16) for n, k in ((512, 8192), (4096, 1024), (1024, 16384))]


def rows(slower_split: float = 1.0) -> list[Row]:
    """What a GPU would take on which `START` holds, but that Split-K is so many times slower."""
    found = []
    for m, n, k in SHAPES:
        empty = Row(m, n, k, {}, 1.0, 1.0)
        whole, split = (_predicted_us(START, timing) for timing in _timings(empty))
        found.append(replace(empty, data_parallel_us=whole, split_k_us=split * slower_split))
    return found


def test_a_model_that_holds_takes_the_faster_schedule() -> None:
    found = judge(rows(), START)
    assert found["right"] == found["judged_on"] == 3 and found["largest_regret"] == 0
    assert found["median_error"] < 0.01 and len(KERNELS) == 2


def test_one_that_does_not_says_what_its_choices_cost() -> None:
    found = judge(rows(slower_split=6.0), START)
    assert found["median_error"] > 0.05  # no constant makes Split-K alone six times slower
    assert found["right"] < found["judged_on"] or found["largest_regret"] == 0


def test_too_few_rows_are_not_judged() -> None:
    assert judge(rows()[:3], START) == {}
