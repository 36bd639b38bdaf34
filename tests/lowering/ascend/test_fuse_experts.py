"""A mixture of experts in torch_npu's ops gives what the canonical one gives, but for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import LoweringError
from panguq.ir.call_arguments import arguments
from panguq.ir.edit import clone, weights_of
from panguq.ir.run.interpret import run
from panguq.ir.text.serialize import from_text, to_text
from tests.lowering.ascend.test_fuse_ascend import fuse, normals, ops, reasons, unit
from tests.model_shelf import trace_tiny

panguq = torch.ops.panguq

TOKENS, HIDDEN, EXPERTS, CHOSEN = 7, 48, 5, 2


class Mixture(nn.Module):
    """Two matmuls of all experts with SwiGLU between; the router's choice is a method."""

    hidden, ffn = HIDDEN, 32

    def __init__(self, dtype: torch.dtype, experts: int = EXPERTS, bias: bool = False) -> None:
        super().__init__()
        self.experts = experts
        hidden, both = self.hidden, 2 * self.ffn
        self.router = nn.Parameter(normals(experts, hidden, dtype=dtype, seed=1))
        self.gate_up = nn.Parameter(
            normals(experts, both, hidden, dtype=dtype, seed=2) / hidden**0.5
        )
        self.down = nn.Parameter(normals(experts, hidden, self.ffn, dtype=dtype, seed=3) / 6)
        self.bias = nn.Parameter(normals(experts, both, dtype=dtype, seed=4)) if bias else None

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = nn.functional.linear(x, self.router).softmax(-1, dtype=torch.float32)
        weights, ids = scores.topk(CHOSEN)
        return weights / weights.sum(-1, keepdim=True), ids

    def rows(self, x: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        return panguq.permute_tokens(x, order, CHOSEN)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        order, counts = panguq.route_tokens(ids, self.experts)
        both = panguq.expert_linear(self.rows(x, order, weights), self.gate_up, self.bias, counts)
        gate, up = both.chunk(2, -1)
        rows = panguq.expert_linear(nn.functional.silu(gate) * up, self.down, None, counts)
        return panguq.combine_experts(rows, order, weights)


class WeighedFirst(Mixture):
    """Rows are weighed before their experts, as Llama 4's, so that the order is read once more."""

    def rows(self, x: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        rows = panguq.permute_tokens(x, order, CHOSEN)
        return rows * weights.to(x.dtype).reshape(-1)[order].unsqueeze(-1)


def close_to_canonical(module: nn.Module, dtype: torch.dtype) -> tuple[fx.GraphModule, list[str]]:
    """The graph after the pass, and what it left; five roundings of the largest row apart."""
    x = normals(TOKENS, HIDDEN, dtype=dtype)
    gm, interface = trace_tiny(module, x)
    (expected,) = run(clone(gm), {"x": x})
    record = fuse(gm, interface)
    (found,) = run(gm, {"x": x})
    bound = 5 * unit(dtype) * expected.abs().max() + 64 * torch.finfo(torch.float32).eps
    assert (found.double() - expected.double()).abs().max() <= bound
    return gm, reasons(record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_is_routed_multiplied_and_added_up(dtype: torch.dtype) -> None:
    gm, left = close_to_canonical(Mixture(dtype), dtype)
    # In float16 the other op would add up in float16.
    combined = "npu_moe_token_unpermute" if dtype == torch.float16 else "npu_moe_finalize_routing"
    found = ops(gm)
    assert found["npu_moe_gating_top_k_softmax"] == found["npu_moe_init_routing_v2"] == 1
    assert found["npu_grouped_matmul"] == 2
    assert found["npu_swiglu"] == found[combined] == 1
    assert left == []
    again = from_text(to_text(gm), weights_of(gm))
    x = normals(TOKENS, HIDDEN, dtype=dtype)
    assert torch.equal(run(again, {"x": x})[0], run(gm, {"x": x})[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_has_the_dtype_that_the_op_wants(dtype: torch.dtype) -> None:
    gm, _ = close_to_canonical(Mixture(dtype, bias=True), dtype)
    first = next(n for n in gm.graph.nodes if "npu_grouped_matmul" in str(n.target))
    (bias,) = arguments(first)["bias"]
    expected = torch.float16 if dtype == torch.float16 else torch.float32
    assert bias.meta["val"].dtype == expected


def test_what_else_reads_the_order_reads_it_of_the_ops_result() -> None:
    gm, _ = close_to_canonical(WeighedFirst(torch.bfloat16), torch.bfloat16)
    assert ops(gm)["argsort"] == 1


def test_more_experts_than_the_op_takes_are_refused_by_name() -> None:
    module = Mixture(torch.bfloat16, experts=1025)
    gm, interface = trace_tiny(module, normals(TOKENS, HIDDEN, dtype=torch.bfloat16))
    with pytest.raises(LoweringError, match="expert_linear: an Ascend NPU cannot run"):
        fuse(gm, interface)
