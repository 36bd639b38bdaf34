"""The self-test without an NPU: what it calls, how it compares, and what it writes."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from panguq.cli import main
from panguq.kernels.ascend.vendor.library import npu_op, npu_ops
from panguq.lowering.targets import find_target
from panguq.selftest import run
from panguq.selftest.compare import compare
from panguq.selftest.device import COLUMNS, CallTime, kernels_of, plain
from panguq.selftest.npu_calls import LEGAL
from panguq.selftest.report import FILES, write_files
from panguq.selftest.run import CallRow, Session, best_tile, unread_results, vendor_ops

BF16 = torch.bfloat16


def test_every_op_that_a_graph_may_contain_is_called() -> None:
    assert {npu_op(op).op for op, _ in LEGAL.values()} == {known.op for known in npu_ops()}


def test_codes_must_be_equal_but_where_the_op_documents_otherwise() -> None:
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
    assert compare("npu_quantize", [codes], [codes]).agrees
    off = compare("npu_quantize", [codes + torch.tensor([0, 0, 1, 0], dtype=torch.int8)], [codes])
    assert (off.agrees, off.said) == (False, "25.00% of integers differ, by 1 at most")
    assert compare("npu_add_rms_norm_quant", [codes + 1], [codes]).agrees
    assert not compare("npu_add_rms_norm_quant", [codes + 2], [codes]).agrees


def test_floats_may_differ_by_one_unit_in_the_last_place() -> None:
    values = torch.full((1, 64), 1.0, dtype=BF16)
    unit = torch.finfo(BF16).eps
    assert compare("npu_quant_matmul", [values + unit], [values]).agrees
    assert not compare("npu_quant_matmul", [values + 2 * unit], [values]).agrees
    assert compare("npu_gelu", [values + unit], [values]).said == "42 dB"
    broken = values.clone()
    broken[0, 3] = torch.nan
    said = compare("npu_quant_matmul", [broken], [values])
    assert (said.agrees, said.said) == (False, "1 values are infinite or NaN on one side alone")
    assert "float32[1, 64] where" in compare("npu_gelu", [values.float()], [values]).said
    assert not compare("npu_gelu", [None], [None]).agrees


def test_a_device_that_computes_what_the_cpu_does_agrees(monkeypatch) -> None:
    names = ("quantize_token", "w8a8_bfloat16", "add_rms_norm_dynamic_quant", "init_routing")
    monkeypatch.setattr(run, "LEGAL", {name: LEGAL[name] for name in names})
    kernel = dict.fromkeys(COLUMNS.values(), "") | {"Task Duration(us)": "2.00"}
    monkeypatch.setattr(run, "time_call", lambda *_: CallTime(2.0, "profiler", (kernel,)))
    session = Session(torch.device("cpu"), find_target("ascend910b2"), True, [])
    rows = list(vendor_ops(session))
    assert [row.verdict for row in rows] == ["agrees"] * len(names), rows
    assert rows[0].us == 2.0 and len(session.kernels) == len(names)
    session.judged = False
    assert {row.verdict for row in vendor_ops(session)} == {"not judged"}


def test_a_call_that_fails_is_a_row() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("EZ9999: inner error in /home/me/kernel.o\nmore")

    session = Session(torch.device("cpu"), find_target("ascend910b2"), True, [])
    row = session.row("op", "npu_gelu", "gelu", broken, lambda: torch.ones(1))
    assert (row.verdict, row.said) == ("failed", "RuntimeError: EZ9999: inner error in <path>")


def test_results_that_were_not_asked_for_are_not_compared() -> None:
    given = {"output_mask": [True, False]}
    assert unread_results("npu_add_rms_norm_dynamic_quant", given) == {1, 4}
    assert unread_results("npu_moe_init_routing_v2", {}) == {2, 3}
    assert unread_results("npu_gelu", {}) == frozenset()


def test_each_schedule_has_the_tile_that_is_predicted_to_be_fastest() -> None:
    problem = run.MatmulProblem(1, 1536, 6144, run.SCHEMES["W8A8_DYNAMIC"], dtype="bfloat16")
    target = find_target("ascend910b2")
    for splits, schedule in ((1, "data_parallel"), (4, "split_k")):
        found = best_tile(problem, target, splits)
        assert found is not None
        assert (found[0].splits, found[0].schedule) == (splits, schedule)
        assert found[1] == pytest.approx(target.cost(found[0], problem).total_us)
    assert best_tile(problem, target, 5) is None  # no kernel has so many splits


def test_kernels_of_one_call_are_the_medians_of_several() -> None:
    head = "Name,Type,Duration(us),Input Shapes,Input Data Types\n"
    calls = 'cast,Cast,{},"""4,4""",FLOAT\nmatmul,MatMulV3,{},"""4,4;4,4""",FLOAT16\n'
    found = kernels_of(head + calls.format(1, 10) + calls.format(3, 30) + calls.format(2, 20), 3)
    assert [(k["OP Type"], k["Task Duration(us)"]) for k in found] == [
        ("Cast", "2.00"),
        ("MatMulV3", "20.00"),
    ]
    assert found[1]["Input Shapes"] == '"4,4;4,4"'
    assert kernels_of(head + calls.format(1, 10), 3) == []
    assert kernels_of("", 3) == []


def test_nothing_private_is_said(monkeypatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "node17")
    said = plain("ada@node17: cannot open /home/ada/x.so, nor ~/y; peer 10.0.0.7 is down\nsecond")
    assert said == "<user>@<host>: cannot open <path>, nor <path>; peer <address> is down"


def test_the_report_has_its_failures_first_and_says_what_a_stand_in_is(tmp_path) -> None:
    rows = [
        CallRow("op", "npu_gelu", "gelu", "agrees", "60 dB", 3.0, "events"),
        CallRow("op", "npu_swiglu", "swiglu", "differs", "20 dB"),
        CallRow("kernel", "W4A16", "m=1: a", "agrees", "60 dB", 30.0, "profiler", 20.0),
        CallRow("kernel", "W4A16", "m=1: b", "agrees", "60 dB", 15.0, "profiler", 25.0),
    ]
    found = {"versions": {"panguq": "0.2.0"}, "device": "x", "target": "t", "stand_in": True}
    text = write_files(tmp_path / "report", found, rows, [])
    assert {file.name for file in (tmp_path / "report").iterdir()} == set(FILES)
    assert "it is a stand-in" in text
    assert text.index("npu_swiglu") < text.index("npu_gelu")
    assert "schedules: the predicted one was the fastest for 0 of 1 shapes" in text
    assert "fastest b, chosen a, 2.00x its time" in text
    content = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    assert content["rows"][1]["verdict"] == "differs"
    header = next(csv.reader((tmp_path / "report/op_summary.csv").open(encoding="utf-8")))
    assert header == list(COLUMNS.values())


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:0", "'cuda:0' is no NPU"), ("npu:x", "'npu:x' is no NPU")]
)
def test_a_device_that_is_no_npu_is_refused(device, said, capsys, tmp_path) -> None:
    assert main(["selftest", "--device", device, "--out", str(tmp_path / "r")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_without_torch_npu_it_says_so(capsys, tmp_path) -> None:
    assert main(["selftest", "--out", str(tmp_path / "r")]) == 1
    assert "torch_npu" in capsys.readouterr().err
