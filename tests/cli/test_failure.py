"""How commands end that do not work: wrong numbers, faults of panguq's, hostile surroundings."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from panguq.cli import main
from panguq.cli.failure import said, write_report
from panguq.errors import StorageError

PANGUQ = [sys.executable, "-m", "panguq.cli"]


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    given = {"capture_output": True, "text": True, **more}
    done = subprocess.run([*PANGUQ, *map(str, arguments)], **given)
    assert "Traceback" not in (done.stderr or "")
    return done


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault leaves its file in the current folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "option", "value", "why"),
    [
        ("compile", "--seed", 1 << 70, "is more than"), ("compile", "--seed", -1, "0 or more"),
        ("compile", "--seed", "9" * 5000, "no whole number"), ("compile", "--seed", "1.5", "whole"),
        ("compile", "--sampled", 10**9, "is more than"), ("compile", "--sampled", -3, "above zero"),
        ("compile", "--windows", 10**12, "is more than"), ("compile", "--windows", 0, "above zero"),
        ("compile", "--window", 10**12, "is more than"), ("eval", "--window", -1, "above zero"),
        ("generate", "--max-new-tokens", 10**9, "is more than"), ("tune", "--threads", -1, "above"),
        ("tune", "--threads", 10**9, "is more than"), ("explain", "--batch", 10**30, "is more"),
        ("explain", "--prompt", 10**30, "is more"), ("bisect", "--floor", "nan", "no finite"),
        ("bisect", "--floor", "inf", "no finite"),
    ],
)  # fmt: skip
def test_a_number_out_of_bounds_is_wrong_usage(
    command: str, option: str, value: object, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, f"{option}={value}"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert option in last and why in last and len(last) < 200


# --- faults of panguq's own -----------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Lets `panguq recipes` end with an exception."""

    def with_error(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("panguq.recipe.preset_names", fail)

    return with_error


def test_a_fault_of_panguqs_own_is_one_line_and_a_file(
    broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    broken(ValueError("what\nis this?"))
    assert main(["recipes", "--json"]) == 1
    (file,) = tmp_path.iterdir()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a fault of panguq: ValueError: what is this?; send ")
    assert str(file) in line
    text = file.read_text()
    assert "command: panguq recipes --json\n" in text
    assert "torch: " in text and "raise error" in text and "look through it" in text


def test_where_no_file_can_be_written_the_line_is_all(
    broken: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("panguq.cli.failure.open", refused, raising=False)
    broken(ValueError("why?"))
    assert main(["recipes"]) == 1
    assert "set PANGUQ_TRACEBACK=1" in capsys.readouterr().err
    assert write_report(ValueError("x"), []) is None


def test_a_traceback_is_there_on_request(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANGUQ_TRACEBACK", "1")
    broken(ValueError("what is this?"))
    with pytest.raises(ValueError, match="what is this"):
        main(["recipes"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: there is not enough memory: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: there is not enough"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (OSError(24, "Too many open files", "a.py"), "error: a.py: Too many open files"),
        (StorageError("no", "try"), "error: no\nhint: try"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_is_nobodys_fault_leaves_no_file(
    error: BaseException, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(error, []).startswith(line)
    error.add_note("parts are kept")
    assert said(error, []).endswith("parts are kept")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_one_line() -> None:
    error = KeyboardInterrupt()
    error.add_note("parts are kept")
    assert said(error, []) == "interrupted: parts are kept"


def test_an_error_that_an_interrupt_became_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy's import, interrupted, may end in an ImportError or a RecursionError."""

    def imports() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr("panguq.recipe.preset_names", imports)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
    try:
        assert main(["recipes"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"
    assert list(Path().iterdir()) == []


# --- surroundings -------------------------------------------------------------------------------


def test_a_deleted_folder_is_one_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"cd {gone} && rmdir {gone} && {sys.executable} -m panguq.cli recipes"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the current folder was deleted\nhint: ")


def test_closed_streams_take_no_file_with_them() -> None:
    """`>&-`: the next file that is opened would get the number of stdout."""
    code = f"{sys.executable} -m panguq.cli recipes <&- >&- 2>&-; echo $?"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""


def test_too_few_file_descriptors_are_one_line() -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))

    done = run("recipes", "--json", preexec_fn=few)
    assert done.returncode in (0, 1) and done.stderr.count("\n") <= 2


@pytest.mark.parametrize("delay", [0.1, 0.5])
def test_an_interrupt_while_modules_are_imported_is_quiet(delay: float, tmp_path: Path) -> None:
    code = "from panguq.cli import main; import sys; print('up', flush=True); sys.exit(main())"
    command = [sys.executable, "-c", code, "compile", str(tmp_path / "no"), "--recipe", "w8a8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 1:  # it had ended
        assert "no such folder" in err
    else:
        assert process.returncode == 130 and err.startswith("interrupted")
    assert "Traceback" not in err


def test_no_home_and_no_place_for_temporary_files(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}
    done = run("recipes", env={**env, "TMPDIR": str(tmp_path / "gone")})
    assert done.returncode == 0 and done.stderr == ""
