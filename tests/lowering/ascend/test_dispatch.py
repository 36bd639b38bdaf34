"""A table over m: which kernel runs, and that no table can change a result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.errors import LoweringError
from panguq.ir.edit import clone, find_label, op_name
from panguq.ir.node_meta import scheme_of
from panguq.ir.ops.packing import pack_int4
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.run.interpret import run
from panguq.lowering import lower_matmuls
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.dispatch import Operands, kernel_call, parse_kernel, row_for
from panguq.lowering.choice import TableEntry
from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.run.specialize import specialize
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.targets import find_target
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import linears
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import OneLinear, run_passes, run_pipeline, tiny_context, trace_tiny

panguq = torch.ops.panguq
HELD = frozenset({Property.CANONICAL, Property.SCHEMES, Property.QDQ, Property.WEIGHT_CODES})
TARGET = find_target("ascend910b1")
K, N = 512, 64


def legal(scheme: str) -> list[Candidate]:
    """Every legal kernel for the tests' matmul, one of each kind and number of splits."""
    problem = MatmulProblem(None, N, K, SCHEMES[scheme])
    found = [c for c in ascend_candidates(problem, TARGET) if c.refusal is None]
    return list({(c.kernel, c.splits): c for c in found}.values())


def int8_operands(m: int, seed: int) -> Operands:
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    scale, token = torch.rand(N, generator=generator), torch.rand(m, generator=generator)
    bias = torch.randn(N, generator=generator)
    return Operands(codes(m, K), codes(K, N), scale, None, token, bias, 0, torch.bfloat16)


def int4_operands(m: int, seed: int) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (K, N), generator=generator, dtype=torch.int8)
    weight = pack_int4(codes).view(torch.int32)
    scale = (torch.rand(K // 128, N, generator=generator) / 8).bfloat16()
    x = torch.randn(m, K, generator=generator).bfloat16()
    return Operands(x, weight, scale, None, None, None, 128, torch.bfloat16)


def result(kernel: Candidate, given: Operands) -> Tensor:
    op, args, named = kernel_call(kernel, given)
    return op(*args, **named)


# --- no kernel of a table changes the result -----------------------------------------------------


@pytest.mark.parametrize("m", [1, 7, 33])
def test_int8_kernels_are_bit_equal(m) -> None:
    kernels, given = legal("W8A8_DYNAMIC"), int8_operands(m, m)
    assert {c.kernel for c in kernels} == {"npu_quant_matmul", "w8a8_data_parallel", "w8a8_split_k"}
    expected = result(kernels[0], given)
    for kernel in kernels[1:]:
        assert torch.equal(result(kernel, given), expected), str(kernel)


@pytest.mark.parametrize("m", [1, 7, 33])
def test_weight_only_kernels_agree_up_to_summation(m) -> None:
    """Float32 sums of k products in another order, then one rounding to bfloat16."""
    kernels, given = legal("W4A16"), int4_operands(m, m)
    assert {c.kernel for c in kernels} > {"npu_weight_quant_batchmatmul", "w4a16_split_k"}
    codes = panguq.unpack_int4(given.weight.view(torch.uint8)).float()
    scaled = codes * given.scale.float().repeat_interleave(128, 0)
    quarters = torch.ops.panguq_npu.int4_quarters(pack_int4(codes.t().contiguous().char()))
    for kernel in kernels:
        own = kernel.storage == "int4_quarters"  # CANN's op rounds weights, panguq's scales sums
        weight = (scaled if own else scaled.bfloat16()).double()
        exact = given.x.double() @ weight
        bound = (K + 16) * 2**-24 * (given.x.double().abs() @ weight.abs()) + 2**-8 * exact.abs()
        read = dataclasses.replace(given, weight=quarters) if own else given
        assert ((result(kernel, read).double() - exact).abs() <= bound).all(), str(kernel)
        assert not ((2 * result(kernel, read).double() - exact).abs() <= bound).all()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True),
    st.integers(1, 48),
    st.randoms(use_true_random=False),
)
def test_any_table_gives_the_same_bits(last_m, m, random) -> None:
    given_, kernels = int8_operands(m, m), legal("W8A8_DYNAMIC")
    table = [str(random.choice(kernels)) for _ in range(len(last_m) + 1)]
    fields = [getattr(given_, field.name) for field in dataclasses.fields(given_)]
    found = panguq.dispatch_matmul(*fields, [*sorted(last_m), 2**31 - 1], table)
    assert torch.equal(found, result(kernels[0], given_))


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "row"), [(1, 0), (16, 0), (17, 1), (64, 1), (65, 2), (9999, 2)])
def test_the_row_for_m(m, row) -> None:
    assert row_for([16, 64, 2**31 - 1], m) == row


