"""Saving and loading compiled models: the same bits, small, and nothing damaged is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import panguq
from panguq.artifact import shared_weights
from panguq.compiled_model import load
from panguq.errors import PanguqError, StorageError, VerifyError
from panguq.files.manifest import MANIFEST
from panguq.formats.own import storage
from panguq.formats.own.model_folder import save_model
from panguq.formats.own.storage import read_folder, write_folder
from panguq.ir.edit import set_tensor, weights_of
from tests.model_folders import make_model, make_tokenizer, shake

IDS = torch.arange(3, 67)[None]


def compiled_model(recipe: str, tokenizer: Any = None, **changed: Any) -> Any:
    model = make_model(hidden_size=256, intermediate_size=512, **changed)
    return panguq.compile(model, recipe, calibration=IDS, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def w8a8() -> Any:
    return compiled_model("w8a8", make_tokenizer())


@pytest.fixture(scope="module")
def w4a16() -> Any:
    return compiled_model("w4a16", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def saved(w8a8: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "w8a8"
    w8a8.save(path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def changed(saved: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose files were changed and whose manifest was made anew to fit: no accident."""
    folder = read_folder(saved)
    files = {n: folder.data(n) for n in folder.names if n not in folder.manifest["weights"]}
    change(files)
    write_folder(path, files, folder.tensors())
    return path


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_a_loaded_model_computes_the_same_bits(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    model.save(tmp_path / "out")
    loaded: Any = panguq.load(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for stage in model.stages:
        one, other = model.at_stage(stage), load(tmp_path / "out", stage)
        assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_a_loaded_model_generates_the_same_tokens(w8a8: Any, saved: Path) -> None:
    options = dict(max_new_tokens=12, attention_mask=torch.ones(1, 8, dtype=torch.long))
    expected = w8a8.generate(IDS[:, :8], **options)
    assert expected.shape == (1, 20)
    assert torch.equal(panguq.load(saved).generate(IDS[:, :8], **options), expected)


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_saving_what_was_loaded_gives_the_same_bytes(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name).save(tmp_path / "first")
    load(tmp_path / "first").save(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_what_comes_with_the_model_comes_back(w8a8: Any, saved: Path) -> None:
    loaded: Any = panguq.load(saved)
    assert loaded.recipe == w8a8.recipe
    assert loaded.report == w8a8.report
    assert loaded.interface == w8a8.interface
    assert loaded.config.to_dict() == w8a8.config.to_dict()
    assert type(loaded.config) is transformers.LlamaConfig
    assert loaded.tokenizer("a text").input_ids == w8a8.tokenizer("a text").input_ids


@pytest.mark.parametrize(("release", "meant"), [("0.1.0", "float32"), ("0.2.0", "bfloat16")])
def test_floats_of_the_first_release_stay_float32(
    release: str, meant: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipes say `precision: bfloat16`, which was of kernels of quantized weights alone."""

    def change(files: dict[str, Any]) -> None:
        spelled = files["recipe.yaml"].replace(b"precision: auto", b"precision: bfloat16")
        assert spelled != files["recipe.yaml"]
        files["recipe.yaml"] = spelled

    monkeypatch.setattr(storage, "version", lambda _: release)
    assert panguq.load(changed(saved, tmp_path / "out", change)).recipe.precision == meant


def test_other_modules_are_saved_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    x = torch.randn(3, 64)
    compiled = panguq.compile(module, "w8a8", calibration=[x], example_inputs=(x,))
    compiled.save(tmp_path / "out")
    assert "config.json" not in contents(tmp_path / "out")
    assert torch.equal(panguq.load(tmp_path / "out")(x), compiled(x))


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96),
        transformers.Qwen2Config(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=96, tie_word_embeddings=True,
        ),
    ],
)  # fmt: skip
def test_other_architectures_come_back(config: Any, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(model)
    compiled = panguq.compile(model, "float", calibration=IDS)
    compiled.save(tmp_path / "first")
    loaded: Any = load(tmp_path / "first")
    assert type(loaded.config) is type(config)
    assert torch.equal(loaded(IDS).logits, compiled(IDS).logits)
    loaded.save(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_config_of_unknown_type_stays_plain_data(saved: Path, tmp_path: Path) -> None:
    def change(files: dict[str, Any]) -> None:
        config = json.loads(files["config.json"])
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
        files["config.json"] = json.dumps(config)

    loaded: Any = load(changed(saved, tmp_path / "mine", change))
    assert loaded.config.model_type == "mine"
    assert loaded.config.hidden_size == 256
    assert loaded(IDS).logits.isfinite().all()
    loaded.save(tmp_path / "first")
    load(tmp_path / "first").save(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_weights_are_memory_mapped(saved: Path) -> None:
    load(saved)
    kept = load(saved)
    codes = weights_of(kept.graph)["model.layers.0.mlp.up_proj.weight_codes"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith("weights.safetensors")]
    assert any(int(low, 16) <= codes.data_ptr() < int(high, 16) for low, high in ranges)


# --- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "limit"), [("w8a8", 1.1), ("w4a16", 0.6)])
def test_decoder_linears_take_few_bytes_on_disk(
    name: str, limit: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    model.save(tmp_path / "out")
    rows = [m for m in model.report.matmuls if not m.gives_logits]
    weights = sum(m.n * m.k for m in rows if not m.is_side)
    tensors = read_folder(tmp_path / "out").tensors()
    stored = sum(t.nbytes for n, t in tensors.items() if "_proj." in n)
    assert stored >= weights // 2
    assert stored / weights <= limit
    whole = sum(len(data) for n, data in contents(tmp_path / "out").items() if "weights" in n)
    assert whole <= sum(t.nbytes for t in {t.data_ptr(): t for t in tensors.values()}.values()) + (
        1 << 16
    )


def test_stages_share_their_weights(w8a8: Any, saved: Path) -> None:
    names = set().union(*(weights_of(graph) for graph in w8a8.stages.values()))
    assert set(read_folder(saved).tensors()) == names


def test_one_name_for_two_weights_is_a_defect(w4a16: Any) -> None:
    stages = load_copy(w4a16)
    name = next(iter(weights_of(stages["lowered"])))
    set_tensor(stages["lowered"], name, torch.zeros(3))
    with pytest.raises(VerifyError, match=name):
        shared_weights(stages)


def load_copy(model: Any) -> Any:
    from panguq.ir.edit import clone

    return {stage: clone(graph) for stage, graph in model.stages.items()}


# --- bad input ----------------------------------------------------------------------------------


def refusal(path: Path, stage: str = "lowered") -> PanguqError:
    with pytest.raises(PanguqError) as caught:
        load(path, stage)
    assert caught.value.hint
    return caught.value


def test_an_existing_folder_is_not_overwritten_unless_asked(w8a8: Any, saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(StorageError, match="already exists"):
        w8a8.save(saved)
    save_model(w8a8.artifact, saved, overwrite=True)
    assert contents(saved) == before


def test_an_unknown_stage(saved: Path) -> None:
    error = refusal(saved, "lowerd")
    assert "no stage 'lowerd'" in error.message
    assert "fake-quant, lowered" in error.hint


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing").message


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert MANIFEST in refusal(tmp_path).message


def test_every_file_is_missed_and_every_truncation_seen(
    saved: Path, tmp_path: Path, w8a8: Any
) -> None:
    w8a8.save(tmp_path / "out")
    for file in sorted((tmp_path / "out").iterdir()):
        data = file.read_bytes()
        file.unlink()
        assert f"{file.name}: missing" in refusal(tmp_path / "out").message
        for damaged in (data[:-1], data[: len(data) // 2] + b"X" + data[len(data) // 2 + 1 :]):
            file.write_bytes(damaged)
            assert file.name in refusal(tmp_path / "out").message
        file.write_bytes(data)
    assert contents(tmp_path / "out") == contents(saved)


TAMPERED: dict[str, tuple[str, Callable[[bytes], bytes | str]]] = {
    "an interface without inputs": ("interface.json", lambda d: b"{}"),
    "an interface that is text": ("interface.json", lambda d: b'"x"'),
    "other inputs": ("interface.json", lambda d: d.replace(b'"position_ids"', b'"positions"')),
    "a report of another kind": ("report.json", lambda d: b"[1]"),
    "a recipe that is a list": ("recipe.yaml", lambda d: b"- 1"),
    "an unknown pass": ("recipe.yaml", lambda d: d.replace(b"smoothquant", b"smoothquart")),
    "a YAML tag": ("recipe.yaml", lambda d: b"!!python/object/apply:os.system ['true']"),
    "an op outside the list": (
        "graph.lowered.json",
        lambda d: d.replace(b"aten.add.Tensor", b"os.system"),
    ),
    "a weight that is not there": ("graph.lowered.json", lambda d: d.replace(b"norm.", b"nrom.")),
    "a config that is no object": ("config.json", lambda d: b"[]"),
    "a config with a wrong value": (
        "config.json",
        lambda d: d.replace(b'"hidden_size": 256', b'"hidden_size": "many"'),
    ),
    "a generation config that is text": ("generation_config.json", lambda d: b'"x"'),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_fits_the_checksums_is_checked_all_the_same(
    what: str, saved: Path, tmp_path: Path
) -> None:
    name, edit = TAMPERED[what]

    def change(files: dict[str, Any]) -> None:
        assert edit(files[name]) != files[name]
        files[name] = edit(files[name])

    error = refusal(changed(saved, tmp_path / "out", change))
    assert isinstance(error, StorageError)
    assert name in error.message


@pytest.mark.parametrize(
    "name", ["interface.json", "recipe.yaml", "report.json", "config.json", "graph.lowered.json"]
)
def test_a_file_that_the_manifest_leaves_out(name: str, saved: Path, tmp_path: Path) -> None:
    refusal(changed(saved, tmp_path / "out", lambda files: files.pop(name)))


def test_a_tokenizer_that_does_not_load_costs_only_the_tokenizer(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(files: dict[str, Any]) -> None:
        files["tokenizer.json"] = b"{}"

    loaded: Any = load(changed(saved, tmp_path / "out", change))
    assert loaded.tokenizer is None
    assert "no tokenizer" in caplog.text
    assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", "EVIL {{ messages }}"),
        ("chat_template.json", '{"chat_template": "EVIL"}'),
        ("added_tokens.json", '{"quantized": 263}'),
        ("special_tokens_map.json", '{"unk_token": "quantized"}'),
        ("tokenizer.4.0.0.json", "{}"),
        ("vocab.txt", "a"),
        ("additional_chat_templates", None),
    ],
)
def test_a_file_that_was_added_is_not_read_and_that_is_said(
    name: str, text: str | None, w8a8: Any, saved: Path, tmp_path: Path, caplog: Any
) -> None:
    """Loaders of tokenizers look into a folder for a dozen names."""
    folder = shutil.copytree(saved, tmp_path / "out")
    if text is None:
        (folder / name).mkdir()
        (folder / name / "evil.jinja").write_text("EVIL")
    else:
        (folder / name).write_text(text)
    tokenizer: Any = load(folder).tokenizer
    assert f"not read: {name}" in caplog.text
    assert tokenizer("A quantized text").input_ids == w8a8.tokenizer("A quantized text").input_ids
    assert tokenizer.chat_template is None and len(tokenizer) == len(w8a8.tokenizer)
    assert tokenizer.name_or_path == str(folder)


@pytest.mark.parametrize("dtype", ["load", "int8", "os", "float32\n"])
def test_the_dtype_of_a_graph_is_a_floating_point_dtype(
    dtype: str, saved: Path, tmp_path: Path
) -> None:
    def change(files: dict[str, Any]) -> None:
        interface = json.loads(files["interface.json"]) | {"float_dtype": dtype}
        files["interface.json"] = json.dumps(interface)

    error = refusal(changed(saved, tmp_path / "out", change))
    assert isinstance(error, StorageError) and "float_dtype" in error.message


def test_code_beside_a_model_is_never_run(w8a8: Any, tmp_path: Path) -> None:
    w8a8.save(tmp_path / "out")
    for name in ("modeling_mine.py", "tokenization_mine.py", "__init__.py"):
        (tmp_path / "out" / name).write_text("raise SystemExit('this ran')")
    load(tmp_path / "out")
