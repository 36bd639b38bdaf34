"""Batched decoding gives what one prompt after another gives."""

from __future__ import annotations

from typing import Any

import pytest

from panguq.errors import InputError
from panguq.tasks.answers import answer_all, loops
from tests.model_folders import make_model, make_tokenizer

PROMPTS = ["a", "a quantized model", "its scales", "x = 1\n"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(max_position_embeddings=64)


def test_batches_of_any_size_answer_alike(model: Any) -> None:
    tokenizer = make_tokenizer()
    one, four = (
        answer_all(model, tokenizer, PROMPTS, max_new_tokens=12, batch=batch) for batch in (1, 4)
    )
    assert [a.text for a in one] == [a.text for a in four]
    assert [a.tokens for a in one] == [12] * 4 and all(a.cut_off for a in one)


def test_an_answer_ends_where_its_stop_begins(model: Any) -> None:
    tokenizer = make_tokenizer()
    (whole,) = answer_all(model, tokenizer, ["a"], max_new_tokens=12)
    stop = whole.text[3:5]
    (cut,) = answer_all(model, tokenizer, ["a"], max_new_tokens=12, stop=[stop])
    assert cut.text == whole.text.split(stop)[0]
    assert cut.tokens < whole.tokens and not cut.cut_off


def test_samples_are_the_seeds(model: Any) -> None:
    tokenizer = make_tokenizer()
    drawn = [
        answer_all(model, tokenizer, ["a"], max_new_tokens=6, temperature=1.0, seed=seed)[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_budget_beyond_the_positions_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="64 new tokens are more than the model's 64 positions"):
        answer_all(model, make_tokenizer(), ["a"], max_new_tokens=64)


@pytest.mark.parametrize(
    ("tokens", "repeats"),
    [
        ([1] * 24, True),
        ([9, 8, *[1, 2, 3] * 8], True),
        ([1] * 23, False),
        (list(range(40)), False),
        ([*[1, 2] * 20, 7], False),
        (list(range(30)) * 4, True),
        (list(range(30)) * 3, False),
    ],
)
def test_a_loop_is_a_piece_that_the_end_repeats(tokens: list[int], repeats: bool) -> None:
    assert loops(tokens) is repeats
