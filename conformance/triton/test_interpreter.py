"""The kernels and their launch path in Triton's interpreter, against exact references.

The interpreter of triton-ascend 3.2.0 keeps bfloat16 as integers and multiplies those, so float
kernels run in float16 here; test_native.py has both.
"""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from math import prod

# Read where a kernel is defined, so this file has a process of its own.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conformance.triton.bounds import assert_within_bound, w4a16_inputs
from panguq.errors import LoweringError
from panguq.kernels.ascend.own.dynamic_quant import dynamic_quant
from panguq.kernels.ascend.own.triton import launch
from panguq.kernels.ascend.own.triton.launch import launch_dynamic_quant, launch_w4a16, launch_w8a8
from panguq.kernels.ascend.own.w8a8 import w8a8

pytest.importorskip("triton", reason="triton is not installed: run python -m conformance.triton")

CHECKED = settings(deadline=None, max_examples=40)
M, N, K, SPLITS = (st.integers(1, most) for most in (40, 150, 200, 4))
W8A8_TILE = [16, 64, 64]
W4A16_TILE = [16, 64, 16]


@contextmanager
def programs_in_random_order(seed: int):
    """A launch runs its programs one after another in an order of this seed."""
    from triton.runtime.interpreter import interpreter_builder as builder

    in_order = builder.set_grid_idx

    def shuffled(x, y, z):
        sizes = builder.grid_dim
        order = list(range(prod(sizes)))
        random.Random(seed).shuffle(order)
        place, z = divmod(order[(x * sizes[1] + y) * sizes[2] + z], sizes[2])
        in_order(*divmod(place, sizes[1]), z)

    builder.set_grid_idx = shuffled
    try:
        yield
    finally:
        builder.set_grid_idx = in_order


def random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@given(m=M, n=N, k=K, splits=SPLITS, extreme=st.booleans(), order=st.integers(0, 99))
@example(m=1, n=1, k=1, splits=1, extreme=True, order=0)
@example(m=17, n=65, k=65, splits=2, extreme=True, order=1)
@CHECKED
def test_w8a8_sums_are_exact_in_one_part_or_several(m, n, k, splits, extreme, order):
    x, weight = random_int8(m, k), random_int8(k, n)
    if extreme:
        x.fill_(-128)
        weight.fill_(-128)
    # 200 * 128 * 128 < 2**24: float32 holds every sum.
    with programs_in_random_order(order):
        result = launch_w8a8(x, weight, torch.ones(n), None, None, torch.float32, splits, W8A8_TILE)
    assert torch.equal(result.long(), x.long() @ weight.long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("bias", "per_token"), [("float", True), ("float", False), ("int32", False), (None, True)]
)
@pytest.mark.parametrize("splits", [1, 3])
def test_w8a8_scales_and_bias_are_bit_equal_to_the_reference(dtype, bias, per_token, splits):
    x, weight, scale = random_int8(2, 9, 150), random_int8(150, 70), torch.rand(70) * 0.01
    token_scale = torch.rand(2, 9) if per_token else None
    added = {"float": torch.randn(70), "int32": torch.arange(70, dtype=torch.int32), None: None}
    rest = (scale, token_scale, added[bias], dtype)
    result = launch_w8a8(x, weight, *rest, splits, W8A8_TILE)
    assert torch.equal(result, w8a8(x, weight, *rest, 1, [16, 64, 512]))


