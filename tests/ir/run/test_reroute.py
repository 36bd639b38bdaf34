"""What an expert would meet if every token went to it, without a word to the router."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn.functional import linear, silu

from panguq.ir.call_arguments import operand
from panguq.ir.edit import get_tensor
from panguq.ir.run.reroute import Reroute, routing_of
from panguq.ir.run.sweep import AllTokens, sweep
from panguq.ir.views import ExpertLinear, Linear
from panguq.passes.pipeline.base import matmuls, no_progress
from tests.model_shelf import EXPERTS, canonical, family_context


def test_the_experts_that_are_named_see_all_tokens() -> None:
    gm, _ = canonical(EXPERTS)
    batches = family_context(EXPERTS, sequences=2, tokens=8).batches
    gate_up, down = [n for n in matmuls(gm) if ExpertLinear.match(n) is not None][:2]
    values = Linear.of(gate_up).input, Linear.of(down).input
    tokens = operand(values[0], 0)  # before they are sorted
    seen: dict[tuple[int, fx.Node], list[Tensor]] = {}
    plain: list[Tensor] = []

    def observe_all(expert: int, node: fx.Node, rows: Tensor) -> None:
        seen.setdefault((expert, node), []).append(rows)

    again = AllTokens(Reroute(routing_of(gate_up), values), (1, 3, 4), observe_all)
    watched = {tokens, values[1]}
    sweep(gm, batches, watched, lambda n, v: plain.append(v), no_progress, [again])

    assert {expert for expert, _ in seen} == {1, 3, 4}
    weight = get_tensor(gm, Linear.of(gate_up).weight_name)
    everything = torch.cat([value for value in plain if value.shape[0] == 8])
    for expert in (1, 3, 4):
        assert torch.equal(torch.cat(seen[expert, values[0]]), everything)
        gate, up = linear(everything, weight[expert]).chunk(2, -1)
        torch.testing.assert_close(torch.cat(seen[expert, values[1]]), silu(gate) * up)
    routed = [value for value in plain if value.shape[0] == 16]
    assert len(routed) == 2  # the values that follow the router are what they were


def test_tokens_are_the_same_for_every_expert_and_what_experts_make_of_them_is_not() -> None:
    gm, _ = canonical(EXPERTS)
    gate_up, down = [n for n in matmuls(gm) if ExpertLinear.match(n) is not None][:2]
    values = Linear.of(gate_up).input, Linear.of(down).input
    reroute = Reroute(routing_of(gate_up), values)
    assert [reroute.is_shared(value) for value in values] == [True, False]
