"""Layers that keep one state of all past tokens: convolutions, linear attention, state spaces."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

import panguq
from panguq.errors import InputError
from tests.families.models import make
from tests.families.sweep import (
    CALIBRATION,
    GREEDY,
    IDS,
    LONG,
    MASK,
    check_float,
    difference,
    quantized,
    shared_traces,
    token_ids,
)


@functools.cache
def pair(family: str):
    """The model and its float compile, which is checked, and so is its trace in 8 bits."""
    model = make(family)
    with shared_traces():
        compiled = panguq.compile(model, "float")
        check_float(model, compiled)
        quantized(model, panguq.compile(model, "w8a8-dynamic", calibration=CALIBRATION))
    return model, compiled


FAMILIES = ["lfm2", "qwen3_5_text", "falcon_h1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time_is_one_prompt(family) -> None:
    model, compiled = pair(family)
    ids = LONG[:, :6]
    with torch.no_grad():
        expected = model(ids).logits
    cache, found = None, []
    for token in ids.split(1, dim=1):
        output = compiled(token, past_key_values=cache, use_cache=True)
        cache = output.get("cache", output.get("past_key_values"))
        found.append(output.logits)
    assert difference(expected, torch.cat(found, dim=1)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(prefill_chunk_size=3)],
    ids=["beams", "several beams returned", "a prompt in chunks, one of them all padding"],
)
def test_generates_as_the_model(family, options) -> None:
    model, compiled = pair(family)
    given = GREEDY | options | dict(attention_mask=MASK, max_new_tokens=6)
    assert torch.equal(model.generate(IDS, **given), compiled.generate(IDS, **given))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_the_model_goes_on_in_the_compiled_one(family) -> None:
    model, compiled = pair(family)
    with torch.no_grad():
        expected = model(LONG).logits[:, 9:]
        cache = transformers.DynamicCache(config=model.config)
        model(LONG[:, :9], cache=cache, use_cache=True)
    assert difference(expected, compiled(LONG[:, 9:], cache=cache).logits) < 1e-5
    assert cache.get_seq_length() == LONG.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache(family) -> None:
    model, compiled = pair(family)
    given = GREEDY | dict(cache_implementation="static", max_new_tokens=4)
    assert torch.equal(model.generate(IDS, **given), compiled.generate(IDS, **given))


def test_a_cache_without_places_for_states_is_refused() -> None:
    _, compiled = pair("lfm2")
    cache = transformers.DynamicCache()
    cache.layers = [transformers.cache_utils.DynamicLayer() for _ in range(2)]
    with pytest.raises(InputError, match="DynamicCache with layers DynamicLayer"):
        compiled(IDS, cache=cache)


def test_a_state_cannot_be_cropped() -> None:
    _, compiled = pair("lfm2")
    assistant = make("lfm2")
    with pytest.raises(InputError, match="records its past"):
        compiled.generate(IDS[:1], assistant_model=assistant, **GREEDY)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_several_chunks(family) -> None:
    model, compiled = pair(family)
    ids = token_ids(1, 80, seed=4)
    with torch.no_grad():
        assert difference(model(ids).logits, compiled(ids).logits) < 1e-5


@pytest.mark.parametrize("tokens", [1, 7])
def test_time_steps_are_limited_in_a_prompt_alone(tokens) -> None:
    """As in the two forms of the model's own recurrence."""
    model, compiled = limited()
    given = GREEDY | dict(max_new_tokens=6)
    assert torch.equal(
        model.generate(IDS[:, :tokens], **given), compiled.generate(IDS[:, :tokens], **given)
    )


@functools.cache
def limited():
    model = make("nemotron_h", time_step_min=0.7)
    return model, panguq.compile(model, "float")
