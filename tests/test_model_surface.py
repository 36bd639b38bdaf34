"""A compiled model among torch's and transformers' tools: each works, or says what to do."""

from __future__ import annotations

import copy
import functools
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.errors import InputError, PanguqError
from tests.model_folders import make_model

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))


@functools.cache
def source(seed: int = 0) -> Any:
    return make_model(seed)


@functools.cache
def compiled(recipe: str = "w8a8-dynamic", seed: int = 0) -> CompiledCausalLM:
    model = panguq.compile(source(seed), recipe, calibration=IDS)
    assert isinstance(model, CompiledCausalLM)
    return model


def logits(model: Any) -> Tensor:
    return model(IDS).logits


# --- weights ------------------------------------------------------------------------------------


def test_weights_are_listed_once_each() -> None:
    model = compiled("float")
    names = dict(model.named_parameters())
    assert torch.equal(names["model.embed_tokens.weight"], source().model.embed_tokens.weight)
    assert not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == model.dtype == torch.float32
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    embedding = source().model.embed_tokens.weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embedding
    assert model.num_parameters(only_trainable=True) == 0


def test_state_dict_goes_through_a_file_into_another_compile() -> None:
    file = io.BytesIO()
    torch.save(compiled().state_dict(), file)
    file.seek(0)
    other = copy.copy(compiled(seed=1))
    assert not torch.equal(logits(other), logits(compiled()))
    loaded = other.load_state_dict(torch.load(file))
    assert not loaded.missing_keys and not loaded.unexpected_keys
    for stage in ("fake-quant", "lowered"):
        assert torch.equal(logits(other.at_stage(stage)), logits(compiled().at_stage(stage)))
    assert not torch.equal(logits(compiled(seed=1)), logits(compiled()))  # it shared the weights


def test_loading_changes_no_source_model() -> None:
    before = logits(source())
    model = copy.copy(compiled("float"))
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    assert torch.equal(logits(source()), before)
    assert not torch.equal(logits(model), logits(compiled("float")))


def test_a_module_around_it_saves_and_loads_it() -> None:
    outer = nn.ModuleDict({"lm": compiled()})
    other = nn.ModuleDict({"lm": copy.copy(compiled(seed=1))})
    other.load_state_dict(outer.state_dict())
    assert torch.equal(logits(other["lm"]), logits(compiled()))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lm.more"'):
        other.load_state_dict({**outer.state_dict(), "lm.more": torch.zeros(1)})


