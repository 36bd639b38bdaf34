"""Formats by name: panguq's own, and those that somebody adds."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from panguq.artifact import Artifact
from panguq.errors import InputError
from panguq.formats.registry import FORMATS, Format, add_format, find_format


def test_a_format_that_was_added_is_found_and_written() -> None:
    written: list[tuple[object, ...]] = []

    def write(artifact: Artifact, path: Path, overwrite: bool) -> None:
        written.append((artifact, path, overwrite))

    artifact: Artifact = object()  # type: ignore[assignment]
    with patch.dict(FORMATS):
        add_format(Format("mine", "nobody", write, lambda path, overwrite: None))
        find_format("mine").write(artifact, Path("out"), overwrite=True)
        assert find_format("mine").linears_check() is None
    assert written == [(artifact, Path("out"), True)]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(InputError, match="there is a format 'ascend' already"):
        add_format(FORMATS["ascend"])


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown format 'ascent'") as caught:
        find_format("ascent")
    assert "ascend" in caught.value.hint
