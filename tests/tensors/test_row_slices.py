"""Work on large weights is done a few rows at a time, with the bits of the whole at once."""

import os
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from panguq.errors import NumericsError
from panguq.ir.ops.packing import pack_int4, unpack_int4
from panguq.ir.ops.quantize import dequantize_weight, quantize_weight
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.run.interpret import ensure_finite
from panguq.kernels.cpu.int4_linear import int4_kernel_weight
from panguq.passes.codes.weight_scales import min_max_scale, search_scale
from panguq.tensors import row_slices as module
from panguq.tensors.memory import return_large_blocks
from panguq.tensors.row_slices import ELEMENTS_AT_ONCE, row_slices

RATIOS = (1.0, 0.9, 0.8)


@given(n=st.integers(0, 40), k=st.integers(0, 9), limit=st.integers(1, 50), m=st.integers(1, 8))
def test_slices_cover_every_row_once(n, k, limit, m) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ELEMENTS_AT_ONCE", limit)
        found = list(row_slices(torch.zeros(n, k), m))
    assert [i for some in found for i in range(n)[some]] == list(range(n))
    assert found and all((some.stop - some.start) % m == 0 for some in found[:-1])
    assert all(some.stop - some.start <= max(limit // max(k, 1), m) for some in found)


def test_a_vector_is_cut_too() -> None:
    found = list(row_slices(torch.zeros(ELEMENTS_AT_ONCE + 1)))
    assert found == [slice(0, ELEMENTS_AT_ONCE), slice(ELEMENTS_AT_ONCE, ELEMENTS_AT_ONCE + 1)]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A16_ASYM"])
def test_quantizing_in_slices_gives_the_same_bits(scheme, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 256, generator=generator).bfloat16()
    importance = torch.rand(256, generator=generator)
    spec = SCHEMES[scheme].weight
    size = spec.group_size_for(256)

    def everything() -> list[torch.Tensor]:
        scales = [*min_max_scale(weight, size, spec)]
        scales += search_scale(weight, size, spec, importance, RATIOS)
        step, zero = scales[2:]
        codes = quantize_weight(weight, step, zero, size, spec.quant_min, spec.quant_max)
        back = dequantize_weight(codes, step, zero, size, torch.bfloat16)
        return [t for t in (*scales, codes, back) if t is not None]

    whole = everything()
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 5 * 256)
    for one, other in zip(whole, everything(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("n", [64, 208])  # 208 = 3 * 64 + 16: the last block is a smaller one
def test_packing_in_slices_gives_the_same_bytes(n, monkeypatch) -> None:
    codes = torch.randint(-8, 8, (n, 128), dtype=torch.int8)
    packed = pack_int4(codes)
    kernel = int4_kernel_weight(packed)
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 1)
    assert torch.equal(pack_int4(codes), packed)
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(int4_kernel_weight(packed), kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 77, 199])
def test_a_number_that_is_not_finite_is_found_anywhere(dtype, bad, place) -> None:
    weight = torch.full((20, 10), torch.finfo(dtype).max, dtype=dtype)  # a sum would overflow
    weight[3] = -weight[3]
    ensure_finite("w", weight)
    weight.view(-1)[place] = bad
    with pytest.raises(NumericsError, match="holds 1 values"):
        ensure_finite("w", weight)


def test_nothing_is_finite() -> None:
    ensure_finite("w", torch.zeros(0, 4))


def test_memory_of_slices_is_used_again() -> None:
    """The system zeroes each page that a process touches first: here it need not do so often."""
    child = os.fork()
    if child == 0:
        return_large_blocks()
        weight, spec = torch.ones(1024, 4096).bfloat16(), SCHEMES["W4A16"].weight

        def faults() -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            search_scale(weight, 128, spec, None, RATIOS)
            weight.double()  # mapped anew in any case
            for rows in row_slices(weight):
                weight[rows].double()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        faults()
        large = weight.numel() * 8 // resource.getpagesize()
        os._exit(0 if faults() < 1.2 * large else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
