"""Graphs lowered for an Ascend NPU: the same numbers in ONNX, and the kernel choice beside them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

import panguq
from panguq.data.inputs import prepare
from panguq.decibels import sqnr_db
from panguq.errors import PanguqError
from panguq.formats.onnx.export import export_graph, export_onnx
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import label
from panguq.ir.run.interpret import run
from tests.formats.onnx.onnx_values import is_matmul, local_differences
from tests.model_shelf import VOCAB, token_ids

RECIPES = ("w8a8", "w8a8-dynamic", "w4a16", "w4a16-asym", "w8a16", "w4a8")
SMALLEST_DB = 60.0


@functools.cache
def compiled(recipe: str, dtype: torch.dtype) -> Any:
    """openPangu's form (bias on q, k, v, o), wide enough for 4-bit groups of 256 inputs."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    calibration = token_ids(4, 32)
    return panguq.compile(model, recipe, calibration=calibration, target="ascend910b1", dtype=dtype)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_op_fed_the_same_input_agrees(recipe: str, tmp_path: Path) -> None:
    model, path = compiled(recipe, torch.bfloat16), tmp_path / "model.onnx"
    export_onnx(model.artifact, path)
    onnx.checker.check_model(str(path), full_check=True)
    inputs = prepare(model.interface, token_ids(2, 17))
    found = local_differences(model.graph, model.interface, path, inputs)
    for name, difference in found.items():
        # Codes: the share that differs, negative. They are spelled out, so none does.
        assert difference >= SMALLEST_DB or difference == 0, (name, difference)
    assert {label(node) for node in model.graph.graph.nodes if is_matmul(node)} <= set(found)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w4a8"])
def test_a_float16_model_agrees_end_to_end(recipe: str, tmp_path: Path) -> None:
    model, path = compiled(recipe, torch.float16), tmp_path / "model.onnx"
    export_onnx(model.artifact, path)
    inputs = prepare(model.interface, token_ids(2, 17))
    results = OnnxModel(path, model.interface).run(inputs)
    expected = run(model.graph, inputs)
    assert sqnr_db(expected[0].float(), results["logits"]) >= SMALLEST_DB


@pytest.mark.parametrize(
    "recipe, op_types",
    [
        ("w8a8", {"MatMulInteger"}),
        ("w8a8-dynamic", {"MatMulInteger", "ReduceMax"}),
        ("w4a8", {"MatMulInteger"}),
        ("w4a16", {"DequantizeLinear", "MatMul"}),
    ],
)
def test_matmuls_are_operators_that_onnxruntime_has(
    recipe: str, op_types: set[str], tmp_path: Path
) -> None:
    model, path = compiled(recipe, torch.bfloat16), tmp_path / "model.onnx"
    export_onnx(model.artifact, path)
    assert op_types <= {node.op_type for node in onnx.load(str(path)).graph.node}
    four_bits = [
        x for x in onnx.load(str(path)).graph.initializer if x.data_type == onnx.TensorProto.INT4
    ]
    assert bool(four_bits) == recipe.startswith("w4")


def test_a_dispatch_carries_its_table_and_the_predicted_times(tmp_path: Path) -> None:
    model, path = compiled("w4a16", torch.bfloat16), tmp_path / "model.onnx"
    export_onnx(model.artifact, path)
    dispatches = [
        node
        for node in model.graph.graph.nodes
        if node.target is torch.ops.panguq.dispatch_matmul.default
    ]
    assert dispatches
    nodes = {node.name: node for node in onnx.load(str(path)).graph.node}
    for node in dispatches:
        notes = {x.key: x.value for x in nodes[label(node)].metadata_props}
        rows = notes["panguq.kernel"].split("; ")
        assert len(rows) == len(node.args[-1])
        for row, kernel in zip(rows, node.args[-1], strict=True):
            assert row.endswith(f": {kernel}")
        for name in ("schedule", "splits"):
            assert len(notes[f"panguq.{name}"].split("; ")) == len(rows)
        times = [float(part.split(": ")[1]) for part in notes["panguq.predicted_us"].split("; ")]
        assert 0 < times[0] <= times[-1]


def test_a_specialized_graph_carries_one_kernel(tmp_path: Path) -> None:
    model, path = compiled("w4a16", torch.bfloat16).specialize(m=1), tmp_path / "model.onnx"
    export_onnx(model.artifact, path)
    notes = [
        {x.key: x.value for x in node.metadata_props} for node in onnx.load(str(path)).graph.node
    ]
    own = [n for n in notes if n.get("panguq.schedule") in ("data_parallel", "split_k")]
    assert own
    for found in own:
        assert int(found["panguq.splits"]) >= 1
        assert len(found["panguq.tile"].split("x")) == 3


def test_four_bit_activations_are_refused_by_name(tmp_path: Path) -> None:
    model = compiled("w4a8", torch.float16)
    gm = model.graph
    node = next(n for n in gm.graph.nodes if "npu_dynamic_quant" in str(n.target))
    given = dict(node.kwargs)
    node.kwargs = {**given, "dst_type": 16}
    try:
        with pytest.raises(PanguqError, match="4-bit codes of activations") as caught:
            export_graph(gm, model.interface, tmp_path / "model.onnx")
    finally:
        node.kwargs = given
    assert label(node) in caught.value.message
    assert not list(tmp_path.iterdir())
