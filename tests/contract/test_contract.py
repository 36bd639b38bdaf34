"""What panguq promises, once: load, compile for each target, generate in every way, save, serve.

It is run with every set of releases that the bounds in pyproject.toml speak of, so it is small:
tiny random models, base dependencies, and one test for each package that is there.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

import panguq
from panguq.ir.kv_cache import CACHE_NAME, cache_of
from panguq.lowering.targets import TARGETS
from tests.model_folders import TEXT, make_folder, make_model, make_tokenizer

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, :5] = 0  # the second row is padded on the left
NOISE = {"w8a8-dynamic": 0.01, "w4a16": 0.1}  # of the logits, to the signal: 20 dB and 10 dB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers writes it, with a tokenizer."""
    return make_folder(tmp_path_factory.mktemp("model") / "source", make_model(eos_token_id=1))


@pytest.fixture(scope="module")
def source(folder: Path) -> Any:
    return panguq.load_pretrained(folder)


@pytest.fixture(scope="module")
def compiled(source: Any) -> Any:
    """The float recipe: its results are the source model's."""
    model = panguq.compile(source, "float", tokenizer=make_tokenizer())
    assert model.report.target == "cpu"
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- load, compile, save ------------------------------------------------------------------------


def test_the_float_recipe_computes_what_the_source_model_does(source: Any, compiled: Any) -> None:
    torch.testing.assert_close(logits(compiled), logits(source), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = source(input_ids=IDS, attention_mask=MASK).logits
    found = compiled(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", NOISE)
def test_a_quantized_model_is_saved_and_loaded(recipe: str, source: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = panguq.compile(source, recipe, calibration=[TEXT] * 4, tokenizer=tokenizer)
    noise = (logits(model) - logits(source)).square().mean() / logits(source).square().mean()
    assert noise < NOISE[recipe]
    model.save(tmp_path / "out")
    loaded = panguq.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.tokenizer is not None
    options: Any = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles(target: str, source: Any) -> None:
    model: Any = panguq.compile(source, "w8a8-dynamic", calibration=IDS, target=target)
    assert any(matmul.scheme.startswith("W8A8") for matmul in model.report.matmuls)
    assert logits(model).isfinite().all()
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize("format", ["compressed-tensors", "ascend"])
def test_a_folder_for_servers_is_written(format: str, source: Any, tmp_path: Path) -> None:
    target = "ascend910b1" if format == "ascend" else "cpu"
    model = panguq.compile(
        source, "w8a8-dynamic", calibration=IDS, target=target, tokenizer=make_tokenizer()
    )
    model.save(tmp_path / "out", format=format)
    assert (tmp_path / "out" / "config.json").exists()
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_an_onnx_file_is_written(compiled: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    compiled.export_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_any_module_compiles() -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    model = torch.nn.Sequential(*layers)
    small = panguq.compile(model, "w8a16", example_inputs=(torch.randn(4, 64),))
    x = torch.randn(9, 64)
    assert (small(x) - model(x)).abs().max() < 0.1


# --- generate -----------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "chunked": {"prefill_chunk_size": 5, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_generate(way: str, padded: bool, source: Any, compiled: Any) -> None:
    options = {"max_new_tokens": 5, **WAYS[way], **({"attention_mask": MASK} if padded else {})}
    results = []
    for model in (source, compiled):
        torch.manual_seed(0)
        results.append(model.generate(IDS, **options))
    assert torch.equal(*results)


def test_generate_with_helpers(source: Any, compiled: Any) -> None:
    tokenizer, ids = make_tokenizer(), IDS[:1].repeat(1, 2)
    options: Any = dict(max_new_tokens=6, do_sample=False)
    plain = source.generate(ids, **options)
    assert torch.equal(compiled.generate(ids, assistant_model=source, **options), plain)
    assert torch.equal(source.generate(ids, assistant_model=compiled, **options), plain)
    assert torch.equal(compiled.generate(ids, prompt_lookup_num_tokens=2, **options), plain)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    assert torch.equal(compiled.generate(ids, streamer=streamer, **options), plain)
    assert "".join(streamer) == tokenizer.decode(plain[0, ids.shape[1] :])
    stop = dict(stop_strings=[tokenizer.decode(plain[0, -3:-2])], tokenizer=tokenizer)
    stopped = [model.generate(ids, **stop, **options) for model in (source, compiled)]
    assert torch.equal(*stopped)


def test_scores_and_the_cache_are_returned(source: Any, compiled: Any) -> None:
    options: Any = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    results = [m.generate(IDS, output_logits=True, **options) for m in (source, compiled)]
    for one, other in zip(*(result.logits for result in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert cache_of(results[1]).get_seq_length() == cache_of(results[0]).get_seq_length() == 14


@pytest.mark.parametrize("kind", ["dynamic", "of a config", "static"])
def test_a_cache_is_used_again(kind: str, source: Any, compiled: Any) -> None:
    results = []
    for model in (source, compiled):
        cache: Any = {
            "dynamic": DynamicCache,
            "of a config": lambda: DynamicCache(config=source.config),
            "static": lambda: StaticCache(config=source.config, max_cache_len=20),
        }[kind]()
        options: Any = {CACHE_NAME: cache, "max_new_tokens": 3, "do_sample": False}
        first = model.generate(IDS, **options)
        results.append(model.generate(torch.cat((first, IDS[:, :2]), 1), **options))
    assert torch.equal(*results)


def test_what_cannot_be_served_is_refused(compiled: Any) -> None:
    for refused in ({"cache_implementation": "quantized"}, {"output_attentions": True}):
        with pytest.raises(panguq.InputError, match=next(iter(refused))):
            compiled.generate(IDS, max_new_tokens=2, **refused)
    with pytest.raises(panguq.InputError, match="does not become"):
        compiled.half()


# --- other tools --------------------------------------------------------------------------------


def test_weights_go_through_a_file(compiled: Any, tmp_path: Path) -> None:
    torch.save(compiled.state_dict(), tmp_path / "weights.pt")
    other = copy.deepcopy(compiled)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(logits(other), logits(compiled))


def test_torch_compile(compiled: Any) -> None:
    faster = torch.compile(compiled, backend="aot_eager")
    torch.testing.assert_close(faster(IDS).logits, logits(compiled), rtol=1e-4, atol=1e-4)


def test_a_pipeline(source: Any, compiled: Any) -> None:
    texts = []
    for model in (source, compiled):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer())
        texts.append(pipe(["hello", "a b c"], max_new_tokens=4, do_sample=False, batch_size=2))
    assert texts[0] == texts[1]


def test_accelerate(compiled: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the extra gguf is not installed")
    prepared = accelerate.Accelerator(cpu=True).prepare_model(compiled, evaluation_mode=True)
    assert torch.equal(logits(prepared), logits(compiled))
    placed = accelerate.dispatch_model(copy.copy(compiled), device_map={"": "cpu"})
    assert torch.equal(logits(placed), logits(compiled))


def test_lm_eval(source: Any, compiled: Any) -> None:
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="the extra eval is not installed"
    )
    from lm_eval.api.instance import Instance

    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<bos>"  # the token that ends the source model's texts
    questions = [("a quantized", " model"), ("its", " scales")]
    scored, texts = [], []
    for model in (source, compiled):
        harness = huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64
        )
        asked = [Instance("loglikelihood", {}, question, 0) for question in questions]
        scored.append([score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)])
        prompt = ("a model", {"until": ["zz"], "max_gen_toks": 4})
        wanted = [Instance("generate_until", {}, prompt, 0)]
        texts.append(harness.generate_until(wanted, disable_tqdm=True))
    torch.testing.assert_close(torch.tensor(scored[1]), torch.tensor(scored[0]), rtol=1e-4, atol=0)
    assert texts[0] == texts[1]
