"""Latent attention as the vendor's fused attention, in the form that multiplies less."""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.canonical_views import LatentAttention
from panguq.ir.edit import call, value_types
from panguq.ir.ops import latent_attention  # noqa: F401  (registers the op)
from panguq.kernels.ascend.own import latent_attention as own
from panguq.lowering.ascend.fusions.masks import attended_mask, hidden_mask
from panguq.lowering.ascend.fusions.shared import FusionState


def fuse_latent_attention(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`panguq_npu.latent_attention` with its mask in full, where the contract of
    `npu_fused_infer_attention_score` takes both of its forms, or why not."""
    given = LatentAttention.of(node)
    hidden = hidden_mask(node, state)
    if isinstance(hidden, str):
        return hidden
    operands = (*given.queries, given.latent, given.rope_key, given.weight, hidden, given.scale)
    nope, rope, latent, _, weight, *rest = value_types(operands)
    reason = own.refusal_of_forms(nope, rope, latent, weight, *rest)
    return reason or call(node, own.latent_attention, operands, origin=node)


def spell_latent_attention(node: fx.Node, state: FusionState) -> fx.Node:
    """The op itself with its mask in full: torch ops run it, on an NPU, too, in either form."""
    given = LatentAttention.of(node)
    operands = (*given.queries, given.latent, given.rope_key, given.weight)
    mask = attended_mask(node, state)
    op = torch.ops.panguq.latent_attention.default
    return call(node, op, (*operands, mask, given.scale), origin=node)
