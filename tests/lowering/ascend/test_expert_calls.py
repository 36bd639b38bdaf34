"""Quantized experts as grouped matmuls: the numbers of the fake-quant graph, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import panguq
from panguq.decibels import sqnr_db
from panguq.ir.call_arguments import arguments
from panguq.ir.quant_spec import SCHEMES
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.lowering.ascend.expert_rules import grouped_matmul_refusal
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.targets import find_target
from tests.lowering.ascend.test_fuse_ascend import normals, ops
from tests.lowering.ascend.test_fuse_experts import Mixture

PASSES = ["calibrate", "insert-fake-quant", {"quantize-weights": {"clip_search": False}}]
HIDDEN, FFN = 256, 256


class Wide(Mixture):
    """Sizes that every scheme takes."""

    hidden, ffn = HIDDEN, FFN


def compiled(module: Mixture, scheme: str, dtype: torch.dtype, target: str, **ascend: object):
    recipe = {"name": "experts", "schemes": {"*": scheme}, "passes": PASSES, "ascend": ascend}
    example = normals(40, module.hidden, dtype=dtype)
    return panguq.compile(
        module, recipe, target=target, dtype=dtype, calibration=[example], example_inputs=(example,)
    )


def same_numbers(
    module: Mixture, scheme: str, dtype: torch.dtype, **ascend: object
) -> tuple[torch.fx.GraphModule, set[str]]:
    """The lowered graph, and the schemes of its experts.

    The fake-quant graph rounds inputs and weights to 16 bits after their codes were read back, for
    each of two matmuls, and the codes of what lies between follow from that.
    """
    lowered = compiled(module, scheme, dtype, "ascend910b1", **ascend)
    x = normals(33, module.hidden, dtype=dtype, seed=9)
    expected = compiled(module, scheme, dtype, "reference")(x)
    least = 36 if dtype == torch.bfloat16 else 44
    assert sqnr_db(expected.double(), lowered(x).double()) > least
    found = {m.scheme for m in lowered.report.matmuls if ".experts" in m.name or "_up" in m.name}
    return lowered.graph, found


def calls(graph: torch.fx.GraphModule) -> list[Mapping[str, object]]:
    nodes = [n for n in graph.graph.nodes if "npu_grouped_matmul" in str(n.target)]
    return [arguments(node) for node in nodes]


def dtype_of(argument: object) -> torch.dtype:
    (node,) = argument  # type: ignore[misc]
    found: torch.dtype = node.meta["val"].dtype
    return found


def test_codes_of_tokens_are_routed_with_their_scales() -> None:
    """Each token is quantized once, and not once for each of its experts."""
    graph, schemes = same_numbers(Wide(torch.bfloat16), "W8A8_DYNAMIC", torch.bfloat16)
    assert schemes == {"W8A8_DYNAMIC"}
    (routing,) = [n for n in graph.graph.nodes if "npu_moe_init_routing" in str(n.target)]
    given = arguments(routing)
    assert given["x"].meta["val"].dtype == torch.int8
    assert given["scale"].meta["val"].shape == given["x"].meta["val"].shape[:1]
    first, second = calls(graph)
    assert first["group_list"] is second["group_list"]
    assert dtype_of(first["scale"]) == torch.bfloat16
    assert ops(graph)["npu_format_cast"] == 2  # FRACTAL_NZ, as the vendor's server has it
    plain, _ = same_numbers(
        Wide(torch.bfloat16), "W8A8_DYNAMIC", torch.bfloat16, weight_format="ND"
    )
    assert ops(plain)["npu_format_cast"] == 0


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "W4A8"])
def test_each_scheme_is_a_form_of_the_one_op(scheme: str) -> None:
    graph, schemes = same_numbers(Wide(torch.bfloat16), scheme, torch.bfloat16)
    assert schemes == {scheme}
    first = calls(graph)[0]
    four_bits = scheme.startswith("W4")
    assert dtype_of(first["weight"]) == (torch.int32 if four_bits else torch.int8)
    if scheme == "W4A8":
        # Counts are read there whatever is said, and the bias gives back what is taken off.
        assert first["group_list_type"] == 1
        assert dtype_of(first["scale"]) == torch.int64
        assert dtype_of(first["bias"]) == torch.float32
    else:
        assert first["group_list_type"] == 0
        assert dtype_of(first["antiquant_scale"]) == torch.bfloat16


def test_float16_wants_float32_scales() -> None:
    graph, _ = same_numbers(Wide(torch.float16), "W8A8_DYNAMIC", torch.float16)
    assert dtype_of(calls(graph)[0]["scale"]) == torch.float32


def test_a_bias_is_bfloat16_beside_fractal_weights() -> None:
    graph, _ = same_numbers(
        Wide(torch.bfloat16, bias=True), "W8A8_DYNAMIC", torch.bfloat16, weight_format="ND"
    )
    assert dtype_of(calls(graph)[0]["bias"]) == torch.bfloat16
    target = find_target("ascend910b1")
    for scheme in ("W4A16", "W8A16"):  # of which CANN's tables have no fractal form
        assert target.weight_formats(problem(scheme, biased=True), "auto") == ("ND",)
    assert ops(graph)["npu_format_cast"] >= 1


@pytest.mark.parametrize(
    ("scheme", "bias", "instead"),
    [
        ("W8A8", False, "W8A8_DYNAMIC"),
        ("W4A8", True, "W8A8_DYNAMIC"),
        ("W4A4", False, "W8A8_DYNAMIC"),
        ("W4A16_ASYM", False, "W8A16"),
    ],
)
def test_what_the_op_does_not_take_falls_back(scheme: str, bias: bool, instead: str) -> None:
    lowered = compiled(Wide(torch.bfloat16, bias=bias), scheme, torch.bfloat16, "ascend910b1")
    assert instead in {m.scheme for m in lowered.report.matmuls}


def problem(scheme: str, n: int = 64, k: int = 256, **rest: object) -> MatmulProblem:
    return MatmulProblem(None, n, k, SCHEMES[scheme], experts=4, top_k=2, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (problem("W8A8_DYNAMIC", n=65536), "n=65536 is more than 65535"),
        (problem("W8A16", dtype="float32"), "float16 or bfloat16 models"),
        (problem("W4A16", n=60), "n=60 is not a multiple of 8"),
        (problem("W4A8", k=96), "k=96 is not a multiple of 64 up to 18432"),
        (problem("W4A4"), "not 4-bit ones"),
        (problem("W8A8"), "needs a zero point"),
        (problem("W4A16_ASYM"), "zero points of groups"),
        (problem("W8A8_DYNAMIC", biased=True, dtype="float16"), "takes no float bias"),
        (problem("W4A8", biased=True), "its bias holds"),
        (problem("W2A16"), "it reads no 2-bit weights"),
    ],
)
def test_refusals(given: MatmulProblem, why: str) -> None:
    assert why in (grouped_matmul_refusal(given, ATLAS_A2) or "")


def test_what_is_taken() -> None:
    for scheme in ("W8A8_DYNAMIC", "W8A16", "W4A16", "W4A8"):
        assert grouped_matmul_refusal(problem(scheme), ATLAS_A2) is None
