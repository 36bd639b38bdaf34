"""Rows of published files in the fields of lm-eval's tasks, so that it makes its own prompts.

Each reader gives `TaskRows`: the items that are scored, and those shown before them. llm-foundry's
files hold whole prompts, which are taken apart again here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from panguq.errors import StorageError
from panguq.tasks.data_folder import TaskRow, csv_rows, json_rows

LETTERS = "ABCDE"


@dataclass(frozen=True)
class TaskRows:
    """Items to score and items to show, in lm-eval's fields; `subject` groups those of one
    configuration."""

    items: list[TaskRow]
    shown: list[TaskRow] = field(default_factory=list)
    subject: str = ""


Reader = Callable[[Path], list[TaskRows]]


def one(convert: Callable[[TaskRow], TaskRow]) -> Reader:
    """A reader of a .jsonl file whose rows are converted one by one."""

    def read(path: Path) -> list[TaskRows]:
        rows = []
        for number, row in enumerate(json_rows(path), start=1):
            try:
                rows.append(convert(row))
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise StorageError(
                    f"{path}: row {number} has other fields than the task's: "
                    f"{type(error).__name__}: {error}",
                    "get the file again",
                ) from None
        return [TaskRows(rows)]

    return read


def arc(row: TaskRow) -> TaskRow:
    """ARC: the question, its choices, and the place of the right one."""
    return {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": list(LETTERS[: len(row["choices"])])},
        "answerKey": LETTERS[row["gold"]],
    }


def piqa(row: TaskRow) -> TaskRow:
    """PIQA: a goal and two ways to it."""
    goal = row["query"].removeprefix("Question: ").strip()
    first, second = row["choices"]
    return {"goal": goal, "sol1": first, "sol2": second, "label": int(row["gold"])}


def openbookqa(row: TaskRow) -> TaskRow:
    """OpenBookQA: the stem of a sentence and four ends."""
    return {**arc(row), "question_stem": row["query"]}


def copa(row: TaskRow) -> TaskRow:
    """COPA: a premise, and which of two sentences is its cause or effect."""
    premise, connector = row["query"].rsplit(", ", 1)
    kind = {"because": "cause", "therefore": "effect"}[connector]
    first, second = row["choices"]
    return {
        "premise": f"{premise}.", "question": kind, "choice1": first, "choice2": second,
        "label": int(row["gold"]),
    }  # fmt: skip


def boolq(row: TaskRow) -> TaskRow:
    """BoolQ: a passage and a question to be answered with yes or no."""
    passage, question = row["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
    right = row["choices"][row["gold"]]
    return {
        "passage": passage, "question": question.strip().removesuffix("?"),
        "label": ["no", "yes"].index(right),
    }  # fmt: skip


def lettered(row: TaskRow) -> tuple[str, list[str]]:
    """The question before `Choices:` and the choices that follow it, one a line."""
    head, _, rest = row["query"].partition("\nChoices:\n")
    lines = [line for line in rest.split("\n") if line[1:3] == ". "]
    return head, [line[3:] for line in lines]


def siqa(row: TaskRow) -> TaskRow:
    """Social IQA: a context, a question, and as many answers as the file has (two of three)."""
    head, answers = lettered(row)
    context, question = head.removeprefix("Context: ").split("\nQuestion: ", 1)
    return {
        "context": context, "question": question, "answerA": answers[0], "answerB": answers[1],
        "label": str(row["gold"] + 1),
    }  # fmt: skip


def commonsense_qa(row: TaskRow) -> TaskRow:
    """CommonsenseQA: a question and as many choices as the file has (four of five)."""
    head, answers = lettered(row)
    return {
        "question": head.removeprefix("Question: "),
        "choices": {"text": answers, "label": list(LETTERS[: len(answers)])},
        "answerKey": LETTERS[row["gold"]],
    }


def winogrande(row: TaskRow) -> TaskRow:
    """Winogrande: a sentence with a gap and two names for it."""
    first, second = row["context_options"]
    same = [i for i in range(min(map(len, (first, second))) + 1) if first[:i] == second[:i]]
    common = first[: same[-1]]
    return {
        "sentence": f"{common}_ {row['continuation'].strip()}",
        "option1": first[len(common) :], "option2": second[len(common) :],
        "answer": str(row["gold"] + 1),
    }  # fmt: skip


def lambada(row: TaskRow) -> TaskRow:
    """LAMBADA: a text whose last word is to be said."""
    return {"text": f"{row['context']} {row['continuation'].strip()}"}


def gsm8k(row: TaskRow) -> TaskRow:
    """GSM8K: a question, and its steps with the number at their end."""
    return {
        "question": row["context"],
        "answer": f"{row['chain_of_thought']}\n#### {row['answer']}",
    }


def gsm8k_rows(path: Path) -> list[TaskRows]:
    """The test split; its first five rows are shown and not scored, since it has no others."""
    (rows,) = one(gsm8k)(path)
    return [TaskRows(rows.items[5:], rows.items[:5])]


def humaneval(row: TaskRow) -> TaskRow:
    """HumanEval: the beginning of a program, and its tests."""
    kept = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
    return {name: row[name] for name in kept}


def humaneval_rows(path: Path) -> list[TaskRows]:
    """All problems, by their number."""
    (rows,) = one(humaneval)(path)
    return [TaskRows(sorted(rows.items, key=lambda row: int(str(row["task_id"]).split("/")[-1])))]


def mbpp_rows(path: Path) -> list[TaskRows]:
    """The test split, problems 11 to 510 of the whole file."""
    (rows,) = one(
        lambda row: {name: row[name] for name in ("task_id", "text", "code", "test_list")}
    )(path)
    return [TaskRows([row for row in rows.items if 11 <= int(row["task_id"]) <= 510] or rows.items)]


def mmlu_rows(folder: Path) -> list[TaskRows]:
    """Every subject's questions, each shown after the five of `dev`."""

    def read(path: Path) -> list[TaskRow]:
        return [
            {"question": q, "choices": [a, b, c, d], "answer": LETTERS.index(right)}
            for q, a, b, c, d, right in csv_rows(path)
        ]

    return [
        TaskRows(read(test), read(folder / "dev" / f"{subject}_dev.csv")[:5], subject)
        for test in sorted((folder / "test").glob("*_test.csv"))
        for subject in [test.name.removesuffix("_test.csv")]
    ]


def cmmlu_rows(folder: Path) -> list[TaskRows]:
    """Every subject's questions in Chinese, each shown after the five of `dev`."""

    def read(path: Path) -> list[TaskRow]:
        head, *rows = csv_rows(path)
        names = ["number", *head[1:]]
        return [dict(zip(names, row, strict=True)) for row in rows]

    return [
        TaskRows(read(test), read(folder / "dev" / test.name)[:5], test.stem)
        for test in sorted((folder / "test").glob("*.csv"))
    ]
