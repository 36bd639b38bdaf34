"""Calibration data out of files, as Python and the command line read it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from panguq.cli.command import text_windows
from panguq.data.calibration_data import read_calibration
from panguq.errors import InputError
from tests.data.test_calibration_data import CHAT, SPELLED, chat_tokenizer, spelled
from tests.model_folders import make_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = ["The first text.", "", "The second text,\nof two lines.\n", " \n"]
JOINED = "The first text.\n\nThe second text,\nof two lines."
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHATS = "".join(json.dumps({"messages": CHAT}) + "\n\n" for _ in range(2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"{JOINED}\n"),
        ("a.MD", f"\ufeff{JOINED}"),
        ("no-suffix", JOINED),
        ("a.jsonl", LINES),
        ("a.ndjson", f"\n{LINES}\n"),
        ("a.json", LINES),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("columns.json", json.dumps({"text": TEXTS})),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.txt.gz", gzip.compress(JOINED.encode(), mtime=0)),
    ],
)
def test_files_of_texts(name: str, content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for given in (path, str(path)):
        read = read_calibration(given, TOKENIZER)
        assert spelled(read) == [JOINED]
        assert read.summary.source == str(path)
        assert read.summary.first_80_characters == JOINED
        assert read.summary.skipped_empty == (2 if "json" in name else 0)
    assert TOKENIZER.decode(text_windows(path, "a text", TOKENIZER, 8, 2).flatten()) == JOINED[:16]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", CHATS),
        ("rows.json", json.dumps([CHAT, CHAT])),
        ("columns.json", json.dumps({"conversations": [CHAT, CHAT]})),
    ],
)
def test_files_of_conversations(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert spelled(read_calibration(path, chat_tokenizer())) == [SPELLED + SPELLED.rstrip()]


def test_one_conversation_is_a_file_of_json(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(CHAT))
    read = read_calibration(tmp_path / "one.json", chat_tokenizer())
    assert spelled(read) == [SPELLED.rstrip()]


def test_windows_of_a_file(tmp_path: Path) -> None:
    """The last one is shorter; less than 8 tokens are left out and counted."""
    path = tmp_path / "text.txt"
    path.write_text("x" * 41)
    for size, lengths, dropped in ((16, [16, 16, 9], 0), (20, [20, 20], 1)):
        read = read_calibration(path, TOKENIZER, window=size)
        assert [len(row.ids[0]) for row in read.sequences] == lengths
        assert (read.summary.dropped_tokens, read.summary.more_left) == (dropped, False)
    read = read_calibration(path, TOKENIZER, window=16, windows=2)
    assert (read.summary.tokens, read.summary.more_left) == (32, True)
    assert text_windows(path, "a text", TOKENIZER, 16, 9).shape == (2, 16)


def test_a_file_of_token_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    rows = [{"input_ids": list(range(3, 30))}, {"input_ids": []}, {"input_ids": [5] * 9}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_calibration(path, window=16)
    assert [row.ids.shape[1] for row in read.sequences] == [16, 11, 9]
    assert (read.summary.skipped_empty, read.summary.cut_rows) == (1, 1)
    read = read_calibration(path, window=16, windows=1)
    assert (read.summary.tokens, read.summary.more_left) == (16, True)


def test_json_lines_under_another_name_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    read_calibration(tmp_path / "a.txt", TOKENIZER)
    assert "looks like JSON lines; name it .jsonl if it is" in caplog.text


# --- parquet ------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(4)), "text": TEXTS}), path)
    read = read_calibration(path, TOKENIZER)
    assert (spelled(read), read.summary.skipped_empty) == ([JOINED], 2)
    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), path)
    assert spelled(read_calibration(path, chat_tokenizer())) == [SPELLED + SPELLED.rstrip()]
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(InputError, match="no column holds text: id, body"):
        read_calibration(path, TOKENIZER)
    path.write_bytes(b"PAR1\xff\xfe\x00" * 50)
    with pytest.raises(InputError, match=r"a.parquet: not a parquet file"):
        read_calibration(path, TOKENIZER)


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow.*\n.*panguq\[data\]"):
        read_calibration(tmp_path / "a.parquet", TOKENIZER)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", b"[" * 99999, "a.jsonl: line 1: n"),
        ("a.jsonl", b'{"text": "\\ud800 half"}\n', "character 0 is half of a surrogate pair"),
        ("a.jsonl", b'{"prompt": "a"}\n', "a.jsonl: line 1 has no input_ids, text or messages"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl: line 1: text is a int, not a text"),
        ("a.jsonl", b"3\n", "a.jsonl: line 1 is a int, not text or token ids"),
        ("a.jsonl", b'{"text": "a"}\n{"input_ids": [3]}\n', "a.jsonl: line 2 holds token ids"),
        ("a.jsonl", b'{"input_ids": [3]}\n{"text": "a"}\n', "a.jsonl: line 2 holds a text"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "a.jsonl: line 1: message 0 is not a role",
        ),
        ("a.jsonl", b"", "a.jsonl: empty: no tokens"),
        ("a.json", b'{"text": ', "a.json: not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json: row 1 is a int"),
        ("a.txt", b" \n", "a.txt: empty: no tokens"),
        ("a.txt", b"short", "a.txt: the text has 5 tokens; 8 are the least"),
        ("a.txt", b"a\0b\0c\0d\0", "a.txt: not text: it holds zero bytes"),
        ("a.txt", b"\xff\xfe\x00 not text", "a.txt: not UTF-8 text"),
        ("a.csv", b"text\na\n", "a.csv: .csv files are not read"),
        ("a.txt.gz", b"\x1f\x8bxx", "a.txt.gz: cannot be read"),
        ("a.txt.gz", b"plain", "a.txt.gz: cannot be read"),
    ],
)
def test_what_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_calibration(tmp_path / name, TOKENIZER)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.parquet"])
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    for given in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            read_calibration(given, TOKENIZER)
    with pytest.raises(InputError, match=": a folder"):
        read_calibration(str(tmp_path), TOKENIZER)


def test_sizes_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 99)
    sizes: list[dict[str, Any]] = [{"window": 7}, {"windows": 0}]
    for size in sizes:
        with pytest.raises(InputError, match="say nothing"):
            read_calibration(tmp_path / "a.txt", TOKENIZER, **size)
