"""What panguq does with every kind of model that is no causal language model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import panguq
from panguq.errors import TraceError
from panguq.ir.encoder import encoder_examples
from tests.families.encoders import make_encoder
from tests.families.sweep import (
    LARGEST_DIFFERENCE,
    LEAST_SQNR_DB,
    TARGET,
    difference,
    fused,
    said,
    saved,
    shared_traces,
    sites,
)


def inputs_of(model: Any, tokens: int, seed: int = 5) -> dict[str, Tensor]:
    """Random inputs of two rows, by name; the texts have no padding."""
    return encoder_examples(model, None, 2, tokens, seed)


def padded(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The same with padding at either end, and True where a token is real."""
    mask = inputs["attention_mask"].clone()
    mask[0, :3] = mask[1, -2:] = 0
    return {**inputs, "attention_mask": mask}, mask.bool()


@torch.no_grad()
def check_encoder(model: Any, compiled: Any) -> None:
    """Every output is the model's, in another batch and length than the trace's."""
    for tokens in (9, 24):
        inputs = inputs_of(model, tokens)
        expected, actual = model(**inputs), compiled(**inputs)
        assert type(expected) is type(actual)
        for name in compiled.interface.outputs:
            assert difference(expected[name], actual[name]) <= LARGEST_DIFFERENCE, name
        if "attention_mask" not in inputs:
            continue
        given, real = padded(inputs)
        expected, actual = model(**given), compiled(**given)
        for name in compiled.interface.outputs:
            one, other = expected[name], actual[name]
            if one.shape[:2] == real.shape:
                one, other = one[real], other[real]
            assert difference(one, other) <= LARGEST_DIFFERENCE, f"{name} with padding"


@torch.no_grad()
def near(model: Any, compiled: Any, least_db: float = LEAST_SQNR_DB) -> str:
    """`13 of 14`: how many matmuls are quantized. The first output is near the float model's."""
    inputs, name = inputs_of(model, 12), compiled.interface.outputs[0]
    expected, actual = (m(**inputs)[name].double() for m in (model, compiled))
    noise = (expected - actual).square().mean() / expected.square().mean()
    decibels = float(-10 * torch.log10(noise))
    assert decibels >= least_db, f"{compiled.recipe.name} has {decibels:.1f} dB"
    matmuls = [m for m in compiled.report.matmuls if not m.is_side]
    count = sum(m.scheme != "FLOAT" for m in matmuls)
    assert count > 0, "nothing is quantized"
    return f"{count} of {len(matmuls)}"


@torch.no_grad()
def loads_alike(model: Any, compiled: Any) -> None:
    """The model that is saved and loaded gives the same output, of the same class."""
    inputs = inputs_of(model, 9)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "saved")
        loaded = panguq.load(Path(folder) / "saved")
        one, other = compiled(**inputs), loaded(**inputs)
    assert type(one) is type(other)
    for name in compiled.interface.outputs:
        # a score of one column is summed in the order that its weight's place in memory allows
        assert difference(one[name], other[name]) <= 1e-6


def encoder_row(kind: str) -> tuple[str, ...]:
    """The class's row of the table. Raises AssertionError for a wrong result."""
    model = make_encoder(kind)
    data = [inputs_of(model, 14, seed) for seed in (2, 3)]
    with shared_traces():
        try:
            compiled: Any = panguq.compile(model, "float")
        except TraceError as error:
            return (kind, f"refused: {said(error)}")
        check_encoder(model, compiled)
        dynamic = panguq.compile(model, "w8a8-dynamic", calibration=data)
        gptq = panguq.compile(model, "w4a16-gptq", calibration=data)
        recipe = "w8a8-dynamic-serving"
        lowered = panguq.compile(model, recipe, calibration=data, target=TARGET)
    loads_alike(model, gptq)
    formats = (saved(gptq, "compressed-tensors"), saved(lowered, "ascend"))
    near(model, lowered)
    counts = (near(model, dynamic), near(model, gptq, least_db=3.0))
    return (kind, sites(compiled), *counts, fused(lowered), "; ".join(formats))
