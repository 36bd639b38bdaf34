"""No op that a lowered graph emits is without a price; one that has none is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import LoweringError
from panguq.ir.edit import op_name
from panguq.ir.ops.linear_attention import gated_linear_attention
from panguq.ir.ops.opset import resolve
from panguq.kernels.ascend.vendor.library import npu_ops
from panguq.lowering.ascend.op_times.node_matmuls import MATMULS
from panguq.lowering.ascend.op_times.nodes import _VENDOR, LOADING, PRICED, node_cost
from panguq.lowering.targets import find_target
from tests.lowering.ascend.test_fuse_ascend import fuse, normals
from tests.lowering.ascend.test_fuse_experts import HIDDEN, TOKENS, Mixture
from tests.lowering.ascend.test_latent_attention import fused
from tests.model_shelf import trace_tiny

B2 = find_target("ascend910b2")
TARGETS = (B2, find_target("ascend950pr"))


def example_sizes(value: Tensor) -> list[int]:
    """The sizes that the graph was traced with."""
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]


def every_kernel(gm: fx.GraphModule) -> dict[str, float]:
    """Microseconds by op; fails where a kernel has no price."""
    found: dict[str, float] = {}
    for target in TARGETS:
        for node in gm.graph.nodes:
            cost = node_cost(node, example_sizes, target)
            if cost is not None:
                assert 0 < cost.total_us < math.inf
                found[op_name(node).partition(".")[0]] = cost.total_us
    return found


def test_every_op_of_torch_npu_is_priced_or_runs_when_a_model_is_loaded() -> None:
    names = {npu.op._schema.name.partition("::")[2] for npu in npu_ops()}
    assert len(names) > 20
    assert names - LOADING - set(MATMULS) - PRICED == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixtures(dtype: torch.dtype) -> None:
    gm, interface = trace_tiny(Mixture(dtype, bias=True), normals(TOKENS, HIDDEN, dtype=dtype))
    fuse(gm, interface)
    combined = "npu_moe_token_unpermute" if dtype == torch.float16 else "npu_moe_finalize_routing"
    assert {"npu_grouped_matmul", "npu_moe_init_routing_v2", combined} <= set(every_kernel(gm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latent_attention_as_one_op_and_as_it_was(dtype: torch.dtype) -> None:
    gm, _ = fused(dtype)
    assert "latent_attention" in every_kernel(gm)


class Recurrence(nn.Module):
    def forward(self, x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
        return gated_linear_attention(x, x, x, decay, decay, state)[0]


def test_a_recurrence_grows_with_its_chunks() -> None:
    def us(tokens: int) -> float:
        x, decay = torch.randn(2, tokens, 2, 16), -torch.rand(2, tokens, 2)
        gm, _ = trace_tiny(Recurrence(), x, decay, torch.zeros(2, 2, 16, 16))
        return every_kernel(gm)["gated_linear_attention"]

    assert us(256) == pytest.approx(4 * us(64), rel=0.01)


def test_an_op_without_a_price_is_named() -> None:
    x = torch.zeros(4, 64, dtype=torch.int8)
    gm, _ = trace_tiny(Packed(), x)
    (node,) = [n for n in gm.graph.nodes if op_name(n).startswith("pack_int4")]
    with pytest.raises(LoweringError, match=r"pack_int4: no price of panguq.pack_int4"):
        node_cost(node, example_sizes, B2)


class Packed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.panguq.pack_int4(x)


@pytest.mark.parametrize("op", [op for op in _VENDOR if op.startswith("npu_")])
def test_a_price_reads_arguments_that_the_op_has(op: str) -> None:
    _, operands, attributes = _VENDOR[op]
    schema = resolve(f"npu.{op}.default")._schema
    assert {*operands, *attributes.values()} <= {a.name for a in schema.arguments}
