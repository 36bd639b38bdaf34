"""The compressed-tensors format: what is written, and what is refused before anything is."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import panguq
from panguq.errors import ExportError, StorageError
from panguq.formats.checkpoint.compressed_tensors import packed, save_compressed_tensors
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.ir.ops.packing import pack_int4
from tests.model_folders import SIZES, make_folder, make_tokenizer
from tests.model_folders import make_model as make_llama
from tests.model_shelf import shared_model, token_ids
from tests.shared_traces import shared_traces

LAST = ("insert-fake-quant", "quantize-weights")
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


def recipe(schemes: dict[str, str], *passes: Any) -> dict[str, Any]:
    return {"schemes": schemes, "passes": [*passes, *LAST]}


def compiled(schemes: str | dict[str, str], *passes: Any, family: str = "openpangu") -> Any:
    chosen = {"*": schemes} if isinstance(schemes, str) else schemes
    return _compiled(family, json.dumps(chosen), json.dumps(passes))


@functools.cache
def _compiled(family: str, schemes: str, passes: str) -> Any:
    chosen = recipe(json.loads(schemes), *json.loads(passes))
    return panguq.compile(shared_model(family), chosen, calibration=token_ids(4, 32))


def config_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- tensors ------------------------------------------------------------------------------------


def test_int_quantized_tensors(tmp_path: Path) -> None:
    model = compiled("W8A8", "calibrate")
    save_compressed_tensors(model.artifact, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    linear = read_checkpoint_graph(model.artifact).quantized[f"{ATTENTION}.k_proj"]
    path = f"{ATTENTION}.k_proj"
    forms = {
        name.removeprefix(path + "."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name.startswith(path + ".")
    }
    assert forms == {
        "weight": (torch.int8, (32, 64)),
        "weight_scale": (torch.float32, (32, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int8, (1,)),
        "bias": (torch.float32, (32,)),
    }
    assert torch.equal(tensors[f"{path}.weight"], linear.codes())
    for leaf in ("input_scale", "input_zero_point"):  # each of a fused matmul's has its own copy
        assert torch.equal(tensors[f"{path}.{leaf}"], tensors[f"{ATTENTION}.q_proj.{leaf}"])


def test_pack_quantized_tensors(tmp_path: Path) -> None:
    model = compiled("W4A16-g32")
    save_compressed_tensors(model.artifact, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    path = f"{MLP}.down_proj"
    assert tensors[f"{path}.weight_packed"].shape == (64, 96 // 8)
    assert tensors[f"{path}.weight_packed"].dtype == torch.int32
    assert tensors[f"{path}.weight_shape"].tolist() == [64, 96]
    assert tensors[f"{path}.weight_scale"].shape == (64, 3)
    assert f"{path}.weight" not in tensors
    words = tensors[f"{path}.weight_packed"]
    codes = read_checkpoint_graph(model.artifact).quantized[path].codes()
    for i in range(8):  # nibble i of a word is code + 8
        assert torch.equal((words >> 4 * i) & 15, codes[:, i::8].int() + 8)


codes_of = st.tuples(
    st.integers(1, 5), st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1)
)


@given(codes_of)
def test_packing_is_the_real_packages(case: tuple[int, int, int, int]) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    n, half, bits, seed = case
    k = 2 * half if bits == 4 else half  # 4-bit codes are stored in pairs
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (n, k), dtype=torch.int8, generator=generator)
    stored = pack_int4(codes) if bits == 4 else codes
    assert torch.equal(packed(stored), helpers.pack_to_int32(codes, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_four_bits_have_the_models_dtype_where_it_holds_them(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    search = {"quantize-weights": {"clip_search": True, "importance": "none"}}
    chosen = {"schemes": {"*": "W4A16-g32"}, "passes": ["insert-fake-quant", search]}
    model = panguq.compile(shared_model("llama"), chosen, calibration=token_ids(1, 8), dtype=dtype)
    save_compressed_tensors(model.artifact, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    path = f"{MLP}.up_proj"
    scale = tensors[f"{path}.weight_scale"]
    assert scale.dtype == dtype
    assert (scale < 0).any() and (scale > 0).any()
    assert torch.equal(
        scale.float(), read_checkpoint_graph(model.artifact).quantized[path].weight_scale.float()
    )
    assert tensors["model.norm.weight"].dtype == dtype
    assert config_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")


# --- configuration ------------------------------------------------------------------------------


def test_one_scheme_targets_the_class(tmp_path: Path) -> None:
    save_compressed_tensors(compiled("W8A8", "calibrate").artifact, tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["format"] == config["format"] == "int-quantized"
    weights, activations = group["weights"], group["input_activations"]
    assert (weights["num_bits"], weights["strategy"], weights["symmetric"]) == (8, "channel", True)
    assert (activations["strategy"], activations["dynamic"]) == ("tensor", False)
    assert not activations["symmetric"]


@pytest.mark.parametrize(
    ("scheme", "form", "weights", "activations"),
    [
        ("W8A8_DYNAMIC", "int-quantized", (8, "channel", None), ("token", True, True)),
        ("W8A16", "pack-quantized", (8, "channel", None), None),
        ("W4A16-g32", "pack-quantized", (4, "group", 32), None),
        ("W4A16-per_channel", "pack-quantized", (4, "channel", None), None),
    ],
)
def test_the_schemes(
    scheme: str, form: str, weights: tuple[Any, ...], activations: Any, tmp_path: Path
) -> None:
    save_compressed_tensors(compiled(scheme).artifact, tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["format"] == config["format"] == form
    found = group["weights"]
    assert (found["num_bits"], found["strategy"], found["group_size"]) == weights
    given_ = group["input_activations"]
    if activations is None:
        assert given_ is None
    else:
        assert (given_["strategy"], given_["dynamic"], given_["symmetric"]) == activations


def test_several_schemes_name_their_linears_and_their_formats(tmp_path: Path) -> None:
    schemes = {"*": "W8A8_DYNAMIC", "*mlp*": "W4A16-g32", "*layers.1*": "FLOAT"}
    save_compressed_tensors(compiled(schemes).artifact, tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    one, other = config["config_groups"].values()
    assert one["targets"] == [f"{ATTENTION}.{p}_proj" for p in "qkvo"]
    assert other["targets"] == [f"{MLP}.{p}_proj" for p in ("gate", "up", "down")]
    assert (one["format"], other["format"]) == ("int-quantized", "pack-quantized")
    assert config["format"] == "mixed-precision"
    assert "model.layers.1.mlp.up_proj" in config["ignore"] and "lm_head" in config["ignore"]


def test_groups_of_several_sizes(tmp_path: Path) -> None:
    """Where a group size does not divide the inputs, a matmul has smaller groups."""
    save_compressed_tensors(compiled("W4A16-g64").artifact, tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    sizes = {g["weights"]["group_size"]: g["targets"] for g in config["config_groups"].values()}
    assert sorted(sizes) == [32, 64]
    assert sizes[32] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert config["format"] == "pack-quantized"


def test_a_quantized_head_unties_the_embedding(tmp_path: Path) -> None:
    head = {"*": "W8A16", "lm_head": "W8A16"}
    save_compressed_tensors(compiled(head, family="qwen2").artifact, tmp_path / "untied")
    assert config_of(tmp_path / "untied")["tie_word_embeddings"] is False
    save_compressed_tensors(compiled("W8A16", family="qwen2").artifact, tmp_path / "tied")
    assert config_of(tmp_path / "tied")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")


def test_openpangu_becomes_a_llama_with_attention_biases(tmp_path: Path) -> None:
    """From a folder in openPangu's own layout; its rotary base under the old name, too."""
    source = make_llama(attention_bias=True, rope_theta=16e6)
    folder = make_folder(tmp_path / "source", source)
    data = {key: value for key, value in SIZES.items() if value is not None}
    data |= {"model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"]}
    data |= {"bias": True, "rope_theta": 16e6, "rms_norm_eps": 1e-6, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(data))
    model = panguq.load_pretrained(folder)
    save_compressed_tensors(
        panguq.compile(model, recipe({"*": "W8A16"}), calibration=token_ids(1, 8)).artifact,
        tmp_path / "out",
    )
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True and config["mlp_bias"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 16e6
    assert "auto_map" not in config
    assert f"{ATTENTION}.o_proj.bias" in tensors_of(tmp_path / "out")


def test_scaled_rotary_embeddings_have_their_old_name_too(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    model = make_llama(rope_parameters=scaled)
    save_compressed_tensors(
        panguq.compile(model, recipe({"*": "W8A16"}), calibration=token_ids(1, 8)).artifact,
        tmp_path / "out",
    )
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


# --- the folder ---------------------------------------------------------------------------------


def test_the_files_and_equal_bytes_from_a_saved_model(tmp_path: Path) -> None:
    model = panguq.compile(
        make_llama(), recipe({"*": "W8A8_DYNAMIC"}), calibration=token_ids(1, 8),
        tokenizer=make_tokenizer(),
    )  # fmt: skip
    save_compressed_tensors(model.artifact, tmp_path / "first")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names <= set(contents(tmp_path / "first"))
    model.save(tmp_path / "panguq")
    save_compressed_tensors(panguq.load(tmp_path / "panguq").artifact, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "first")
    assert tokenizer("a text").input_ids == make_tokenizer()("a text").input_ids
    settings = json.loads((tmp_path / "first" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows this


def test_shards(tmp_path: Path) -> None:
    model = compiled("W4A16-g32")
    save_compressed_tensors(model.artifact, tmp_path / "one")
    save_compressed_tensors(model.artifact, tmp_path / "many", shard_bytes=30_000)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert len(set(index["weight_map"].values())) > 2


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    save_compressed_tensors(compiled("W8A16").artifact, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(StorageError, match="already exists"):
        save_compressed_tensors(compiled("W4A16-g32").artifact, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    save_compressed_tensors(compiled("W4A16-g32").artifact, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") != before


def test_the_source_models_folder_is_never_replaced(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source")
    before = contents(folder)
    with pytest.raises(StorageError, match="no checkpoint that panguq wrote"):
        save_compressed_tensors(compiled("W8A16").artifact, folder, overwrite=True)
    assert contents(folder) == before


# --- refusals: nothing is written ----------------------------------------------------------------


def refusal(model: Any, path: Path) -> ExportError:
    with pytest.raises(ExportError) as caught:
        save_compressed_tensors(model.artifact, path / "out")
    assert not any(path.iterdir())
    assert caught.value.hint
    return caught.value


def test_weights_of_three_bits(tmp_path: Path) -> None:
    error = refusal(compiled("W3A16-g32"), tmp_path)
    for server in ("transformers: ", "vllm: ", "vllm-ascend: "):
        assert server in error.message
    assert f"{ATTENTION}.q_proj and 13 more (W3A16-g32)" in error.message


def test_four_bit_activations(tmp_path: Path) -> None:
    model = panguq.compile(
        shared_model("openpangu"), recipe({"*": "W4A4"}), calibration=token_ids(1, 8),
        target="ascend910b1",
    )  # fmt: skip
    assert "W4A4" in refusal(model, tmp_path).message


def test_nothing_quantized(tmp_path: Path) -> None:
    model = panguq.compile(shared_model("llama"), "float", calibration=token_ids(1, 8))
    assert "nothing in this model is quantized" in refusal(model, tmp_path).message


def test_split_outliers_name_the_modules_and_a_recipe_that_works(tmp_path: Path) -> None:
    split = {"outliers": {"treatment": "split", "threshold": 1.0}}
    calibrate = {"calibrate": {"observer": "percentile"}}
    error = refusal(compiled("W8A8", calibrate, split), tmp_path)
    assert "outlier channels were split off" in error.message
    assert "w8a8-serving" in error.hint
    for name in ("w8a8-serving", "w8a8-dynamic-serving"):
        passes = [step for step in panguq.Recipe.of(name).passes if step.name == "outliers"]
        assert all(getattr(step, "treatment", "") != "split" for step in passes)


def test_gpt2(tmp_path: Path) -> None:
    assert "Conv1D" in refusal(compiled("W8A16", family="gpt2"), tmp_path).message


@pytest.mark.parametrize("name", ["w8a8-serving", "w8a8-dynamic-serving"])
def test_the_serving_recipes_are_written(name: str, tmp_path: Path) -> None:
    source = make_llama(hidden_size=256, intermediate_size=512)
    model = panguq.compile(source, name, calibration=token_ids(4, 64))
    save_compressed_tensors(model.artifact, tmp_path / "out")
    assert config_of(tmp_path / "out")["panguq"]["recipe"] == name


# --- warnings: some loader does, some does not ---------------------------------------------------


def warnings_of(model: Any, path: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="panguq"):
        save_compressed_tensors(model.artifact, path / "out")
    said = (record.message for record in caplog.records)
    return "\n".join(message for message in said if "NO TOKENIZER" not in message)


def test_what_every_loader_takes_is_written_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(compiled("W8A8_DYNAMIC"), tmp_path, caplog) == ""


def test_static_activations_have_zero_points_that_vllm_ascend_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = warnings_of(compiled("W8A8", "calibrate"), tmp_path, caplog)
    assert "vllm-ascend will not load" in said and "without zero points" in said
    assert "vllm will" not in said


def test_zero_points_of_four_bit_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Packed along the outputs; what a reader dequantizes is what the graph multiplies by."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    model = compiled("W4A16_ASYM-g32")
    said = warnings_of(model, tmp_path, caplog)
    assert "transformers will not load this checkpoint" in said and "vllm will" not in said
    (group,) = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert not group["weights"]["symmetric"]
    tensors = tensors_of(tmp_path / "out")
    for path, linear in read_checkpoint_graph(model.artifact).quantized.items():
        n, k = linear.shape
        packed = tensors[f"{path}.weight_packed"]
        codes = helpers.unpack_from_int32(packed, 4, torch.Size([n, k]))
        zeros = helpers.unpack_from_int32(
            tensors[f"{path}.weight_zero_point"], 4, torch.Size([n, k // 32]), packed_dim=0
        )
        scale = tensors[f"{path}.weight_scale"].float().repeat_interleave(32, dim=1)
        read = (codes.int() - zeros.int().repeat_interleave(32, dim=1)) * scale
        assert torch.equal(read, linear.dequantized(torch.float32)), path


def test_a_quantized_head_is_refused_by_servers_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = {"*": "W8A8_DYNAMIC", "lm_head": "W8A8_DYNAMIC"}
    said = warnings_of(compiled(head), tmp_path, caplog)
    assert "vllm will not load this checkpoint: lm_head" in said
    assert "transformers" not in said
