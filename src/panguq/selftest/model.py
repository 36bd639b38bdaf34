"""A model small enough to compile in seconds, with widths that every kernel takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEW_TOKENS = 8


def tiny_llama() -> nn.Module:
    """Two decoder layers with random weights, the same in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def prompt() -> Tensor:
    """Tokens int64 [1, 32]."""
    torch.manual_seed(1)
    return torch.randint(1, 256, (1, 32))