@pytest.mark.parametrize("kernel", [*legal("W8A8_DYNAMIC")[:3], *legal("W4A16")[-2:]], ids=str)
def test_a_spelling_is_read_back(kernel) -> None:
    found = parse_kernel(str(kernel))
    assert (found.kernel, found.splits, found.tile) == (kernel.kernel, kernel.splits, kernel.tile)


@pytest.mark.parametrize(
    "text", ["", "rm -rf", "w4a16_split", "w4a16_split_k splits=0", "w8a8_split_k tile=1x2", "x y"]
)
def test_what_spells_no_kernel(text) -> None:
    with pytest.raises(LoweringError, match="spells no kernel"):
        parse_kernel(text)


def lowered_with_table(scheme: str, monkeypatch):
    """One matmul lowered with a table of all its kernels."""
    x = torch.randn(4, 16, K).bfloat16()
    gm, interface = trace_tiny(OneLinear(K, N).bfloat16(), torch.randn(2, 3, K).bfloat16())
    ctx = tiny_context(interface, x)
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    # Kernels of one table read the same bytes.
    kernels = [c for c in legal(scheme) if c.storage in ("int8", "int4_quarters")][:3]

    def choose(problem, target, *options):
        found = select_kernel(problem, target)
        ends = [8, 32, None]
        table = [TableEntry(1, e, c) for e, c in zip(ends, kernels, strict=True)]
        return dataclasses.replace(found, table=tuple(table))

    monkeypatch.setattr(lower_matmuls, "select_format", choose)
    run_pipeline(gm, [LowerMatmuls("ascend910b1")], ctx, held=HELD)
    return gm, kernels


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A16"])
def test_specialize_leaves_the_kernel_of_its_row(scheme, monkeypatch) -> None:
    gm, kernels = lowered_with_table(scheme, monkeypatch)
    assert op_name(find_label(gm, "fc:linear.kernel")) == "dispatch_matmul"
    for m, row in ((1, 0), (8, 0), (20, 1), (512, 2)):
        special = specialize(gm, m)
        assert kernels[row].kernel.startswith(op_name(find_label(special, "fc:linear.kernel")))
        x = {"x": torch.randn(1, m, K).bfloat16()}
        assert torch.equal(run(special, x)[0], run(gm, x)[0])


@pytest.mark.parametrize("m", [0, -1, 1.5, True, "8"])
def test_specialize_for_no_number_of_tokens(m, monkeypatch) -> None:
    gm, _ = lowered_with_table("W8A8", monkeypatch)
    with pytest.raises(LoweringError, match="cannot specialize"):
        specialize(gm, m)


# --- a wrong cost --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("constant", sorted(TARGET.constants))
def test_a_wrong_constant_changes_no_scheme_and_no_result(constant, factor, monkeypatch) -> None:
    wrong = dataclasses.replace(
        TARGET,
        constants={
            name: dataclasses.replace(c, value=c.value * factor) if name == constant else c
            for name, c in TARGET.constants.items()
        },
    )
    problem = MatmulProblem(None, N, K, SCHEMES["W8A8_DYNAMIC"])
    right, found = (select_kernel(problem, target) for target in (TARGET, wrong))
    assert found.storage == right.storage == "int8"
    for m in (1, 16, 48):
        given_ = int8_operands(m, m)
        chosen = [
            next(e.candidate for e in choice.table if e.last_m is None or m <= e.last_m)
            for choice in (right, found)
        ]
        assert torch.equal(result(chosen[0], given_), result(chosen[1], given_))


def test_allow_float_is_what_permits_float() -> None:
    """At 64 x 512 starts are all that counts, and kernels that unpack weights start later."""

    def schemes(**options) -> set[str]:
        gm, interface = trace_tiny(OneLinear(K, N).bfloat16(), torch.randn(2, 3, K).bfloat16())
        ctx = tiny_context(interface, torch.randn(2, 3, K).bfloat16())
        run_passes(gm, ctx, "W4A16")
        FitSchemes("ascend910b1", AscendOptions(**options)).run(gm, ctx)
        return {scheme_of(n).name for n in linears(clone(gm))}

    assert schemes() == {"W4A16"}
    assert schemes(allow_float=True) == {"FLOAT"}
