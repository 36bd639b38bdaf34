"""A table of op calls is priced row by row, or refused in a sentence that names the line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from panguq.cli import main
from panguq.errors import LoweringError
from panguq.explain.op_rows import read_rows
from panguq.explain.ops import price_table, render
from panguq.lowering.ascend.op_times.call import VendorCall
from panguq.lowering.ascend.op_times.price import price, source_of
from panguq.lowering.targets import find_target

EVEN = Path(__file__).parents[2] / "bench" / "data" / "cann_bench_even.csv"
HEAD = "hw,op,case,shape,dtype,attrs,us\n"
NORM = '910b2,rms_norm,2,"[[4096,1024],[1024]]","[""float32"",""float32""]",{},31.9\n'
B2 = find_target("ascend910b2")


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "times.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_row_says_what_it_costs_by_term_and_where_that_is_from(tmp_path) -> None:
    found = price_table(table(tmp_path, HEAD + NORM), B2).as_json()
    (row,) = found["rows"]
    assert (row["op"], row["case"], row["us"]) == ("rms_norm", "2", 31.9)
    serial = row["terms"]["start"]
    rest = max(row["terms"][name] for name in ("vector", "memory"))
    assert row["predicted_us"] == pytest.approx(serial + rest)
    assert "published times of the op on ascend910b2" in row["source"]
    error = abs(row["predicted_us"] / 31.9 - 1)
    assert found["ops"] == {
        "rms_norm": {
            "rows": 1,
            "median_error": error,
            "p90_error": error,
            "worst_error": error,
            "unpriced": 0,
        }
    }


def test_times_are_optional_and_other_columns_are_ignored(tmp_path) -> None:
    text = 'attrs,note,dtype,op,shape,hw\n,x,"[""float16""]",dynamic_quant,"[[8,64]]",910b2\n'
    found = price_table(table(tmp_path, text), B2)
    assert found.rows[0].row.us is None and found.rows[0].error is None
    assert found.rows[0].row.case == "2"  # its line
    assert found.by_op()["dynamic_quant"]["median_error"] is None
    assert "8.9" in render(found)  # little but the start


@pytest.mark.parametrize(("target", "rows", "other"), [("ascend910b2", 142, "950pr"),
                                                       ("ascend950pr", 185, "910b2")])  # fmt: skip
def test_rows_of_other_parts_are_counted_and_every_op_is_taken(target, rows, other) -> None:
    found = price_table(EVEN, find_target(target))
    assert len(found.rows) == rows and found.others == {other: 327 - rows}
    assert {row.row.call.op for row in found.rows if row.cost is None} <= {
        "gather",
        "scatter",
        "sparse_flash_attention",
        "transpose",
    }
    unpriced = [row for row in found.rows if row.cost is None]
    assert all("no lowered graph calls it" in row.source for row in unpriced)
    assert f"{327 - rows} of {other}" in render(found)
    assert all(math.isfinite(row.cost.total_us) for row in found.rows if row.cost)


def test_errors_on_the_rows_that_are_fitted_to_are_small() -> None:
    for name in ("ascend910b2", "ascend950pr"):
        for op, entry in price_table(EVEN, find_target(name)).by_op().items():
            if not entry["unpriced"]:
                assert entry["median_error"] < 0.15, (name, op)


def test_another_part_of_the_chip_costs_in_proportion(tmp_path) -> None:
    text = HEAD + 'X,dynamic_quant,1,"[[8192,16384]]","[""float16""]",{},\n'
    b2 = price_table(table(tmp_path, text.replace("X", "910b2")), B2).rows[0]
    b4 = price_table(table(tmp_path, text.replace("X", "910b4")), find_target("ascend910b4")).rows[
        0
    ]
    assert b4.cost.terms["memory"] == pytest.approx(2 * b2.cost.terms["memory"])
    assert "carried over by cores, clock and memory" in b4.source


def test_the_command_prints_json_and_text(capsys) -> None:
    command = ["explain", "--ops", str(EVEN), "--target", "ascend950pr"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"target", "rows", "ops", "rows_of_other_parts"}
    assert {"op", "case", "us", "predicted_us", "terms", "source"} == set(found["rows"][0])
    assert main(command) == 0
    assert "quant_matmul" in capsys.readouterr().out


def row(**cells: str) -> str:
    found = {"hw": "910b2", "op": "dynamic_quant", "case": "1", "shape": '"[[8,64]]"',
             "dtype": '"[""float16""]"', "attrs": "{}", "us": "9"} | cells  # fmt: skip
    return HEAD + ",".join(found.values()) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "times.csv: is empty"),
        ("hw,op,shape\n", "has no column 'dtype', 'attrs'"),
        ("hw,op,op,shape,dtype,attrs\n", "has the column 'op' twice"),
        ("hw,op,shape,dtype,attrs,time_ms\n", "has times in a column 'time_ms', and none in 'us'"),
        (HEAD, "has no row of ascend910b2"),
        (HEAD + NORM.replace("910b2", "950pr"), "no row of ascend910b2; its rows are of 950pr"),
        ("# a comment\n" + HEAD + "910b2,x\n", "line 3: has not as many cells as the header"),
        (HEAD + NORM.replace("\n", ",7\n"), "line 2: has not as many cells"),
        (HEAD + '910b2,"x"y\n', "line 2: is no CSV"),
        (row(hw=""), "line 2: hw: is empty"),
        (row(op=" "), "line 2: op: is empty"),
        (row(shape='"[[8,0]]"'), r"shape: \[8, 0\] has the size 0"),
        (row(shape='"[[8,-1]]"'), "has the size -1"),
        (row(shape='"[[8,1.5]]"'), "has the size 1.5"),
        (row(shape='"[[8,true]]"'), "has the size true"),
        (row(shape='"[8,64]"'), "shape: 8 is no list of sizes"),
        (row(shape="8x64"), "shape: '8x64' is no JSON"),
        (row(shape='"{}"'), "shape: '{}' is no list"),
        (row(dtype='"[""half""]"'), 'dtype: "half" is no known dtype'),
        (row(dtype='"[""int8"",""int8""]"'), "has 1 shapes and 2 dtypes"),
        (row(attrs="[]"), r"attrs: '\[\]' is no JSON object"),
        (row(us="9 us"), "us: '9 us' is no number of microseconds above zero"),
        (row(us="0"), "us: '0' is no number"),
        (row(us="nan"), "us: 'nan' is no number"),
    ],
)
def test_a_bad_table_is_refused_in_one_sentence(tmp_path, text, message) -> None:
    with pytest.raises(LoweringError, match=message):
        read_rows(table(tmp_path, text), "ascend910b2")


def test_a_file_that_is_none(tmp_path) -> None:
    with pytest.raises(LoweringError, match="cannot be read"):
        read_rows(tmp_path / "none.csv", "ascend910b2")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoweringError, match="is not text in UTF-8"):
        read_rows(tmp_path / "binary.csv", "ascend910b2")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"op": "my_op"}, "my_op: no model of it exists"),
        ({"op": "gqa"}, "its operands or attributes do not fit"),
        ({"op": "grouped_matmul"}, "operand 2 of grouped_matmul is missing"),
        (
            {
                "op": "quant_matmul",
                "shape": '"[[8,64],[32,16]]"',
                "dtype": '"[""int8"",""int8""]"',
            },
            "x has 64 inputs and the weight 32",
        ),
        (
            {
                "op": "weight_quant_batch_matmul",
                "shape": '"[[8,64],[64,16]]"',
                "dtype": '"[""float16"",""int32""]"',
            },
            "only int8 weights were timed",
        ),
        ({"op": "moe_gating_top_k_softmax"}, "'k' is missing"),
    ],
)
def test_an_op_that_has_no_price_says_why(tmp_path, cells, reason) -> None:
    found = price_table(table(tmp_path, row(**cells)), B2)
    (entry,) = found.by_op().values()
    assert entry["unpriced"] == 1 and reason in found.rows[0].source
    assert f"  {found.rows[0].source}" in render(found)


def test_a_target_that_is_no_npu_has_no_times_of_ops() -> None:
    with pytest.raises(LoweringError, match="target cpu has no times of ops"):
        price_table(EVEN, find_target("cpu"))


def test_explain_takes_a_subject_or_a_table(capsys) -> None:
    assert main(["explain", "--target", "ascend910b2"]) == 1
    assert "neither a subject nor --ops" in capsys.readouterr().err
    assert main(["explain", "8x8x8", "--ops", str(EVEN)]) == 1
    assert "both a subject and --ops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("op", "other", "shapes", "same"),
    [
        ("moe_gating_top_k", "moe_gating_top_k_softmax", ((64, 8),), ((64, 8),)),
        ("moe_init_routing_v2", "moe_re_routing", ((128, 512), (128, 8)), ((1024, 512), (2, 11))),
    ],
)
def test_an_op_of_mixtures_without_published_times_is_priced_as_its_kin(
    op, other, shapes, same
) -> None:
    dtypes = ("float16", "int32")
    found, kin = (
        price(VendorCall(name, of, dtypes[: len(of)], {"k": 2}), B2).total_us
        for name, of in ((op, shapes), (other, same))
    )
    assert found == kin
    assert f"published times of {other}" in source_of(op, B2)
    assert "published times of the op" in source_of(other, B2)
