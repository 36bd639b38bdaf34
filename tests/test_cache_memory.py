"""A cache grows in memory of its own: what is there is neither copied nor changed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

import panguq
from panguq import compiled_causal_lm
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.ir.kv_cache import CACHE_NAME, cache_of
from panguq.lowering.run.write_into_cache import PAST_LENGTH, written_into
from tests.model_folders import make_model
from tests.model_shelf import token_ids
from tests.test_layer_states import pair

IDS = torch.arange(3, 43).reshape(2, 20)


@functools.cache
def compiled(recipe: str = "float") -> CompiledCausalLM:
    made = panguq.compile(make_model(), recipe, calibration=IDS)
    assert isinstance(made, CompiledCausalLM)
    return made


def step(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    output = model(ids, use_cache=True, **{CACHE_NAME: cache})
    return output.logits, cache_of(output)


def places(cache: Any) -> list[int]:
    return [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("recipe", ["float", "w8a8-dynamic-kv8"])
def test_a_step_writes_behind_the_past(recipe: str) -> None:
    model = compiled(recipe)
    _, cache = step(model, IDS[:, :12])
    before = places(cache)
    for at in range(12, 19):
        found, again = step(model, IDS[:, at : at + 1], cache)
        assert again is cache and places(cache) == before
    assert cache.get_seq_length() == 19
    expected = model(IDS[:, :19]).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_memory_that_is_outgrown_is_replaced() -> None:
    model, ids = compiled(), token_ids(1, 190, seed=4)
    _, cache = step(model, ids[:, :4])
    moved = 0
    for at in range(4, 190):
        before = places(cache)
        logits, cache = step(model, ids[:, at : at + 1], cache)
        moved += places(cache) != before
    assert moved == 2  # room for 68 tokens, for 133, for 198
    torch.testing.assert_close(logits, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_a_static_cache_is_written_where_it_is() -> None:
    model = compiled()
    cache = StaticCache(config=make_model().config, max_cache_len=20)
    step(model, IDS[:, :9], cache)
    before = places(cache)
    logits, _ = step(model, IDS[:, 9:20], cache)
    assert places(cache) == before and int(cache.get_seq_length()) == 20
    torch.testing.assert_close(logits, model(IDS).logits[:, 9:], rtol=1e-4, atol=1e-4)


def eager(ids: Tensor) -> Tensor:
    with torch.no_grad():
        return make_model()(ids).logits[:, -1:]


@pytest.mark.parametrize("way", ["copied", "copied layer by layer", "shared tensors"])
def test_two_caches_go_on_apart(way: str) -> None:
    """Both begin with the same past; what one appends, the other does not see."""
    model = compiled()
    _, first = step(model, IDS[:, :6])
    second = copy.deepcopy(first) if way == "copied" else DynamicCache()
    if way != "copied":
        second.layers = [copy.copy(layer) for layer in first.layers]
    if way == "shared tensors":
        second = DynamicCache()
        for index, layer in enumerate(first.layers):
            second.update(layer.keys, layer.values, index)
    others = IDS.flip(1)
    found = []
    for at in range(6, 9):
        one, _ = step(model, IDS[:, at : at + 1], first)
        other, _ = step(model, others[:, at : at + 1], second)
        found = [one, other]
    for logits, end in zip(found, (IDS, others), strict=True):
        expected = eager(torch.cat((IDS[:, :6], end[:, 6:9]), 1))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_cropped_cache_is_written_over() -> None:
    model = compiled()
    _, cache = step(model, IDS[:, :9])
    before = places(cache)
    cache.crop(-4)
    logits, _ = step(model, IDS[:, 5:7], cache)
    assert places(cache) == before
    torch.testing.assert_close(logits[:, -1:], eager(IDS[:, :7]), rtol=1e-4, atol=1e-4)


def test_a_call_that_keeps_nothing_leaves_the_cache_alone() -> None:
    model = compiled()
    _, cache = step(model, IDS[:, :6])
    keys = cache.layers[0].keys.clone()
    model(IDS[:, :3], use_cache=False)
    assert torch.equal(cache.layers[0].keys, keys)


def test_the_graph_that_is_saved_is_a_function() -> None:
    """Memory is an affair of the graph that runs: the one that is saved returns a new past."""
    model = compiled()
    names = [str(n.target) for n in model.graph.graph.nodes if n.op == "placeholder"]
    assert PAST_LENGTH not in names and not written_into(model.graph)
    assert len(written_into(model.executable)) == 4


# --- long prompts -------------------------------------------------------------------------------


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_causal_lm, "PREFILL_CHUNK", 7)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("kept", [0, 1, 9, torch.tensor([-1, 3, 12, 3])])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_long_prompt_is_read_in_parts(kept: Any, padded: bool, use_cache: bool) -> None:
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :9] = 0
    options = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    output = compiled()(IDS, logits_to_keep=kept, use_cache=use_cache, **options)
    with torch.no_grad():
        expected = make_model()(IDS, **options).logits
    at = torch.arange(20)[-kept:] if isinstance(kept, int) else kept
    expected = expected[:, at]
    real = mask[:, at].bool()
    torch.testing.assert_close(output.logits[real], expected[real], rtol=1e-4, atol=1e-4)
    assert (cache_of(output) is not None) == use_cache


@pytest.mark.usefixtures("in_parts")
def test_parts_are_kept_as_one() -> None:
    model = compiled()
    _, cache = step(model, IDS[:, :3])
    step(model, IDS[:, 3:19], cache)
    assert cache.get_seq_length() == 19
    logits, _ = step(model, IDS[:, 19:], cache)
    torch.testing.assert_close(logits, eager(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("in_parts")
def test_a_state_passes_from_part_to_part() -> None:
    model, found = pair("lfm2")
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(found(IDS).logits, expected, rtol=1e-3, atol=1e-3)
