"""The choice of a router as one op of torch_npu, where that makes the same one; else the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.ir.call_arguments import arguments
from panguq.ir.run.interpret import run
from tests.lowering.ascend.test_fuse_ascend import fuse, normals, ops, reasons
from tests.model_shelf import trace_tiny

panguq = torch.ops.panguq
TOKENS, HIDDEN, EXPERTS, CHOSEN = 33, 16, 12, 3


class Router(nn.Module):
    """Ids and weights of the chosen experts, seen through what the experts of a model do with them.

    `choose` of a subclass is one family's router; scores are a sigmoid unless it says otherwise.
    """

    def __init__(self, experts: int = EXPERTS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.experts = experts
        self.router = nn.Parameter(normals(experts, HIDDEN, dtype=dtype, seed=1))
        self.bias = nn.Parameter(normals(experts, dtype=dtype, seed=2) / 4)

    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.router.float()).sigmoid()

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.scores(x))
        order, _ = panguq.route_tokens(ids, self.experts)
        rows = panguq.permute_tokens(x, order, CHOSEN)
        # What a token gets differs from expert to expert.
        rows = rows + ids.reshape(-1)[order].unsqueeze(-1)
        return panguq.combine_experts(rows, order, weights)


def within_groups(ranked: Tensor, groups: int, kept: int, fill: float, largest: bool) -> Tensor:
    """`ranked` with `fill` for experts outside the best groups, as transformers spells it."""
    grouped = ranked.view(-1, groups, ranked.shape[-1] // groups)
    worth = grouped.amax(-1) if largest else grouped.topk(2, dim=-1)[0].sum(-1)
    best = torch.topk(worth, kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(worth).scatter_(1, best, 1).unsqueeze(-1)
    mask = mask.expand(-1, groups, grouped.shape[-1]).reshape(-1, ranked.shape[-1])
    return ranked.masked_fill(~mask.bool(), fill)


class DeepSeekV3(Router):
    fill, kept, normalized = float("-inf"), 2, True

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ranked = within_groups(scores + self.bias, 4, self.kept, self.fill, largest=False)
        ids = torch.topk(ranked, CHOSEN, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * 2.5, ids


class OldDeepSeekV3(DeepSeekV3):
    fill = 0.0


class NotNormalized(DeepSeekV3):
    normalized = False


class DeepSeekV2(Router):
    """Softmax, groups worth their best expert, weights as they are chosen, times a factor."""

    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.router.float()).softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(within_groups(scores, 4, 2, 0.0, largest=True), CHOSEN, dim=-1)
        return weights * 16.0, ids


class GatheredV2(DeepSeekV2):
    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.topk(within_groups(scores, 4, 2, 0.0, largest=True), CHOSEN, dim=-1)[1]
        return scores.gather(1, ids), ids


class Ernie(DeepSeekV2):
    """Softmax plus a bias; the weights are divided by their sum with ordinary ops."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.topk(scores + self.bias.unsqueeze(0), CHOSEN, dim=-1)[1]
        weights = scores.gather(-1, ids)
        return weights / weights.sum(-1, keepdim=True), ids


class Plain(Router):
    """Sigmoid, and weights that are divided by their sum: MiniMax without its bias."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(CHOSEN)
        return weights / weights.sum(-1, keepdim=True), ids


class Biased(Router):
    """The weights hold the bias."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return (scores + self.bias).topk(CHOSEN)


class OtherScores(Router):
    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.router).tanh()

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(CHOSEN)


class Narrow(OtherScores):
    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.router).sigmoid()


class OfAnothersGroups(Router):
    """Groups are judged without the bias, experts with it."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        hidden = within_groups(scores, 4, 2, float("-inf"), largest=False).isinf()
        ids = torch.topk((scores + self.bias).masked_fill(hidden, float("-inf")), CHOSEN)[1]
        return scores.gather(1, ids), ids


def lowered(module: Router, dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, list[str]]:
    x = normals(TOKENS, HIDDEN, dtype=dtype)
    gm, interface = trace_tiny(module, x)
    expected = module(x)
    left = reasons(fuse(gm, interface))
    (found,) = run(gm, {"x": x})
    torch.testing.assert_close(found, expected)
    return gm, left


@pytest.mark.parametrize(
    "kind, expected",
    [
        (DeepSeekV3, {"norm_type": 1, "group_count": 4, "k_group": 2, "group_select_mode": 1,
                      "eps": 1e-20, "routed_scaling_factor": 2.5}),
        (DeepSeekV2, {"norm_type": 0, "group_count": 4, "k_group": 2, "group_select_mode": 0,
                      "routed_scaling_factor": 1.0}),
        (Ernie, {"norm_type": 0, "group_count": 1, "k_group": 1}),
        (Plain, {"norm_type": 1, "group_count": 1, "eps": 0.0, "bias": None}),
    ],
)  # fmt: skip
def test_the_op_is_called_with_what_the_data_flow_says(
    kind: type[Router], expected: dict[str, object]
) -> None:
    gm, left = lowered(kind())
    assert left == []
    assert ops(gm)["npu_moe_gating_top_k"] == 1
    assert ops(gm)["topk"] == ops(gm)["sigmoid"] == ops(gm)["scatter"] == ops(gm)["gather"] == 0
    node = next(n for n in gm.graph.nodes if "npu_moe_gating_top_k" in str(n.target))
    given = arguments(node)
    assert {name: given[name] for name in expected} == expected


def test_a_bias_of_16_bits_is_widened_as_the_sum_widens_it() -> None:
    gm, left = lowered(DeepSeekV3(dtype=torch.bfloat16), torch.bfloat16)
    assert left == []
    node = next(n for n in gm.graph.nodes if "npu_moe_gating_top_k" in str(n.target))
    assert arguments(node)["bias"].meta["val"].dtype == torch.float32


@pytest.mark.parametrize(
    "kind, reason",
    [
        (OldDeepSeekV3, "experts outside the best groups count as 0.0, which may be chosen where"),
        (NotNormalized, "weights of sigmoid scores are not divided by their sum"),
        (GatheredV2, "experts outside the best groups count as 0, and keep their scores"),
        (Biased, "the weights hold the bias, which the op leaves out of them"),
        (OtherScores, "the scores are neither softmax nor sigmoid of the experts, but tanh"),
        (OfAnothersGroups, "the experts that are left out are not those of all but the best"),
    ],
)
def test_a_choice_that_the_op_does_not_make_keeps_its_ops_and_says_why(
    kind: type[Router], reason: str
) -> None:
    gm, (left,) = lowered(kind())
    assert left.startswith(reason)
    assert ops(gm)["npu_moe_gating_top_k"] == 0 < ops(gm)["topk"]


def test_scores_of_16_bits_are_no_op_of_the_vendors() -> None:
    _, left = lowered(Narrow(dtype=torch.bfloat16), torch.bfloat16)
    assert left == ["the scores are rounded to 16 bits before the choice, which the op does not do"]


def test_groups_of_two_experts_are_refused_by_the_ops_contract() -> None:
    _, (left,) = lowered(DeepSeekV3(experts=8))
    assert "a group must have more than 2 experts, not 2" in left
