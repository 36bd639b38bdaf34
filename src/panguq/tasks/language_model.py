"""A model as lm-eval's HFLM, whose generated answers come from panguq's own decoder, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from panguq.errors import InputError
from panguq.ir.run.sweep import Progress
from panguq.models.openpangu.chat import Thinking, chat_prompt
from panguq.passes.pipeline.base import no_progress
from panguq.tasks.answers import Answer, answer_all, longest_sequence
from panguq.tasks.harness import quiet, version

LONGEST = 2048
"""The most tokens of a prompt and its answer, where the model would take more."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: `budget` new tokens at most, greedy unless `temperature` is above
    0, `samples` a prompt, in a chat if `thinking` says how to think."""

    budget: int = 256
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    batch: int = 8
    thinking: Thinking | None = None


def check_thinking(tokenizer: Any, thinking: Thinking | None) -> None:
    """Raises InputError, before any work, for a tokenizer that cannot chat in this mode."""
    if thinking is not None:
        chat_prompt(tokenizer, [{"role": "user", "content": "Hello"}], thinking)


def language_model(
    model: Any, tokenizer: Any, decoding: Decoding, progress: Progress = no_progress
) -> Any:
    """An HFLM of lm-eval. `model` is a transformers model or a compiled one, passed untouched;
    `answers` holds the `Answer`s of every prompt that it was asked to continue."""
    version()
    from lm_eval.models.huggingface import HFLM

    class CountedModel(HFLM):
        """HFLM, but for `generate_until`."""

        answers: dict[str, list[Answer]]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            """HFLM's own, without its bars."""
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """One text for each request, in order."""
            prompts = list(dict.fromkeys(request.arguments[0] for request in requests))
            stops = list(requests[0].arguments[1].get("until", []))
            found = generated(model, tokenizer, prompts, stops, decoding, progress)
            self.answers = dict(zip(prompts, found, strict=True))
            return [self.answers[request.arguments[0]][0].text for request in requests]

    length = min(longest_sequence(model) or LONGEST, LONGEST)
    with quiet():
        return CountedModel(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=decoding.batch,
            max_length=length,
            truncation=True,
        )


def generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    stops: Sequence[str],
    decoding: Decoding,
    progress: Progress = no_progress,
) -> list[list[Answer]]:
    """`decoding.samples` answers to every prompt; a chat answers up to its own end."""
    if decoding.samples > 1 and decoding.temperature <= 0:
        raise InputError("several greedy samples are one", "give --temperature, 0.2 or 0.8")
    chat = decoding.thinking is not None
    texts = [
        chat_prompt(tokenizer, [{"role": "user", "content": prompt}], decoding.thinking)
        if decoding.thinking is not None
        else prompt
        for prompt in prompts
    ]
    from panguq.models.openpangu.chat import is_openpangu

    repeated = [text for text in texts for _ in range(decoding.samples)]
    answers = answer_all(
        model,
        tokenizer,
        repeated,
        max_new_tokens=decoding.budget,
        stop=() if chat else stops,
        batch=decoding.batch,
        temperature=decoding.temperature,
        seed=decoding.seed,
        special_tokens=not chat or is_openpangu(tokenizer),
        progress=progress,
    )
    n = decoding.samples
    return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]
