"""What msModelSlim wrote passes `panguq check`, and reads back as what is written there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from conformance.msmodelslim.__main__ import KINDS
from panguq.check.ascend_read import FakeQuantLinear, load_ascend_v1
from panguq.check.report import check_folder
from tests.formats.checkpoint.ascend_reference import reference

torch.set_num_threads(1)
FOLDERS = Path(os.environ.get("PANGUQ_MSMODELSLIM", "no-such-folder"))
IDS = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(0))
# What is said of its folders and breaks nothing: static scales that a 16-bit model cannot hold
# (V0), a quant_bias computed in 16 bits (V1), no tokenizer where the model had none, and W4A8 that
# vllm-ascend computes as W4A16.
NOTES = {"input-scale-rounded", "quant-bias-rounded", "no-tokenizer", "computes-otherwise"}

if not FOLDERS.is_dir():
    pytest.skip("run python -m conformance.msmodelslim", allow_module_level=True)


def folder(kind: str, dtype: str) -> Path:
    return FOLDERS / f"{kind}-{dtype}"


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_it_passes_the_check(kind: str, dtype: str) -> None:
    report = check_folder(folder(kind, dtype))
    rules = {finding.rule for finding in report.findings}
    assert report.servers["mindie"] == "takes", report.render()
    assert report.servers["vllm-ascend"] == "takes", report.render()
    on_sglang = kind not in ("w8a16", "w4a8")
    assert report.servers["sglang"] == ("takes" if on_sglang else "refuses")
    assert rules - NOTES == (set() if on_sglang else {"no-kernel"})


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_logits_are_those_of_the_written_quantization(kind: str, dtype: str) -> None:
    model = load_ascend_v1(folder(kind, dtype), torch.float32)
    quantized = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
    assert len(quantized) == 14
    found, expected = model(IDS).logits, reference(folder(kind, dtype))(IDS).logits
    assert found.isfinite().all()
    assert torch.equal(found, expected)


def test_its_anti_outlier_method_left_norm_biases() -> None:
    description = (
        folder("w8a8_norm_bias", "bfloat16") / "quant_model_description.json"
    ).read_text()
    assert "input_layernorm.bias" in description
