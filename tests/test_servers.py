"""Which server takes which scheme: the table, and what a dry run says with --for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from panguq.cli import main
from panguq.errors import InputError
from panguq.ir.quant_spec import SCHEMES, parse_scheme
from panguq.server_releases import SERVERS
from panguq.server_verdicts import verdicts
from panguq.servers import (
    ASCEND_TYPES,
    NPU_SERVERS,
    READS,
    SUPPORT,
    ascend_type,
    support,
    too_large,
)
from tests.model_folders import make_folder, make_model


@dataclass(frozen=True)
class Row:
    name: str
    n: int
    k: int
    scheme: str
    group_size: int | None = None
    bias: bool = False


def rows(scheme: str, group_size: int | None = None) -> list[Row]:
    return [Row(f"layers.{i}.up", 512, 256, scheme, group_size) for i in range(3)]


def test_the_table_is_complete_and_says_what_to_do() -> None:
    assert SUPPORT.keys() == {(server, form) for server in SERVERS for form in READS[server]}
    for entries in SUPPORT.values():
        assert entries.keys() <= SCHEMES.keys() - {"FLOAT"} | {"W4A4_FLATQUANT"}
        for entry in entries.values():
            assert entry.takes or (entry.reason and entry.instead)
    for kind in ASCEND_TYPES:
        assert all(ascend_type(server, kind) is not None for server in NPU_SERVERS)
    assert ascend_type("mindie", "W2A2") is None


@pytest.mark.parametrize(
    "scheme", [*sorted(SCHEMES.keys() - {"FLOAT"}), "W6A16-asym", "W3A16-sym-g64"]
)
@pytest.mark.parametrize(("server", "form"), SUPPORT)
def test_every_scheme_has_a_verdict(server: str, form: str, scheme: str) -> None:
    found = support(server, form, scheme)
    assert found.takes or (found.reason and found.instead)
    bits = (2, 3, 4, 8) if form == "gptq" else (4, 8)
    assert not found.takes or parse_scheme(scheme).weight.bits in bits


@pytest.mark.parametrize("server", SERVERS)
def test_float_is_taken_by_all(server: str) -> None:
    assert verdicts(rows("FLOAT"), server).takes


@pytest.mark.parametrize(
    ("server", "scheme", "form", "takes"),
    [
        ("vllm-ascend", "W8A8", "ascend", True),
        ("vllm-ascend", "W8A16", "ascend", True),
        ("vllm-ascend", "W8A8_DYNAMIC", "ascend", True),
        ("vllm-ascend", "W4A16", "ascend", False),
        ("vllm-ascend", "W4A8", "ascend", True),
        ("vllm-ascend==0.23.0.post1", "W4A8", "ascend", True),
        ("vllm-ascend==main", "W4A8", "ascend", False),
        ("sglang", "W8A8", "ascend", True),
        ("sglang", "W8A16", "gptq", True),
        ("sglang==0.5.23", "W4A16_ASYM", "awq", True),
        ("sglang", "W4A8", "ascend", False),
        ("mindie", "W4A8", "ascend", True),
        ("mindie", "W4A16", "ascend", False),
        ("vllm", "W4A16-g64", "compressed-tensors", True),
        ("vllm", "W4A16_ASYM", "compressed-tensors", True),
        ("vllm", "W3A16", "gptq", True),
        ("transformers", "W4A16_ASYM", "gptq", True),
        ("vllm", "W4A8", "compressed-tensors", False),
        ("transformers", "W4A8", "compressed-tensors", True),
        ("transformers", "W4A4", "compressed-tensors", False),
    ],
)
def test_verdicts(server: str, scheme: str, form: str, takes: bool) -> None:
    verdict = verdicts(rows(scheme), server)
    assert (verdict.format, verdict.takes) == (form, takes)
    if not takes:
        assert len(verdict.refusals) == 3 and verdict.refusals[0].instead
        assert "layers.0.up and 2 more" in verdict.render()


def test_mindie_wants_groups_of_256() -> None:
    assert verdicts(rows("W4A8", 256), "mindie").takes
    refused = verdicts(rows("W4A8-g128", 128), "mindie")
    assert "one scale per 256 inputs" in refused.render()


def test_a_format_that_a_server_does_not_read() -> None:
    entry = support("mindie", "compressed-tensors", "W8A8")
    assert not entry.takes and "ascend" in entry.instead


def test_large_matmuls_are_beyond_the_npu_ops() -> None:
    head = [Row("lm_head", 153376, 4096, "W8A8")]
    assert "153376 is more than the 65535" in verdicts(head, "vllm-ascend").render()
    assert too_large("vllm-ascend", "W8A8_DYNAMIC", 153376, 4096) == ""
    assert too_large("mindie", "W8A8_DYNAMIC", 153376, 4096)
    assert too_large("vllm", "W8A8", 153376, 4096) == ""


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("tgi", "unknown server 'tgi'"),
        ("vllm-ascend==0.9.2", "does not know what vllm-ascend 0.9.2 takes"),
        ("vllm>=0.3", "neither NAME nor NAME==VERSION"),
    ],
)
def test_unknown_servers_and_versions_are_refused(asked: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        verdicts(rows("W8A8"), asked)


def test_what_a_server_computes_otherwise_is_said() -> None:
    assert "W4A8 as W4A16" in verdicts(rows("W4A8", 256), "vllm-ascend").render()
    with_bias = [Row("q_proj", 64, 256, "W4A8", 256, bias=True)]
    assert "bias of dense W4A8 out without a word" in verdicts(with_bias, "vllm-ascend").render()
    assert "without a word" in support("sglang", "ascend", "W8A16").reason


# --- the dry run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "m", make_model().bfloat16())


def dry_run(folder: Path, recipe: str, *more: str) -> int:
    return main(["compile", str(folder), "--recipe", recipe, "--dry-run", *more])


def test_a_dry_run_refuses_w4a16_for_vllm_ascend(folder: Path, capsys: Any) -> None:
    assert dry_run(folder, "w4a16", "--for", "vllm-ascend") == 1
    text = capsys.readouterr().out
    assert "vllm-ascend==0.23 with format='ascend': refuses 14 matmuls" in text
    assert "choose W8A16" in text
    assert dry_run(folder, "w4a16", "--for", "vllm") == 0


def test_for_a_server_a_recipe_takes_its_serving_form(
    folder: Path, capsys: Any, caplog: Any
) -> None:
    assert dry_run(folder, "w8a8", "--for", "vllm-ascend==0.23", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"] == "w8a8-serving" and "serving form w8a8-serving" in caplog.text
    server = said["server"]
    assert server["takes"] and (server["format"], server["version"]) == ("ascend", "0.23")
    assert not any("split outlier channels" in note for note in server["notes"])
    assert any("split" in note for note in verdicts([], "vllm", splits_outliers=True).notes)
    assert dry_run(folder, "w8a16", "--for", "mindie", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["server"]["notes"]
    assert not any("split" in note for note in notes)


def test_without_a_server_nothing_is_said(folder: Path, capsys: Any) -> None:
    assert dry_run(folder, "w4a16", "--json") == 0
    assert "server" not in json.loads(capsys.readouterr().out)


def test_for_needs_a_dry_run(folder: Path, capsys: Any) -> None:
    assert main(["compile", str(folder), "--recipe", "w4a16", "--for", "vllm"]) == 1
    assert "--dry-run" in capsys.readouterr().err
