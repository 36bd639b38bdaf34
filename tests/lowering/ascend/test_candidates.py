"""What Ascend targets take, and the reason where they do not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panguq.ir.number_format import FLOAT8_E4M3, INT4, INT8
from panguq.ir.quant_spec import SCHEMES, QuantSpec, Scheme, parse_scheme
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.own.tiles import legal_tiles
from panguq.lowering.ascend.candidates import ascend_candidates, split_counts
from panguq.lowering.ascend.rules import fallback_names, weight_quant_templates
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.select_kernel import scheme_refusal
from panguq.lowering.targets import find_target

B1, B3 = find_target("ascend910b1"), find_target("ascend910b3")
TOKEN = QuantSpec(INT8, "per_token", dynamic=True)
TOKEN_4 = QuantSpec(INT4, "per_token", dynamic=True)
CHANNEL_4 = QuantSpec(INT4, "per_channel")
W4A8 = Scheme("W4A8", QuantSpec(INT4, "per_group", group_size=256), TOKEN)
W4A8_CHANNEL = Scheme("W4A8-per_channel", CHANNEL_4, TOKEN)
W4A4 = Scheme("W4A4", CHANNEL_4, TOKEN_4)
WORDS = "a word"


def problem(n: int, k: int, scheme: str | Scheme, **options) -> MatmulProblem:
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    return MatmulProblem(None, n, k, scheme, **options)


def refusals(given: MatmulProblem) -> dict[str, str | None]:
    """The first candidate's refusal of each op."""
    found: dict[str, str | None] = {}
    for candidate in ascend_candidates(given, B1):
        found.setdefault(candidate.kernel, candidate.refusal)
    return found


@pytest.mark.parametrize(
    ("scheme", "vendor", "storage", "own"),
    [
        ("W8A8", "npu_quant_matmul", "int8", {"w8a8_data_parallel", "w8a8_split_k"}),
        ("W8A8_DYNAMIC", "npu_quant_matmul", "int8", {"w8a8_data_parallel", "w8a8_split_k"}),
        ("W8A16", "npu_weight_quant_batchmatmul", "int8", set()),
        ("W4A16", "npu_weight_quant_batchmatmul", "int4", {"w4a16_data_parallel", "w4a16_split_k"}),
        ("W4A16_ASYM", "npu_weight_quant_batchmatmul", "int4", {"w4a16_split_k"}),
        (W4A8, "npu_quant_matmul", "int4", set()),
        (W4A4, "npu_quant_matmul", "int4", set()),
        ("FLOAT", "linear", "float", set()),
    ],
)
def test_the_ops_of_a_scheme(scheme, vendor, storage, own) -> None:
    found = ascend_candidates(problem(4096, 4096, scheme), B1)
    first = found[0]
    assert (first.kernel, first.storage, first.schedule) == (vendor, storage, "vendor")
    assert first.refusal is None
    ops = {c.kernel for c in found[1:] if c.kernel != "linear"}
    assert own <= ops and bool(own) == bool(ops)
    quarters = [c.kernel for c in found if c.storage == "int4_quarters"]
    assert set(quarters) == {kernel for kernel in ops if kernel.startswith("w4a16")}
    others = [c for c in found if c.kernel not in ("linear", *quarters)]
    assert all(c.storage == storage for c in others)


def test_own_kernels_come_with_every_tile_and_number_of_splits() -> None:
    found = [c for c in ascend_candidates(problem(4096, 16384, "W8A8"), B3) if c.tile]
    for count in (1, *split_counts(20)):
        kernel = "w8a8_split_k" if count > 1 else "w8a8_data_parallel"
        tiles = {c.tile for c in found if c.splits == count and c.kernel == kernel}
        assert tiles == set(legal_tiles(kernel))
    assert split_counts(20) == [2, 4, 5, 8, 10, 16, 20]
    assert split_counts(24) == [2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("n", "k", "scheme", "op", "reason"),
    [
        (65536, 512, "W8A8", "npu_quant_matmul", "n=65536 is more than 65535"),
        (512, 65536, "W8A8", "npu_quant_matmul", "k=65536 is more than 65535"),
        (153376, 4096, "W8A16", "npu_weight_quant_batchmatmul", "n=153376 is more than 65535"),
        (512, 512 + 128, W4A8, "npu_quant_matmul", "k=640 is not a multiple of 256"),
        (512, 29696, W4A8, "npu_quant_matmul", "k=29696 is not below 29576"),
        (508, 512, W4A8, "npu_quant_matmul", WORDS),
        (512, 384, W4A8_CHANNEL, "npu_quant_matmul", "k=384 is not a multiple of 256"),
        (508, 512, W4A4, "npu_quant_matmul", f"n=508 is not a multiple of 8: .* {WORDS}"),
        (512, 508, W4A4, "npu_quant_matmul", f"k=508 is not a multiple of 8: .* {WORDS}"),
        (508, 512, "W4A16", "npu_weight_quant_batchmatmul", WORDS),
        (512, 128, "W4A16", "npu_weight_quant_batchmatmul", "128 is more than k - 1 = 127"),
    ],
)
def test_shapes_that_are_refused(n, k, scheme, op, reason) -> None:
    assert re.search(reason, refusals(problem(n, k, scheme))[op] or "legal")


