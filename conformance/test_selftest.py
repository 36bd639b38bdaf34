"""`panguq selftest` from end to end on the pretend device, on which nothing computes."""

from __future__ import annotations

import getpass
import json
import socket

from panguq.cli import main


def test_it_runs_and_judges_nothing(tmp_path) -> None:
    """Every call reaches aclnn, or the row would say that it failed."""
    main(["selftest", "--device", "npu:0", "--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["stand_in"] is True
    assert {row["part"] for row in report["rows"]} == {"op", "kernel", "model"}
    failed = [row for row in report["rows"] if row["verdict"] != "not judged"]
    assert failed == []
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert "it is a stand-in" in text
    for private in (getpass.getuser(), socket.gethostname(), str(tmp_path)):
        assert private not in text
