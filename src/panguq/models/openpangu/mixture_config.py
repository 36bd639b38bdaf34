"""The configurations of openPangu's mixtures of experts, as their config.json's say it.

- `PanguProMoE`: Pro MoE 72B (`PanguProMoEForCausalLM`), and R-72B (`PanguProMoEV2ForCausalLM`),
  whose config.json has the same model type and more keys.
- `pangu_ultra_moe`: Ultra MoE 718B.
- `openpangu_v2` and `pangu_v2_moe`: 2.0 Flash and 2.0 Pro.

Sources: the published configuration classes of Pro MoE and Ultra MoE, whose defaults are those
here; the keys that vLLM's openpangu.py reads; openPangu-2.0's report for its sizes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


class OpenPanguMixtureConfig(PreTrainedConfig):
    """What all of them say in the same words. Layers below `first_k_dense_replace`, and those in
    `mlp_only_layers`, have one MLP in place of experts."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 153600
    hidden_size: int = 7680
    intermediate_size: int | None = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 0
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_enable_expert_bias: bool = False
    sandwich_norm: bool = False
    attention_bias: bool = False
    param_sink_number: int = 0
    param_sink_with_value: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.mlp_only_layers = self.mlp_only_layers or []  # servers look for a layer in it
        super().__post_init__(**kwargs)

    def is_dense(self, layer: int) -> bool:
        """Whether the layer has one MLP in place of experts."""
        return layer < self.first_k_dense_replace or layer in (self.mlp_only_layers or ())

    def unknown_pieces(self) -> dict[str, int]:
        """Pieces of the model for which there is no module here, with their number of weights."""
        return {}


class PanguProMoEConfig(OpenPanguMixtureConfig):
    """Pro MoE 72B: grouped heads with biases, one expert of each of `num_experts_per_tok` groups,
    by softmax. R-72B says `qk_nope_dim`, `qk_rope_dim`, `v_channels`, `param_sink_number`."""

    model_type = "PanguProMoE"
    default_theta = 16e6
    attribute_map: ClassVar[dict[str, str]] = {
        "n_routed_experts": "num_experts",
        "qk_nope_head_dim": "qk_nope_dim",
        "qk_rope_head_dim": "qk_rope_dim",
        "v_head_dim": "v_channels",
        "num_nextn_predict_layers": "num_mtp_layers",
    }

    vocab_size: int = 153376
    hidden_size: int = 5120
    intermediate_size: int | None = None
    moe_intermediate_size: int = 1344
    shared_expert_intermediate_size: int = 5376
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    num_experts: int = 64
    qk_nope_dim: int | None = None
    qk_rope_dim: int | None = None
    v_channels: int | None = None
    num_mtp_layers: int = 0
    attention_bias: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 45892
    pad_token_id: int | None = 0

    @property
    def has_sinks(self) -> bool:
        """Whether this is R-72B, whose attention has sinks and a size of its own for values."""
        return self.qk_nope_dim is not None


class PanguUltraMoEConfig(OpenPanguMixtureConfig):
    """Ultra MoE 718B: latent attention, sandwich norms, the best experts by sigmoid.

    The words are vLLM's, which are DeepSeek-V3's; those of the first release mean the same.
    """

    model_type = "pangu_ultra_moe"
    default_theta = 25.6e6
    attribute_map: ClassVar[dict[str, str]] = {
        "attention_q_lora_dim": "q_lora_rank",
        "attention_kv_lora_dim": "kv_lora_rank",
        "attention_qk_dim": "qk_nope_head_dim",
        "attention_qk_rope_dim": "qk_rope_head_dim",
        "attention_v_dim": "v_head_dim",
        "num_routed_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "num_dense_layers": "first_k_dense_replace",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    routed_scaling_factor: float = 2.5
    sandwich_norm: bool = True
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleaved: bool = True
    num_nextn_predict_layers: int = 1


class OpenPanguV2Config(PanguUltraMoEConfig):
    """2.0 Flash, whose sizes are the defaults, and 2.0 Pro: Ultra MoE's layers with sinks, biased
    routers and sliding windows, and pieces that are only counted."""

    model_type = "openpangu_v2"
    default_theta = 6.4e6
    attribute_map: ClassVar[dict[str, str]] = {
        "num_mtp_layers": "num_nextn_predict_layers",
        "rope_interleave": "rope_interleaved",
    }

    vocab_size: int = 151552
    hidden_size: int = 2560
    intermediate_size: int | None = 9216
    moe_intermediate_size: int = 1024
    num_hidden_layers: int = 46
    num_attention_heads: int = 48
    first_k_dense_replace: int = 2
    q_lora_rank: int | None = 1024
    rope_interleaved: bool = False
    router_enable_expert_bias: bool = True
    param_sink_number: int = 128
    param_sink_with_value: bool = True
    max_position_embeddings: int = 524288
    num_nextn_predict_layers: int = 3
    swa_layers: list[int] | None = None
    dsa_layers: list[int] | None = None
    sliding_window_list: list[int] | None = None
    sliding_window: int | None = 512
    layer_types: list[str] | None = None
    use_mhc: bool = True
    mhc_num_stream: int = 4
    mhc_recur_norm: int = 20
    mhc_use_gamma: bool = True
    block_post_layernorm_idx: list[int] | None = None
    use_mome: bool = True
    router_sliding_window: int = 3
    index_topk: int | None = 2048
    index_n_heads: int = 32
    index_head_dim: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        self.layer_types = [
            SLIDING if layer in (self.swa_layers or ()) else FULL
            for layer in range(self.num_hidden_layers)
        ]
        windows = set(self.sliding_window_list or ())
        if len(windows) > 1:
            raise ValueError(f"sliding windows of several sizes: {sorted(windows)}")
        self.sliding_window = windows.pop() if windows else self.sliding_window
        super().__post_init__(**kwargs)

    def unknown_pieces(self) -> dict[str, int]:
        """mHC, the indexer, MoME and the norms of blocks; their shapes are those that vLLM's
        openpangu.py gives them."""
        layers = self.num_hidden_layers
        mixed, streams = self.mhc_num_stream * self.hidden_size, self.mhc_num_stream
        found = {}
        if self.use_mhc:
            phi = mixed * streams * (streams + 2)
            found["the mixing of residual streams (mHC)"] = 2 * layers * (
                phi + mixed * self.mhc_use_gamma
            ) + mixed * (streams + 1)
            found["the norms at the end of blocks"] = mixed * len(
                self.block_post_layernorm_idx or ()
            )
        if self.index_topk is not None and self.dsa_layers:
            query = self.index_n_heads * self.index_head_dim * (self.q_lora_rank or 0)
            key = (self.index_head_dim + self.index_n_heads) * self.hidden_size
            found["the indexer of sparse attention (DSA)"] = len(self.dsa_layers) * (query + key)
        if self.use_mome:
            width = self.num_attention_heads * self.v_head_dim
            width += (self.q_lora_rank or 0) + self.kv_lora_rank
            found["convolutions on latents and after attention (MoME)"] = (
                layers * width * self.router_sliding_window
            )
        return {name: count for name, count in found.items() if count}


class PanguV2MoEConfig(OpenPanguV2Config):
    """2.0 Pro's config.json, which calls the same model so."""

    model_type = "pangu_v2_moe"
