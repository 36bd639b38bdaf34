"""What triton-ascend lowers the kernels to computes the reference's numbers, as native code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.triton.bounds import assert_within_bound, w4a16_inputs
from conformance.triton.native import NativeKernel, mlir_folder, random_int8
from conformance.triton.variants import Variant, variant
from panguq.kernels.ascend.own.dynamic_quant import dynamic_quant
from panguq.kernels.ascend.own.triton.launch import FLAG_WORDS, grid_of
from panguq.kernels.ascend.own.w8a8 import w8a8
from panguq.kernels.cpu.int8_linear import int32_matmul

if mlir_folder() is None:
    pytest.skip("MLIR 19 is not there: run python -m conformance.triton", True)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Small ones, to have many tiles and tails in a small matmul, and legal ones.
W4A16_TILES = [(16, 64, 16), (16, 64, 128), (32, 256, 32)]
W8A8_TILES = [(16, 64, 64), (16, 256, 256)]
CHECKED = settings(deadline=None, max_examples=20)
M, N, K, SPLITS = (st.integers(1, most) for most in (40, 300, 300, 5))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    built: dict[str, NativeKernel] = {}

    def kernel(at_tile: Variant) -> NativeKernel:
        key = f"{at_tile.name} {at_tile.signature}"
        if key not in built:
            place = folder / str(len(built))
            place.mkdir()
            built[key] = NativeKernel(at_tile, place)
        return built[key]

    return kernel


def _workspace(grid, m, n, sums: torch.dtype, dtype: torch.dtype):
    """Partial sums that nothing has written, lowered flags, and a result."""
    partials = torch.full((grid[2], m, n), -99, dtype=sums)
    flags = torch.zeros(grid[0] * grid[1] * grid[2] * FLAG_WORDS, dtype=torch.int32)
    return partials, flags, torch.full((m, n), torch.nan, dtype=dtype)


@pytest.mark.parametrize("tile", W4A16_TILES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("offset", "bias"), [(True, True), (False, False)])
def test_w4a16_data_parallel(build, tile, dtype, offset, bias):
    added = "float" if bias else None
    kernel = build(variant("w4a16_data_parallel", tile, dtype, offset, added))

    @given(m=M, words=st.integers(1, 40), k=K, groups=st.integers(1, 4))
    @CHECKED
    def check(m, words, k, groups):
        n, groups_of = 8 * words, groups * tile[2]
        inputs = w4a16_inputs(m, n, k, groups_of, DTYPES[dtype], offset, bias)
        x, weight, scale, zero, added = inputs
        result = torch.empty(m, n, dtype=x.dtype)
        tensors = [x, weight, scale, zero, added, result]
        present = [tensor for tensor in tensors if tensor is not None]
        kernel(grid_of(m, n, list(tile)), *present, m, n, k, groups_of)
        steps = 4 * -(-k // tile[2])
        assert_within_bound(result, *inputs, groups_of, additions=k + 1 + steps)

    check()


@pytest.mark.parametrize("tile", W4A16_TILES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_w4a16_split_k_gives_the_same_bits_in_any_order_of_programs(build, tile, dtype):
    split_k = build(variant("w4a16_split_k", tile, dtype))

    @given(m=M, words=st.integers(1, 40), k=K, splits=SPLITS, order=st.integers(0, 99))
    @CHECKED
    def check(m, words, k, splits, order):
        n, groups_of = 8 * words, 2 * tile[2]
        inputs = w4a16_inputs(m, n, k, groups_of, DTYPES[dtype], True, True)
        x, weight, scale, zero, bias = inputs
        results, grid = [], grid_of(m, n, list(tile), splits)
        for seed in (None, order):
            partials, flags, result = _workspace(grid, m, n, torch.float32, x.dtype)
            tensors = (x, weight, scale, zero, bias, partials, flags, result)
            split_k(grid, *tensors, m, n, k, groups_of, splits, order=seed)
            assert not flags.any()
            results.append(result.clone())
            # Another program that found all flags raised, too, writes the same bits.
            flags.fill_(1)
            split_k((1, 1, 1), *tensors, m, n, k, groups_of, splits)
            assert torch.equal(result, results[-1])
            total = torch.zeros(m, n)
            for partial in partials:
                total += partial
            assert torch.equal(result, (total + bias).to(x.dtype))
        assert torch.equal(*results)
        steps = 4 * -(-k // tile[2])
        assert_within_bound(results[0], *inputs, groups_of, k + splits + 1 + steps)

    check()


@pytest.mark.parametrize("tile", W8A8_TILES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("bias", "per_token"), [("float", True), ("int32", False), (None, True), (None, False)]
)
def test_w8a8_is_bit_equal_to_the_reference(build, tile, dtype, bias, per_token):
    options = {"dtype": dtype, "bias": bias, "pertoken_scale": per_token}
    data_parallel = build(variant("w8a8_data_parallel", tile, **options))
    split_k = build(variant("w8a8_split_k", tile, **options))

    @given(m=M, n=N, k=K, splits=SPLITS, order=st.integers(0, 99))
    @CHECKED
    def check(m, n, k, splits, order):
        x, weight = random_int8(m, k), random_int8(k, n)
        scale, token_scale = torch.rand(n) * 0.01, torch.rand(m) if per_token else None
        added = None
        if bias is not None:
            added = torch.randn(n) if bias == "float" else torch.randint(-999, 999, (n,)).int()
        expected = w8a8(x, weight, scale, token_scale, added, DTYPES[dtype], 1, [16, 64, 512])
        finish = [tensor for tensor in (scale, token_scale, added) if tensor is not None]
        result = torch.empty_like(expected)
        data_parallel(grid_of(m, n, list(tile)), x, weight, *finish, result, m, n, k)
        assert torch.equal(result, expected)

        grid = grid_of(m, n, list(tile), splits)
        partials, flags, result = _workspace(grid, m, n, torch.int32, expected.dtype)
        tensors = (x, weight, *finish, partials, flags, result)
        split_k(grid, *tensors, m, n, k, splits, order=order)
        assert torch.equal(partials.sum(0, dtype=torch.int32), int32_matmul(x, weight.t()))
        assert torch.equal(result, expected)
        assert not flags.any()

    check()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dynamic_quant_is_bit_equal_to_the_reference(build, dtype):
    kernel = build(variant("dynamic_quant", (1, 1, 128), dtype))

    @given(m=M, k=st.integers(1, 400), programs=st.integers(1, 50), magnitude=st.integers(-7, 4))
    @CHECKED
    def check(m, k, programs, magnitude):
        x = (torch.randn(m, k) * 10.0**magnitude).to(DTYPES[dtype])
        x[0] = 0
        codes, scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m)
        kernel((programs, 1, 1), x, codes, scale, m, k)
        expected = dynamic_quant(x)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])

    check()
