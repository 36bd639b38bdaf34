"""A target fitted to a table of op times, in msprof's form and in that of torch_npu's profiler."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panguq.cli import main
from panguq.errors import LoweringError
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.tuning.fit import fit_to_timings
from panguq.lowering.ascend.tuning.table import read_op_table
from panguq.lowering.ascend.tuning.timings import MatmulTiming, matmul_timings
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.targets import find_target

HEAD = (
    "Op Name,OP Type,Task Type,Task Duration(us),Input Shapes,Input Data Types,Input Formats,"
    "Output Shapes,Output Data Types,Output Formats"
)
SUMMARY = f'''{HEAD}
aclnnMm_1,MatMulV2,AI_CORE,36.5,"""16,4096;4096,1024""",DT_BF16;DT_BF16,ND;ND,"""16,1024""",DT_BF16,ND
aclnnMm_2,MatMulV2,AI_CORE,37.5,"""16,4096;4096,1024""",DT_BF16;DT_BF16,ND;ND,"""16,1024""",DT_BF16,ND
aclnnMm_3,MatMulV3,AI_CORE,90.0,"""1024,4096;1024,4096""",FLOAT16;FLOAT16,ND;ND,"""1024,1024""",FLOAT16,ND
q_1,QuantBatchMatmulV3,MIX_AIC,28.0,"""1,4096;128,256,16,32;4096""",INT8;INT8;FLOAT,ND;FRACTAL_NZ;ND,"""1,4096""",DT_BF16,ND
w_1,WeightQuantBatchMatmulV2,MIX_AIC,33.8,"""1,4096;4096,4096;32,4096""",FLOAT16;INT4;FLOAT16,ND;ND;ND,"""1,4096""",FLOAT16,ND
s_1,SwiGlu,AI_VECTOR_CORE,9.6,"""16,2048""",DT_BF16,ND,"""16,1024""",DT_BF16,ND
h_1,hcom_allReduce_,COMMUNICATION,30.0,N/A,N/A,N/A,N/A,N/A,N/A
'''


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "op_summary.csv"
    path.write_text(SUMMARY)
    return path


def test_rows_become_problems(table) -> None:
    timings, others = matmul_timings(read_op_table(table))
    found = {
        (t.kernel, t.problem.m, t.problem.n, t.problem.k, t.problem.scheme.name, t.problem.dtype,
         t.problem.weight_format): (t.us, t.calls)
        for t in timings
    }  # fmt: skip
    assert found == {
        ("linear", 16, 1024, 4096, "FLOAT", "bfloat16", "ND"): (37.0, 2),  # the median of two calls
        ("linear", 1024, 1024, 4096, "FLOAT", "float16", "ND"): (90.0, 1),
        ("npu_quant_matmul", 1, 4096, 4096, "W8A8", "bfloat16", "NZ"): (28.0, 1),
        ("npu_weight_quant_batchmatmul", 1, 4096, 4096, "W4A16", "float16", "ND"): (33.8, 1),
    }
    assert others == {"SwiGlu: no matmul of one weight": 1}


def test_the_profilers_own_headers(tmp_path) -> None:
    path = tmp_path / "kernel_details.csv"
    path.write_text(
        "Name,Type,Duration(us),Input Shapes,Input Data Types,Input Formats\n"
        'mm,MatMul,12.5,"8,512;512,256",DT_BF16;DT_BF16,ND;ND\n'
    )
    (timing,), _ = matmul_timings(read_op_table(path))
    assert (timing.problem.m, timing.problem.n, timing.problem.k) == (8, 256, 512)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Input Shapes", "Shapes In", "has no column Input Shapes"),
        ("Task Duration(us)", "Task Duration(ms)", "is in ms, not in us"),
        ("Task Duration(us)", "Task Duration", "no unit that it names"),
        ("16,4096;4096,1024", "0,4096;4096,1024", "line 2: the shape 0,4096 has a size of zero"),
        ("16,4096;4096,1024", "16,x;4096,1024", "line 2: shape '16,x' is no list of sizes"),
        (",36.5,", ",-36.5,", "line 2: a duration of -36.5 us cannot be"),
        (",36.5,", ",nan,", "line 2: a duration of nan us cannot be"),
        (",36.5,", ",fast,", "line 2: duration 'fast' is not a number"),
        (",36.5,", ",36.5,1,", "line 2: has 11 fields, the header 10"),
        (SUMMARY, "", "is empty"),
        (SUMMARY, HEAD + "\n", "no row has an op with shapes"),
    ],
)
def test_a_table_that_is_damaged(table, old, new, said) -> None:
    table.write_text(SUMMARY.replace(old, new, 1))
    with pytest.raises(LoweringError, match=said.replace("(", r"\(")):
        read_op_table(table)


def test_what_was_measured_is_used_and_interpolated(tmp_path, capsys) -> None:
    path, out = tmp_path / "ops.csv", tmp_path / "mine.yaml"
    rows = "".join(
        f'mm,MatMulV2,AI_CORE,{us},"""{m},4096;4096,4096""",DT_BF16;DT_BF16,ND;ND,'
        f'"""{m},4096""",DT_BF16,ND\n'
        for m, us in ((1, 40.0), (16, 50.0), (256, 90.0))
    )
    path.write_text(f"{HEAD}\n{rows}")
    asked = ["tune", "--from", str(path), "--target", "ascend910b2", "--out", str(out), "--json"]
    assert main(asked) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["rows"]) == 3 and data["started_from"] == "ascend910b2"
    target = find_target(out)
    linear, problem = Candidate("linear"), MatmulProblem(16, 4096, 4096, SCHEMES["FLOAT"])
    us = target.total_us([linear], problem, np.array([1, 16, 64, 256]))[0]
    assert us[[0, 1, 3]] == pytest.approx([40.0, 50.0, 90.0])
    assert 50.0 <= us[2] <= 90.0
    assert target.cost(linear, problem).how.startswith("measured")
    between = target.cost(linear, replace(problem, m=64))
    assert "interpolated between measured m=16 and m=256" in between.how
    assert between.total_us == pytest.approx(us[2])
    beyond = target.cost(linear, replace(problem, m=1024))
    assert "measured" not in beyond.how


def test_the_constants_that_made_times_are_found_again() -> None:
    """Times predicted with another memory and launch: the fit comes near both, from far away."""
    base = find_target("ascend910b2")
    names = [n for n, c in base.constants.items() if c.fitted or n == "hbm_gb_per_s"]
    changed = {n: replace(base.constants[n], value=0.6 * base[n]) for n in names}
    other = replace(base, constants={**base.constants, **changed})
    problems = [
        MatmulProblem(m, n, k, SCHEMES["FLOAT"], own_kernels=False)
        for m in (1, 64, 1024)
        for n, k in ((1024, 1024), (4096, 4096), (12288, 4096))
    ]
    timings = [
        MatmulTiming(
            "MatMulV2",
            "linear",
            p,
            float(other.total_us([Candidate("linear")], p, np.array([p.m]))[0, 0]),
            1,
        )
        for p in problems
    ]
    found = fit_to_timings(base, timings, "mine", "a test")
    before = np.abs([row.before_us / row.timing.us - 1 for row in found.rows])
    after = np.abs([row.error for row in found.rows])
    assert np.median(after) < 0.3 * np.median(before) and after.max() < 0.15
    assert all("9 matmuls" in found.target.constants[name].source for name in found.changed)


def test_published_rows_improve(tmp_path, capsys) -> None:
    """CATLASS' eight W8A8 timings of this repository, written as a profiler would have."""
    data = Path(__file__).parents[4] / "bench" / "data" / "w8a8_split_k.csv"
    lines = [line for line in data.read_text().splitlines() if not line.startswith("#")]
    rows = [row for row in csv.DictReader(lines) if row["splits"] == "1"]
    path = tmp_path / "published.csv"
    text = [
        f'q,QuantBatchMatmulV3,AI_CORE,{r["us"]},"""{r["m"]},{r["k"]};{r["k"]},{r["n"]}""",'
        f'INT8;INT8,ND;ND,"""{r["m"]},{r["n"]}""",FLOAT16,ND'
        for r in rows
    ]
    path.write_text("\n".join([HEAD, *text]) + "\n")
    out = tmp_path / "mine.yaml"
    assert main(["tune", "--from", str(path), "--target", "ascend910b3", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"these {len(rows)} shapes are used as they were measured" in said
    assert f"--target {out}" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quick"], "--quick is for measuring this machine"),
        (["--target", "cpu"], "op times are fitted for Ascend targets alone"),
        (["--out", "ascend910b1.yaml"], "no name for a new target"),
    ],
)
def test_options_that_do_not_fit(table, tmp_path, monkeypatch, capsys, options, said) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--from", str(table), "--out", "mine.yaml", *options]) == 1
    assert said in capsys.readouterr().err
