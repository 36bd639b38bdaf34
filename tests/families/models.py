"""One tiny random model of every family that is tried: two layers, hidden size 128, 4 heads of 32.

Weights have the scale that keeps activations at 1, and everything that a fresh model leaves at 0 or
1 (biases, norms, sinks, a router's biases) is random: what a graph ignored would show.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, WINDOW, POSITIONS = 256, 16, 96
SLIDING, FULL = "sliding_attention", "full_attention"
IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None)
HEADS = dict(
    **IDS, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
GROUPED = dict(**HEADS, num_key_value_heads=2)
SIZED = dict(**GROUPED, head_dim=32)
WINDOWED = dict(**SIZED, sliding_window=WINDOW, layer_types=[SLIDING, FULL])
LATENT = dict(
    **HEADS, num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=16,
    qk_nope_head_dim=32, v_head_dim=32,
)  # fmt: skip
GPT2 = dict(**IDS, n_embd=128, n_layer=2, n_head=4, n_positions=POSITIONS)
EXPERTS = dict(**SIZED, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
ROUTED = dict(
    moe_intermediate_size=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
)
CONV = dict(layer_types=["conv", FULL], full_attn_idxs=[1])
LINEAR = dict(
    layer_types=["linear_attention", FULL], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=32, linear_value_head_dim=32,
)  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": GROUPED,
    "arcee": SIZED,
    "bamba": dict(**GROUPED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=32),
    "bitnet": GROUPED,
    "bloom": dict(**IDS, hidden_size=128, n_layer=2, n_head=4),
    "cohere": GROUPED,
    "cohere2": WINDOWED,
    "deepseek_v2": dict(LATENT, first_k_dense_replace=2, q_lora_rank=None),
    "deepseek_v3": dict(LATENT, first_k_dense_replace=2),
    "ernie4_5": SIZED,
    "exaone": GROUPED,
    "exaone4": WINDOWED,
    "falcon": dict(**HEADS, alibi=False),
    "falcon-alibi": dict(**HEADS, alibi=True, multi_query=False),
    "falcon-new": dict(**HEADS, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_h1": dict(**SIZED, mamba_d_ssm=256, mamba_n_heads=8, mamba_d_head=32),
    "gemma": SIZED,
    "gemma2": dict(**WINDOWED, query_pre_attn_scalar=32),
    "gemma3_text": WINDOWED,
    "gemma3n_text": dict(
        **dict(SIZED, num_hidden_layers=3), sliding_window=WINDOW, num_kv_shared_layers=1,
        layer_types=[SLIDING, FULL, SLIDING], hidden_size_per_layer_input=16, laurel_rank=8,
        vocab_size_per_layer_input=VOCAB, activation_sparsity_pattern=[0.5, 0.0, 0.0],
    ),
    "glm": SIZED,
    "glm4": SIZED,
    "gpt2": GPT2,
    "gpt_neo": dict(
        **IDS, hidden_size=128, num_layers=2, num_heads=4, window_size=WINDOW,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=POSITIONS,
    ),
    "gpt_neox": HEADS,
    "gptj": dict(**GPT2, rotary_dim=16),
    "granite": dict(
        **GROUPED, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5
    ),
    "granitemoehybrid": dict(
        **GROUPED, layer_types=["mamba", "attention"], num_local_experts=0,
        shared_intermediate_size=256, mamba_n_heads=8, mamba_d_head=32, mamba_d_state=32,
        mamba_n_groups=1,
    ),
    "helium": SIZED,
    "hunyuan_v1_dense": SIZED,
    "internlm3": SIZED,
    "lfm2": dict(**GROUPED, **CONV),
    "llama": GROUPED,
    "minicpm3": LATENT,
    "ministral": WINDOWED,
    "ministral3": SIZED,
    "mistral": dict(**SIZED, sliding_window=WINDOW),
    "mpt": dict(**IDS, d_model=128, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
    "nemotron": SIZED,
    "nemotron_h": dict(
        **dict(SIZED, num_hidden_layers=3), layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, n_groups=2,
    ),
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": dict(**GROUPED, sliding_window=WINDOW, layer_types=[SLIDING, FULL]),
    "olmo_hybrid": dict(**GROUPED, **LINEAR),
    "opt": dict(
        **IDS, hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=128, max_position_embeddings=POSITIONS,
    ),
    "persimmon": HEADS,
    "phi": HEADS,
    "phi3": dict(**GROUPED, sliding_window=WINDOW),
    "qwen2": GROUPED,
    "qwen3": SIZED,
    "qwen3_5_text": dict(**SIZED, **LINEAR),
    "seed_oss": SIZED,
    "smollm3": dict(**GROUPED, no_rope_layers=[1, 0]),
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    # Mixtures of experts.
    "deepseek_v3-moe": dict(LATENT, **ROUTED),
    "dots1": dict(SIZED, **ROUTED),
    "ernie4_5_moe": dict(
        **SIZED, moe_intermediate_size=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1
    ),
    "glm4_moe": dict(SIZED, **ROUTED),
    "gpt_oss": dict(**WINDOWED, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": dict(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "hunyuan_v1_moe": dict(**SIZED, num_experts=4, moe_topk=2),
    "jetmoe": dict(
        **IDS, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=2,
        kv_channels=32, max_position_embeddings=POSITIONS, num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4_text": dict(
        **SIZED, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=256,
        moe_layers=[0, 1], attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "minimax_m2": dict(**SIZED, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": dict(**GROUPED, num_local_experts=4),
    "olmoe": dict(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "phimoe": dict(**GROUPED, num_local_experts=4),
    "qwen2_moe": dict(EXPERTS, shared_expert_intermediate_size=96),
    "qwen3_moe": EXPERTS,
    "vaultgemma": dict(**WINDOWED, query_pre_attn_scalar=32),
    "youtu": LATENT,
    "zamba2": dict(
        **HEADS, num_key_value_heads=4, layers_block_type=["mamba", "hybrid"], n_mamba_heads=8,
        mamba_d_state=32, mamba_headdim=32, num_mem_blocks=1, use_long_context=False,
    ),
    # Those that are refused.
    "mamba": dict(**IDS, hidden_size=128, num_hidden_layers=2),
    "qwen3_next": dict(**EXPERTS, **LINEAR),
}  # fmt: skip


def make(family: str, **other: Any) -> Any:
    """A new model of the family, in float32, with `other` settings than FAMILIES has."""
    settings = FAMILIES[family] | other
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every parameter values of the scale that keeps activations at 1."""
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif parameter.dim() == 1:
            parameter.add_(0.1 * noise)
