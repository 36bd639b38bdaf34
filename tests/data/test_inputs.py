"""What a compiled model refuses at the front door, and what reaches its graph."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from torch import Tensor, nn

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.data.inputs import prepare, takes_empty_mask
from panguq.errors import InputError
from panguq.ir.edit import clone
from tests.model_shelf import FAMILIES, canonical, make_model, token_ids, traced


@functools.cache
def compiled(family: str) -> CompiledCausalLM:
    model = panguq.compile(make_model(family), "float")
    assert isinstance(model, CompiledCausalLM)
    return model


# --- token ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 96]]), r"token ids lie in \[1, 96\], the vocabulary is \[0, 96\)"),
        (torch.tensor([[-1, 5]]), r"token ids lie in \[-1, 5\]"),
        (torch.tensor([1, 2]), r"input_ids have shape \[2\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"have shape \[1, 2, 3\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"have shape \[1, 0\]"),
        (torch.zeros(0, 4, dtype=torch.long), r"have shape \[0, 4\]"),
        (torch.zeros(1, 4), r"input_ids are torch\.float32"),
        (torch.ones(1, 4).bool(), r"input_ids are torch\.bool"),
        ([[1, 2]], "input_ids are list"),
        (None, "input_ids are NoneType"),
    ],
)
def test_bad_ids_are_refused(ids, message) -> None:
    with pytest.raises(InputError, match=message):
        compiled("llama")(ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_every_integer_type_is_taken(dtype) -> None:
    ids = token_ids(2, 5)
    assert torch.equal(compiled("llama")(ids.to(dtype)).logits, compiled("llama")(ids).logits)


# --- mask, positions, logits_to_keep ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (2, 6), (2, 1, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape) -> None:
    with pytest.raises(InputError, match=r"attention_mask has shape .* expected \[2, 5\]"):
        compiled("llama")(token_ids(2, 5), attention_mask=torch.ones(shape))


def test_a_mask_must_cover_the_past() -> None:
    cache = compiled("llama")(token_ids(2, 5)).past_key_values
    with pytest.raises(InputError, match=r"expected \[2, 8\]"):
        compiled("llama")(token_ids(2, 3), attention_mask=torch.ones(2, 3), past_key_values=cache)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (5, 2), (2, 5, 1)])
def test_positions_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(InputError, match="position_ids"):
        compiled("llama")(token_ids(2, 5), position_ids=torch.zeros(shape, dtype=torch.long))


def test_positions_of_one_row_serve_all() -> None:
    ids, positions = token_ids(2, 5), torch.arange(5)[None]
    expected = compiled("llama")(ids).logits
    assert torch.equal(compiled("llama")(ids, position_ids=positions).logits, expected)


def test_positions_beyond_a_learned_table_are_refused() -> None:
    with pytest.raises(InputError, match="position"):
        compiled("gpt2")(token_ids(1, 3), position_ids=torch.tensor([[254, 255, 256]]))


@pytest.mark.parametrize(
    "keep",
    [-1, torch.tensor([5]), torch.tensor([-6]), torch.tensor([0.5]), torch.zeros(1, 1).long()],
)
def test_logits_that_are_not_there_are_refused(keep) -> None:
    with pytest.raises(InputError, match="logits_to_keep"):
        compiled("llama")(token_ids(2, 5), logits_to_keep=keep)


@pytest.mark.parametrize(
    ("keep", "kept"), [(0, 5), (1, 1), (3, 3), (9, 5), (torch.tensor([1, 4]), 2)]
)
def test_logits_to_keep(keep, kept) -> None:
    every = compiled("llama")(token_ids(2, 5)).logits
    some = compiled("llama")(token_ids(2, 5), logits_to_keep=keep).logits
    wanted = every[:, keep] if isinstance(keep, Tensor) else every[:, 5 - kept :]
    assert some.shape == (2, kept, 96)
    torch.testing.assert_close(some, wanted)


# --- cache --------------------------------------------------------------------------------------


def test_a_cache_continues_where_it_ended() -> None:
    model, ids = compiled("llama"), token_ids(2, 9)
    whole = model(ids).logits
    first = model(ids[:, :6])
    then = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, whole[:, 6:], rtol=1e-4, atol=1e-4)
    assert then.past_key_values is first.past_key_values  # updated in place
    assert then.past_key_values.get_seq_length() == 9


def test_an_eager_models_cache_is_taken() -> None:
    eager, ids = make_model("llama"), token_ids(2, 9)
    with torch.no_grad():
        cache = eager(ids[:, :6], use_cache=True).past_key_values
    then = compiled("llama")(ids[:, 6:], past_key_values=cache)
    whole = compiled("llama")(ids).logits
    torch.testing.assert_close(then.logits, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_without_a_cache_none_is_returned() -> None:
    assert compiled("llama")(token_ids(1, 3), use_cache=False).past_key_values is None


def foreign_cache(kind: str) -> object:
    ids = token_ids(2, 4)
    if kind == "another batch":
        return compiled("llama")(ids[:1]).past_key_values
    if kind == "another model":
        return compiled("gpt2")(ids).past_key_values
    if kind == "a layer less":
        cache = copy.deepcopy(compiled("llama")(ids).past_key_values)
        cache.layers.pop()
        return cache
    if kind == "layers of two lengths":
        cache = copy.deepcopy(compiled("llama")(ids).past_key_values)
        cache.layers[1].keys = cache.layers[1].keys[:, :, :-1]
        return cache
    if kind == "static":
        return transformers.StaticCache(config=make_model("llama").config, max_cache_len=2)
    return ((torch.zeros(1), torch.zeros(1)),)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another batch", "cache tensor 0 has shape .* expected"),
        ("another model", "cache tensor 0 has shape .* expected"),
        ("a layer less", "the cache has 1 layers, the model 2"),
        ("layers of two lengths", "cache tensor 2 has shape"),
        ("static", "room for 2 tokens; it holds 0 and would take 3 more"),
        ("tuples", "the cache is a tuple"),
    ],
)
def test_a_foreign_cache_is_refused(kind, message) -> None:
    with pytest.raises(InputError, match=message):
        compiled("llama")(token_ids(2, 3), past_key_values=foreign_cache(kind))


# --- length and unknown arguments ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_more_tokens_than_learned_positions_are_refused(family) -> None:
    model = compiled(family)
    cache = model(token_ids(1, 256)).past_key_values
    for ids, past, held in ((257, None, 0), (1, cache, 256)):
        with pytest.raises(InputError, match=f"{held} past and {ids} new .* 256 positions"):
            model(token_ids(1, ids), past_key_values=past)


def test_rotary_positions_have_no_end() -> None:
    ids = token_ids(1, 300)  # the config says 256
    with torch.no_grad():
        expected = make_model("llama")(ids).logits
    torch.testing.assert_close(compiled("llama")(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "unknown",
    [
        {"labels": token_ids(1, 3)}, {"output_attentions": True},
        {"inputs_embeds": torch.zeros(1, 3, 64)}, {"token_types": 0},
    ],
)  # fmt: skip
def test_arguments_that_the_graph_has_not_are_refused(unknown) -> None:
    with pytest.raises(InputError, match=f"does not take {next(iter(unknown))}"):
        compiled("llama")(token_ids(1, 3), **unknown)


def test_arguments_that_ask_for_nothing_are_taken() -> None:
    compiled("llama")(token_ids(1, 3), output_attentions=False, labels=None)


def test_results_as_a_tuple() -> None:
    logits, _ = compiled("llama")(token_ids(1, 3), return_dict=False)
    assert torch.equal(logits, compiled("llama")(token_ids(1, 3)).logits)


# --- the empty mask -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_mask_says_causal(family) -> None:
    gm, interface = canonical(family)
    assert takes_empty_mask(gm)
    ids = token_ids(2, 7)
    plain, empty = (prepare(interface, ids, empty_mask=e) for e in (False, True))
    assert empty["attention_mask"].numel() == 0
    results = [gm(*inputs.values())[0] for inputs in (plain, empty)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_mask_that_others_read_must_be_whole() -> None:
    raw, _ = traced("llama")
    assert not takes_empty_mask(raw)
    gm, _ = canonical("llama")
    gm = clone(gm)
    mask = next(n for n in gm.graph.nodes if n.target == "attention_mask")
    with gm.graph.inserting_after(mask):
        gm.graph.call_function(torch.ops.aten.logical_not.default, (mask,))
    assert not takes_empty_mask(gm)


# --- any module ---------------------------------------------------------------------------------


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, x), 0) + y


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x + 1
        return x


def test_sizes_that_were_baked_in_are_refused() -> None:
    model = panguq.compile(
        Loop(), "float", example_inputs=(torch.zeros(3, 4),), calibration=[torch.zeros(3, 4)]
    )
    assert torch.equal(model(torch.zeros(3, 7)), torch.full((3, 7), 3.0))
    with pytest.raises(InputError, match="dimension 0 of input x is 5, the graph serves 3"):
        model(torch.zeros(5, 7))


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    examples = (torch.zeros(3, 4), torch.zeros(6, 4))
    model = panguq.compile(Pair(), "float", example_inputs=examples, calibration=[examples])
    assert model(torch.ones(5, 2), torch.ones(10, 2)).shape == (10, 2)
    for x, y in (((3, 4), (6, 5)), ((3, 4), (5, 4))):
        with pytest.raises(InputError, match="of input y is"):
            model(torch.zeros(x), torch.zeros(y))
    with pytest.raises(InputError, match="1 inputs given, the module takes 2"):
        model(torch.zeros(3, 4))
    with pytest.raises(InputError, match="input y has 1 dimensions, expected 2"):
        model(torch.zeros(3, 4), torch.zeros(6))
