"""Constants from timings whose constants are known."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panguq.errors import LoweringError
from panguq.lowering.cpu.target import CPU
from panguq.lowering.cpu.tuning.fit import fit_kernel, predict_us
from panguq.lowering.cpu.tuning.timing import Timing
from panguq.lowering.cpu.tuning.tune import FULL, NAME, fit_target
from panguq.lowering.target import KernelCost, check_target
from panguq.lowering.target_files import save_target
from panguq.lowering.targets import find_target

CELLS = [(m, shape.n, shape.k) for shape in FULL.shapes for m in FULL.tokens_of(shape)]


def timings_of(cost: KernelCost, kernel: str = "it", noise=lambda: 1.0, cells=CELLS, repeats=3):
    found = []
    for m, n, k in cells:
        exact = predict_us(cost, Timing(kernel, m, n, k, ()))
        found.append(Timing(kernel, m, n, k, tuple(exact * noise() for _ in range(repeats))))
    return found


@given(
    launch_us=st.floats(5, 200),
    gb_per_s=st.floats(0.5, 30),
    gmac_per_s=st.floats(10, 300),
)
def test_known_constants_are_recovered(launch_us, gb_per_s, gmac_per_s) -> None:
    cost = KernelCost(launch_us, gb_per_s, gmac_per_s, 0.5)
    fit = fit_kernel(timings_of(cost), 0.5, "made up")
    for name in ("launch_us", "gb_per_s", "gmac_per_s"):
        # Three digits are kept.
        assert getattr(fit.cost, name) == pytest.approx(getattr(cost, name), rel=0.006)
    assert fit.cost.weight_bytes_per_weight == 0.5
    assert fit.mean_error < 0.01


@pytest.mark.parametrize("kernel", list(CPU.kernels))
def test_noise_and_some_disturbed_timings_move_the_costs_little(kernel) -> None:
    """A tenth of the samples take 2 to 5 times as long, the others up to 8 % more or less."""
    random.seed(kernel)
    cost = CPU.kernels[kernel]

    def noise() -> float:
        return random.uniform(2, 5) if random.random() < 0.1 else random.uniform(0.92, 1.08)

    fit = fit_kernel(timings_of(cost, noise=noise, repeats=7), cost.weight_bytes_per_weight, "it")
    for timing in timings_of(cost):
        assert predict_us(fit.cost, timing) == pytest.approx(timing.median_us, rel=0.05)


def test_one_wild_timing_is_outvoted_and_reported() -> None:
    cost = CPU.kernels["int4_linear"]
    timings = timings_of(cost)
    timings[7] = dataclasses.replace(timings[7], microseconds=(timings[7].median_us * 40,))
    fit = fit_kernel(timings, 0.5, "it")
    assert fit.cost.gmac_per_s == pytest.approx(cost.gmac_per_s, rel=0.02)
    assert fit.worst_error == fit.errors[7] < -0.9


def test_a_term_that_is_not_there_stays_above_zero() -> None:
    """Time that is all products: the other constants are tiny, and the target is still sound."""
    cost = KernelCost(1e-9, 1e12, 40.0, 1.0)
    fit = fit_kernel(timings_of(cost), 1.0, "fitted to nothing")
    assert 0 < fit.cost.launch_us <= 0.01
    assert fit.cost.gmac_per_s == pytest.approx(40, rel=0.01)
    check_target(dataclasses.replace(CPU, kernels={**CPU.kernels, "linear": fit.cost}), "it")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "0 timings are too few"),
        (CELLS[:5], "5 timings are too few"),
        ([(1, n, 64) for n in range(64, 640, 64)], "cannot tell launch, bytes and products apart"),
        ([(m, 64, 64) for m in range(1, 10)], "cannot tell launch, bytes and products apart"),
    ],
)
def test_too_few_timings_are_refused(cells, message) -> None:
    with pytest.raises(LoweringError, match=message):
        fit_kernel(timings_of(CPU.kernels["linear"], cells=cells), 4.0, "it")


@pytest.mark.parametrize("microseconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_refused(microseconds) -> None:
    timings = timings_of(CPU.kernels["linear"])
    timings[3] = dataclasses.replace(timings[3], microseconds=(microseconds,))
    with pytest.raises(LoweringError, match="it: a timing is not above zero"):
        fit_kernel(timings, 4.0, "it")


def test_a_tuned_target_in_a_file_is_the_same_target(tmp_path) -> None:
    timings = [t for kernel, cost in CPU.kernels.items() for t in timings_of(cost, kernel)]
    target, fits = fit_target(timings, "fitted to made-up timings")
    path = tmp_path / "mine.yaml"
    save_target(target, path)
    read = find_target(path)
    assert (read.name, read.kind, read.kernels) == (NAME, "cpu", target.kernels)
    for kernel, cost in read.kernels.items():
        assert cost.source.startswith(f"fitted to made-up timings; {len(CELLS)} timings, mean err")
        assert cost.gmac_per_s == pytest.approx(CPU.kernels[kernel].gmac_per_s, rel=0.01)
        assert fits[kernel].mean_error < 0.01


def test_every_kernel_must_have_been_timed() -> None:
    timings = timings_of(CPU.kernels["linear"], "linear")
    with pytest.raises(LoweringError, match="int8_linear: no timings"):
        fit_target(timings, "it")
