"""One task on one model: every item's score, what was said, and what the answers cost."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from panguq.errors import InputError
from panguq.ir.run.sweep import Progress
from panguq.passes.pipeline.base import no_progress
from panguq.tasks import code
from panguq.tasks.answers import Answer
from panguq.tasks.data_folder import TaskRow, checked_file, data_file, json_rows
from panguq.tasks.harness import Sample, limited, make, quiet, run, score_of, version
from panguq.tasks.language_model import Decoding, check_thinking, generated, language_model
from panguq.tasks.rows import TaskRows
from panguq.tasks.sandbox import sandbox_tool
from panguq.tasks.statistics import pass_at_k
from panguq.tasks.task_list import VERSION, Task

WINDOW = 512
WINDOWS = 64
"""Of a text at most, where there is no limit."""


@dataclass(frozen=True)
class ScoredItem:
    """One item. score: 1 or 0, or pass@1 of several samples; of a perplexity, the window's mean
    negative log likelihood in nats."""

    score: float
    prompt: str = ""
    answer: str = ""
    right: str = ""
    tokens: int = 0
    cut_off: bool = False
    loops: bool = False
    ties: int = 0
    passed: int = 0
    samples: int = 1
    note: str = ""


@dataclass(frozen=True)
class TaskOutcome:
    """The items of a task that one model answered, in the data's order, out of `total`; `prompts`
    are what the model read of them."""

    items: list[ScoredItem]
    total: int
    prompts: list[str] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Each item's."""
        return [item.score for item in self.items]

    def as_json(self) -> list[dict[str, Any]]:
        """The items as JSON."""
        return [asdict(item) for item in self.items]


@dataclass(frozen=True)
class Prepared:
    """A task's data, read and checked: its rows, out of `total`, or its text, and the protocol in
    a line."""

    task: Task
    protocol: str
    rows: list[TaskRows]
    total: int = 0
    text: str = ""


def sampled(limit: int | None, seed: int) -> Callable[[int], Sequence[int]]:
    """Which of so many items are taken: all, or `limit` of them by the seed, in their order."""

    def chosen(count: int) -> Sequence[int]:
        if limit is None or limit >= count:
            return range(count)
        return sorted(random.Random(seed).sample(range(count), limit))

    return chosen


def prepare_task(
    task: Task, folder: Path | None, limit: int | None, decoding: Decoding
) -> Prepared:
    """Read a task's data. Raises InputError for a set that is missing or another than published."""
    if task.kind == "perplexity":
        text, digest, name = _text(task, folder)
        said = f"perplexity v{VERSION}; windows of {WINDOW} tokens; {name} {digest[:12]}"
        return Prepared(task, said, [], text=text)
    path, digest = checked_file(folder, task.file)
    assert task.read is not None
    whole = task.read(path)
    rows = limited(whole, sampled(limit, decoding.seed))
    if not rows:
        raise InputError(f"{path}: no items", "get the file again")
    said = f"lm-eval {version()} {task.name} v{VERSION}; {task.shots}-shot"
    if task.is_generated:
        how = "greedy" if decoding.temperature <= 0 else f"temperature {decoding.temperature}"
        said += f"; {decoding.budget} new tokens, {how}"
        said += f", {decoding.samples} samples" if decoding.samples > 1 else ""
        said += f"; chat, thinking {decoding.thinking}" if decoding.thinking else ""
    note = f"; {task.note}" if task.note else ""
    return Prepared(
        task,
        f"{said}; {task.file} {digest[:12]}{note}",
        rows,
        sum(len(part.items) for part in whole),
    )


def evaluate_task(
    prepared: Prepared,
    model: Any,
    tokenizer: Any,
    decoding: Decoding,
    limit: int | None,
    *,
    unsafe: bool = False,
    progress: Progress = no_progress,
) -> TaskOutcome:
    """Every item of the task, answered by a transformers model or a compiled one."""
    task = prepared.task
    if task.kind == "perplexity":
        return _perplexity(prepared, model, tokenizer, limit, decoding.seed, progress)
    if task.is_generated:
        check_thinking(tokenizer, decoding.thinking)
    if task.kind == "code":
        return _code(prepared, model, tokenizer, decoding, unsafe, progress)
    if decoding.thinking is not None and task.kind == "text":
        raise InputError(f"{task.name} is not asked in a chat", "leave --thinking to code tasks")
    lm = language_model(model, tokenizer, decoding, progress)
    samples = run(task, prepared.rows, lm)
    if task.kind == "text":
        items = [_text_item(sample, lm.answers) for sample in samples]
        return TaskOutcome(items, prepared.total, [item.prompt for item in items])
    items = [_choice_item(sample) for sample in samples]
    return TaskOutcome(items, prepared.total, [_asked(sample) for sample in samples])


def _text(task: Task, folder: Path | None) -> tuple[str, str, str]:
    if task.name == "code" and folder is not None and not (folder / task.file).exists():
        path, digest = checked_file(folder, "human_eval.jsonl")
        return (
            "\n".join(row["prompt"] + row["canonical_solution"] for row in json_rows(path)),
            digest,
            path.name,
        )
    path, digest = checked_file(folder, task.file)
    try:
        return data_file(folder, task.file).read_text("utf-8"), digest, path.name
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no UTF-8 text: {error.reason}", "give plain text") from None


