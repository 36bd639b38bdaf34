"""Calibration inputs of modules that are no language models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from panguq.data.calibration_modules import MOST_ITEMS, module_batches
from panguq.errors import InputError
from panguq.ir.interface import Interface

PAIR = Interface(
    kind="module", inputs=("x", "y"), outputs=("z",), float_dtype="float32",
    input_shapes={"x": ("n", 3), "y": ("n",)},
)  # fmt: skip
ONE = PAIR.model_copy(update={"inputs": ("x",)})
X, Y = torch.zeros(2, 3), torch.ones(2)


def test_inputs_of_any_module() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    for data in ([(X, Y)], [[X, Y]], [{"y": Y, "x": X}], {"x": X, "y": Y}, loader):
        (batch,) = module_batches(data, PAIR)
        assert list(batch) == ["x", "y"]
        assert torch.equal(batch["x"], X) and torch.equal(batch["y"], Y)


def test_inputs_of_a_module_that_takes_one() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=2)
    for data in ([X], X, [(X,)], [{"x": X}], (x for x in [X]), loader, [X.numpy()]):
        (batch,) = module_batches(data, ONE, (X,))
        assert torch.equal(batch["x"], X)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(X, Y), X], "calibration item 1 has 1 tensors, the module takes 2: x, y"),
        ([(X, Y, Y)], "calibration item 0 has 3 tensors"),
        ([{"x": X}], "calibration item 0 has no y, but x"),
        ([(X, "y")], "calibration item 0 holds a str, not a tensor"),
        ([(X, Y), (X[0], Y)], r"item 1, of shape \[3\], \[2\]: input x has 1 dimensions"),
        ([(X, Y), (X, Y[:1])], r"item 1, of shape \[2, 3\], \[1\]: dimension 0 of input y is 1"),
        ([(X, Y), (X.double(), Y)], "item 1: input x is torch.float64, the example input"),
        ([], "the calibration data is empty\n.*the module takes 2: x, y"),
        (7, "calibration data is a int"),
        ("x.pt", "calibration data is a str"),
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        module_batches(data, PAIR, (X, Y))


def test_an_infinite_source_ends_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert len(module_batches(itertools.repeat(X), ONE)) == MOST_ITEMS
    assert "the first 4096 inputs are taken" in caplog.text
