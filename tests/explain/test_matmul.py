"""`panguq explain`: the winner is the cheapest, the reasons name real terms, files are whole."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from panguq.cli import main
from panguq.errors import LoweringError
from panguq.explain.files import TOKENS, neighbours, split_k_gain
from panguq.explain.matmul import explain, looks_like_shape, parse_shape, render
from panguq.ir.quant_spec import SCHEMES, parse_scheme
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.model import cost
from panguq.lowering.ascend.cost.terms import OVERLAPPED, SERIAL
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.target_files import save_target
from panguq.lowering.targets import find_target

DEEP = ["explain", "128x256x16384", "--scheme", "w8a8", "--target", "ascend910b3"]


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic", "w8a16", "w4a16", "w4a16-g32", "float"])
@pytest.mark.parametrize("shape", ["1x4096x4096", "128x256x16384", "700x1536x6144"])
def test_json_lists_every_candidate_and_the_cheapest_wins(capsys, shape, scheme) -> None:
    found = run_json(capsys, "explain", shape, "--scheme", scheme)
    m, n, k = map(int, shape.split("x"))
    problem = MatmulProblem(m, n, k, parse_scheme(scheme))
    target = find_target("ascend910b1")
    assert len(found["candidates"]) == len(ascend_candidates(problem, target))
    legal = [c for c in found["candidates"] if c["refusal"] is None]
    assert found["winner"]["total_us"] == min(c["total_us"] for c in legal)
    assert found["winner"] in found["candidates"]
    assert legal == sorted(legal, key=lambda c: c["total_us"])
    for candidate in found["candidates"]:
        assert {"kernel", "schedule", "splits", "tile", "total_us", "terms"} <= candidate.keys()
        if candidate["refusal"] is None:
            terms = candidate["terms"]
            serial = sum(terms[name] for name in SERIAL)
            expected = serial + max(terms[name] for name in OVERLAPPED)
            assert candidate["total_us"] == pytest.approx(expected)
        else:
            assert candidate["total_us"] is None and candidate["terms"] == {}
    assert found["table"][0]["first_m"] == 1 and found["table"][-1]["last_m"] is None


def test_the_answer_for_a_deep_matmul(capsys) -> None:
    found = run_json(capsys, *DEEP)
    assert found["winner"]["kernel"] == "w8a8_split_k"
    assert found["winner"]["schedule"] == "split_k" and found["winner"]["splits"] > 1
    assert found["runner_up"]["kernel"] == "npu_quant_matmul"
    assert "loading blocks into the busiest core" in found["runner_up"]["why"]


def test_the_text_tells_winner_terms_runner_up_and_table(capsys) -> None:
    assert main(DEEP) == 0
    text = capsys.readouterr().out
    assert "winner: w8a8_split_k splits=" in text
    assert "runner-up: npu_quant_matmul" in text and "lost by" in text
    assert "core_load" in text and "vector_start" in text
    assert "refused:\n  linear: the scheme is W8A8, and allow_float is off" in text
    assert "by number of tokens, on int8 weights" in text


def test_why_names_the_term_that_differs_most() -> None:
    target = find_target("ascend910b3")
    found = explain(parse_shape("128x256x16384", SCHEMES["W8A8"]), target)
    winner, second = found.winner.cost, found.runner_up.cost
    serial = {name: second.terms[name] - winner.terms[name] for name in SERIAL}
    together = [max(c.terms[name] for name in OVERLAPPED) for c in (winner, second)]
    assert together[1] - together[0] > max(serial.values())
    assert f"({second.bound_by})" in found.why()
    assert f"{together[1] - together[0]:.1f} us" in found.why()


def test_float_may_win_where_allowed(capsys) -> None:
    arguments = ["explain", "1x1536x6144", "--scheme", "w8a16"]
    assert run_json(capsys, *arguments)["winner"]["kernel"] == "npu_weight_quant_batchmatmul"
    allowed = run_json(capsys, *arguments, "--allow-float")
    assert allowed["winner"]["kernel"] == "linear" and allowed["storage"] == "float"


def test_exact_tables_have_no_hysteresis(capsys) -> None:
    assert run_json(capsys, *DEEP, "--exact")["hysteresis"] == 0
    assert len(run_json(capsys, *DEEP, "--exact")["table"]) > len(run_json(capsys, *DEEP)["table"])


def test_a_cpu_matmul(capsys) -> None:
    found = run_json(capsys, "explain", "512x512x512", "--scheme", "w8a16", "--target", "cpu")
    assert found["winner"]["kernel"] == "int8_weight_linear"
    terms = found["winner"]["terms"]
    assert found["winner"]["total_us"] == pytest.approx(sum(terms.values()))


def test_a_target_file(capsys, tmp_path) -> None:
    built_in = find_target("ascend910b1")
    save_target(replace(built_in, name="mine"), tmp_path / "mine.yaml")
    found = run_json(capsys, *DEEP[:-1], str(tmp_path / "mine.yaml"))
    assert found["target"] == "mine"
    assert found["winner"] == run_json(capsys, *DEEP[:-1], "ascend910b1")["winner"]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("0x4x4", "m is zero"),
        ("4x0x4", "n is zero"),
        ("4x4x0", "k is zero"),
        ("4x-4x4", "n=-4 is not a whole number from 1"),
        ("1.5x4x4", r"m=1\.5 is not a whole number"),
        ("12x", "is not MxNxK"),
        ("12x12", "is not MxNxK"),
        ("1x2x3x4", "is not MxNxK"),
        ("mx4096x4096", "m is symbolic and has no bounds"),
        ("1xnx4096", "n='n' is not a number"),
        ("1x99999999999x3", "n=99999999999 is not a whole number from 1 to 999999999"),
    ],
)
def test_shapes_that_cannot_be(capsys, shape, message) -> None:
    with pytest.raises(LoweringError, match=message) as caught:
        parse_shape(shape, SCHEMES["W8A8"])
    assert looks_like_shape(shape)
    assert main(["explain", shape]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {caught.value.message}") and "hint: " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "no such folder"),
        (["1x8x8", "--target", "ascend910b9"], "unknown target 'ascend910b9'"),
        (["1x8x8", "--scheme", "w9a9"], "unknown scheme 'w9a9'"),
        (["1x8x8", "--scheme", "mxfp8"], "panguq has no kernel of MXFP8"),
        (["1x65536x8", "--scheme", "w8a16"], "n=65536 is more than 65535"),
        (["1x8x8", "--csv", "/no/such/folder/x.csv"], "cannot be written"),
        (["1x8x8", "--dtype", "float32"], "the model is float32"),
    ],
)
def test_errors_say_what_is_wrong(capsys, arguments, message) -> None:
    assert main(["explain", *arguments]) == 1
    assert message in capsys.readouterr().err


# --- files --------------------------------------------------------------------------------------


def test_csv_has_every_candidate_with_every_term(capsys, tmp_path) -> None:
    path = tmp_path / "all.csv"
    found = run_json(capsys, *DEEP, "--csv", str(path))
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert len(rows) == len(found["candidates"])
    for row, candidate in zip(rows, found["candidates"], strict=True):
        assert (row["kernel"], row["splits"]) == (candidate["kernel"], str(candidate["splits"]))
        if candidate["refusal"] is None:
            assert float(row["total_us"]) == pytest.approx(candidate["total_us"], abs=1e-4)
            assert float(row["hbm"]) == pytest.approx(candidate["terms"]["hbm"], abs=1e-4)
        else:
            assert (row["total_us"], row["refusal"]) == ("", candidate["refusal"])
    assert [p.name for p in tmp_path.iterdir()] == ["all.csv"]


def test_the_gain_of_split_k_is_the_ratio_of_the_cheapest() -> None:
    target, problem = find_target("ascend910b3"), parse_shape("1x256x16384", SCHEMES["W8A8"])
    gain = split_k_gain(problem, target)
    for m, value in zip(TOKENS[::4], gain[::4], strict=True):
        given = MatmulProblem(m, 256, 16384, SCHEMES["W8A8"])
        found = [c for c in ascend_candidates(given, target) if c.refusal is None]
        best = [
            min(
                cost(c, given, target).total_us for c in found if (c.schedule == "split_k") == split
            )
            for split in (False, True)
        ]
        assert value == pytest.approx(best[0] / best[1])
    assert gain[0] > 1.5 and np.isfinite(gain).all()


def test_neighbours_have_about_as_many_weights() -> None:
    problem = parse_shape("1x4096x4096", SCHEMES["W8A8"])
    shapes = neighbours(problem, 65535)
    assert (4096, 4096) in shapes and len(shapes) == 7
    assert all(n * k == 4096 * 4096 for n, k in shapes)


def test_a_heat_map_without_matplotlib_says_how_to_get_it(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*DEEP, "--heat-map", str(tmp_path / "gain.png")]) == 1
    shown = capsys.readouterr().err
    assert "needs the package matplotlib" in shown and "hint: pip install 'panguq[plots]'" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_heat_map_is_a_png(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gain.png"
    assert main([*DEEP, "--heat-map", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_scheme_without_split_k_has_no_heat_map(capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["explain", "1x512x512", "--scheme", "w8a16", "--heat-map", str(tmp_path / "x.png")]
    assert main(arguments) == 1
    assert "has no Split-K kernel" in capsys.readouterr().err


def test_help_is_worth_reading(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    text = capsys.readouterr().out
    for wanted in ("128x256x2048", "w4a16-g32", "--heat-map", "tokens, n outputs, k inputs"):
        assert wanted in text


def test_render_is_plain_text() -> None:
    found = explain(parse_shape("4x512x2048", SCHEMES["W4A16"]), find_target("ascend910b2"))
    assert all(line == line.rstrip() for line in render(found).splitlines())
