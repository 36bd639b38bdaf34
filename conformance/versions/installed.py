"""Run outside the source tree, by a Python that has the wheel and nothing of panguq's extras.

Compiles a small model, saves it, loads it, generates; then asks for what an extra brings.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import panguq
from panguq.extras import OPTIONAL


def main() -> None:
    """Use the installed package; an AssertionError says what is not as it should be."""
    where = Path(panguq.__file__)
    assert "site-packages" in where.parts, f"{where} is no installed package"
    there = sorted(module for module in OPTIONAL if find_spec(module) is not None)
    assert not there, f"not the plain environment that this is about: it has {there}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        compiled = compile_small_model()
        compiled.save(folder / "out")
        loaded = panguq.load(folder / "out")
        ids = torch.arange(12)[None]
        assert torch.equal(compiled(ids).logits, loaded(ids).logits), "a load gives other numbers"
        written = loaded.generate(ids, max_new_tokens=4, do_sample=False)
        assert written.shape == (1, 16), written.shape
        try:
            loaded.export_onnx(folder / "model.onnx")
        except panguq.PanguqError as error:
            assert "panguq[onnx]" in error.hint, error
        else:
            raise AssertionError("an ONNX export without the package onnx")
    print(f"panguq {panguq.__version__} in {where.parent}: compiles, saves, loads, generates")


def compile_small_model() -> panguq.CompiledCausalLM:
    """Two layers of 64 channels with 8-bit weights and activations."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    return panguq.compile(model, "w8a8", calibration=torch.randint(0, 64, (4, 16)))


if __name__ == "__main__":
    sys.exit(main())