NAME = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, f'Missing key.*"{NAME}"'),
        (lambda s: {"module." + name: t for name, t in s.items()}, "Missing key"),
        (lambda s: {**s, "more.weight": torch.zeros(1)}, 'Unexpected key.*"more.weight"'),
        (lambda s: {**s, NAME: s[NAME][:-1]}, rf"{NAME}: a tensor \[263, 128\] torch.float32"),
        (lambda s: {**s, NAME: s[NAME].half()}, rf"{NAME}: .* torch.float16 where the model has"),
        (lambda s: {**s, NAME: None}, f"{NAME}: a NoneType where the model has a tensor"),
        (lambda s: source().state_dict(), "Missing key"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(change: Callable[[Any], Any], message: str) -> None:
    model = copy.copy(compiled())
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(change(model.state_dict()))
    if "a tensor" in message or "where" in message:
        assert torch.equal(logits(model), logits(compiled()))  # nothing was taken


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    made = copy.deepcopy(compiled())
    assert torch.equal(logits(made), logits(compiled()))
    own = {p.data_ptr() for p in compiled().parameters()}
    assert not own & {p.data_ptr() for p in made.parameters()}
    assert copy.deepcopy([compiled()] * 2)[0] is not compiled()
    shared = copy.copy(compiled())
    assert own == {p.data_ptr() for p in shared.parameters()}


def test_tied_weights_stay_tied() -> None:
    tied = panguq.compile(make_model(tie_word_embeddings=True), "float")
    assert len(list(tied.parameters())) == len({p.data_ptr() for p in tied.parameters()})
    for made in (copy.deepcopy(tied), copy.copy(tied)):
        made.load_state_dict(tied.state_dict())
        assert len(list(made.parameters())) == len(list(tied.parameters()))
        assert torch.equal(logits(made), logits(tied))


@pytest.mark.parametrize(
    "write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "save"]
)
def test_pickles_are_refused(write: Callable[[Any], Any]) -> None:
    with pytest.raises(PanguqError, match=r"not pickled.*\n.*compiled\.save\(folder\)"):
        write(compiled())


# --- dtype, device, training --------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    ],
)
def test_another_dtype_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=r"compiled for torch.float32 and does not become torch"):
        call(compiled())


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.to("cpu", non_blocking=True),
        lambda m: m.to(device=torch.device("cpu"), dtype=torch.float32),
        lambda m: m.to(torch.zeros(1)),
        lambda m: m.cpu(),
        lambda m: m.eval(),
        lambda m: m.train(False),
        lambda m: m.requires_grad_(False),
    ],
)
def test_what_it_is_already_gives_the_model(call: Callable[[Any], Any]) -> None:
    assert call(compiled()) is compiled()
    assert not compiled().training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.cuda(), "do not run on cuda"),
        (lambda m: m.to(0), "do not run on cuda:0"),
        (lambda m: m.to("meta"), "do not run on meta"),
        (lambda m: m.npu(), "compiled for cpu does not run on npu"),
        (lambda m: m.npu(1), "compiled for cpu does not run on npu:1"),
        (lambda m: m.train(), "is not trained"),
        (lambda m: m.requires_grad_(), "have no gradients"),
        (lambda m: m.gradient_checkpointing_enable(), "is not trained"),
        (lambda m: m.share_memory(), "are not converted one by one"),
        (lambda m: m.to_empty(device="cpu"), "are not converted one by one"),
        (lambda m: m.resize_token_embeddings(300), "embeddings are fixed"),
        (lambda m: m.set_output_embeddings(None), "embeddings are fixed"),
        (lambda m: m.save_pretrained("out"), r"compiled\.save\(folder\)"),
        (lambda m: m.from_pretrained("out"), r"panguq\.load\(folder\)"),
    ],
)
def test_what_it_cannot_do_is_refused(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(PanguqError, match=message):
        call(compiled())


# --- transformers' questions --------------------------------------------------------------------


def test_embeddings() -> None:
    model = compiled("float")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(table(IDS), source().get_input_embeddings()(IDS))
    hidden = torch.randn(1, 128)
    assert torch.equal(head(hidden), source().lm_head(hidden))
    assert torch.equal(compiled().get_input_embeddings()(IDS), table(IDS))
    model.tie_weights()


def test_a_quantized_head_is_no_linear_layer() -> None:
    model = panguq.compile(
        make_model(num_hidden_layers=1),
        {
            "name": "all",
            "schemes": {"*": "W8A16", "lm_head": "W8A16"},
            "passes": ["insert-fake-quant", "quantize-weights"],
        },
    )
    with pytest.raises(InputError, match="is not a float one"):
        model.get_output_embeddings()


def test_what_a_transformers_model_is_asked_for() -> None:
    model = compiled()
    assert model.can_generate() and type(model).can_generate()
    assert model.main_input_name == "input_ids"
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert isinstance(model.name_or_path, str)
    assert not hasattr(model, "hf_device_map") and not hasattr(model, "hf_quantizer")


# --- processes, threads, torch.compile ----------------------------------------------------------


def _answer(queue: Any) -> None:
    queue.put(logits(compiled()).tolist())


def test_a_forked_process_runs_it() -> None:
    expected = logits(compiled()).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_answer, args=(queue,))
    child.start()
    assert queue.get() == expected
    child.join(30)
    assert child.exitcode == 0


def test_threads_share_it() -> None:
    model, expected = copy.copy(compiled()), logits(compiled())
    found: list[Tensor] = []
    made: list[Any] = []

    def run() -> None:
        made.append(model.executable)
        found.extend(logits(model) for _ in range(3))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(torch.equal(one, expected) for one in found)
    assert len({id(one) for one in made}) == 1


@pytest.mark.parametrize("recipe", ["float", "w8a8-dynamic"])
def test_torch_compile_gives_the_same(recipe: str) -> None:
    model = copy.copy(compiled(recipe))
    faster = torch.compile(model, backend="aot_eager")
    first = faster(IDS)
    torch.testing.assert_close(first.logits, logits(compiled(recipe)), rtol=1e-4, atol=1e-4)
    then = faster(IDS[:, :1], past_key_values=first.past_key_values)
    assert then.past_key_values.get_seq_length() == 10


def test_autocast_changes_no_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(compiled())
    assert found.dtype == torch.float32
    assert torch.equal(found, logits(compiled()))


def test_parts_of_the_source_model_are_not_there() -> None:
    assert not hasattr(compiled(), "model")
    with pytest.raises(AttributeError, match="no submodule 'lm_head': it runs one graph"):
        _ = compiled().lm_head
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = compiled().other


def test_hooks_are_called() -> None:
    model, seen = copy.copy(compiled()), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.shape))
    model(IDS)
    assert seen == [torch.Size([2, 9, 264])]
