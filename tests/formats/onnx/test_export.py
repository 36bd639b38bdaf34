"""Exported models in onnxruntime against the same graph in PyTorch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import panguq
from panguq.data.inputs import prepare
from panguq.decibels import sqnr_db
from panguq.errors import PanguqError
from panguq.formats.onnx.export import export_graph, export_onnx
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import label
from panguq.ir.run.interpret import run
from tests.formats.onnx.onnx_values import is_matmul, local_differences
from tests.model_shelf import hand_written, shared_model, token_ids, trace_tiny
from tests.shared_traces import shared_traces

FAMILIES = ("llama", "openpangu", "gpt2", "opt")
SMALLEST_DB = 60.0
WEIGHT_ONLY = {
    name: {
        "schemes": {"*": scheme},
        "passes": ["insert-fake-quant", "quantize-weights"],
        "precision": "float32",  # the default kernels for few tokens round to bfloat16
    }
    for name, scheme in (("w8a16", "W8A16"), ("w4a16", "W4A16"), ("w4a16-asym", "W4A16_ASYM"))
}


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


@functools.cache
def compiled(family: str, recipe: str) -> Any:
    given = WEIGHT_ONLY.get(recipe, recipe.removeprefix("preset "))
    return panguq.compile(shared_model(family), given, calibration=token_ids(4, 32))


def exported(model: Any, stage: str, folder: Path) -> OnnxModel:
    path = folder / "model.onnx"
    export_onnx(model.artifact, path, stage)
    onnx.checker.check_model(str(path), full_check=True)
    return OnnxModel(path, model.interface)


def assert_close(model: Any, stage: str, found: OnnxModel, inputs: dict[str, Tensor]) -> None:
    """Logits and cache agree to 60 dB; `inputs` as the graph takes them."""
    expected = dict(zip(model.interface.outputs, run(model.stages[stage], inputs), strict=True))
    results = found.run(inputs)
    assert list(results) == list(expected)
    for name, tensor in expected.items():
        assert results[name].shape == tensor.shape
        assert sqnr_db(tensor, results[name]) >= SMALLEST_DB, name


@pytest.mark.parametrize("stage", ["fake-quant", "lowered"])
@pytest.mark.parametrize("recipe", ["float", *WEIGHT_ONLY])
@pytest.mark.parametrize("family", FAMILIES)
def test_float_and_weight_only_models_agree_and_generate_the_same(
    family: str, recipe: str, stage: str, tmp_path: Path
) -> None:
    model = compiled(family, recipe)
    found = exported(model, stage, tmp_path)
    assert_close(model, stage, found, prepare(model.interface, token_ids(2, 17)))
    prompt = token_ids(2, 7, seed=5)
    expected = model.at_stage(stage).generate(prompt, max_new_tokens=32, do_sample=False)
    assert torch.equal(found.generate(prompt, 32), expected)


@pytest.mark.parametrize("recipe", ["float", "w8a16", "w4a16", "preset w8a8"])
def test_no_stored_weight_is_turned_at_every_call(recipe: str, tmp_path: Path) -> None:
    exported(compiled("llama", recipe), "lowered", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Transpose":
            made_by = producers[node.input[0]]  # of no initializer
            assert made_by.op_type != "DequantizeLinear"


def test_onnxruntimes_optimizations_leave_activations_as_they_are(tmp_path: Path) -> None:
    model = compiled("llama", "w8a16")
    for stage in ("fake-quant", "lowered"):
        found = exported(model, stage, tmp_path / stage)
        assert_close(model, stage, found, prepare(model.interface, token_ids(2, 17)))


@pytest.mark.parametrize("batch, seq, past", [(1, 1, 0), (1, 9, 0), (3, 1, 8), (2, 5, 4)])
def test_batch_sequence_and_past_are_dynamic(
    batch: int, seq: int, past: int, tmp_path: Path
) -> None:
    model = compiled("openpangu", "w4a16")
    found = exported(model, "lowered", tmp_path)
    cache = list(run(model.graph, prepare(model.interface, token_ids(batch, past or 1))))[1:]
    inputs = prepare(model.interface, token_ids(batch, seq), past=cache if past else [])
    assert_close(model, "lowered", found, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_kept_positions(family: str, tmp_path: Path) -> None:
    model = compiled(family, "float")
    found = exported(model, "lowered", tmp_path)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    inputs = prepare(model.interface, token_ids(2, 8), mask, logits_to_keep=2)
    assert_close(model, "lowered", found, inputs)


# --- quantized activations ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fake-quant", "lowered"])
@pytest.mark.parametrize(
    "recipe", ["w8a8", "w8a8-dynamic", "w4a8", "preset w4a16", "preset w4a16-asym", "preset w8a16"]
)
@pytest.mark.parametrize("family", ["openpangu", "qwen2"])
def test_every_op_fed_the_same_input_agrees(
    family: str, recipe: str, stage: str, tmp_path: Path
) -> None:
    """What quantizes, or rounds to bfloat16, may differ at a tie: so op by op, not end to end."""
    model = compiled(family, recipe)
    exported(model, stage, tmp_path)
    inputs = prepare(model.interface, token_ids(2, 17))
    gm = model.stages[stage]
    found = local_differences(gm, model.interface, tmp_path / "model.onnx", inputs)
    matmuls = {label(node) for node in gm.graph.nodes if is_matmul(node)}
    assert len(matmuls) == 15
    for name, difference in found.items():
        # Codes: the share that differs by rounding at a tie, negative; anything else in dB.
        assert difference >= SMALLEST_DB or -0.003 <= difference <= 0, (name, difference)
    assert matmuls <= set(found)


def test_the_comparison_finds_one_wrong_scale(tmp_path: Path) -> None:
    model = compiled("openpangu", "w8a8")
    exported(model, "lowered", tmp_path)
    path = tmp_path / "model.onnx"
    file = onnx.load(str(path))
    name = "model.layers.0.mlp.up_proj:linear"
    scale = next(x for x in file.graph.initializer if x.name == f"{name}.deq_scale")
    wrong = onnx.numpy_helper.to_array(scale) * 1.01
    scale.CopyFrom(onnx.numpy_helper.from_array(wrong, scale.name))
    onnx.save(file, str(path))
    inputs = prepare(model.interface, token_ids(2, 17))
    found = local_differences(model.graph, model.interface, path, inputs)
    assert [label for label, db in found.items() if 0 < db < SMALLEST_DB] == [name]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "preset w4a16", "preset w8a16"])
def test_greedy_tokens_are_equal_until_two_are_nearly_as_likely(
    recipe: str, tmp_path: Path
) -> None:
    model = compiled("llama", recipe)
    found = exported(model, "lowered", tmp_path)
    prompt = token_ids(1, 7, seed=5)
    expected = model.generate(prompt, max_new_tokens=32, do_sample=False)
    tokens = found.generate(prompt, 32)
    differing = (tokens != expected)[0].nonzero()
    if len(differing):
        first = int(differing[0])
        top = model(tokens[:, :first]).logits[0, -1].topk(2).values
        assert float(top[0] - top[1]) < 0.1


# --- form ---------------------------------------------------------------------------------------


def test_values_and_nodes_have_the_labels_of_the_graph(tmp_path: Path) -> None:
    model = compiled("llama", "w8a8")
    exported(model, "fake-quant", tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    values = {name for node in graph.node for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    # A quantizer's two results are called like the nodes that take them out.
    pairs = ("quantize_per_token",)
    for node in model.stages["fake-quant"].graph.nodes:
        if node.op == "call_function" and not label(node).endswith(pairs):
            assert label(node) in values
        elif node.op == "get_attr" and label(node).endswith(("weight", "weight_codes")):
            assert {label(node), f"{label(node)}_t"} & stored
    assert [node.name for node in graph.node] == [node.output[0] for node in graph.node]
    assert [x.name for x in graph.input] == list(model.interface.inputs)
    assert [x.name for x in graph.output] == list(model.interface.outputs)
    shape = next(x for x in graph.input if x.name == "attention_mask").type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 1, "seq", "past + seq"]


@pytest.mark.parametrize(
    "recipe, stage, ops",
    [
        ("w8a8", "fake-quant", {"QuantizeLinear", "DequantizeLinear"}),
        ("w8a8", "lowered", {"QuantizeLinear", "MatMulInteger"}),
        ("w8a8-dynamic", "lowered", {"ReduceMax", "MatMulInteger"}),
        ("preset w4a16", "fake-quant", {"DequantizeLinear"}),
        ("preset w4a16", "lowered", {"MatMulNBits"}),
        ("preset w8a16", "lowered", {"MatMulNBits"}),
        ("w4a16", "lowered", {"MatMulNBits"}),
    ],
)
def test_quantized_matmuls_are_standard_operators(
    recipe: str, stage: str, ops: set[str], tmp_path: Path
) -> None:
    model = compiled("llama", recipe)
    exported(model, stage, tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    found = [node.op_type for node in graph.node]
    assert ops <= set(found)
    assert found.count(sorted(ops)[-1]) >= 7
    four_bits = [x for x in graph.initializer if x.data_type == onnx.TensorProto.INT4]
    assert len(four_bits) == (14 if (recipe, stage) == ("preset w4a16", "fake-quant") else 0)


def test_a_lowered_matmul_says_which_kernel_and_what_it_is_predicted_to_take(
    tmp_path: Path,
) -> None:
    exported(compiled("llama", "w8a8"), "lowered", tmp_path)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    node = next(n for n in nodes if n.op_type == "MatMulInteger")
    notes = {entry.key: entry.value for entry in node.metadata_props}
    assert notes["panguq.label"] == "model.layers.0.self_attn.q_proj:linear"
    assert notes["panguq.module"] == "model.layers.0.self_attn.q_proj"
    assert notes["panguq.scheme"] == "W8A8"
    assert notes["panguq.kernel"] == "int8_linear"
    assert notes["panguq.predicted_us"].startswith("m=1: ")


def test_a_module_that_is_no_language_model(tmp_path: Path) -> None:
    ids = token_ids(2, 9)
    model = panguq.compile(hand_written(), "w8a16", example_inputs=(ids,))
    found = exported(model, "fake-quant", tmp_path)
    (result,) = found.run({model.interface.inputs[0]: token_ids(3, 5)}).values()
    expected = model.at_stage("fake-quant")(token_ids(3, 5))
    assert sqnr_db(expected, result) >= SMALLEST_DB


def test_an_unknown_op_is_named(tmp_path: Path) -> None:
    class Rolls(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.roll(x, 1, 0) + x

    gm, interface = trace_tiny(Rolls(), torch.randn(4, 8))
    with pytest.raises(PanguqError, match=r"node roll: .* the op aten\.roll\.default"):
        export_graph(gm, interface, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled("llama", "float")
    exported(model, "lowered", tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(PanguqError, match=f"needs the package {package}, which is not") as caught:
        if package == "onnx":
            export_onnx(model.artifact, tmp_path / "other.onnx")
        OnnxModel(tmp_path / "model.onnx", model.interface)
    assert "panguq[onnx]" in caught.value.hint


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(PanguqError, match="no stage 'traced'") as caught:
        export_onnx(compiled("llama", "float").artifact, tmp_path / "model.onnx", "traced")
    assert "fake-quant, lowered" in caught.value.hint


@pytest.mark.parametrize(
    ("recipe", "linear"), [("preset w8a8-dynamic", "W8A8_DYNAMIC"), ("w4a16", "W4A16")]
)
def test_functions_show_a_model_and_compute_the_same(
    recipe: str, linear: str, tmp_path: Path
) -> None:
    model = compiled("llama", recipe)
    flat, folded = tmp_path / "flat.onnx", tmp_path / "folded.onnx"
    export_onnx(model.artifact, flat)
    export_onnx(model.artifact, folded, functions=True)
    # ONNX knows no result types of MatMulNBits, which nothing but a model's own values can say.
    onnx.checker.check_model(str(folded), full_check=linear != "W4A16")
    shown = onnx.load(folded)
    boxes = [(node.op_type, node.name) for node in shown.graph.node]
    assert [box for box in boxes if box[0] == "Layer"] == [
        ("Layer", "model.layers.0"),
        ("Layer", "model.layers.1"),
    ]
    assert len(boxes) < 25 < len(onnx.load(flat).graph.node) / 4
    (layer,) = (function for function in shown.functions if function.name == "Layer")
    inside = {node.name: node.op_type for node in layer.node}
    assert inside["mlp.up_proj:linear"].startswith(f"QuantizedLinear_{linear}")
    assert any(name.startswith("self_attn.q_proj") for name in layer.input)
    ids = token_ids(2, 9)
    one, other = (OnnxModel(path, model.interface).logits(ids)[0] for path in (flat, folded))
    assert torch.equal(one, other)


def test_layers_that_differ_are_functions_of_their_own(tmp_path: Path) -> None:
    schemes = {"*": "W8A16", "model.layers.1.mlp.down_proj": "W4A16"}
    passes = ["insert-fake-quant", "quantize-weights"]
    model: Any = panguq.compile(shared_model("llama"), {"schemes": schemes, "passes": passes})
    export_onnx(model.artifact, tmp_path / "model.onnx", functions=True)
    shown = onnx.load(tmp_path / "model.onnx")
    assert [n.op_type for n in shown.graph.node if "Layer" in n.op_type] == ["Layer", "Layer_2"]
