"""The router's choice: scores of experts, the k largest of each token, and their weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    Size,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_K = 1024
LARGEST_EXPERTS = 2048
SOFTMAX, SIGMOID = 0, 1
LARGEST, TWO_LARGEST = 0, 1  # what a group of experts is scored by
_SOFTMAX_DOCS = OP_PLUGIN.format("npu_moe_gating_top_k_softmax")
_DOCS = OP_PLUGIN.format("npu_moe_gating_top_k")
_TILING = "CANN's tiling of MoeGatingTopK"


def _softmax_contract(x: Tensor, finished: Tensor | None, k: int) -> Iterator[Broken]:
    yield from wrong_dtype("x", x, FLOATS, _SOFTMAX_DOCS)
    if x.dim() not in (2, 3):
        yield Broken(f"x must have 2 or 3 dimensions, not {x.dim()}", _SOFTMAX_DOCS)
        return
    if k < 1 or k > LARGEST_K or surely(k > x.shape[-1]):
        yield Broken(
            f"k must be from 1 to {LARGEST_K} and at most the {x.shape[-1]} experts, not {k}",
            _SOFTMAX_DOCS,
        )
    yield from wrong_dtype("finished", finished, (torch.bool,), _SOFTMAX_DOCS)
    yield from wrong_shape("finished", finished, [x.shape[:-1]], _SOFTMAX_DOCS)


def _softmax_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    experts, rows = (x.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return x.new_empty(shape), experts, rows


def largest(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: the experts of the k largest scores, in falling order, the first of equals.

    CANN's sort keeps the order of equal scores, as the instruction's description says; torch.topk
    promises none.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@define_npu_op(
    "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1)"
    " -> (Tensor, Tensor, Tensor)",
    _softmax_fake,
    contract=_softmax_contract,
)
def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of softmax(x) over the experts: weights, experts int32, rows int32, [..., k].

    x float [..., experts]; the weights have its dtype and are not normalized. rows[i, j] is
    j * tokens + i, which npu_moe_init_routing (not its v2) wants. A `finished` token, bool [...],
    is sent to the expert behind the last. Softmax and order are of float32, rounded once at the
    end, as CANN's kernel computes them; op-plugin's page gives the formula and says nothing of
    ties (`largest`).
    """
    scores = x.to(torch.float32).softmax(-1)
    experts = largest(scores, k)
    weights = scores.gather(-1, experts).to(x.dtype)
    if finished is not None:
        experts = experts.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    tokens = weights.numel() // k
    rows = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().reshape(weights.shape)
    return weights, experts.to(torch.int32), rows


def _contract(
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
) -> Iterator[Broken]:
    yield from not_given({"input_ids": input_ids, "tid2eid": tid2eid}, PANGUQ)
    yield from wrong_dtype("x", x, FLOATS, _DOCS)
    if x.dim() != 2:
        yield Broken(f"x must have 2 dimensions, not {x.dim()}", _DOCS)
        return
    experts = x.shape[1]
    if surely(experts > LARGEST_EXPERTS):
        yield Broken(f"there may be at most {LARGEST_EXPERTS} experts, not {experts}", _DOCS)
    yield from wrong_dtype("bias", bias, (x.dtype,), _DOCS)
    yield from wrong_shape("bias", bias, [[experts]], _DOCS)
    for name, value, legal in (
        ("group_select_mode", group_select_mode, (LARGEST, TWO_LARGEST)),
        ("norm_type", norm_type, (SOFTMAX, SIGMOID)),
        ("renorm", renorm, (0,)),
    ):
        if value not in legal:
            text = " or ".join(map(str, legal))
            yield Broken(f"{name} must be {text}, not {value}", _DOCS)
    yield from _groups(experts, k, k_group, group_count)


def _groups(experts: Size, k: int, k_group: int, group_count: int) -> Iterator[Broken]:
    if group_count < 1 or surely(experts % group_count != 0):
        yield Broken(f"group_count {group_count} must divide the {experts} experts", _DOCS)
        return
    if not 1 <= k_group <= group_count:
        yield Broken(f"k_group must be from 1 to {group_count}, not {k_group}", _DOCS)
        return
    size = experts // group_count
    if k < 1 or surely(k > k_group * size):
        yield Broken(f"k must be from 1 to k_group x {size}, not {k}", _DOCS)
    if group_count > 1 and surely(size <= 2):
        yield Broken(f"a group must have more than 2 experts, not {size}", _DOCS)
    padded = group_count * (-(-size // 32) * 32)
    if group_count > 1 and k_group < group_count and surely(padded > LARGEST_EXPERTS):
        yield Broken(
            f"groups of {size} experts, each padded to a multiple of 32, must be at most"
            f" {LARGEST_EXPERTS} together, not {padded}",
            _TILING,
        )


def _fake(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], k)
    experts = x.new_empty(shape, dtype=torch.int32)
    return x.new_empty(shape), experts, x.new_empty(x.shape, dtype=torch.float32)


@define_npu_op(
    "npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None,"
    " Tensor? tid2eid=None, int k_group=1, int group_count=1, int group_select_mode=0,"
    " int renorm=0, int norm_type=0, bool out_flag=False, float routed_scaling_factor=1.0,"
    " float eps=9.9999999999999995e-21) -> (Tensor, Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of the k largest scores + bias in the best `k_group` groups, and their scores.

    x float [tokens, experts] -> weights [tokens, k] of x's dtype, experts int32 [tokens, k], all
    scores float32 [tokens, experts] (NaN without `out_flag`: an NPU writes nothing there).

    Scores are softmax(x) (`norm_type` 0) or sigmoid(x) (1); a group of neighbouring experts is
    worth its largest score + bias (`group_select_mode` 0) or the sum of its two largest (1). The
    weights are scores without the bias, divided by their sum + eps for sigmoid and never for
    softmax, times routed_scaling_factor. In float32, rounded once at the end.
    """
    scores = x.to(torch.float32)
    scores = scores.sigmoid() if norm_type == SIGMOID else scores.softmax(-1)
    ranked = scores if bias is None else scores + bias.to(torch.float32)
    if group_count > 1 and k_group < group_count:
        grouped = ranked.unflatten(-1, (group_count, -1))
        best = grouped.sort(-1, descending=True).values
        worth = best[..., 0] if group_select_mode == LARGEST else best[..., :2].sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, largest(worth, k_group), True)
        ranked = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    experts = largest(ranked, k)
    weights = scores.gather(-1, experts)
    if norm_type == SIGMOID:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, experts.to(torch.int32), scores if out_flag else scores.fill_(torch.nan)
