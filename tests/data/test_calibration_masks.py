"""Attention masks of calibration batches: exactly one 0 or 1 a token, or a refusal."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from panguq.data.calibration_data import read_calibration
from panguq.errors import InputError

IDS = torch.arange(3, 51).reshape(4, 12)
LEFT = torch.ones(4, 12)
LEFT[1, :5] = 0


def lengths(mask: Any, ids: Any = IDS) -> list[int]:
    read = read_calibration([{"input_ids": ids, "attention_mask": mask}])
    return [len(row) for item in read.sequences for row in item.ids]


@pytest.mark.parametrize(
    "mask", [LEFT, LEFT.bool(), LEFT.long(), LEFT.half(), LEFT.tolist(), LEFT.numpy()],
    ids=["float", "bool", "int", "half", "list", "array"],
)  # fmt: skip
def test_a_mask_of_zeros_and_ones(mask: Any) -> None:
    assert lengths(mask) == [12, 7, 12, 12]


def test_a_mask_of_lists_and_of_one_row() -> None:
    assert lengths([[1, 1, 0], [1, 1]], [[4, 5, 6], [7, 8]]) == [2, 2]
    assert lengths([0, 1, 1], [4, 5, 6]) == [2]
    assert lengths(torch.tensor([0, 1, 1]), torch.tensor([4, 5, 6])) == [2]


def hole() -> torch.Tensor:
    mask = torch.ones(4, 12)
    mask[2, 3] = 0
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (LEFT.t(), r"attention_mask has shape \[12, 4\], input_ids \[4, 12\]"),
        (torch.ones(48), r"attention_mask has shape \[48\], input_ids \[4, 12\]"),
        (torch.ones(4, 1, 12, 12), r"attention_mask has shape \[4, 1, 12, 12\]"),
        (torch.ones(4, 11), r"attention_mask has shape \[4, 11\]"),
        (torch.where(LEFT > 0, 0.0, -torch.inf), "attention_mask holds -inf, not only 0 and 1"),
        (torch.full((4, 12), torch.nan), "attention_mask holds nan"),
        (LEFT * 255, "attention_mask holds 255.0"),
        ([[1] * 12, [1] * 11], "attention_mask is ragged or holds no numbers"),
        ("left", "attention_mask is ragged or holds no numbers"),
        (torch.zeros(4, 12), r"row 0 of attention_mask \[4, 12\] keeps no token"),
        (1 - LEFT, r"row 0 of attention_mask \[4, 12\] keeps no token"),
        (hole(), r"row 2 of attention_mask \[4, 12\] has padding between its tokens"),
        (numpy.float32(1), r"attention_mask has shape \[1?\]"),
    ],
    ids=[
        "transposed", "flat", "4-D", "short", "additive", "NaN", "255", "ragged", "text", "zeros",
        "inverted", "hole", "scalar",
    ],
)  # fmt: skip
def test_masks_that_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"calibration item 0: {message}"):
        lengths(mask)


def test_masks_that_do_not_fit_lists_of_ids() -> None:
    ragged = [[4, 5, 6], [7, 8]]
    with pytest.raises(InputError, match="item 0: attention_mask has not the 2 rows of input_ids"):
        lengths([[1, 1, 1]], ragged)
    with pytest.raises(InputError, match="item 0: attention_mask has not the 2 rows"):
        lengths(torch.tensor(1), ragged)
    with pytest.raises(InputError, match=r"item 0, row 1: attention_mask has shape \[3\]"):
        lengths([[1, 1, 1], [1, 1, 0]], ragged)
