"""The command line: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import panguq
from panguq.cli import main, parser
from panguq.cli.command import print_json
from panguq.cli.evaluate_model import figures_of
from panguq.compiled_model import load
from tests.model_folders import TEXT, make_folder, make_model, with_config

SHORT = ["--windows", "2", "--window", "64"]
EVAL_KEYS = {
    "perplexity", "float_perplexity", "kl", "top1", "bits_per_weight", "static_share",
    "dynamic_share", "float_share",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def out(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "out"
    arguments = ["--recipe", "w8a8", "--calibration", text, "--out", path, *SHORT]
    assert main(list(map(str, ["compile", folder, *arguments]))) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What stderr says of arguments that are refused: an error with a hint, status 1."""
    assert main([str(a) for a in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "\nhint: " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return printed.err


def printed_json(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    assert main([str(a) for a in arguments]) == status
    return json.loads(capsys.readouterr().out)


# --- help ---------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    (sub,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(sub.choices)


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_with_an_example(name: str) -> None:
    text = " ".join(commands()[name].format_help().split())
    assert f"example: panguq {name}" in text


def test_help_and_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in (["--help"], 0), (["complie"], 2), ([], 2), (["compile"], 2):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == status
    assert "usage: panguq" in capsys.readouterr().out


def test_windows_must_be_above_zero(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compile", str(folder), "--recipe", "w8a8", "--windows", "0"])
    assert caught.value.code == 2
    assert "0 is not above zero" in capsys.readouterr().err


def test_help_is_quick_and_errors_have_no_traceback(tmp_path: Path) -> None:
    code = "import sys; from panguq.cli import parser; parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
    missing = [sys.executable, "-m", "panguq.cli", "generate", tmp_path / "no", "--prompt", "a"]
    done = subprocess.run(missing, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 2


def test_a_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANGUQ_TRACEBACK", "1")
    with pytest.raises(panguq.StorageError):
        main(["generate", str(tmp_path / "no"), "--prompt", "a"])


def test_an_interrupt_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("panguq.recipe.preset_names", interrupt)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m panguq.cli passes --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "0"
    assert done.stderr == ""


# --- listings -----------------------------------------------------------------------------------


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in printed_json(capsys, "passes", "--json")}
    assert rows["smoothquant"]["options"]["alpha"] == 0.5
    assert rows["smoothquant"]["requires"] == ["CANONICAL", "FLOAT_MATMULS", "SCHEMES"]
    assert rows["calibrate"]["establishes"] == ["CALIBRATED", "STATISTICS"]
    assert "lower-matmuls" in rows
    assert all(row["summary"] for row in rows.values())
    assert main(["passes"]) == 0
    text = capsys.readouterr().out
    assert "    alpha: 0.5\n" in text


def test_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [row["name"] for row in printed_json(capsys, "recipes", "--json")] == list(
        panguq.recipes()
    )
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    uses = {line: part for part in listed.split("\n\n") for line in part.splitlines()[:1]}
    assert "\n  w8a16 " in uses["6- and 8-bit weights alone: less memory at next to no loss"]
    assert sum(line.startswith("  ") for line in listed.splitlines()) == len(panguq.recipes())
    assert main(["recipes", "w8a8"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert panguq.Recipe.from_yaml(tmp_path / "mine.yaml") == panguq.Recipe.named("w8a8")
    assert "did you mean w8a8" in refused(capsys, "recipes", "w8a9")


# --- compile ------------------------------------------------------------------------------------


def test_compile_prints_a_summary_and_saves(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "w8a16", "--calibration", text, "--out", tmp_path / "out", *SHORT]
    assert main(list(map(str, ["compile", folder, *arguments]))) == 0
    printed = capsys.readouterr()
    assert "decoder linears: 8." in printed.out
    assert f"saved as {tmp_path / 'out'}" in printed.out
    assert printed.err == ""
    loaded: Any = load(tmp_path / "out")
    assert loaded.tokenizer is not None


def test_compile_as_json_with_overrides(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "")))
    report = printed_json(
        capsys, "compile", folder, "--recipe", "w8a8-dynamic", "--calibration", rows, *SHORT,
        "--scheme", "*.down_proj=W8A16", "--json",
    )  # fmt: skip
    used = {"source": str(rows), "sequences": 2, "tokens": 128, "more_left": True}
    assert report["calibration"].items() >= used.items()
    assert report["calibration"]["first_80_characters"] == TEXT[:80]
    schemes = {row["name"]: row["scheme"] for row in report["matmuls"]}
    assert schemes["model.layers.0.mlp.down_proj:linear"] == "W8A16"
    assert schemes["model.layers.0.mlp.up_proj:linear"] == "W8A8_DYNAMIC"
    assert report["out"] is None


def test_compile_without_calibration_data_says_what_it_took(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", str(folder), "--recipe", "w8a16", "--dtype", "float32"]) == 0
    assert "calibration data: sampled from the model itself" in capsys.readouterr().out


def test_a_dry_run_needs_no_weights_and_changes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = with_config(folder, tmp_path / "bare", dtype="float32")
    (bare / "model.safetensors").unlink()
    arguments = ["compile", bare, "--recipe", "w4a16", "--out", tmp_path / "out", "--dry-run"]
    plan = printed_json(capsys, *arguments, "--json")
    assert plan["refusals"] == []
    assert len(plan["matmuls"]) == 15
    assert main([str(a) for a in arguments]) == 0
    assert "int4_linear" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    plan = printed_json(capsys, *arguments, "--scheme", "*.dwn=W8A16", "--json", status=1)
    assert "matches no matmul" in plan["refusals"][0]


def test_what_compile_refuses_at_once(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", folder, "--recipe"]
    assert "did you mean w8a8" in refused(capsys, *start, "w8a9")
    (tmp_path / "bad.yaml").write_text('schemes: {"*": W8A8}\nalpha: 1\n')
    assert "unknown key 'alpha'" in refused(capsys, *start, tmp_path / "bad.yaml")
    assert "unknown target 'cqu'" in refused(capsys, *start, "w8a8", "--target", "cqu")
    assert "write GLOB=SCHEME" in refused(capsys, *start, "w8a8", "--scheme", "W8A8")
    assert "unknown scheme 'W9'" in refused(capsys, *start, "w8a8", "--scheme", "*=W9")
    missing = refused(capsys, "compile", tmp_path / "no", "--recipe", "w8a8")
    assert "no such folder" in missing


def test_bad_calibration_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    start = ["compile", folder, "--recipe", "w8a8", "--calibration", file]
    assert f"{file}: no such file" in refused(capsys, *start)
    file.write_text(" \n")
    assert f"{file}: empty" in refused(capsys, *start)
    file.write_text("short")
    assert f"{file}: the text has 5 tokens" in refused(capsys, *start)
    file.write_bytes(b"\xff\xfe\x00 not text")
    assert f"{file}: not UTF-8 text" in refused(capsys, *start)
    file.unlink()
    file.mkdir()
    assert f"{file}: a folder" in refused(capsys, *start)


def test_a_calibration_file_without_a_tokenizer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    arguments = ["compile", bare, "--recipe", "w8a8", "--calibration", text]
    assert "no tokenizer" in refused(capsys, *arguments)


def test_a_model_folder_without_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = with_config(folder, tmp_path / "bare", dtype="float32")
    (bare / "model.safetensors").unlink()
    assert "there are no weights" in refused(capsys, "compile", bare, "--recipe", "w8a16")


def test_out_is_checked_before_the_work(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", folder, "--recipe", "w8a16", "--out"]
    error = refused(capsys, *start, out)
    assert f"{out} already exists" in error and "--force" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    error = refused(capsys, *start, tmp_path / "mine", "--force")
    assert "was not written by panguq" in error
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, *start, tmp_path / "file" / "out")


def test_force_replaces_a_compiled_model(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compile", folder, "--calibration", text, "--out", tmp_path / "out", *SHORT]
    assert main([*map(str, arguments), "--recipe", "float"]) == 0
    assert main([*map(str, arguments), "--recipe", "w8a16", "--force"]) == 0
    assert load(tmp_path / "out").recipe.name == "w8a16"


# --- eval ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["lowered", "fake-quant", "float"])
def test_eval_prints_the_figures(
    stage: str, folder: Path, out: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed_json(
        capsys, "eval", out, "--against", folder, "--text", text, *SHORT, "--stage", stage, "--json"
    )
    assert set(found) >= EVAL_KEYS
    shares = [found[f"{kind}_share"] for kind in ("static", "dynamic", "float")]
    assert sum(shares) == pytest.approx(1)
    assert (found["kl"] == 0) == (stage == "float")
    assert (found["bits_per_weight"] == 32) == (stage == "float")
    assert found["windows"] == 2


def test_eval_as_text(
    folder: Path, out: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", out, "--against", folder, "--text", text, *SHORT]
    assert main(list(map(str, arguments))) == 0
    assert "perplexity        " in capsys.readouterr().out


def test_eval_takes_the_compiled_models_tokenizer_where_the_float_model_has_none(
    out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    assert printed_json(capsys, "eval", out, "--against", bare, "--text", text, *SHORT, "--json")


def test_a_broken_model_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    """The last norm of a float compile overflows: everything before it is sound."""
    model = make_model()
    compiled: Any = panguq.compile(model, "float", calibration=torch.arange(3, 67)[None])
    graph = compiled.graph
    broken = graph.get_submodule("model.norm")._buffers
    broken["weight"] = torch.full_like(broken["weight"], torch.inf)
    windows: Tensor = torch.arange(3, 67).reshape(2, 32)
    print_json(figures_of(compiled, model, windows))
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] is None
    assert found["first_broken"].startswith("model.norm")
    assert found["float_perplexity"] > 1


def test_what_eval_refuses(
    folder: Path, out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--against", folder, "--text", text]
    assert "no such folder" in refused(capsys, "eval", tmp_path / "no", *rest)
    assert "no such file" in refused(capsys, "eval", out, "--against", folder, "--text", "no.txt")
    assert "manifest.json" in refused(capsys, "eval", folder, *rest)
    (tmp_path / "short.txt").write_text("abc")
    error = refused(capsys, "eval", out, "--against", folder, "--text", tmp_path / "short.txt")
    assert "short.txt: the text has 3 tokens" in error


# --- generate -----------------------------------------------------------------------------------


def test_generate_continues_a_text(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(out), "--prompt", "A text", "--max-new-tokens", "5"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_what_generate_refuses(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no chat template" in refused(capsys, "generate", out, "--prompt", "a", "--chat")
    assert "the prompt is empty" in refused(capsys, "generate", out, "--prompt", "")
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    assert main(["compile", str(bare), "--recipe", "w8a16", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert "without a tokenizer" in refused(capsys, "generate", tmp_path / "out", "--prompt", "a")


# --- dumps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dump(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dumps") / "dump"
    arguments = ["--recipe", "w8a8", "--calibration", text, "--dump", path, *SHORT]
    assert main(list(map(str, ["compile", folder, *arguments]))) == 0
    return path


def test_show_prints_the_parts_of_a_dump(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for arguments, expected in {
        (): "03_smoothquant",
        ("3",): "+++ 03_smoothquant",
        ("smoothquant", "--graph"): "rms_norm",
        ("calibrate", "--table", "ranges"): "value,readers,amax",
        ("0", "--diff"): "changed nothing",
    }.items():
        assert main(["show", str(dump), *arguments]) == 0
        assert expected in capsys.readouterr().out
    found = printed_json(capsys, "show", dump, "--json")
    assert found["stages"][0] == "00_trace"
    assert "ranges" in printed_json(capsys, "show", dump, "calibrate", "--json")["tables"]


def test_run_and_bisect_print_their_results(
    dump: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["run", str(dump), "--limit", "5", "--model", str(folder)]) == 0
    assert "05_outliers" in capsys.readouterr().out
    assert printed_json(capsys, "run", dump, "--json")
    assert printed_json(capsys, "bisect", dump, "--floor", "1", "--json")["clean"] is True
    assert main(["bisect", str(dump), "--floor", "900"]) == 0
    assert "model.layers." in capsys.readouterr().out


def test_what_the_dump_commands_refuse(
    dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for command in ("show", "run", "bisect"):
        assert "no such folder" in refused(capsys, command, tmp_path / "no")
        assert "not a dump" in refused(capsys, command, tmp_path)
    assert "there is no stage '77'" in refused(capsys, "show", dump, "77")
    assert "did you mean ranges" in refused(capsys, "show", dump, "calibrate", "--table", "rages")


def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "panguq.cli", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"
