"""The real loader: transformers with the compressed-tensors package reads what panguq writes.

Bit-equal weights, each linear fed the same input, and perplexity; `python -m
conformance.compressed_tensors` does the same with an older pair of releases.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import panguq
from conformance.compressed_tensors import checkpoints, compare
from conformance.compressed_tensors.reference import write_reference
from panguq.formats.checkpoint.compressed_tensors import save_compressed_tensors
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from tests.smollm2 import first_layers

pytest.importorskip("compressed_tensors")

TINY = {row.name: row for row in checkpoints.ROWS}


def written(row: checkpoints.Row, source: Any, calibration: Any, ids: Any, path: Path) -> Path:
    """A folder with the row's checkpoint and its reference."""
    model = checkpoints.compile_row(row, source, calibration)
    save_compressed_tensors(model.artifact, path / "checkpoint")
    write_reference(model, ids, path / "reference.safetensors")
    return path


def tiny(name: str, path: Path) -> Path:
    calibration, ids = checkpoints.random_tokens(4, 64), checkpoints.random_tokens(2, 128, 1)
    return written(TINY[name], checkpoints.openpangu_shaped(), calibration, ids, path)


def figures(folder: Path, mode: str = "default") -> dict[str, Any]:
    return compare.compare(folder / "checkpoint", folder / "reference.safetensors", mode)


@pytest.mark.parametrize("name", TINY)
def test_an_openpangu_shaped_model(name: str, tmp_path: Path) -> None:
    folder = tiny(name, tmp_path)
    for mode in compare.modes():
        if f"5 {mode}" not in TINY[name].refused:
            found = figures(folder, mode)
            assert found["linears"] == 14
            assert compare.problems(found) == [], mode


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "layers"), [("w8a8-serving", 30), ("w4a16", 4)])
def test_smollm2(name: str, layers: int, tmp_path: Path) -> None:
    source, calibration, ids = checkpoints.smollm2()
    first_layers(source, layers)
    folder = written(TINY[name], source, calibration, ids, tmp_path)
    found = figures(folder)
    assert found["linears"] == 7 * layers
    assert compare.problems(found) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["w8a16", "w4a16-g32"])
def test_sixteen_bit_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The default rounds scales to the model's dtype, of which panguq's are values already."""
    row, tokens = TINY[name], checkpoints.random_tokens(1, 32)
    source = checkpoints.openpangu_shaped()
    model = panguq.compile(source, row.recipe, calibration=tokens, dtype=dtype)
    save_compressed_tensors(model.artifact, tmp_path / "out")
    quantized = read_checkpoint_graph(model.artifact).quantized
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    for options in ({}, {"quantization_config": dequantize}):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
        assert loaded.dtype == dtype
        with torch.no_grad():
            loaded(tokens)  # the first call decompresses
        for path, linear in quantized.items():
            weight, expected = loaded.get_submodule(path).weight.detach(), linear.dequantized()
            assert weight.dtype == dtype
            assert torch.equal(weight, expected)


# --- the comparisons can fail --------------------------------------------------------------------


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("w8a8", tmp_path_factory.mktemp("static"))


def changed(folder: Path, path: Path, change: Any) -> Path:
    """A copy whose tensors were changed."""
    shutil.copytree(folder, path)
    file = path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


DOWN = "model.layers.1.mlp.down_proj"


def test_a_doubled_weight_fails_every_comparison(static: Path, tmp_path: Path) -> None:
    def double(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}.weight_scale"] *= 2

    found = figures(changed(static, tmp_path / "copy", double))
    assert found["unequal"] == [DOWN]
    assert found["quantized_db"] < 10
    assert abs(found["perplexity_change"]) > compare.LARGEST_PERPLEXITY_CHANGE
    assert len(compare.problems(found)) >= 3


def test_one_wrong_code_is_noticed(static: Path, tmp_path: Path) -> None:
    def flip(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}.weight"][0, 0] ^= 1

    assert figures(changed(static, tmp_path / "copy", flip))["unequal"] == [DOWN]


def test_a_wrong_zero_point_fails_where_the_input_is_rounded(static: Path, tmp_path: Path) -> None:
    def shift(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}.input_zero_point"] += 20

    found = figures(changed(static, tmp_path / "copy", shift))
    assert found["unequal"] == []
    assert found["raw_db"] < compare.LEAST_DB


def test_a_missing_tensor_is_no_random_number(static: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[f"{DOWN}.weight_scale"]

    folder = changed(static, tmp_path / "copy", drop)
    with pytest.raises(RuntimeError, match=r"not in the checkpoint: .*down_proj\.weight_scale"):
        figures(folder)
