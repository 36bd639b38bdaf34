"""Mixtures of experts of transformers, as the ops of `ir/ops/experts.py`.

transformers calls experts through an interface, as it does attention: one function computes those
of nearly every family. While tracing it is the one below. Experts that the interface does not reach
are replaced where their kind is known and refused where it is not.
"""

from __future__ import annotations

from collections.abc import Callable
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
            if hasattr(module, "num_experts"):
                _check_top_k(path, int(module.num_experts), module)
            for name, method in _REPLACED[type(module).__name__].items():
                setattr(module, name, method.__get__(module))


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
    router_logits = self.router(hidden_states)
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


def _llama4_router(self: Any, hidden_states: Tensor) -> Tensor:
    """The scores of all experts; `_llama4` chooses among them."""
    return nn.functional.linear(hidden_states, self.weight)


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


def _jetmoe_router(self: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of rows, how many each expert has, and the weights `[t, top_k]`."""
    logits = self.layer(tokens).float()
    top, expert_ids = logits.topk(self.top_k, dim=1)
    order, counts = torch.ops.panguq.route_tokens(expert_ids, self.num_experts)
    return order, counts, torch.softmax(top, dim=1).type_as(tokens)


def _jetmoe_linear(self: Any, rows: Tensor, counts: Tensor) -> Tensor:
    result: Tensor = torch.ops.panguq.expert_linear(rows, self.weight, None, counts)
    return result


def _jetmoe(self: Any, layer_input: Tensor) -> Tensor:
    """JetMoE's block of experts."""
    ops, tokens = torch.ops.panguq, layer_input.reshape(-1, self.input_size)
    order, counts, weights = self.router(tokens)
    rows = ops.permute_tokens(tokens, order, self.router.top_k)
    gate, up = self.input_linear(rows, counts).chunk(2, dim=-1)
    rows = self.output_linear(self.activation(gate) * up, counts)
    combined = ops.combine_experts(rows, order, weights).view(layer_input.shape)
    return combined + self.bias


def _jetmoe_queries(self: Any, layer_input: Tensor) -> tuple[Tensor, None, tuple[Tensor, ...]]:
    """Queries `[batch, seq, top_k, hidden]` of JetMoE's attention, each by an expert of its own."""
    batch, length, width = layer_input.shape
    tokens = layer_input.reshape(-1, width)
    order, counts, weights = self.router(tokens)
    rows = torch.ops.panguq.permute_tokens(tokens, order, self.top_k)
    queries = self.input_linear(rows, counts).index_select(0, order.argsort())
    return queries.view(batch, length, self.top_k, -1), None, (order, counts, weights)


def _jetmoe_output(self: Any, layer_input: Tensor, routed: tuple[Tensor, ...]) -> Tensor:
    """The output projections that belong to these queries, added up."""
    batch, length, _, width = layer_input.shape
    order, counts, weights = routed
    rows = layer_input.reshape(-1, width).index_select(0, order)
    combined = torch.ops.panguq.combine_experts(self.output_linear(rows, counts), order, weights)
    return combined.view(batch, length, self.input_size) + self.bias


_REPLACED: dict[str, dict[str, Callable[..., Any]]] = {
    "DbrxExperts": {"forward": _dbrx},
    "JetMoeMoA": {"map": _jetmoe_queries, "reduce": _jetmoe_output},
    "JetMoeMoE": {"forward": _jetmoe},
    "JetMoeParallelExperts": {"forward": _jetmoe_linear},
    "JetMoeTopKGating": {"forward": _jetmoe_router},
    "Llama4Router": {"forward": _llama4_router},
    "Llama4TextMoe": {"forward": _llama4},
}
"""Methods by the class whose own they replace."""
