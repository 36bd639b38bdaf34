"""Published files as lm-eval's documents; items are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panguq.errors import InputError, StorageError
from panguq.tasks import data_folder, rows
from panguq.tasks.data_folder import checked_file, json_rows
from panguq.tasks.harness import limited
from panguq.tasks.outcome import sampled


@pytest.mark.parametrize(
    ("convert", "row", "expected"),
    [
        (rows.arc, {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
         {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
          "answerKey": "B"}),
        (rows.copa, {"query": "It rained, therefore", "choices": ["wet.", "dry."], "gold": 0},
         {"premise": "It rained.", "question": "effect", "choice1": "wet.", "choice2": "dry.",
          "label": 0}),
        (rows.boolq, {"query": "Passage: Sun.\nQuestion: is it hot?", "choices": ["no", "yes"],
                      "gold": 1},
         {"passage": "Sun.", "question": "is it hot", "label": 1}),
        (rows.siqa, {"query": "Context: C.\nQuestion: Q?\nChoices:\nA. x\nB. y\nAnswer:",
                     "gold": 1},
         {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "label": "2"}),
        (rows.winogrande, {"context_options": ["Ann met Sam and Ann", "Ann met Sam and Sam"],
                           "continuation": "sang.", "gold": 1},
         {"sentence": "Ann met Sam and _ sang.", "option1": "Ann", "option2": "Sam",
          "answer": "2"}),
        (rows.lambada, {"context": "One two", "continuation": "three"}, {"text": "One two three"}),
        (rows.gsm8k, {"context": "Q", "chain_of_thought": "C", "answer": "4"},
         {"question": "Q", "answer": "C\n#### 4"}),
    ],
)  # fmt: skip
def test_rows_are_taken_apart(convert: object, row: object, expected: object) -> None:
    assert convert(row) == expected  # type: ignore[operator]


def test_a_missing_set_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there") as caught:
        checked_file(tmp_path, "arc_easy.jsonl")
    assert "llm-foundry" in caught.value.hint


def test_another_version_of_a_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"the sha256 is .*, not d2d12e59543acf9a"):
        checked_file(tmp_path, "arc_easy.jsonl")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "line 1"), ("[1]\n", "no object"), ("\n", "no rows")]
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(StorageError, match=said):
        json_rows(tmp_path / "x.jsonl")


def test_a_row_of_other_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    with pytest.raises(StorageError, match="row 1 has other fields"):
        rows.one(rows.arc)(tmp_path / "x.jsonl")


def test_questions_of_several_lines_stay_whole(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"x_{split}.csv").write_text('"two\nlines",1,2,3,4,C\n')
    (found,) = rows.mmlu_rows(tmp_path)
    assert found.items == [{"question": "two\nlines", "choices": ["1", "2", "3", "4"], "answer": 2}]
    assert (found.subject, found.shown) == ("x", found.items)


def test_a_sample_is_the_seeds_and_keeps_its_order() -> None:
    parts = [rows.TaskRows([{"i": i} for i in range(5)], subject="a"),
             rows.TaskRows([{"i": i} for i in range(5, 9)], subject="b")]  # fmt: skip
    kept = [row["i"] for part in limited(parts, sampled(4, 1)) for row in part.items]
    assert len(kept) == 4 and kept == sorted(kept)
    assert kept == [row["i"] for part in limited(parts, sampled(4, 1)) for row in part.items]
    assert sum(len(part.items) for part in limited(parts, sampled(None, 1))) == 9


def test_every_set_says_where_it_is_published() -> None:
    assert all(entry["where"] for entry in data_folder.sources().values())
