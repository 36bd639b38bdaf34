"""Tuning: what is timed, in which order, and the command that writes the target file."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
import torch

from bench.cpu_target import Row, candidates, measure, summary
from panguq.cli import main
from panguq.errors import LoweringError
from panguq.lowering.cpu.target import CPU
from panguq.lowering.cpu.tuning import tune as cpu_tuning
from panguq.lowering.cpu.tuning.calls import KernelCalls, Shape
from panguq.lowering.cpu.tuning.timing import CLOCKS, TimingBudget, time_in_turn
from panguq.lowering.cpu.tuning.tune import TuningGrid, check_threads, tune
from panguq.lowering.targets import find_target

TINY = TuningGrid(
    shapes=(Shape(16, 32), Shape(32, 64), Shape(48, 96)),
    tokens=(1, 2, 5),
    budget=TimingBudget(repeats=1, seconds=0.0),
    cold_bytes=0,
)


@pytest.fixture
def tiny_quick(monkeypatch):
    monkeypatch.setattr(cpu_tuning, "QUICK", TINY)


# --- calls and clocks ---------------------------------------------------------------------------


def sqnr_db(expected: torch.Tensor, found: torch.Tensor) -> float:
    noise = (expected.double() - found.double()).square().sum()
    return 10 * math.log10(expected.double().square().sum() / noise)


def test_all_kernels_are_called_on_the_same_numbers() -> None:
    calls = KernelCalls(Shape(48, 128), cold_bytes=0)(7)
    assert set(calls) == set(CPU.kernels)
    results = {kernel: call() for kernel, call in calls.items()}
    assert {result.shape for result in results.values()} == {(7, 48)}
    assert sqnr_db(results["dequantized_linear"], results["int4_linear"]) >= 45
    eight = [results[f"int8_weight_linear{kind}"] for kind in ("", " (converted)")]
    assert sqnr_db(*eight) >= 45
    assert sqnr_db(eight[0], results["int8_linear"]) >= 30  # its activations have 8 bits


@pytest.mark.parametrize(
    ("n", "k", "absent"),
    [
        (48, 100, {"int8_weight_linear", "int4_linear"}),
        (40, 64, {"int4_linear"}),
        (16, 33, {"int8_weight_linear", "int4_linear", "dequantized_linear"}),
    ],
)
def test_a_kernel_that_does_not_take_the_shape_is_left_out(n, k, absent) -> None:
    assert set(CPU.kernels) - set(KernelCalls(Shape(n, k), cold_bytes=0)(2)) == absent


def test_copies_of_the_weight_take_turns() -> None:
    calls = KernelCalls(Shape(16, 32), cold_bytes=2 * 16 * 32)
    seen = [calls.int8_weight().data_ptr() for _ in range(6)]
    assert len(set(seen)) == 3 and seen[:3] == seen[3:]
    once = KernelCalls(Shape(16, 32), cold_bytes=0)
    assert once.int8_weight().data_ptr() == once.int8_weight().data_ptr()


def test_calls_take_turns_and_a_sample_is_a_mean() -> None:
    now, order = [0.0], []

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    calls = {"short": call("short", 0.001), "long": call("long", 0.005)}
    found = time_in_turn(calls, TimingBudget(repeats=3, seconds=0.002), lambda: now[0])
    assert found["short"] == pytest.approx((1000, 1000, 1000))
    assert found["long"] == pytest.approx((5000, 5000, 5000))
    warm_up, measured = order[:4], order[4:]
    assert warm_up == ["short", "short", "long", "long"]
    assert measured == ["short", "short", "long"] * 3


# --- tuning -------------------------------------------------------------------------------------


def test_tuning_times_every_cell_and_leaves_the_threads_alone() -> None:
    before, said = torch.get_num_threads(), []
    found = tune(TINY, threads=1, progress=lambda what, seconds: said.append((what, seconds)))
    assert torch.get_num_threads() == before
    cells = {(t.kernel, t.m, t.n, t.k) for t in found.timings}
    assert len(cells) == len(found.timings) == len(CPU.kernels) * 9
    assert [what.partition(":")[0] for what, _ in said] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all(seconds > 0 for _, seconds in said)
    for kernel, cost in found.target.kernels.items():
        assert "1 thread, PyTorch" in cost.source and "9 timings" in cost.source
        assert cost.weight_bytes_per_weight == CPU.kernels[kernel].weight_bytes_per_weight


def test_large_products_are_left_out() -> None:
    grid = TuningGrid((Shape(10, 10),), (1, 5, 6), TimingBudget(), most_products=500)
    assert grid.tokens_of(Shape(10, 10)) == [1, 5]


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_numbers_of_threads_that_cannot_be(threads) -> None:
    with pytest.raises(LoweringError, match=f"threads: {threads} is not between 1 and"):
        check_threads(threads)


def test_the_cpu_clock_counts_one_thread(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert check_threads(1, "cpu") == 1 and check_threads(2, "wall") == 2
    with pytest.raises(LoweringError, match="counts one thread, and there are 2"):
        check_threads(2, "cpu")
    with pytest.raises(LoweringError, match="clock: 'sun' is none of"):
        check_threads(1, "sun")
    assert set(CLOCKS) == {"wall", "cpu"}


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_target_that_other_commands_take(tmp_path, capsys, tiny_quick) -> None:
    path = tmp_path / "new" / "mine.yaml"
    assert main(["tune", "--quick", "--threads", "1", "--out", str(path)]) == 0
    printed = capsys.readouterr()
    assert all(kernel in printed.out for kernel in CPU.kernels)
    assert f"--target {path}" in printed.out
    assert re.search(r"bfloat16 takes \d+\.\d\d times as long as float32, so", printed.out)
    assert "3 of 3: n=48 k=96, about" in printed.err
    assert [p.name for p in path.parent.iterdir()] == ["mine.yaml"]
    assert find_target(path).name == "cpu-tuned"
    arguments = ["explain", "1x64x64", "--scheme", "w4a16-g32", "--json", "--target", str(path)]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "cpu-tuned"


def test_the_command_in_json(tmp_path, capsys, tiny_quick) -> None:
    path = tmp_path / "mine.yml"
    assert main(["tune", "--quick", "--threads", "1", "--json", "--out", str(path)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["out"], data["target"]) == (str(path), "cpu-tuned")
    assert set(data["kernels"]) == set(CPU.kernels)
    assert data["bfloat16_ratio"] > 0
    assert data["kernels"]["linear"]["gmac_per_s"] == find_target(path).kernels["linear"].gmac_per_s
    assert len(data["timings"]) == len(CPU.kernels) * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "mine.json"], "mine.json: a target file is YAML"),
        (["--out", "folder.yaml"], "folder.yaml: is a folder"),
        (["--out", "file.txt/mine.yaml"], "file.txt/mine.yaml: cannot be written: "),
        (["--threads", "4000"], "threads: 4000 is not between 1 and"),
    ],
)
def test_bad_input_is_refused_before_anything_is_timed(
    tmp_path, monkeypatch, capsys, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu_tuning, "_measure", lambda *_: pytest.fail("it measured"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "file.txt").write_text("x")
    assert main(["tune", "--quick", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and "Traceback" not in error


# --- the benchmark of the choices ---------------------------------------------------------------


def test_the_benchmark_measures_all_legal_candidates_and_the_choice_is_one() -> None:
    rows = measure(Shape(48, 64), [1, 30], [CPU], TimingBudget(1, 0.0), "wall")
    assert [(row.scheme, row.m) for row in rows] == [
        (scheme, m) for scheme in ("W8A16", "W4A16") for m in (1, 30)
    ]
    eight, four = rows[0].microseconds, rows[2].microseconds
    assert set(eight) == {
        "int8_weight_linear",
        "int8_weight_linear (converted)",
        "dequantized_linear",
    }
    assert set(four) == {"int4_linear", "dequantized_linear"}
    assert all(row.chosen["cpu"] in row.microseconds for row in rows)


def test_excess_is_against_the_fastest() -> None:
    times = {"slow": 150.0, "fast": 100.0}
    rows = [
        Row("W4A16", 1, 8, 8, times, {"t": "slow"}),
        Row("W4A16", 2, 8, 8, times, {"t": "fast"}),
        Row("W4A16", 3, 8, 8, {"only": 1.0}, {"t": "only"}),
    ]
    assert [row.excess("t") for row in rows] == [0.5, 0.0, 0.0]
    text = summary(rows, "t")
    assert "2 matmuls with a choice (1 without)" in text
    assert "mean excess 25.00%, worst 50.0% (W4A16 m=1 n=8 k=8), not the fastest in 1" in text


def test_odd_shapes_have_fewer_candidates() -> None:
    calls = KernelCalls(Shape(1000, 1000), cold_bytes=0)
    assert set(candidates(calls, "W4A16", 2)) == {"dequantized_linear"}
    assert set(candidates(calls, "W8A16", 2)) == {"dequantized_linear"}
