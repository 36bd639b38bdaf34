"""Gate, up, SwiGLU and the quantizer behind them as one op: where asked for, with other codes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import fx

import panguq
from panguq.decibels import sqnr_db
from panguq.ir.call_arguments import arguments
from tests.lowering.ascend.test_expert_calls import PASSES, Wide, compiled, same_numbers
from tests.lowering.ascend.test_fuse_ascend import normals, ops

FUSED = "npu_grouped_matmul_swiglu_quant_v2"


def reason(folder: Path, scheme: str, bias: bool, ascend: dict[str, object]) -> str:
    """Why the op is not called, as the dump says it."""
    module = Wide(torch.bfloat16, bias=bias)
    recipe = {"name": "experts", "schemes": {"*": scheme}, "passes": PASSES, "ascend": ascend}
    example = normals(40, module.hidden, dtype=torch.bfloat16)
    found = panguq.compile(
        module, recipe, target="ascend910b1", dtype=torch.bfloat16, calibration=[example],
        example_inputs=(example,), dump_dir=folder,
    )  # fmt: skip
    assert ops(found.graph)[FUSED] == 0
    (skipped,) = folder.glob("*fuse-ascend/skipped.csv")
    with skipped.open(encoding="utf-8") as lines:
        reasons = [row["reason"] for row in csv.DictReader(lines)]
    (why,) = [text for text in reasons if FUSED in text]
    return why


def call_of(graph: fx.GraphModule) -> dict[str, object]:
    (node,) = [n for n in graph.graph.nodes if FUSED in str(n.target)]
    return arguments(node)


def test_where_codes_may_change_one_op_makes_the_rows_of_the_second_matmul() -> None:
    graph, _ = same_numbers(
        Wide(torch.bfloat16), "W8A8_DYNAMIC", torch.bfloat16, allow_inexact=True
    )
    found = ops(graph)
    assert found[FUSED] == found["npu_grouped_matmul"] == found["npu_dynamic_quant"] == 1
    assert found["npu_swiglu"] == 0
    assert call_of(graph)["group_list_type"] == 0


def test_the_one_op_is_nearer_to_the_product_that_is_not_rounded() -> None:
    """Both are roundings of the same product: they agree to a step of its codes, not to the bit."""
    module, x = Wide(torch.bfloat16), normals(33, 256, dtype=torch.bfloat16, seed=9)
    results = [
        compiled(module, "W8A8_DYNAMIC", torch.bfloat16, "ascend910b1", allow_inexact=inexact)(x)
        for inexact in (True, False)
    ]
    assert not torch.equal(*results)
    assert sqnr_db(results[1].double(), results[0].double()) > 36


@pytest.mark.parametrize(
    "scheme, bias, options, expected",
    [
        ("W8A8_DYNAMIC", False, {}, "(allow_inexact permits it)"),
        ("W8A8_DYNAMIC", True, {"allow_inexact": True}, "takes no bias"),
        ("W8A8_DYNAMIC", False, {"allow_inexact": True, "weight_format": "ND"}, "FRACTAL_NZ"),
        ("W4A8", False, {"allow_inexact": True}, "8-bit rows and 8-bit weights alone"),
    ],
)
def test_elsewhere_the_reason_says_why_not(
    scheme: str, bias: bool, options: dict[str, object], expected: str, tmp_path: Path
) -> None:
    assert expected in reason(tmp_path / "dump", scheme, bias, options)
