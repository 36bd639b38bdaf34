"""panguq packs 4-bit weights into the bytes that npu_convert_weight_to_int4pack makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

npu = torch.ops.npu


def really_packed(codes: Tensor) -> Tensor:
    """int32 [k, n] -> int32 [k, n / 8] by torch_npu's own C++ code, which runs on the host."""
    packed: Tensor = npu.npu_convert_weight_to_int4pack(codes.npu()).cpu()
    return packed


def random_codes(k: int, n: int, seed: int) -> Tensor:
    """int32 [k, n] in [-8, 7]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (k, n), generator=generator, dtype=torch.int32)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(k=st.integers(1, 70), words=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_body_packs_the_same_bytes(k: int, words: int, seed: int) -> None:
    """The body for CPU tensors against the C++ code."""
    codes = random_codes(k, 8 * words, seed)
    assert torch.equal(npu.npu_convert_weight_to_int4pack(codes), really_packed(codes))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(k=st.integers(1, 70), words=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_stored_weights_become_the_same_bytes(k: int, words: int, seed: int) -> None:
    """From the form that panguq stores, [n, k] with two codes a byte, to the kernel's."""
    pytest.importorskip("panguq.kernels.ascend.own.int4_weight")
    codes = random_codes(2 * k, 8 * words, seed)
    stored = torch.ops.panguq.pack_int4(codes.t().to(torch.int8).contiguous())
    assert torch.equal(torch.ops.panguq_npu.int4_weight(stored), really_packed(codes))


def test_every_code_in_every_place() -> None:
    """Word c of a row holds columns 8c to 8c + 7, the lowest bits first."""
    for place in range(8):
        for code in range(-8, 8):
            codes = torch.zeros(1, 8, dtype=torch.int32)
            codes[0, place] = code
            word = (code & 0xF) << (4 * place)
            expected = torch.tensor([[word - 2**32 if word >= 2**31 else word]], dtype=torch.int32)
            assert torch.equal(really_packed(codes), expected)
            assert torch.equal(npu.npu_convert_weight_to_int4pack(codes), expected)