@pytest.mark.parametrize(
    ("n", "k", "scheme"),
    [
        (65535, 512, "W8A8"),
        (512, 65535, "W8A8"),
        (512, 29440, W4A8),
        (504, 512, W4A4),
        (512, 512, W4A8_CHANNEL),
        (512, 160, "W4A16"),  # group 32
        (512, 256, "W4A16"),
    ],
)
def test_shapes_at_the_limit_are_taken(n, k, scheme) -> None:
    assert scheme_refusal(problem(n, k, scheme), B1) is None


def test_what_a_scheme_cannot_be() -> None:
    grouped = Scheme("W8A8-g32", QuantSpec(INT8, "per_group", group_size=32), TOKEN)
    assert "must be per channel" in (scheme_refusal(problem(512, 512, grouped), B1) or "")
    skewed = Scheme("W8A8-asym", QuantSpec(INT8, "per_channel", symmetric=False), TOKEN)
    assert "zero points" in (scheme_refusal(problem(512, 512, skewed), B1) or "")
    group_32 = Scheme("W4A8-g32", QuantSpec(INT4, "per_group", group_size=32), TOKEN)
    assert "only 256" in (scheme_refusal(problem(512, 512, group_32), B1) or "")
    static = Scheme("W4A4-static", CHANNEL_4, QuantSpec(INT4, "per_tensor"))
    assert "per token" in (scheme_refusal(problem(512, 512, static), B1) or "")
    odd = problem(512, 33, "W4A16")
    assert "divides k = 33" in (scheme_refusal(odd, B1) or "") or "odd" in str(
        scheme_refusal(odd, B1)
    )


def test_float32_models_have_no_quantized_kernel() -> None:
    for scheme in ("W8A8", "W8A16", "W4A16"):
        reason = scheme_refusal(problem(512, 512, scheme, dtype="float32"), B1)
        assert reason is not None and "the model is float32" in reason


def test_own_w8a8_does_not_read_the_19_bit_scales_of_static_float16() -> None:
    found = refusals(problem(512, 512, "W8A8", dtype="float16"))
    assert found["npu_quant_matmul"] is None
    assert "19-bit" in (found["w8a8_split_k"] or "")
    assert refusals(problem(512, 4096, "W8A8_DYNAMIC", dtype="float16"))["w8a8_split_k"] is None
    assert refusals(problem(512, 4096, "W8A8", dtype="bfloat16"))["w8a8_split_k"] is None


def test_float_is_legal_for_a_quantized_scheme_only_if_allowed() -> None:
    given = problem(512, 512, "W8A8")
    assert refusals(given)["linear"] == "the scheme is W8A8, and allow_float is off"
    allowed = [c for c in ascend_candidates(given, B1, allow_float=True) if c.kernel == "linear"]
    assert [c.refusal for c in allowed] == [None]


def test_blocks_of_k_stay_within_a_group() -> None:
    found = [c for c in ascend_candidates(problem(512, 512, "W4A16-g32"), B1) if c.tile]
    for candidate in found:
        fits = candidate.tile[2] == 32
        assert (candidate.refusal is None) == (fits and candidate.splits <= 16)
        if not fits:
            assert "does not divide the group size 32" in candidate.refusal


