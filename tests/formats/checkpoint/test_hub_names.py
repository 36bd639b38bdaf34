"""Folders for servers have the published names, where transformers has others in memory."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import panguq
from panguq.check.ascend_read import load_ascend_v1
from panguq.check.model import ExpectedModel
from panguq.check.report import check_folder
from panguq.errors import ExportError
from panguq.formats.checkpoint.ascend_v1_tensors import unpack_rows
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.ir.edit import get_tensor
from panguq.models.hub_names import HubNames, hub_names
from panguq.planning.format_check import check_format
from tests.families.models import make

RENAMED = ("exaone", "gpt_neox")
EXPERTS = ("qwen3_moe", "mixtral")
IDS = torch.arange(2, 26).view(2, 12)
SIDE = (".weight_scale", ".weight_offset")
STEM = {"compressed-tensors": "model", "ascend": "quant_model_weights"}


@functools.cache
def compiled(family: str, scheme: str = "W8A8_DYNAMIC") -> Any:
    passes = ["insert-fake-quant", "quantize-weights"]
    return panguq.compile(
        make(family), {"schemes": {"*": scheme}, "passes": passes}, dtype=torch.bfloat16
    )


@functools.cache
def saved_by_transformers(family: str, folder: Path) -> set[str]:
    make(family).save_pretrained(folder / family)
    return set(load_file(folder / family / "model.safetensors"))


def names_in(folder: Path, format: str) -> set[str]:
    return set(load_file(folder / f"{STEM[format]}.safetensors"))


@pytest.mark.parametrize("format", STEM)
@pytest.mark.parametrize("family", (*RENAMED, *EXPERTS))
def test_a_folder_has_the_names_that_transformers_saves(
    family: str, format: str, tmp_path: Path
) -> None:
    expected = saved_by_transformers(family, tmp_path)
    compiled(family).save(tmp_path / "out", format=format)
    found = names_in(tmp_path / "out", format)
    assert {name for name in found if not name.endswith(SIDE)} == expected
    codes = {name.removesuffix(".weight_scale") for name in found if name.endswith("scale")}
    assert codes == set(read_checkpoint_graph(compiled(family).artifact).published().quantized)
    assert f"{min(codes)}.weight" in expected


@pytest.mark.parametrize("family", EXPERTS)
def test_an_experts_tensors_are_its_slice(family: str, tmp_path: Path) -> None:
    compiled(family).save(tmp_path / "out", format="compressed-tensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    gm = compiled(family).artifact.stages["fake-quant"]
    codes = get_tensor(gm, "model.layers.1.mlp.experts.gate_up_proj_codes")
    scale = get_tensor(gm, "model.layers.1.mlp.experts.gate_up_proj_scale")
    path = {"qwen3_moe": "mlp.experts.3.up_proj", "mixtral": "block_sparse_moe.experts.3.w3"}
    n = codes.shape[1] // 2
    assert torch.equal(found[f"model.layers.1.{path[family]}.weight"], codes[3, n:])
    assert torch.equal(found[f"model.layers.1.{path[family]}.weight_scale"], scale[3, n:])
    report = check_folder(tmp_path / "out")
    assert {finding.rule for finding in report.findings} == {"no-tokenizer"}
    assert report.types == {"group_0": 2 * (4 + 4 * 3)}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("granitemoe", "block_sparse_moe.experts.3.{}:w1 w3 w2"),
        ("llama4_text", "feed_forward.experts.3.{}:gate_proj up_proj down_proj"),
    ],
)
def test_experts_that_are_published_as_one_tensor_are_served_one_by_one(
    family: str, names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _, leaves = names.partition(":")
    compiled(family).save(tmp_path / "out", format="compressed-tensors")
    assert "transformers will not load this checkpoint: it knows a layer's experts" in caplog.text
    found = load_file(tmp_path / "out" / "model.safetensors")
    experts = make(family).get_submodule(f"model.layers.1.{path.partition('.3')[0]}")
    turned = family == "llama4_text"  # which holds them as [experts, k, n]
    both, down = (w[3].T if turned else w[3] for w in (experts.gate_up_proj, experts.down_proj))
    for leaf, weight in zip(leaves.split(), (*both.chunk(2), down), strict=True):
        name = f"model.layers.1.{path.format(leaf)}"
        steps = weight.bfloat16().float() / found[f"{name}.weight_scale"]
        assert (steps - found[f"{name}.weight"]).abs().max() <= 0.501
    assert not any(name.endswith("gate_up_proj") for name in found)
    report = check_folder(tmp_path / "out")
    assert {finding.rule for finding in report.findings} == {"no-tokenizer"}


def test_experts_that_no_server_reads_are_refused_before_anything_runs() -> None:
    recipe = panguq.Recipe.of("w8a8-dynamic")
    with pytest.raises(ExportError, match="gate_up_proj: this architecture's experts are publish"):
        check_format("compressed-tensors", make("gpt_oss"), recipe)


def test_served_experts_are_read_back_from_the_npu_format(tmp_path: Path) -> None:
    compiled("granitemoe").save(tmp_path / "out", format="ascend")
    assert {f.rule for f in check_folder(tmp_path / "out").findings} == {"no-tokenizer"}
    found = load_ascend_v1(tmp_path / "out")(IDS).logits.float()
    wanted = make("granitemoe")(IDS).logits
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_experts_in_the_npu_format_are_read_by_type(tmp_path: Path) -> None:
    compiled("qwen3_moe").save(tmp_path / "out", format="ascend")
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["model.layers.0.mlp.experts.3.down_proj.weight"] == "W8A8_DYNAMIC"
    assert description["model.layers.0.mlp.gate.weight"] == "FLOAT"
    report = check_folder(tmp_path / "out")
    assert {finding.rule for finding in report.findings} == {"no-tokenizer"}
    assert report.servers["vllm-ascend"] == "takes"
    description["model.layers.1.mlp.experts.2.up_proj.weight"] = "W8A16"
    (tmp_path / "out" / "quant_model_description.json").write_text(json.dumps(description))
    found = {f.rule: f for f in check_folder(tmp_path / "out").findings}["mixed-expert-types"]
    assert found.tensor == "model.layers.1.mlp.experts"
    assert found.breaks == ("vllm-ascend",)


def test_experts_of_w4a8_have_one_scale_an_output(tmp_path: Path) -> None:
    passes = ["insert-fake-quant", "quantize-weights"]
    schemes = {"*": "W8A8_DYNAMIC", "*.experts.*": "W4A8-per_channel"}
    model = panguq.compile(
        make("qwen3_moe"), {"schemes": schemes, "passes": passes}, dtype=torch.bfloat16
    )
    model.save(tmp_path / "out", format="ascend")
    found = load_file(tmp_path / "out" / "quant_model_weights.safetensors")
    path = "model.layers.0.mlp.experts.1"
    forms = {
        name.removeprefix(f"{path}."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in found.items()
        if name.startswith(path)
    }
    up = {
        "weight": (torch.int8, (32, 128)),
        "weight_scale": (torch.float32, (64, 1)),
        "weight_offset": (torch.float32, (64, 1)),
        "scale_bias": (torch.float32, (64, 1)),
    }
    assert {leaf: forms[f"up_proj.{leaf}"] for leaf in up} == up
    assert forms["down_proj.scale_bias"] == (torch.float32, (128, 16))
    assert len(forms) == 3 * len(up)
    scale = found[f"{path}.up_proj.weight_scale"]
    assert torch.equal(scale, scale.bfloat16().float())  # two kernels round it
    codes = unpack_rows(found[f"{path}.up_proj.weight"])
    expected = 8 * (codes.double() * scale.double()).sum(1, keepdim=True)
    assert torch.allclose(found[f"{path}.up_proj.scale_bias"].double(), expected, atol=1e-4)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["group_size"] == 0


def test_experts_of_several_types_in_a_layer_are_refused(tmp_path: Path) -> None:
    schemes = {"*": "W8A8_DYNAMIC", "*.layers.0.mlp.experts.down_proj": "FLOAT"}
    passes = ["insert-fake-quant", "quantize-weights"]
    model = panguq.compile(
        make("qwen3_moe"), {"schemes": schemes, "passes": passes}, dtype=torch.bfloat16
    )
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.experts: its experts have several"):
        model.save(tmp_path / "out", format="ascend")


def test_a_folder_that_is_loaded_has_the_same_names(tmp_path: Path) -> None:
    make("exaone").save_pretrained(tmp_path / "float")
    recipe = {"schemes": {"*": "W4A16-g32"}, "passes": ["insert-fake-quant", "quantize-weights"]}
    from panguq.models.hf import load_pretrained

    panguq.compile(load_pretrained(tmp_path / "float"), recipe).save(
        tmp_path / "out", format="compressed-tensors"
    )
    found = names_in(tmp_path / "out", "compressed-tensors")
    assert "transformer.h.1.mlp.c_proj.weight_packed" in found
    assert not any(name.startswith("model.") for name in found)


@pytest.mark.parametrize("family", RENAMED)
def test_transformers_reads_the_folder(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    compiled(family).save(tmp_path / "out", format="compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    source: Any = make(family).to(torch.bfloat16)
    logits, wanted = model(IDS).logits.float(), source(IDS).logits.float()
    assert (logits - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("family", RENAMED)
def test_panguq_reads_the_folder_of_the_npu_format(family: str, tmp_path: Path) -> None:
    compiled(family).save(tmp_path / "out", format="ascend")
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert names_in(tmp_path / "out", "ascend") == {n for n in description if "." in n}
    logits = load_ascend_v1(tmp_path / "out")(IDS).logits.float()
    wanted = make(family)(IDS).logits
    assert (logits - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("family", RENAMED)
def test_linears_that_stay_float_are_named_for_servers_and_for_transformers(
    family: str, tmp_path: Path
) -> None:
    compiled(family).save(tmp_path / "out", format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"exaone": ["lm_head"], "gpt_neox": ["embed_out", "lm_head"]}
    assert config["quantization_config"]["ignore"] == expected[family]


def test_check_takes_published_names(tmp_path: Path) -> None:
    compiled("gpt_neox").save(tmp_path / "out", format="compressed-tensors")
    report = check_folder(tmp_path / "out")
    assert [finding.rule for finding in report.findings] == ["no-tokenizer"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["embed_out"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = {f.rule: f for f in check_folder(tmp_path / "out").findings}["ignored-in-memory"]
    assert found.breaks == ("transformers",)
    assert "knows it as lm_head" in found.message


def test_check_says_when_a_folder_has_the_names_of_transformers_memory(tmp_path: Path) -> None:
    compiled("exaone").save(tmp_path / "out", format="compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    names = read_checkpoint_graph(compiled("exaone").artifact).names
    tensors = {}
    for name, tensor in load_file(file).items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{names.module_in_memory(path)}.{leaf}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "out" / "SHA256SUMS").unlink()
    report = check_folder(tmp_path / "out")
    found = [f for f in report.findings if f.rule == "names-in-memory"]
    by_name = {finding.tensor: finding.message for finding in found}
    assert "transformer.h.0.mlp.c_fc_0.weight" in by_name["model.layers.0.mlp.gate_proj.weight"]
    assert "lm_head.weight" not in by_name
    assert report.servers["vllm"] == "refuses"
    assert not any("transformers" in f.breaks for f in report.findings if f.rule != "changed-file")


def test_an_architecture_that_is_not_renamed_keeps_its_names() -> None:
    names = hub_names(make("llama"))
    assert not names.differ
    assert names.module("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert not hub_names(torch.nn.Linear(2, 2)).differ


def test_a_module_one_of_whose_tensors_alone_is_published_elsewhere() -> None:
    """As Laguna's routers, whose bias is published among the experts."""
    names = {"gate.weight": "gate.weight", "gate.bias": "experts.bias"}
    model = ExpectedModel({}, (), {}, frozenset(), HubNames(names))
    stored = ["gate.weight", "gate.weight_scale", "gate.bias"]
    assert model.called_as_in_memory(stored) == {"gate.bias": "experts.bias"}


def test_weights_that_are_merged_when_they_are_loaded_are_refused() -> None:
    from dataclasses import replace

    graph = read_checkpoint_graph(compiled("gpt_neox").artifact)
    merged = HubNames(graph.names.tensors, {"lm_head.weight": ()})
    with pytest.raises(ExportError, match=r"makes lm_head\.weight out of other tensors"):
        replace(graph, names=merged).published()