def token_windows_of(
    text: str, tokenizer: Any, longest: int, limit: int | None, seed: int
) -> tuple[torch.Tensor, int]:
    """Token windows `[windows, window]`, all or a seeded sample of them, and how many there are."""
    from panguq.data.calibration_tokens import token_windows

    windows = token_windows(text[: 8 * WINDOWS * WINDOW], tokenizer, min(WINDOW, longest), WINDOWS)
    return windows[list(sampled(limit, seed)(len(windows)))], len(windows)


def _perplexity(
    prepared: Prepared, model: Any, tokenizer: Any, limit: int | None, seed: int, progress: Progress
) -> TaskOutcome:
    from panguq.evaluation import logits_of
    from panguq.tasks.answers import longest_sequence

    longest = longest_sequence(model) or WINDOW
    windows, total = token_windows_of(prepared.text, tokenizer, longest, limit, seed)
    logits, items = logits_of(model), []
    for done, ids in enumerate(windows):
        progress("windows", done, len(windows))
        log_probs = logits(ids[None])[0, :-1].float().log_softmax(-1)
        loss = -log_probs.gather(1, ids[1:, None]).double().mean()
        items.append(ScoredItem(float(loss), tokens=len(ids) - 1))
    progress("windows", len(windows), len(windows))
    return TaskOutcome(items, total)


def _choice_item(sample: Sample) -> ScoredItem:
    scored = [response[0] for response in sample["filtered_resps"]]
    said = [str(arguments[1]).strip() for arguments in sample["arguments"]]
    best = max(range(len(scored)), key=lambda i: scored[i]) if len(scored) > 1 else 0
    prompt = str(sample["arguments"][0][0])
    right = sample["target"]
    shown = said[right] if isinstance(right, int) and right < len(said) else str(right)
    answer = said[best]
    if len(scored) == 1:  # one answer: is it what the model would say?
        answer = said[0] if sample["filtered_resps"][0][1] else "(another word)"
    return ScoredItem(score_of(sample), prompt=prompt, answer=answer, right=shown.strip())


def _asked(sample: Sample) -> str:
    """A question with its right answer, or with the first one where that is not to be seen."""
    right = sample["target"] if isinstance(sample["target"], int) else 0
    context, continuation = sample["arguments"][min(right, len(sample["arguments"]) - 1)][:2]
    return f"{context}{continuation}"


def _text_item(sample: Sample, answers: dict[str, list[Answer]]) -> ScoredItem:
    prompt = str(sample["arguments"][0][0])
    return replace(
        _item_of(prompt, answers[prompt]), score=score_of(sample), right=str(sample["target"])
    )


def _code(
    prepared: Prepared,
    model: Any,
    tokenizer: Any,
    decoding: Decoding,
    unsafe: bool,
    progress: Progress,
) -> TaskOutcome:
    """lm-eval's prompts, panguq's decoder, and the sandbox."""
    task, chat = prepared.task, decoding.thinking is not None
    if not unsafe:  # before the model's work, not after it
        sandbox_tool()
    rows = [row for part in prepared.rows for row in part.items]
    prompts, stops = _code_prompts(prepared)
    if chat:
        prompts = [code.chat_question(task.name, row) for row in rows]
    answers = generated(model, tokenizer, prompts, stops, decoding, progress)
    programs = [
        code.program(task.name, row, _without_thinking(answer.text, tokenizer), chat)
        for row, given in zip(rows, answers, strict=True)
        for answer in given
    ]
    verdicts = code.run_all(programs, unsafe=unsafe)
    items, n = [], decoding.samples
    for i, (row, prompt, given) in enumerate(zip(rows, prompts, answers, strict=True)):
        found = verdicts[i * n : (i + 1) * n]
        passed = sum(verdict.passed for verdict in found)
        item = replace(_item_of(prompt, given), score=pass_at_k(n, passed, 1), passed=passed)
        right = str(row.get("canonical_solution", row.get("code", "")))
        items.append(replace(item, right=right, samples=n, note=found[0].reason))
    return TaskOutcome(items, prepared.total, prompts)


def _code_prompts(prepared: Prepared) -> tuple[list[str], list[str]]:
    prompts, stops = [], []
    with quiet():
        for part in prepared.rows:
            made = make(prepared.task, part)
            made.build_all_requests()
            prompts += [str(instance.arguments[0]) for instance in made.instances]
            stops = list(made.instances[0].arguments[1].get("until", []))
    return prompts, stops


def _without_thinking(text: str, tokenizer: Any) -> str:
    from panguq.models.openpangu.chat import is_openpangu, split_thinking

    return split_thinking(text)[1] if is_openpangu(tokenizer) else text


def _item_of(prompt: str, answers: Sequence[Answer]) -> ScoredItem:
    """The first answer; tokens and the like are means over all samples, rounded."""
    return ScoredItem(
        0.0,
        prompt=prompt,
        answer=answers[0].text,
        tokens=round(statistics.mean(a.tokens for a in answers)),
        cut_off=sum(a.cut_off for a in answers) * 2 > len(answers),
        loops=sum(a.loops for a in answers) * 2 > len(answers),
        ties=sum(a.ties for a in answers),
    )


def of_json(rows: Sequence[TaskRow]) -> list[ScoredItem]:
    """Items from JSON."""
    return [ScoredItem(**row) for row in rows]
