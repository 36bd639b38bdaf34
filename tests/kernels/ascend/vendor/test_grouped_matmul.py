"""npu_grouped_matmul and its fusion with SwiGLU: each expert's rows by that expert's weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.dynamic_quant import npu_dynamic_quant
from panguq.kernels.ascend.vendor.grouped_matmul import npu_grouped_matmul
from panguq.kernels.ascend.vendor.grouped_swiglu_quant import npu_grouped_matmul_swiglu_quant_v2
from panguq.kernels.ascend.vendor.int4pack import pack_words
from panguq.kernels.ascend.vendor.quant_matmul import npu_quant_matmul
from panguq.kernels.ascend.vendor.swiglu import npu_swiglu
from panguq.kernels.ascend.vendor.weight_quant_matmul import npu_weight_quant_batchmatmul

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXPERTS, K, N, ROWS = 3, 512, 16, 11
COUNTS = torch.tensor([4, 0, 5])  # two rows are nobody's
GENERATOR = torch.Generator().manual_seed(0)


def codes(*shape: int, limit: int = 128) -> Tensor:
    return torch.randint(-limit, limit, shape, dtype=torch.int8, generator=GENERATOR)


def scales(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.rand(shape, generator=GENERATOR) * 0.01 + 1e-3).to(dtype)


def full(scale: Tensor) -> Tensor:
    return scale.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF


def grouped(x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
    how = {"group_list": COUNTS, "group_list_type": 1, "split_item": 2, "group_type": 0, **rest}
    (result,) = npu_grouped_matmul([x], [weight], **how)
    assert result[9:].isnan().all() or not result.is_floating_point()
    return result[:9]


def by_expert(result: Tensor) -> list[tuple[int, slice, Tensor]]:
    return [(0, slice(0, 4), result[:4]), (2, slice(4, 9), result[4:9])]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_floats(dtype: torch.dtype) -> None:
    x, weight = torch.randn(ROWS, K).to(dtype), torch.randn(EXPERTS, K, N).to(dtype)
    bias = torch.randn(EXPERTS, N).to(FP16 if dtype == FP16 else FP32)
    result = grouped(x, weight, bias=[bias])
    for expert, rows, found in by_expert(result):
        exact = x[rows].double() @ weight[expert].double() + bias[expert].double()
        assert torch.allclose(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    ends = grouped(x, weight, bias=[bias], group_list=COUNTS.cumsum(0), group_list_type=0)
    assert torch.equal(ends, result)


@pytest.mark.parametrize("output", [BF16, FP16])
def test_int8_is_npu_quant_matmul_for_each_expert(output: torch.dtype) -> None:
    x, weight, per_token = codes(ROWS, K), codes(EXPERTS, K, N), scales(ROWS, dtype=FP32)
    scale = scales(EXPERTS, N, dtype=BF16 if output == BF16 else FP32)
    number = dtype_number(output)
    quantized = {"scale": [scale], "per_token_scale": [per_token], "output_dtype": number}
    pairs = torch.tensor([[0, 4], [2, 5], [0, 0]])
    result = grouped(x, weight, **quantized)
    assert torch.equal(grouped(x, weight, **quantized, group_list=pairs, group_list_type=2), result)
    for expert, rows, found in by_expert(result):
        alone = npu_quant_matmul(
            x[rows], weight[expert], scale[expert], pertoken_scale=per_token[rows],
            output_dtype=number,
        )  # fmt: skip
        assert torch.equal(found, alone)
    sums = grouped(x, weight, output_dtype=dtype_number(torch.int32))
    assert torch.equal(sums[:4].long(), x[:4].long() @ weight[0].long())


def test_int8_biases_of_both_kinds() -> None:
    x, weight, scale = codes(ROWS, K), codes(EXPERTS, K, N), scales(EXPERTS, N, dtype=FP32)
    whole, late = torch.full((EXPERTS, N), 7, dtype=torch.int32), scales(EXPERTS, N) * 100
    fp16 = grouped(x, weight, scale=[scale], bias=[whole], output_dtype=dtype_number(FP16))
    bf16 = grouped(x, weight, scale=[scale], bias=[late], output_dtype=dtype_number(BF16))
    for expert, rows, found in by_expert(fp16):
        total = (x[rows].long() @ weight[expert].long()).double()
        assert torch.allclose(found.double(), (total + 7) * scale[expert].double(), rtol=1e-3)
        added = total * scale[expert].double() + late[expert].double()
        assert torch.allclose(bf16[rows].double(), added, rtol=1e-2)


@pytest.mark.parametrize(("bits", "groups"), [(8, 0), (4, 0), (4, 4)])
def test_weight_only_is_the_op_for_one_weight(bits: int, groups: int) -> None:
    x = torch.randn(ROWS, K, generator=GENERATOR).to(BF16)
    values = codes(EXPERTS, K, N, limit=2 ** (bits - 1))
    weight = values if bits == 8 else pack_words(values)
    scale = scales(EXPERTS, *([groups] if groups else []), N)
    offset = torch.full_like(scale, 3) if not groups else torch.zeros_like(scale)
    result = grouped(x, weight, antiquant_scale=[scale], antiquant_offset=[offset])
    for expert, rows, found in by_expert(result):
        alone = npu_weight_quant_batchmatmul(
            x[rows], weight[expert], scale[expert], offset[expert],
            antiquant_group_size=K // groups if groups else 0,
        )  # fmt: skip
        # The sums are the same but for their order.
        assert torch.allclose(found.double(), alone.double(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_int8_by_int4_gives_back_what_it_shifted(groups: int) -> None:
    x, values = codes(ROWS, K), codes(EXPERTS, K, N, limit=8)
    scale, per_token = scales(EXPERTS, groups, N), scales(ROWS, dtype=FP32)
    spread = scale.double().repeat_interleave(K // groups, 1)
    bias = 8 * (values.double() * spread).sum(1).float()
    rest = {"bias": [bias], "per_token_scale": [per_token], "output_dtype": dtype_number(BF16)}
    result = grouped(x, pack_words(values), scale=[full(scale)], **rest)
    if groups == 1:  # as vllm-ascend gives it
        flat = grouped(x, pack_words(values), scale=[full(scale).squeeze(1)], **rest)
        assert torch.equal(flat, result)
    for expert, rows, found in by_expert(result):
        exact = x[rows].double() @ (values[expert].double() * spread[expert])
        exact *= per_token[rows].double().unsqueeze(1)
        assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-4)


def test_swiglu_of_codes_differs_from_the_chain_by_one_step_at_most() -> None:
    """Nothing is rounded to bfloat16 in between, and codes are rounded twice."""
    x, weight = codes(ROWS, K), codes(EXPERTS, K, 2 * 256)
    scale, per_token = scales(EXPERTS, 512), scales(ROWS, dtype=FP32)
    fused, fused_scale = npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [scale], per_token, COUNTS, group_list_type=1
    )
    both = grouped(
        x, weight, scale=[scale], per_token_scale=[per_token], output_dtype=dtype_number(BF16)
    )
    chained, chained_scale = npu_dynamic_quant(npu_swiglu(both))
    assert torch.allclose(fused_scale[:9], chained_scale, rtol=2**-7)
    assert (fused[:9].int() - chained.int()).abs().max() <= 1
    assert fused[:9].abs().amax(1).tolist() == [127] * 9
    assert fused_scale[9:].isnan().all()


def test_swiglu_of_packed_weights_is_that_of_the_same_int8_ones() -> None:
    x, values = codes(ROWS, K), codes(EXPERTS, K, 32, limit=8)
    scale, per_token = scales(EXPERTS, 32), scales(ROWS, dtype=FP32)
    assist = 8 * (values.double().sum(1) * scale.double()).float()
    packed = npu_grouped_matmul_swiglu_quant_v2(
        x, [pack_words(values)], [full(scale)], per_token, COUNTS.cumsum(0),
        weight_assist_matrix=[assist],
    )  # fmt: skip
    plain = npu_grouped_matmul_swiglu_quant_v2(
        x, [values], [scale], per_token, COUNTS, group_list_type=1
    )
    assert (packed[0][:9].int() - plain[0][:9].int()).abs().max() <= 1
    assert torch.allclose(packed[1][:9], plain[1][:9], rtol=1e-5)


def test_a_row_of_zeros_has_codes_of_zero() -> None:
    zeros = torch.zeros(ROWS, K, dtype=torch.int8)
    result, scale = npu_grouped_matmul_swiglu_quant_v2(
        zeros, [codes(EXPERTS, K, N)], [scales(EXPERTS, N)], scales(ROWS, dtype=FP32), COUNTS,
        group_list_type=1,
    )  # fmt: skip
    assert not result.any()
    assert not scale[:9].any()
