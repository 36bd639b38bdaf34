"""A file is there whole or not at all, and a failure keeps the old one."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from panguq.errors import LoweringError
from panguq.files.whole_file import output_file, whole_file, write_file


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_bytes(b"old")
    with whole_file(path) as partial:
        written = write_file(partial, [b"ne", memoryview(b"w")])
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert written == {"bytes": 3, "sha256": hashlib.sha256(b"new").hexdigest()}
    assert os.listdir(tmp_path) == ["report.csv"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        write_file(partial, [b"half"])
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.csv"]


def test_what_the_system_says_becomes_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with (
        pytest.raises(LoweringError, match=r"mine\.yaml: cannot be written: No space left"),
        output_file(path, LoweringError),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(LoweringError, match=r"m\.yaml: cannot be written: No such file"),
        output_file(tmp_path / "absent" / "m.yaml", LoweringError) as partial,
    ):
        write_file(partial, [b"x"])


def test_a_new_file_never_replaces_one(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "there", [b"new"])
    assert (tmp_path / "there").read_bytes() == b"old"