@given(
    n=st.integers(1, 70000),
    k=st.integers(1, 70000),
    scheme=st.sampled_from([*SCHEMES.values(), W4A8, W4A8_CHANNEL, W4A4]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_candidates_for_any_shape(n, k, scheme, dtype) -> None:
    """No shape raises; splits never exceed blocks of k; refusals speak."""
    found = B1.candidates(MatmulProblem(None, n, k, scheme, dtype=dtype))
    assert found
    for candidate in found:
        assert candidate.refusal is None or len(candidate.refusal) > 5
        if candidate.refusal is None and candidate.tile is not None:
            assert candidate.splits <= -(-k // candidate.tile[2])
            assert candidate.tile in legal_tiles(candidate.kernel)


# --- CANN's own kernels -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "scheme", "weight_format", "wanted"),
    [
        (4096, 4096, "W4A16", "ND", [(16, "msd"), (0, "dequantize")]),
        (4096, 4096, "W4A16-g64", "ND", [(8, "msd"), (0, "dequantize")]),
        (4096, 4096, "W4A16-g32", "ND", [(0, "dequantize")]),
        (4096, 14080, "W4A16", "ND", [(0, "dequantize")]),  # k above 13952
        (4096 + 32, 4096, "W4A16", "ND", [(0, "dequantize")]),  # n % 64
        (4096, 4096, "W4A16-per_channel", "ND", [(64, "msd"), (0, "dequantize")]),
        (64, 4096, "W4A16-per_channel", "ND", [(32, "msd"), (0, "dequantize")]),  # n >= 2m
        (4096, 4096, "W8A16", "ND", [(64, "msd"), (0, "dequantize")]),
        (4096, 4112, "W8A16", "ND", [(0, "dequantize")]),  # k % 32
        (
            4096,
            4096,
            "W8A16",
            "NZ",
            [(64, "msd"), (64, "dequantize"), (256, "nz_split_k"), (0, "dequantize")],
        ),
    ],
)
def test_which_kernel_cann_takes(n, k, scheme, weight_format, wanted) -> None:
    given = problem(n, k, scheme, weight_format=weight_format)
    assert weight_quant_templates(given, ATLAS_A2) == wanted


# --- fallbacks ----------------------------------------------------------------------------------


def test_the_order_of_fallbacks() -> None:
    orders = {s.name: fallback_names(s) for s in (*SCHEMES.values(), W4A8, W4A4)}
    assert orders["W4A8"] == orders["W4A4"] == ("W8A8_DYNAMIC", "FLOAT")
    assert orders["W4A16"] == orders["W4A16_ASYM"] == ("W8A16", "FLOAT")
    assert orders["W8A8"] == ("W8A8_DYNAMIC", "FLOAT")
    assert orders["W8A8_DYNAMIC"] == orders["W8A16"] == ("FLOAT",)
    assert orders["FLOAT"] == ()
    assert fallback_names(parse_scheme("w4a16-g32")) == ("W8A16", "FLOAT")
    assert [s.name for s in B1.fallbacks(W4A8)] == ["W8A8_DYNAMIC", "FLOAT"]


READ = [name for name, scheme in SCHEMES.items() if all(map(B1.reads, scheme.formats))]


@given(
    n=st.integers(1, 70000),
    k=st.integers(1, 70000),
    name=st.sampled_from([name for name in READ if name != "W1A16"]),
)
def test_a_fallback_is_always_found(n, k, name) -> None:
    scheme = SCHEMES[name]
    order = [scheme, *B1.fallbacks(scheme)]
    assert any(scheme_refusal(problem(n, k, s), B1) is None for s in order)


def test_one_bit_weights_have_neither_kernel_nor_fallback() -> None:
    assert B1.fallbacks(SCHEMES["W1A16"]) == ()
    refusal = scheme_refusal(problem(512, 512, "W1A16"), B1)
    assert refusal is not None and refusal.startswith("none: no NPU kernel reads 1-bit weights")


@given(n=st.integers(1, 70000), k=st.integers(1, 70000))
def test_w8a8_needs_no_quantized_fallback(n, k) -> None:
    both = [scheme_refusal(problem(n, k, s), B1) is None for s in ("W8A8", "W8A8_DYNAMIC")]
    assert both[0] == both[1]


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8", "W4A4"])
def test_ascend_950_takes_no_4_bit_integers_and_falls_back(scheme) -> None:
    target = find_target("ascend950pr")
    (found,) = ascend_candidates(problem(4096, 4096, scheme), target)
    assert found.refusal == (
        "no kernel of 4-bit integers is known on Ascend 950, whose 4-bit format is MXFP4"
    )
    assert target.fallbacks(SCHEMES[scheme])[0].name in ("W8A16", "W8A8_DYNAMIC")


def test_ascend_950_has_cann_s_8_bit_kernels_and_none_of_panguq_s() -> None:
    found = ascend_candidates(problem(4096, 4096, "W8A8"), find_target("ascend950pr"))
    assert [c.kernel for c in found if c.refusal is None] == ["npu_quant_matmul"]


def test_formats_that_a_chip_multiplies_and_panguq_does_not_are_named() -> None:
    eight = replace(SCHEMES["W8A8"].weight, format=FLOAT8_E4M3)
    given = replace(problem(64, 64, "W8A8"), scheme=replace(SCHEMES["W8A8"], weight=eight))
    (found,) = ascend_candidates(given, find_target("ascend950pr"))
    assert "Ascend 950 multiplies MXFP8, MXFP4" in found.refusal
    assert "panguq has no kernel of them" in found.refusal
    (found,) = ascend_candidates(given, find_target("ascend910b1"))
    assert found.refusal == "no kernel reads float8_e4m3fn"
