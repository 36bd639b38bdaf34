"""Folders whose weights are stored in FP8 and MXFP4: read as the floats that they stand for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import panguq
from panguq.errors import InputError, StorageError
from panguq.models.hf import load_pretrained, skeleton
from tests.families.models import make
from tests.model_folders import make_folder, make_model
from tests.model_shelf import token_ids

BLOCK = 128
DOWN = "model.layers.0.mlp.down_proj.weight"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
CHANNELS = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
}  # fmt: skip


def packed_folder(path: Path, config: dict[str, Any], pack: Any, model: Any = None) -> Path:
    """A folder whose linears' weights are what `pack` makes of each."""
    model = model or make_model(hidden_size=256, dtype="bfloat16").to(torch.bfloat16)
    make_folder(path, model)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n, t in tensors.items() if t.dim() == 2 and "_proj" in n]:
        tensors |= pack(name, tensors.pop(name).float())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((path / "config.json").read_text()) | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(data))
    return path


def in_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    tall, wide = math.ceil(n / BLOCK), math.ceil(k / BLOCK)
    padded = torch.zeros(tall * BLOCK, wide * BLOCK)
    padded[:n, :k] = weight
    blocks = padded.view(tall, BLOCK, wide, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[:n, :k]
    return {name: codes.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scale}


def in_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.bfloat16()}


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_blocks_of_fp8_are_transformers_values(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    folder = packed_folder(tmp_path / "fp8", FP8, in_blocks)
    model = load_pretrained(folder)
    dequantize = fp8.Fp8Dequantize(None)._dequantize_one
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        scale = stored(folder).get(f"{name}_scale_inv")
        codes = stored(folder)[name]
        if scale is None:
            assert torch.equal(weight, codes)
        elif all(size % BLOCK == 0 for size in codes.shape):
            assert torch.equal(weight, dequantize(codes, scale, torch.bfloat16))


def test_the_last_block_may_be_smaller(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "fp8", FP8, in_blocks)
    codes, scale = stored(folder)[DOWN], stored(folder)[f"{DOWN}_scale_inv"]
    assert codes.shape == (256, 192) and scale.shape == (2, 2)
    expected = torch.empty(codes.shape)
    for i in range(256):
        for j in (0, 127, 128, 191):
            expected[i, j] = codes[i, j].float() * scale[i // BLOCK, j // BLOCK]
    weight = dict(load_pretrained(folder).named_parameters())[DOWN].detach()
    columns = [0, 127, 128, 191]
    assert torch.equal(weight[:, columns], expected[:, columns].bfloat16())


def test_rows_of_fp8_are_compressed_tensors_values(tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    rows = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel")
    folder = packed_folder(tmp_path / "rows", CHANNELS, in_rows)
    model = load_pretrained(folder)
    codes, scale = stored(folder)[DOWN], stored(folder)[f"{DOWN}_scale"]
    expected = forward.dequantize(codes, scale, args=rows, dtype=torch.bfloat16)
    assert torch.equal(dict(model.named_parameters())[DOWN], expected)


def test_mxfp4_experts_are_transformers_values(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model = make("gpt_oss").to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    make_folder(tmp_path / "oss", model, tokenizer=False)
    tensors = stored(tmp_path / "oss")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = tensors.pop(name).shape
        shape = (experts, n, k // 32)
        bytes_ = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"] = bytes_
        tensors[f"{name}_scales"] = torch.randint(
            110, 126, shape, dtype=torch.uint8, generator=generator
        )
    save_file(tensors, tmp_path / "oss" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "oss" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "oss" / "config.json").write_text(json.dumps(config))
    found = dict(load_pretrained(tmp_path / "oss").named_parameters())
    for name in [n for n in tensors if n.endswith("_blocks")]:
        weight = name.removesuffix("_blocks")
        expected = mxfp4.convert_moe_packed_tensors(tensors[name], tensors[f"{weight}_scales"])
        assert torch.equal(found[weight], expected)


def test_a_packed_folder_compiles(tmp_path: Path) -> None:
    model = load_pretrained(packed_folder(tmp_path / "fp8", FP8, in_blocks))
    compiled = panguq.compile(model, "float")
    ids = token_ids(2, 12)
    assert (compiled(ids).logits - model(ids).logits).abs().max() < 0.05
    assert not hasattr(compiled.config, "quantization_config")


def test_a_plan_of_packed_weights_reads_no_values(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "fp8", FP8, in_blocks)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(start)
        opened.write(b"\x7f" * (file.stat().st_size - start))  # not a number, each of them
    assert skeleton(folder).dtype == torch.bfloat16
    found = panguq.plan(folder, "w8a16")
    weights = 2 * sum(p.numel() for p in make_model(hidden_size=256).parameters())
    assert weights <= found.weight_bytes < weights + 1000  # and a table of frequencies
    assert not found.refusals


# --- what is refused ----------------------------------------------------------------------------


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    def wrong(name: str, weight: Tensor) -> dict[str, Tensor]:
        return in_blocks(name, weight) | {f"{name}_scale_inv": torch.ones(3, 3)}

    with pytest.raises(StorageError, match=r"codes .* have scales float32 \[3, 3\]"):
        load_pretrained(packed_folder(tmp_path / "fp8", FP8, wrong))


def test_scales_that_are_missing(tmp_path: Path) -> None:
    def without(name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name: in_blocks(name, weight)[name]}

    folder = packed_folder(tmp_path / "fp8", FP8, without)
    for read in (load_pretrained, skeleton):
        with pytest.raises(InputError, match=r"is stored as F8_E4M3 without .*_scale_inv"):
            read(folder)


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    def infinite(name: str, weight: Tensor) -> dict[str, Tensor]:
        made = in_blocks(name, weight)
        made[f"{name}_scale_inv"][0, 0] = torch.inf
        return made

    with pytest.raises(StorageError, match="a scale is not finite"):
        load_pretrained(packed_folder(tmp_path / "fp8", FP8, infinite))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}},
        {"quant_method": "compressed-tensors"},
        {},
    ],
)  # fmt: skip
def test_other_quantized_folders_are_one_error(config: dict[str, Any], tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "one", config, lambda name, weight: {name: weight})
    for read in (load_pretrained, skeleton):
        with pytest.raises(InputError, match="quantized already"):
            read(folder)
