"""AscendV1 checkpoints: every tensor, what is refused, and the folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import panguq
from panguq.check.report import check_folder
from panguq.errors import ExportError, PanguqError, StorageError
from panguq.formats.checkpoint.ascend_v1 import DESCRIPTION, save_ascend_v1
from panguq.formats.checkpoint.ascend_v1_tensors import pack_rows, unpack_rows
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.formats.checkpoint.served_files import served_config
from panguq.ir.edit import find_label, get_tensor
from panguq.models.hf import read_config
from tests.model_folders import make_model, make_tokenizer
from tests.shared_traces import shared_traces

IDS = torch.arange(3, 67)[None]
SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


PASSES = ["calibrate", "insert-fake-quant", "quantize-weights"]


def recipe(schemes: str | dict[str, str], passes: list[Any] = PASSES) -> Any:
    listed = {"*": schemes} if isinstance(schemes, str) else schemes
    return panguq.Recipe.of({"name": "r", "description": "r", "schemes": listed, "passes": passes})


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


@functools.cache
def model_of(dtype: str, sizes: tuple[tuple[str, Any], ...]) -> nn.Module:
    """One model of a size, never to be changed."""
    return make_model(**dict(sizes)).to(getattr(torch, dtype))


def compiled(
    schemes: str | dict[str, str] = "W8A8", dtype: str = "bfloat16", **changed: Any
) -> Any:
    """A tiny Llama, biased in attention, compiled for the CPU (W4A8: for an NPU)."""
    four = schemes == "W4A8"
    sizes = {**SIZES, "attention_bias": not four, **changed}
    return panguq.compile(
        model_of(dtype, tuple(sizes.items())),
        recipe(schemes),
        calibration=IDS,
        tokenizer=make_tokenizer(),
        target="ascend910b1" if four else "cpu",
    )


@pytest.fixture(scope="module")
def w8a8() -> Any:
    return compiled()


@pytest.fixture(scope="module")
def w8a8_folder(w8a8: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ascend") / "w8a8"
    save_ascend_v1(w8a8.artifact, path)
    return path


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def form(tensor: Tensor) -> tuple[torch.dtype, list[int]]:
    return tensor.dtype, list(tensor.shape)


# --- tensors ------------------------------------------------------------------------------------

F32, I8, I32, I64 = torch.float32, torch.int8, torch.int32, torch.int64
PER_CHANNEL = {
    "weight": (I8, [256, 512]),
    "weight_scale": (F32, [256, 1]),
    "weight_offset": (F32, [256, 1]),
}
STATIC = {
    "input_scale": (F32, [1]),
    "input_offset": (F32, [1]),
    "deq_scale": (F32, [256]),
    "quant_bias": (I32, [256]),
}
W4A8 = {
    "weight": (I8, [128, 512]),
    "weight_scale": (F32, [256, 1]),
    "weight_offset": (F32, [256, 1]),
    "weight_scale_second": (F32, [256, 2]),
    "weight_offset_second": (F32, [256, 2]),
    "scale_bias": (F32, [256, 16]),
}


@pytest.mark.parametrize(
    ("scheme", "type_", "dtype", "expected"),
    [
        ("W8A8", "W8A8", "bfloat16", PER_CHANNEL | STATIC),
        ("W8A8", "W8A8", "float16", PER_CHANNEL | STATIC | {"deq_scale": (I64, [256])}),
        ("W8A8_DYNAMIC", "W8A8_DYNAMIC", "bfloat16", PER_CHANNEL),
        ("W8A16", "W8A16", "float16", PER_CHANNEL),
        ("W4A8", "W4A8_DYNAMIC", "bfloat16", W4A8),
    ],
)
def test_every_tensor_has_the_documented_form(
    scheme: str, type_: str, dtype: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    save_ascend_v1(compiled(scheme, dtype).artifact, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    leaves = {n.removeprefix(f"{DOWN}."): n for n in tensors if n.startswith(DOWN)}
    assert {leaf: form(tensors[name]) for leaf, name in leaves.items()} == expected
    assert {described[name] for name in leaves.values()} == {type_}
    assert described["model_quant_type"] == type_ and described["version"] == "1.0.0"
    assert described["group_size"] == (256 if scheme == "W4A8" else 0)
    # Everything else is described too, lm_head and embeddings and norms and biases, as FLOAT.
    assert {name for name in described if "." in name} == tensors.keys()
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert described[name] == "FLOAT" and tensors[name].dtype == getattr(torch, dtype)
    if scheme != "W4A8":
        assert described[f"{Q}.bias"] == "FLOAT" and tensors[f"{Q}.bias"].dtype == F32
    report = check_folder(tmp_path / "out")
    assert report.servers["mindie"] == "takes"
    assert report.servers["vllm-ascend"] == "takes"
    assert report.servers["sglang"] == ("takes" if scheme.startswith("W8A8") else "refuses")
    assert {f.rule for f in report.findings} <= {"no-kernel", "computes-otherwise", "w8a16-bias"}


def test_w8a8_numbers_follow_the_formulas(w8a8: Any, w8a8_folder: Path) -> None:
    tensors = stored(w8a8_folder)
    graph = w8a8.stages["fake-quant"]
    weight_scale = get_tensor(graph, f"{Q}.weight_scale").double().reshape(-1)
    matmul = find_label(graph, f"{Q}:linear")
    quantize = matmul.args[0].args[0]
    step = get_tensor(graph, str(quantize.args[1].target)).double()
    zero = get_tensor(graph, str(quantize.args[2].target)).double()
    assert torch.equal(tensors[f"{Q}.input_scale"].double(), step)
    assert torch.equal(tensors[f"{Q}.input_offset"].double(), zero)
    deq = tensors[f"{Q}.deq_scale"].double()
    assert torch.equal(deq, (step * weight_scale).float().double())
    sums = tensors[f"{Q}.weight"].double().sum(1)
    wanted = tensors[f"{Q}.bias"].double() / deq - zero * sums
    assert torch.equal(tensors[f"{Q}.quant_bias"].double(), wanted.round())
    assert float(step) == float(step.to(torch.bfloat16)), "a value that the server keeps"


def test_float16_scales_are_the_bits_of_a_float32(tmp_path: Path) -> None:
    save_ascend_v1(compiled(dtype="float16").artifact, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    deq = tensors[f"{DOWN}.deq_scale"].to(I32).view(F32)
    product = tensors[f"{DOWN}.input_scale"] * tensors[f"{DOWN}.weight_scale"].reshape(-1)
    assert torch.equal(deq, product)


def test_rows_are_packed_in_pairs() -> None:
    codes = torch.tensor([[-8, 7], [1, -1], [0, 3], [-4, 2]], dtype=I8)
    packed = pack_rows(codes)
    assert packed.tolist() == [[0x18, 0xF7 - 256], [0xC0 - 256, 0x23]]
    assert torch.equal(unpack_rows(packed), codes)
    random = torch.randint(-8, 8, (64, 24), dtype=I8)
    assert torch.equal(unpack_rows(pack_rows(random)), random)


def test_mixed_types_are_named_one_by_one(tmp_path: Path) -> None:
    schemes = {"*": "W8A8_DYNAMIC", "*.self_attn.[qkv]_proj": "W8A8", "*.down_proj": "FLOAT"}
    save_ascend_v1(compiled(schemes).artifact, tmp_path / "out")
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert described[f"{Q}.weight"] == "W8A8" and described[f"{DOWN}.weight"] == "FLOAT"
    assert described["model.layers.0.self_attn.o_proj.weight"] == "W8A8_DYNAMIC"
    assert check_folder(tmp_path / "out").findings == ()


# --- other files --------------------------------------------------------------------------------


def test_the_config_is_understood_by_transformers_4_and_5(w8a8_folder: Path) -> None:
    data = json.loads((w8a8_folder / "config.json").read_text())
    assert data["torch_dtype"] == data["dtype"] == "bfloat16"
    assert data["architectures"] == ["LlamaForCausalLM"]
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 10000.0
    assert "quantization_config" not in data
    config = read_config(w8a8_folder)
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


def test_scaled_rotary_embeddings_keep_their_old_spelling() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 16e6}
    config = make_model(num_hidden_layers=1, rope_parameters=rope).config
    data = served_config(config, torch.float16)
    assert data["rope_theta"] == 16e6 and data["torch_dtype"] == "float16"
    assert data["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_the_tokenizer_comes_along(w8a8: Any, w8a8_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(w8a8_folder)
    assert tokenizer("a text").input_ids == w8a8.tokenizer("a text").input_ids


def test_a_tied_head_is_described_and_not_written_twice(tmp_path: Path) -> None:
    save_ascend_v1(compiled(tie_word_embeddings=True).artifact, tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert described["lm_head.weight"] == "FLOAT"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert check_folder(tmp_path / "out").findings == ()


def test_a_quantized_head_is_no_longer_tied(tmp_path: Path) -> None:
    model = compiled({"*": "W8A8", "lm_head": "W8A8_DYNAMIC"}, tie_word_embeddings=True)
    save_ascend_v1(model.artifact, tmp_path / "out")
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert described["lm_head.weight"] == "W8A8_DYNAMIC"
    assert described["model.embed_tokens.weight"] == "FLOAT"
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert check_folder(tmp_path / "out").findings == ()


def test_large_models_are_written_in_shards(w8a8: Any, w8a8_folder: Path, tmp_path: Path) -> None:
    save_ascend_v1(w8a8.artifact, tmp_path / "out", shard_bytes=200_000)
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names[0] == f"quant_model_weights-00001-of-{count:05}.safetensors"
    index = json.loads(
        (tmp_path / "out" / "quant_model_weights.safetensors.index.json").read_text()
    )
    assert set(index["weight_map"].values()) == set(names)
    one, many = stored(w8a8_folder), stored(tmp_path / "out")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert check_folder(tmp_path / "out").findings == ()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compiled("W4A16"), "vllm-ascend: it has no dense W4A16"),
        (lambda: compiled("W4A16_ASYM"), "mindie: it reads msModelSlim's older per-group W4A16"),
        (lambda: compiled("W8A8", "float32"), "take float16 and bfloat16 alone"),
        (lambda: compiled("W4A8", attention_bias=True), "mindie: its int8 x int4 kernel takes no"),
        (
            lambda: panguq.compile(
                make_model(**SIZES).bfloat16(), "float", calibration=IDS
            ).at_stage("lowered"),
            "",
        ),
    ],
)
def test_what_no_server_takes_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    model = make()
    if not message:  # a float model is fine
        save_ascend_v1(model.artifact, tmp_path / "out")
        return
    with pytest.raises(ExportError, match=message) as caught:
        save_ascend_v1(model.artifact, tmp_path / "out")
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_split_outliers_are_refused(tmp_path: Path) -> None:
    split = {"outliers": {"treatment": "split", "threshold": 1.0}}
    passes = [{"calibrate": {"observer": "percentile"}}, split, *PASSES[1:]]
    model = make_model(**SIZES).bfloat16()
    compiled_so = panguq.compile(model, recipe("W8A8", passes), calibration=IDS)
    with pytest.raises(ExportError, match="split off into a float matmul"):
        save_ascend_v1(compiled_so.artifact, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_int32_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_model(**SIZES, attention_bias=True).bfloat16()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(1e9)
        model.model.layers[0].self_attn.q_proj.weight.mul_(1e-6)
    large = panguq.compile(model, recipe("W8A8"), calibration=IDS)
    with pytest.raises(ExportError, match="q_proj: its bias is more than") as caught:
        save_ascend_v1(large.artifact, tmp_path / "out")
    assert "W8A8_DYNAMIC" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_one_server_must_take_the_whole_model(tmp_path: Path) -> None:
    """Most linears have a server, but no server has all of them."""
    model = make_model(**SIZES, vocab_size=65600).bfloat16()
    schemes = {"*": "W8A16", "lm_head": "W8A16"}
    mixed = panguq.compile(model, recipe(schemes), calibration=IDS)
    with pytest.raises(ExportError) as caught:
        save_ascend_v1(mixed.artifact, tmp_path / "out")
    assert "vllm-ascend: n = 65600 is more than the 65535" in caught.value.message
    assert "sglang: it takes the codes for float weights" in caught.value.message


def test_a_server_that_refuses_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_ascend_v1(compiled("W4A8").artifact, tmp_path / "w4a8")
    assert "sglang will not take this checkpoint" in caplog.text
    assert "mindie will not" not in caplog.text
    caplog.clear()
    save_ascend_v1(compiled("W8A8_DYNAMIC").artifact, tmp_path / "dynamic")
    assert "will not take" not in caplog.text


def test_other_modules_are_refused(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    other = panguq.compile(module, "w8a8", calibration=[x], example_inputs=(x,))
    with pytest.raises(ExportError, match="only a compiled model of transformers"):
        save_ascend_v1(other.artifact, tmp_path / "out")


def test_fused_linears_have_one_type(w8a8: Any) -> None:
    groups = {
        tuple(p.rpartition(".")[2] for p in g) for g in read_checkpoint_graph(w8a8.artifact).fused
    }
    assert groups == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}


def test_nothing_is_overwritten_unless_asked(w8a8: Any, tmp_path: Path) -> None:
    path = tmp_path / "out"
    save_ascend_v1(w8a8.artifact, path)
    before = (path / DESCRIPTION).read_bytes()
    with pytest.raises(StorageError, match="already exists"):
        save_ascend_v1(w8a8.artifact, path)
    (path / DESCRIPTION).write_text("{}")
    save_ascend_v1(w8a8.artifact, path, overwrite=True)
    assert (path / DESCRIPTION).read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError):
        save_ascend_v1(w8a8.artifact, foreign, overwrite=True)
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_nothing(
    w8a8: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> Tensor:
        raise PanguqError("no more")

    monkeypatch.setattr("panguq.formats.checkpoint.ascend_v1_tensors.stored_deq_scale", fails)
    with pytest.raises(PanguqError, match="no more"):
        save_ascend_v1(w8a8.artifact, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
