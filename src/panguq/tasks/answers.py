"""Answers of a model to many prompts: batches of like length, padded on the left.

A greedy answer is that of a batch of one, up to ties: steps where the two likeliest tokens are so
near that the order of summation decides. They are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from panguq.errors import InputError
from panguq.ir.run.sweep import Progress
from panguq.passes.pipeline.base import no_progress

TIE = 1e-4
"""Of the largest logit: nearer than this, two logits are a tie, as a graph may differ so much."""
PIECE = 64
"""The longest piece, in tokens, that an answer which loops repeats."""
TIMES, LEAST = 4, 24
"""How often it does so at the answer's end, and how many tokens that is at least."""


@dataclass(frozen=True)
class Answer:
    """What a model said: `text` up to the first stop, `tokens` that it took, whether it was
    `cut_off` at the budget, whether it `loops`, and how many `ties` its greedy steps had."""

    text: str
    tokens: int
    cut_off: bool = False
    loops: bool = False
    ties: int = 0


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    special_tokens: bool = True,
    progress: Progress = no_progress,
) -> list[Answer]:
    """One answer a prompt, greedy, or sampled at a temperature above 0.

    special_tokens: whether the tokenizer adds its own; not for a chat, whose template has them.
    A prompt that leaves no room for the budget loses its beginning, as in lm-eval.
    """
    longest = longest_sequence(model)
    if longest is not None and max_new_tokens >= longest:
        raise InputError(
            f"{max_new_tokens} new tokens are more than the model's {longest} positions",
            "lower --max-new-tokens",
        )
    keep = None if longest is None else longest - max_new_tokens
    encoded = [_encode(tokenizer, prompt, special_tokens, keep) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), i))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        progress("answers", start, len(order))
        chosen = order[start : start + batch]
        found = _answer_batch(
            model, tokenizer, [encoded[i] for i in chosen], max_new_tokens, stop, temperature,
            seed + start,
        )  # fmt: skip
        answers.update(zip(chosen, found, strict=True))
    progress("answers", len(order), max(len(order), 1))
    return [answers[i] for i in range(len(prompts))]


def longest_sequence(model: Any) -> int | None:
    """How many positions a model has, of a graph or of its config; None if it says nothing."""
    found = getattr(getattr(model, "interface", None), "max_positions", None)
    found = found or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return None if found is None else int(found)


def loops(tokens: Sequence[int]) -> bool:
    """Whether an answer ends in the same piece of 1 to 64 tokens four times or more, over at
    least 24 tokens."""
    for size in range(1, min(PIECE, len(tokens) // TIMES) + 1):
        length = max(TIMES * size, LEAST)
        if length <= len(tokens):
            tail = tokens[-length:]
            if all(tail[i] == tail[i + size] for i in range(length - size)):
                return True
    return False


def _encode(tokenizer: Any, prompt: str, special_tokens: bool, keep: int | None) -> list[int]:
    ids: list[int] = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    if not ids:
        raise InputError("a prompt is empty", "give at least one word")
    return ids if keep is None else ids[-keep:]


def _answer_batch(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    temperature: float,
    seed: int,
) -> list[Answer]:
    width = max(map(len, rows))
    pad = pad_token(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    stops = _Stops(tokenizer, list(stop), width, len(rows))
    ties = _Ties(len(rows))
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    else:  # a model's own generation_config may say otherwise, and warn
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            num_beams=1,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([ties]),
            stopping_criteria=StoppingCriteriaList([stops]),
            **sampling,
        )
    return [
        _answer(tokenizer, output[i, width:].tolist(), stops, i, ties.found[i], max_new_tokens,
                end_tokens(model, tokenizer))
        for i in range(len(rows))
    ]  # fmt: skip


def _answer(
    tokenizer: Any,
    tokens: list[int],
    stops: _Stops,
    row: int,
    ties: list[bool],
    budget: int,
    ends: set[int],
) -> Answer:
    said = stops.length[row]
    finish = next((i for i, token in enumerate(tokens) if token in ends), None)
    count = min(len(tokens), *(n for n in (said, finish) if n is not None), budget)
    kept = tokens[:count]
    text = tokenizer.decode(kept, skip_special_tokens=not _marks(tokenizer))
    for word in stops.words:
        text = text.split(word, 1)[0]
    cut = said is None and finish is None and count >= budget
    return Answer(text, count, cut, loops(kept), sum(ties[:count]))


def _marks(tokenizer: Any) -> bool:
    from panguq.models.openpangu.chat import is_openpangu

    return is_openpangu(tokenizer)


def pad_token(tokenizer: Any) -> int:
    """The id that pads; the mask hides it, so that any does."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer, of the generation config and the tokenizer."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = set(found if isinstance(found, list | tuple) else [] if found is None else [found])
    return ends | ({tokenizer.eos_token_id} - {None})


class _Stops(StoppingCriteria):
    """Ends a row where its text has a stop word; `length` is how many tokens it then had."""

    def __init__(self, tokenizer: Any, words: list[str], width: int, rows: int) -> None:
        self.tokenizer, self.words, self.width = tokenizer, words, width
        self.look_back = max((len(word) for word in words), default=0) + 8
        self.length: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        new = input_ids.shape[1] - self.width
        if self.words:
            for row, done in enumerate(self.length):
                if done is None:
                    tail = input_ids[row, self.width :][-self.look_back :]
                    text = self.tokenizer.decode(tail)
                    if any(word in text for word in self.words):
                        self.length[row] = new
        return torch.tensor([n is not None for n in self.length], device=input_ids.device)


class _Ties(LogitsProcessor):
    """Notes for each row and step whether the two likeliest tokens are a tie."""

    def __init__(self, rows: int) -> None:
        self.found: list[list[bool]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top = scores.topk(2, dim=-1).values
        near = (top[:, 0] - top[:, 1]) <= TIE * scores.abs().amax(-1)
        for row, tie in zip(self.found, near.tolist(), strict=True):
            row.append(tie)
        return scores
