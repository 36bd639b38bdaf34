"""Latent attention on an NPU: the vendor's fused attention in both forms, and where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from panguq.ir.edit import fake_mode, op_name
from panguq.ir.ops.latent_attention import absorbs, latent_attention
from panguq.ir.properties import TRACED, Property
from panguq.kernels.ascend.own import latent_attention as own
from panguq.kernels.ascend.vendor.attention import npu_fused_infer_attention_score
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.fuse_latent_attention import FuseLatentAttention
from panguq.passes.pipeline.base import PassContext
from panguq.passes.pipeline.runner import PassRecord, Runner
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import LatentAttention, latent_inputs, trace_tiny

SCALE = 0.1
# heads, nope, rope, value, rank
SHAPES = {
    "deepseek": (4, 128, 64, 128, 512),
    "as many heads as the op does not take": (20, 192, 64, 256, 512),
    "minicpm3": (5, 64, 32, 64, 256),
    "no size aligned": (3, 7, 5, 9, 11),
}


def operands(seq: int, total: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    heads, nope, rope, value, rank = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (2, heads, seq, nope), (2, heads, seq, rope), (2, 1, total, rank), (2, 1, total, rope),
        (heads * (nope + value), rank),
    )  # fmt: skip
    made = [torch.randn(size, generator=generator) for size in sizes]
    made[-1] *= rank**-0.5
    return tuple(tensor.to(torch.bfloat16) for tensor in made)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seq, total, absorbed", [(1, 40, True), (6, 6, False)])
def test_both_forms(name: str, seq: int, total: int, absorbed: bool) -> None:
    given = operands(seq, total, SHAPES[name])
    nope, rope, latent, _, weight = given
    assert absorbs(nope, rope, latent, weight) is absorbed
    attended = torch.ones(1, 1, seq, total, dtype=torch.bool).tril(total - seq)
    assert own.refusal_of_forms(nope, rope, latent, weight, ~attended, SCALE) is None
    expected = latent_attention(*(tensor.double() for tensor in given), attended, SCALE)
    result = own.latent_attention(*given, ~attended, SCALE)
    noise = (result.double() - expected).norm() / expected.norm()
    assert result.dtype == torch.bfloat16 and noise < 2**-7  # a few roundings to 8 bits


def test_what_the_op_takes_with_a_rotary_part() -> None:
    """DeepSeek's two forms, and a call that breaks each rule."""

    def broken(
        query: tuple[int, ...], key: tuple[int, ...], rope: int = 64, **named: object
    ) -> str:
        tensors = [torch.empty(*size, dtype=torch.bfloat16) for size in (query, key, key)]
        ropes = [torch.empty(*size[:3], rope, dtype=torch.bfloat16) for size in (query, key)]
        given = {
            "query_rope": ropes[0], "key_rope": ropes[1], "num_heads": query[1],
            "num_key_value_heads": key[1], "input_layout": "BNSD",
        }  # fmt: skip
        found = violations(npu_fused_infer_attention_score, tensors, {**given, **named})
        return "; ".join(violation.rule for violation in found)

    absorbed, expanded = ((2, 128, 1, 512), (2, 1, 9, 512)), ((2, 8, 4, 128), (2, 8, 9, 128))
    assert broken(*absorbed) == broken(*expanded) == ""
    assert "query must have one of 1, 2, 4" in broken((2, 20, 1, 512), absorbed[1])
    assert "key must have 1 head, not 2" in broken((2, 8, 1, 512), (2, 2, 9, 512))
    assert "query's head size must be 512 or 128" in broken((2, 8, 1, 64), (2, 8, 9, 64))
    assert "query_rope must have shape [2, 8, 4, 64]" in broken(*expanded, rope=32)
    assert "must be given together" in broken(*expanded, key_rope=None)
    assert "softmax_lse_flag must not be set" in broken(*absorbed, softmax_lse_flag=True)
    flat = torch.ones(4, 9, dtype=torch.bool)
    assert "atten_mask must have shape" in broken(*expanded, atten_mask=flat)


def fused(dtype: torch.dtype) -> tuple[fx.GraphModule, PassRecord]:
    inputs = [tensor.to(dtype) for tensor in latent_inputs(2, 3)]
    gm, interface = trace_tiny(LatentAttention().to(dtype), *inputs)
    held = TRACED | {Property.CANONICAL, Property.LOWERED}
    runner = Runner(PassContext(interface, WeightStore()), held=held)
    runner.run(gm, [FuseLatentAttention()])
    guards = len(fake_mode(gm).shape_env.guards)
    (record,) = runner.run(gm, [FuseAscend()])
    assert len(fake_mode(gm).shape_env.guards) == guards, "a size was fixed"
    return gm, record


def test_a_graph() -> None:
    gm, _ = fused(torch.bfloat16)
    names = [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    assert names[-1] == "latent_attention"
    last = [node for node in gm.graph.nodes if node.op == "call_function"][-1]
    assert last.target is own.latent_attention
    module = LatentAttention()
    for seq, total in ((1, 40), (5, 5)):
        query, latent, rope_key = latent_inputs(seq, total)
        weights = dict(gm.named_buffers())
        module.load_state_dict({name: w.float() for name, w in weights.items()})
        result = gm(*(x.to(torch.bfloat16) for x in (query, latent, rope_key)))[0]
        expected = module(query, latent, rope_key)
        assert (result.float() - expected).norm() < 2**-6 * expected.norm()


def test_what_the_contract_refuses_stays_the_op_of_every_target() -> None:
    gm, record = fused(torch.float32)
    (reason,) = [skip.reason for skip in record.result.skipped if skip.node == "attention"]
    assert "absorbed: npu.npu_fused_infer" in reason and "expanded: npu.npu_fused" in reason
    assert "query must be float16 or bfloat16, not float32" in reason
    assert [n.target for n in gm.graph.nodes if "latent_attention" in str(n.target)] == [
        latent_attention
    ]