@given(
    m=M,
    words=st.integers(1, 20),
    k=K,
    group_size=st.sampled_from([16, 32, 208]),
    splits=SPLITS,
    offset=st.booleans(),
    bias=st.booleans(),
    order=st.integers(0, 99),
)
@CHECKED
def test_w4a16_is_within_the_summation_bound(m, words, k, group_size, splits, offset, bias, order):
    inputs = w4a16_inputs(m, 8 * words, k, group_size, torch.float16, offset, bias)
    result = launch_w4a16(*inputs, group_size, splits, W4A16_TILE)
    assert_within_bound(result, *inputs, group_size, additions=k + splits + 1 + 4 * -(-k // 16))
    with programs_in_random_order(order):
        assert torch.equal(result, launch_w4a16(*inputs, group_size, splits, W4A16_TILE))


def test_w4a16_with_one_scale_per_output():
    x, weight, scale, _, bias = w4a16_inputs(5, 72, 100, 100, torch.float16, False, True)
    result = launch_w4a16(x, weight, scale[0], None, bias, 0, 2, W4A16_TILE)
    assert_within_bound(result, x, weight, scale, None, bias, 100, additions=103 + 4 * 7)


@pytest.mark.parametrize("order", range(6))
def test_partial_sums_are_added_in_the_order_of_k_whoever_arrives_last(order):
    # In float32, (2**25 + 1) - 2**25 is 0 and (2**25 - 2**25) + 1 is 1.
    weight = torch.full((48, 16), 0x1111, dtype=torch.int16)  # every code is 1
    scale = torch.ones(3, 64, dtype=torch.float16)
    for parts, expected in (([2.0**11, 1.0, -(2.0**11)], 0.0), ([2.0**11, -(2.0**11), 1.0], 1.0)):
        scale[:] = torch.tensor(parts).reshape(3, 1)
        x = torch.zeros(2, 48, dtype=torch.float16)
        x[:, ::16] = (
            torch.tensor([2.0**14, 1.0, 2.0**14])
            if expected == 0
            else torch.tensor([2.0**14, 2.0**14, 1.0])
        )
        with programs_in_random_order(order):
            result = launch_w4a16(x, weight, scale, None, None, 16, 3, W4A16_TILE)
        assert torch.equal(result, torch.full((2, 64), expected, dtype=torch.float16))


def test_a_launch_leaves_its_flags_lowered_and_the_next_one_shares_them():
    flags = launch._flags(torch.device("cpu"), 1)
    for m, splits in ((40, 4), (3, 2), (17, 3)):
        x, weight = random_int8(m, 200), random_int8(200, 70)
        result = launch_w8a8(
            x, weight, torch.ones(70), None, None, torch.float32, splits, W8A8_TILE
        )
        assert torch.equal(result.long(), x.long() @ weight.long())
        flags = launch._flags(torch.device("cpu"), 1)
        assert not flags.any()
    assert flags is launch._flags(torch.device("cpu"), flags.numel())


@pytest.mark.parametrize("order", range(4))
def test_a_gpu_s_count_of_arrivals_gives_what_flags_give(order, monkeypatch):
    def results() -> tuple[torch.Tensor, torch.Tensor]:
        with programs_in_random_order(order):
            return (
                launch_w8a8(*integers, torch.ones(70), None, None, torch.float32, 3, W8A8_TILE),
                launch_w4a16(*floats, 32, 3, W4A16_TILE),
            )

    integers = random_int8(19, 200), random_int8(200, 70)
    floats = w4a16_inputs(19, 72, 100, 32, torch.float16, True, True)
    by_flags = results()
    monkeypatch.setattr(launch, "_counts", lambda device: True)
    assert all(map(torch.equal, results(), by_flags))
    assert not launch._flags(torch.device("cpu"), 1).any()


@given(
    m=st.integers(1, 3),
    k=st.integers(1, 5000),
    magnitude=st.integers(-7, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@settings(deadline=None, max_examples=20)  # the interpreter takes 0.1 s for a maximum over k
def test_dynamic_quant_codes_are_exact(m, k, magnitude, dtype):
    x = (torch.randn(m, k) * 10.0**magnitude).to(dtype)
    x[0] = 0
    codes, scale = launch_dynamic_quant(x)
    expected = dynamic_quant(x)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


def test_dynamic_quant_rounds_ties_to_even():
    # scale is exactly 1, so each value is its own quotient.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.49999997]])
    codes, scale = launch_dynamic_quant(x)
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 0]]


def test_no_tokens():
    codes, scale = launch_dynamic_quant(torch.empty(0, 64))
    assert (codes.shape, scale.shape) == ((0, 64), (0,))
    result = launch_w8a8(
        codes, random_int8(64, 8), torch.ones(8), scale, None, torch.float16, 2, W8A8_TILE
    )
    assert result.shape == (0, 8)


def test_a_transposed_weight_and_a_part_of_a_wider_input_are_taken_by_position():
    x, weight = random_int8(6, 200)[:, 100:], random_int8(70, 100).t()
    result = launch_w8a8(x, weight, torch.ones(70), None, None, torch.float32, 1, W8A8_TILE)
    assert torch.equal(result.long(), x.long() @ weight.long())


def test_too_many_programs_are_refused():
    with pytest.raises(LoweringError, match="programs, more than 65535"):
        launch.grid_of(4096, 153376, [16, 64, 64])
