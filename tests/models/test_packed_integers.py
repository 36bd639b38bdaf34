"""Weight-only folders as input: the floats that their codes, zero points and scales stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import panguq
from panguq.errors import InputError, PanguqError, StorageError
from tests.formats.checkpoint.test_weight_only import DOWN, check_loads, gptq_weight, of, saved

Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize("scheme", ["W4A16_ASYM-g32", "W4A16-per_channel", "W8A16"])
def test_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    of(scheme).save(tmp_path / "out", format="compressed-tensors")
    check_loads(of(scheme), tmp_path / "out")


def changed(folder: Path, change: Change) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_inputs_in_the_order_of_their_activations(tmp_path: Path) -> None:
    """GPTQ's desc_act: g_idx names a scale for each input, in any order."""
    _, tensors = saved(of("W4A16-g32"), "gptq", tmp_path / "out")
    mixed = tensors[f"{DOWN}.g_idx"].flip(0)
    changed(tmp_path / "out", lambda tensors: tensors.update({f"{DOWN}.g_idx": mixed}))
    expected = gptq_weight(tensors | {f"{DOWN}.g_idx": mixed}, DOWN, 4, 1)
    loaded = panguq.load_pretrained(tmp_path / "out").state_dict()[f"{DOWN}.weight"]
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (lambda t: t.pop(f"{DOWN}.scales"), InputError, f"{DOWN}.qweight has no {DOWN}.scales"),
        (lambda t: t.pop(f"{DOWN}.qzeros"), StorageError, "its parts do not fit each other"),
        (
            lambda t: t.update({f"{DOWN}.qzeros": t[f"{DOWN}.qzeros"].float()}),
            StorageError,
            "qzeros is stored as float32",
        ),
        (lambda t: t[f"{DOWN}.g_idx"].add_(99), StorageError, "scales that are not there"),
        (lambda t: t[f"{DOWN}.qzeros"].fill_(-1), StorageError, "stored as 15, which some readers"),
        (lambda t: t[f"{DOWN}.scales"].fill_(torch.inf), StorageError, "a scale is not finite"),
        (
            lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:-1]}),
            StorageError,
            "scales that are not there",
        ),
    ],
)
def test_what_does_not_fit_is_one_error(
    change: Change, error: type[PanguqError], why: str, tmp_path: Path
) -> None:
    saved(of("W4A16-g32"), "gptq", tmp_path / "out")
    with pytest.raises(error, match=why.replace(".", r"\.")) as caught:
        panguq.load_pretrained(changed(tmp_path / "out", change))
    assert DOWN in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"checkpoint_format": "marlin"}, "gptq, marlin, 4 bits"),
        ({"bits": 5}, "gptq, gptq, 5 bits"),
    ],
)
def test_layouts_that_are_not_read(config: dict[str, object], why: str, tmp_path: Path) -> None:
    saved(of("W4A16-g32"), "gptq", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] |= config
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=why):
        panguq.load_pretrained(tmp_path / "out")


def test_quantized_inputs_are_not_read(tmp_path: Path) -> None:
    of("W8A8_DYNAMIC").save(tmp_path / "out", format="compressed-tensors")
    with pytest.raises(InputError, match="its inputs, too, which is not read"):
        panguq.load_pretrained(tmp_path / "out")
