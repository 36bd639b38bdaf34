"""The demo's table: rows as they come, and a failure in one of them."""

from __future__ import annotations

import io

import pytest

from demo.run import Row, quality_cells, report, show_rows
from demo.table import COLUMNS, Steps, header, row


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


CELLS = ["25.00 (+1.0 %)", "0.010", "95.0 %", "8.06", "140 MiB", "2.00x", "1.50x"]


def test_a_row_that_fails_does_not_lose_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown_before: list[str] = []

    def measured(one: Row) -> tuple[list[str], str]:
        shown_before.append(capsys.readouterr().out)
        if one.title == "second":
            raise ValueError("what went wrong\nin detail")
        return CELLS, "'some text'"

    rows = [Row(title, None) for title in ("first", "second", "third")]
    failed = show_rows(rows, measured, Steps(io.StringIO()))
    last = capsys.readouterr().out
    # Each row was on the screen before the next one was begun.
    assert shown_before[0].splitlines()[0].split()[0] == "perplexity"
    assert shown_before[1].splitlines() == [row(["first", *CELLS]), "  'some text'"]
    assert shown_before[2].splitlines() == ["second", "  failed: ValueError: what went wrong"]
    assert last.splitlines() == [row(["third", *CELLS]), "  'some text'"]
    assert list(failed) == ["second"]
    assert report(failed) == 1 and "in detail" in capsys.readouterr().err
    assert report({}) == 0


def test_the_columns_stand_under_their_names() -> None:
    line = row(["panguq w8a8", *CELLS])
    names = header().splitlines()[0]
    for (name, _), cell in zip(COLUMNS[1:], CELLS, strict=True):
        assert names.index(name) + len(name) == line.index(cell) + len(cell)


def test_the_float_model_is_compared_with_nothing() -> None:
    assert quality_cells({"perplexity": 20.0}) == ["20.00", "", ""]
    figures = {"perplexity": 21.0, "float_perplexity": 20.0, "kl": 0.0123, "top1": 0.9}
    assert quality_cells(figures) == ["21.00 (+5.0 %)", "0.012", "90.0 %"]


def test_steps_are_lines_where_nobody_watches() -> None:
    stream = io.StringIO()
    steps = Steps(stream)
    steps.say("compiling")
    steps("calibrate", 1, 30)
    steps.clear()
    [line] = stream.getvalue().splitlines()
    assert line.endswith("s] compiling")


def test_on_a_terminal_the_step_is_one_line_that_makes_room_for_a_row() -> None:
    stream = Terminal()
    steps = Steps(stream)
    steps.say("compiling")
    steps.drawn = 0.0
    steps("calibrate", 1, 30)
    steps.clear()
    drawn = stream.getvalue()
    assert "\n" not in drawn and drawn.endswith("\r\033[K")
    assert drawn.count("\r\033[K") == 3 and "compiling: calibrate 1/30" in drawn
