"""Every way of generate gives what the source model gives, or is refused in one sentence."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.errors import InputError
from panguq.ir.kv_cache import CACHE_NAME, cache_of
from tests.model_folders import make_model, make_tokenizer

FAMILIES = ("llama", "mistral", "opt")
WINDOW = 24


@functools.cache
def source(family: str) -> Any:
    """A random model of the tokenizer's vocabulary, with an end-of-sequence token."""
    if family == "llama":
        return make_model(eos_token_id=1)
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    if family == "mistral":
        config: Any = transformers.MistralConfig(
            **sizes, num_key_value_heads=2, intermediate_size=48, sliding_window=WINDOW,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    else:
        config = transformers.OPTConfig(
            **sizes, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@functools.cache
def compiled(family: str) -> CompiledCausalLM:
    model = panguq.compile(source(family), "float")
    assert isinstance(model, CompiledCausalLM)
    return model


def prompts(batch: int = 2, tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(batch * tokens)
    return torch.randint(3, 259, (batch, tokens), generator=generator)


def both(family: str, ids: Tensor, **options: Any) -> tuple[Any, Any]:
    """What the source model and the compiled one generate, from the same seed."""
    results = []
    for model in (source(family), compiled(family)):
        torch.manual_seed(0)
        results.append(model.generate(ids, **{"max_new_tokens": 7, **options}))
    return results[0], results[1]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "chunked": {"prefill_chunk_size": 4},
    "chunked static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "penalties": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_generate(family: str, way: str) -> None:
    expected, found = both(family, prompts(), **WAYS[way])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["greedy", "beams", "static"])
def test_padding(family: str, side: str, way: str) -> None:
    ids, mask = padded(side)
    expected, found = both(family, ids, attention_mask=mask, **WAYS[way])
    assert torch.equal(found, expected)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three prompts of 9, 6 and 1 tokens."""
    ids, mask = prompts(3), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 6, 1)):
        kept = slice(9 - length, 9) if side == "left" else slice(0, length)
        mask[row, kept] = 1
    return ids * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_call_without_positions_is_that_of_the_source_model(family: str, side: str) -> None:
    ids, mask = padded(side)
    with torch.no_grad():
        expected = source(family)(ids, attention_mask=mask).logits
    found = compiled(family)(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    if side == "right":  # padding after a token sees that token
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("assistant", ["source", "compiled", "small"])
def test_assisted_decoding(assistant: str) -> None:
    model = compiled("llama")
    helper = {
        "source": source("llama"),
        "compiled": model,
        "small": panguq.compile(make_model(seed=1, num_hidden_layers=1, eos_token_id=1), "float"),
    }[assistant]
    expected = source("llama").generate(prompts(1), max_new_tokens=9, do_sample=False)
    options = dict(assistant_model=helper, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(prompts(1), **options), expected)
    assert torch.equal(source("llama").generate(prompts(1), **options), expected)


def test_prompt_lookup() -> None:
    ids = prompts(1, 5).repeat(1, 3)
    expected, found = both("llama", ids, prompt_lookup_num_tokens=3, do_sample=False)
    assert torch.equal(found, expected)


def test_stop_strings() -> None:
    tokenizer = make_tokenizer()
    free = compiled("llama").generate(prompts(1), max_new_tokens=7, do_sample=False)
    stop = tokenizer.decode(free[0, -4:-3])
    options = dict(stop_strings=[stop], tokenizer=tokenizer, do_sample=False)
    expected, found = both("llama", prompts(1), **options)
    assert torch.equal(found, expected)
    assert found.shape[1] < free.shape[1]


def test_streamers() -> None:
    tokenizer = make_tokenizer()
    texts = []
    for model in (source("llama"), compiled("llama")):
        streamer = transformers.TextIteratorStreamer(tokenizer)
        model.generate(prompts(1), max_new_tokens=6, do_sample=False, streamer=streamer)
        texts.append("".join(streamer))
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("beams", [1, 2])
def test_scores_and_logits(beams: int) -> None:
    wanted = dict(output_scores=True, output_logits=True, return_dict_in_generate=True)
    expected, found = both("llama", prompts(), num_beams=beams, do_sample=False, **wanted)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert isinstance(cache_of(found), Cache)


def test_a_context_beyond_the_configured_one() -> None:
    length = source("llama").config.max_position_embeddings + 5
    expected, found = both("llama", prompts(1, length), max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected)


# --- caches -------------------------------------------------------------------------------------


def new_cache(kind: str, family: str) -> Cache:
    config = source(family).config
    if kind == "static":
        return StaticCache(config=config, max_cache_len=20)
    return DynamicCache(config=config) if kind == "of a config" else DynamicCache()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["empty", "of a config", "static"])
def test_a_cache_goes_on_in_a_second_call(family: str, kind: str) -> None:
    ids, results = prompts(2, 12), []
    for model in (source(family), compiled(family)):
        cache = new_cache(kind, family)
        first = model.generate(ids[:, :8], max_new_tokens=3, do_sample=False, **{CACHE_NAME: cache})
        more = torch.cat((first, ids[:, 8:10]), 1)
        then = model.generate(more, max_new_tokens=4, do_sample=False, **{CACHE_NAME: cache})
        results.append((then, int(cache.get_seq_length())))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("kind", ["empty", "of a config", "static"])
@pytest.mark.parametrize("change", ["cropped", "reordered", "repeated", "selected"])
def test_a_cache_that_was_changed(kind: str, change: str) -> None:
    if kind == "static" and change in ("repeated", "selected"):
        pytest.skip("transformers' StaticCache has no such method")
    ids, results = prompts(2, 9), []
    for model in (source("mistral"), compiled("mistral")):
        cache, following = new_cache(kind, "mistral"), ids[:, 7:]
        with torch.no_grad():
            model(ids[:, :7], use_cache=True, **{CACHE_NAME: cache})
        if change == "cropped":
            if kind == "static" and not hasattr(cache.layers[0], "crop"):
                pytest.skip("this transformers crops no static cache")
            cache.crop(-2)
        elif change == "reordered":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "repeated":
            cache.batch_repeat_interleave(2)
            following = following.repeat_interleave(2, 0)
        else:
            cache.batch_select_indices(torch.tensor([1]))
            following = following[1:]
        with torch.no_grad():
            results.append(model(following, use_cache=True, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_sliding_cache_keeps_what_the_graph_reads() -> None:
    """Of its own cache nothing is dropped; what another one has dropped, no token attends to."""
    eager, model, ids = source("mistral"), compiled("mistral"), prompts(1, WINDOW + 4)
    cache = DynamicCache(config=eager.config)
    model(ids[:, :-1], cache=cache)
    assert cache.get_seq_length() == WINDOW + 3
    result = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    with torch.no_grad():
        torch.testing.assert_close(result, eager(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    dropped = DynamicCache(config=eager.config)
    with torch.no_grad():
        eager(ids[:, :-1], use_cache=True, **{CACHE_NAME: dropped})
    assert dropped.layers[0].keys.shape[2] == WINDOW - 1
    after = model(ids[:, -1:], cache=dropped).logits[:, -1]
    torch.testing.assert_close(after, result, rtol=1e-4, atol=1e-4)


def test_a_cache_of_a_smaller_window_is_refused() -> None:
    config = copy.deepcopy(source("mistral").config)
    config.sliding_window = WINDOW // 2
    dropped, ids = DynamicCache(config=config), prompts(1, WINDOW)
    keys = torch.zeros(1, 2, WINDOW - 1, 8)
    for layer in range(2):
        dropped.update(keys, keys, layer)
    with pytest.raises(InputError, match="has seen 23 tokens and holds the last 11"):
        compiled("mistral")(ids[:, -1:], cache=dropped)
    small = StaticCache(config=config, max_cache_len=2 * WINDOW)
    with pytest.raises(InputError, match=f"room for {WINDOW // 2} tokens"):
        compiled("mistral")(ids, cache=small)


@pytest.mark.parametrize("tokens", [WINDOW - 4, WINDOW, WINDOW + 4])
def test_a_static_cache_slides(tokens: int) -> None:
    options = dict(max_new_tokens=9, do_sample=False, cache_implementation="static")
    expected, found = both("mistral", prompts(2, tokens), **options)
    assert torch.equal(expected, found)


def test_both_names_of_the_cache_are_taken() -> None:
    model, ids = compiled("llama"), prompts(1, 8)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    for name in ("cache", "past_key_values"):
        options: Any = {name: DynamicCache()}
        found = model.generate(ids, max_new_tokens=3, do_sample=False, **options)
        assert torch.equal(found, expected)
        assert options[name].get_seq_length() == 10
    with pytest.raises(InputError, match="cache and past_key_values are both given"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


def test_an_int8_cache_in_a_static_one() -> None:
    model = panguq.compile(source("llama"), "w8a8-dynamic-kv8", calibration=prompts(4, 16))
    assert isinstance(model, CompiledCausalLM)
    expected = model.generate(prompts(), max_new_tokens=5, do_sample=False)
    for chunk in (None, 4):
        found = model.generate(
            prompts(), max_new_tokens=5, do_sample=False, cache_implementation="static",
            prefill_chunk_size=chunk,
        )  # fmt: skip
        assert torch.equal(found, expected)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized", "paged"])
def test_other_kinds_of_cache_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"cache_implementation='{kind}' .*\n.*'static'"):
        compiled("llama").generate(prompts(), max_new_tokens=2, cache_implementation=kind)
    config = transformers.GenerationConfig(max_new_tokens=2, cache_implementation=kind)
    with pytest.raises(InputError, match=f"cache_implementation='{kind}'"):
        compiled("llama").generate(prompts(), generation_config=config)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states", "inputs_embeds"])
def test_what_no_graph_has_is_refused(name: str) -> None:
    options = {name: torch.zeros(1, 2, 32) if name == "inputs_embeds" else True}
    with pytest.raises(InputError, match=name):
        compiled("llama").generate(prompts(), max_new_tokens=2, **options)
    with pytest.raises(InputError, match=name):
        compiled("llama")(None if name == "inputs_embeds" else prompts(), **options)


def test_early_exit_is_refused() -> None:
    with pytest.raises(InputError, match="assistant_early_exit"):
        compiled("llama").generate(prompts(1), max_new_tokens=2, assistant_early_exit=1)


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(InputError, match="continuous batching"):
        compiled("llama").generate_batch([[3, 4]])


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (((torch.zeros(1), torch.zeros(1)),), "the cache is a tuple"),
        (transformers.EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (StaticCache(config=make_model().config, max_cache_len=5), "room for 5 tokens"),
        (DynamicCache(config=make_model(num_hidden_layers=3).config), "3 layers, the model 2"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(cache: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled("llama").generate(prompts(), max_new_tokens=2, **{CACHE_NAME: cache})
    with pytest.raises(InputError, match=message):
        compiled("llama")(prompts(), cache=cache)


class CacheLayerOfAUser(transformers.cache_utils.DynamicLayer):
    """Keeps something else than plain keys and values, as quantized layers do."""


def test_layers_of_another_kind_are_refused() -> None:
    cache = DynamicCache()
    cache.layers = [CacheLayerOfAUser(), CacheLayerOfAUser()]
    with pytest.raises(InputError, match="DynamicCache with layers CacheLayerOfAUser"):
        compiled("llama")(prompts(), cache=cache)


def test_a_cache_of_another_dtype_is_refused() -> None:
    cache = compiled("llama")(prompts()).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    with pytest.raises(InputError, match=r"cache tensor 0 is torch\.bfloat16, expected"):
        compiled("llama")(prompts(), cache=cache)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.full((2, 9), -1e9)}, "attention_mask holds other values"),
        ({"attention_mask": torch.full((2, 9), 2)}, "other values than 0 and 1, such as 2"),
        ({"position_ids": torch.arange(9.0)[None]}, "position_ids are torch.float32"),
    ],
)
def test_masks_and_positions_of_another_form_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled("llama")(prompts(), **given)


def test_positions_before_the_table_are_refused() -> None:
    with pytest.raises(InputError, match="position_ids go down to -2"):
        compiled("opt")(prompts(1, 3), position_ids=torch.tensor([[-2, 0, 1]]))


@pytest.mark.parametrize(("use_cache", "return_dict"), [(False, True), (True, False)])
def test_the_config_decides_what_is_returned(use_cache: bool, return_dict: bool) -> None:
    model = copy.copy(compiled("llama"))
    model.config = type(model.config)(**{**model.config.to_dict(), "use_cache": use_cache})
    model.config.return_dict = return_dict
    output = model(prompts(1, 3))
    assert isinstance(output, dict if return_dict else tuple)
    assert len(output) == 1 + use_cache
