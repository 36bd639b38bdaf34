"""GPTQ's and AWQ's formats: what is written is what the graph multiplies by."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import panguq
from panguq.errors import ExportError
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.formats.checkpoint.linear import QuantizedLinear
from tests.formats.checkpoint.read_words import from_awq_words, unpacked_words
from tests.model_shelf import shared_model, token_ids

PASSES = ["insert-fake-quant", "quantize-weights"]
DOWN = "model.layers.0.mlp.down_proj"


@functools.cache
def compiled(schemes: str) -> Any:
    recipe = {"schemes": json.loads(schemes), "passes": PASSES}
    return panguq.compile(shared_model("openpangu"), recipe, calibration=token_ids(1, 8))


def of(scheme: str, **more: str) -> Any:
    return compiled(json.dumps({"*": scheme, **more}))


def saved(model: Any, format: str, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model.save(path, format=format)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((path / "quantize_config.json").read_text())
    return config, load_file(path / "model.safetensors")


def linears(model: Any) -> dict[str, QuantizedLinear]:
    return dict(read_checkpoint_graph(model.artifact).quantized)


def check_loads(model: Any, folder: Path) -> None:
    """A model that is loaded from the folder multiplies by the same weights."""
    loaded = panguq.load_pretrained(folder)
    weights = loaded.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for path, linear in linears(model).items():
        assert torch.equal(weights[f"{path}.weight"], linear.dequantized(torch.float32)), path


def gptq_weight(tensors: dict[str, Tensor], path: str, bits: int, plus: int) -> Tensor:
    """(code - zero) * scale of every weight, `[n, k]`, as a reader has it."""
    codes = unpacked_words(tensors[f"{path}.qweight"].T.contiguous(), bits).T
    zeros = unpacked_words(tensors[f"{path}.qzeros"], bits).int() + plus
    of_input = tensors[f"{path}.g_idx"].long()
    scales = tensors[f"{path}.scales"].float()
    return ((codes.int() - zeros[of_input]) * scales[of_input]).T


@pytest.mark.parametrize(
    ("scheme", "bits", "convention"),
    [
        ("W4A16-g32", 4, "gptq"),
        ("W4A16_ASYM-g32", 4, "gptq_v2"),
        ("W3A16-g32", 3, "gptq_v2"),
        ("W2A16-sym-g32", 2, "gptq"),
        ("W8A16", 8, "gptq"),
    ],
)
def test_gptq(scheme: str, bits: int, convention: str, tmp_path: Path) -> None:
    model = of(scheme)
    config, tensors = saved(model, "gptq", tmp_path / "out")
    assert (config["bits"], config["checkpoint_format"]) == (bits, convention)
    assert config["sym"] == (convention == "gptq")
    assert config["group_size"] == (-1 if bits == 8 else 32)
    assert config["dynamic"] == {"-:^lm_head$": {}}
    plus = 1 if convention == "gptq" else 0
    for path, linear in linears(model).items():
        read = gptq_weight(tensors, path, bits, plus)
        assert torch.equal(read, linear.dequantized(torch.float32)), path
        assert (f"{path}.bias" in tensors) == linear.has_bias
    check_loads(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("schemes", "group_size"),
    [
        ({"*": "W4A16-g32"}, 32),
        ({"*": "W4A16_ASYM-g32"}, 32),
        ({"*": "W4A16-per_channel"}, -1),
        ({"*": "W4A16-g32", "*down*": "W4A16-per_channel"}, 32),  # its scale is repeated
    ],
)
def test_awq(schemes: dict[str, str], group_size: int, tmp_path: Path) -> None:
    model = compiled(json.dumps(schemes))
    config, tensors = saved(model, "awq", tmp_path / "out")
    assert config["group_size"] == group_size
    assert (config["version"], config["zero_point"]) == ("gemm", True)
    assert config["modules_to_not_convert"] == ["lm_head"]
    for path, linear in linears(model).items():
        codes = from_awq_words(tensors[f"{path}.qweight"]).int()
        zeros = from_awq_words(tensors[f"{path}.qzeros"]).int()
        k = linear.shape[1]
        of_input = torch.arange(k) // (k if group_size == -1 else group_size)
        scales = tensors[f"{path}.scales"].float()
        read = ((codes - zeros[of_input]) * scales[of_input]).T
        assert torch.equal(read, linear.dequantized(torch.float32)), path
    check_loads(model, tmp_path / "out")


def test_rules_name_what_differs_and_what_servers_make_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of("W4A16-g32", **{"*down*": "W8A16", "*layers.1*[qkv]_proj": "FLOAT"})
    with caplog.at_level(logging.WARNING, logger="panguq"):
        config, _ = saved(model, "gptq", tmp_path / "out")
    rules = config["dynamic"]
    prefix = r"^model\.layers\.1\.self_attn\."
    assert rules[rf"-:{prefix}(q_proj|qkv_proj)$"] == {}
    name = DOWN.replace(".", r"\.")
    assert rules[rf"+:^{name}$"] == {"bits": 8, "group_size": -1, "sym": True}
    assert "transformers will not load this checkpoint" in caplog.text


# --- refusals: nothing is written ----------------------------------------------------------------


def refusal(model: Any, format: str, path: Path) -> str:
    with pytest.raises(ExportError) as caught:
        model.save(path / "out", format=format)
    assert not any(path.iterdir())
    assert caught.value.hint
    return caught.value.message


def test_quantized_inputs(tmp_path: Path) -> None:
    model = of("W8A8_DYNAMIC")
    for format in ("gptq", "awq"):
        assert "integer weights alone, for inputs in float" in refusal(model, format, tmp_path)


def test_bits_that_a_format_has_not(tmp_path: Path) -> None:
    assert "codes of 2, 3, 4 and 8 bits" in refusal(of("W6A16-g32"), "gptq", tmp_path)
    assert "codes of 4 bits alone" in refusal(of("W8A16"), "awq", tmp_path)


def test_a_quantized_head(tmp_path: Path) -> None:
    said = refusal(of("W4A16-g32", lm_head="W4A16-g32"), "gptq", tmp_path)
    assert "lm_head" in said
