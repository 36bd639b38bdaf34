"""Mixtures of experts of transformers, as the ops of `ir/ops/experts.py`.

transformers calls experts through an interface, as it does attention: one function computes those
of nearly every family. While tracing it is the one below. Experts that the interface does not reach
are replaced where their kind is known and refused where it is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from panguq.errors import TraceError
from panguq.ir.ops import experts as expert_ops  # noqa: F401  (registers torch.ops.panguq.*)

OWN_EXPERTS = "panguq"


def choose_experts(skeleton: nn.Module) -> None:
    """Let the experts of a copied model compute through the ops that a graph shows whole.

    Raises TraceError, naming the module, where more experts a token are asked for than there are.
    """
    for path, module in list(skeleton.named_modules()):
        if _has_interface(module):
            ALL_EXPERTS_FUNCTIONS.register(OWN_EXPERTS, _experts)
            config: Any = module.config
            config._experts_implementation = OWN_EXPERTS
            _check_top_k(path, int(module.num_experts), config)
        elif type(module).__name__ in _REPLACED:
            _check_top_k(path, int(module.num_experts), module)
            module.forward = _REPLACED[type(module).__name__].__get__(module)


def check_experts(skeleton: nn.Module) -> None:
    """Raises TraceError, naming the module, for experts that `choose_experts` does not reach."""
    for path, module in skeleton.named_modules():
        known = _has_interface(module) or _is_replaced(skeleton, path)
        if _holds_experts(path, module) and not known:
            raise TraceError(
                f"module {path} ({type(module).__name__}) computes its experts in a way of its own",
                "panguq takes experts that transformers calls through its interface "
                "(use_experts_implementation): one weight of all experts a matmul; stack those of a"
                " list into one such module, as transformers 5 does for the families that it has",
            )


def _has_interface(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _check_top_k(path: str, experts: int, asks: Any) -> None:
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k")
    found = [getattr(asks, name, None) for name in names]
    top_k = next((n for n in found if isinstance(n, int)), 1)
    if top_k > experts:
        raise TraceError(
            f"module {path} has {experts} experts, and {top_k} of them are asked for each token",
            "the configuration contradicts itself",
        )


def _holds_experts(path: str, module: nn.Module) -> bool:
    named = path.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
    return named and any(True for _ in module.parameters())


def _is_replaced(skeleton: nn.Module, path: str) -> bool:
    """Whether the module, or one around it, is replaced as a whole."""
    owner = type(skeleton.get_submodule(path)).__name__
    return owner in _REPLACED or bool(path and _is_replaced(skeleton, path.rpartition(".")[0]))


def _experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function: hidden_states `[t, k]`, the others `[t, top_k]`."""
    ops = torch.ops.panguq
    order, counts = ops.route_tokens(top_k_index, self.num_experts)
    rows = ops.permute_tokens(hidden_states, order, top_k_index.shape[1])
    if self.has_gate:
        rows = self._apply_gate(_linear(self, "gate_up_proj", rows, counts))
    else:
        rows = self.act_fn(_linear(self, "up_proj", rows, counts))
    rows = _linear(self, "down_proj", rows, counts)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    result: Tensor = ops.combine_experts(rows, order, top_k_weights)
    return result


def _linear(module: Any, name: str, rows: Tensor, counts: Tensor) -> Tensor:
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    result: Tensor = torch.ops.panguq.expert_linear(rows.to(weight.dtype), weight, bias, counts)
    return result


def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4's block. Its own sends every token through every expert, all but `top_k` as zeros.

    Its experts have no bias, so that zeros stay zeros; a token is weighted before its experts.
    """
    ops, experts = torch.ops.panguq, self.experts
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    router_logits = nn.functional.linear(hidden_states, self.router.weight)
    top, expert_ids = torch.topk(router_logits, self.top_k, dim=1)
    scores = torch.sigmoid(top.float()).to(top.dtype)
    order, counts = ops.route_tokens(expert_ids, self.num_experts)
    rows = ops.permute_tokens(hidden_states, order, self.top_k)
    rows = rows * scores.reshape(-1)[order].unsqueeze(-1)
    gate, up = ops.expert_linear(rows, experts.gate_up_proj.transpose(1, 2), None, counts).chunk(
        2, dim=-1
    )
    rows = up * experts.act_fn(gate)
    rows = ops.expert_linear(rows, experts.down_proj.transpose(1, 2), None, counts)
    routed = ops.combine_experts(rows, order, torch.ones_like(scores))
    return self.shared_expert(hidden_states) + routed, router_logits


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DBRX's experts: three weights, each of all experts one below the other."""
    ops, mlp, batch = torch.ops.panguq, self.mlp, hidden_states.shape[0]
    stacked = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    gate, up, down = (weight.view(stacked) for weight in (mlp.w1, mlp.v1, mlp.w2))
    order, counts = ops.route_tokens(top_k_index, self.num_experts)
    tokens = hidden_states.reshape(-1, self.hidden_size)
    rows = ops.permute_tokens(tokens, order, top_k_index.shape[1])
    gated = mlp.activation_fn(ops.expert_linear(rows, gate, None, counts))
    rows = gated * ops.expert_linear(rows, up, None, counts)
    rows = ops.expert_linear(rows, down.transpose(1, 2), None, counts)
    combined: Tensor = ops.combine_experts(rows, order, top_k_weights)
    return combined.view(batch, -1, self.hidden_size)


_REPLACED = {"DbrxExperts": _dbrx, "Llama4TextMoe": _llama4}
