"""npu_kronecker_quant gives the codes and scales of its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from panguq.kernels.ascend.vendor.int4pack import unpack_words
from panguq.kernels.ascend.vendor.kronecker_quant import npu_kronecker_quant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_codes_and_scales(dtype: torch.dtype, clip: float | None) -> None:
    """Token by token in numpy, with the kernel's roundings between the steps."""
    generator = torch.Generator().manual_seed(0)
    x, p1, p2 = (torch.randn(*s, generator=generator).to(dtype) for s in
                 ((5, 3, 8), (3, 3), (8, 8)))  # fmt: skip
    x[3] = 0
    codes, scale = npu_kronecker_quant(x, p1, p2, clip)
    ratio = 1.0 if clip is None else clip
    for token in range(5):
        first = (x[token].float() @ p2.float()).to(dtype).float()
        z = (p1.float() @ first).half().float().numpy()
        largest = max(np.abs(z).max(), np.float32(1e-30))
        steps = (z * np.float32(7 / ratio / largest)).astype(np.float16).astype(np.float32)
        wanted = np.clip(np.round(steps), -8, 7)
        found = unpack_words(codes[token]).numpy()
        assert np.abs(found - wanted).max() <= 1  # a product may round the other way
        assert (found != wanted).mean() < 0.05
        assert float(scale[token]) == pytest.approx(float(largest) * ratio / 7, rel=1e-2)
    assert codes[3].abs().max() == 0


def test_golden_codes() -> None:
    """One token by hand: z = [[4, 2], ...] times clip 1/2 makes 4 and more the code 7."""
    x = torch.zeros(1, 1, 8, dtype=torch.float16)
    x[0, 0, :4] = torch.tensor([4.0, 2.0, -4.0, 0.5])
    eye = torch.eye(8, dtype=torch.float16)
    codes, scale = npu_kronecker_quant(x, torch.ones(1, 1, dtype=torch.float16), eye, 0.5)
    assert scale.tolist() == pytest.approx([2 / 7])
    assert unpack_words(codes)[0, 0].tolist() == [7, 7, -8, 2, 0, 0, 0, 0]
