"""openPangu's mixtures of experts as language models that transformers builds and loads.

transformers has no class for them, and the files that are published with the weights are code,
which is not run. What is here has the published tensors under their published names. Layers that
predict further tokens (MTP) are left out, as transformers leaves out DeepSeek's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.initialization import normal_
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from panguq.ir.kv_cache import CACHE_NAME
from panguq.models.openpangu.mixture_config import (
    FULL,
    SLIDING,
    OpenPanguMixtureConfig,
    OpenPanguV2Config,
    PanguProMoEConfig,
    PanguUltraMoEConfig,
    PanguV2MoEConfig,
)
from panguq.models.openpangu.mixture_layers import (
    GroupedAttention,
    GroupedMixture,
    OpenPanguExperts,
    OpenPanguMLP,
    ScoredMixture,
    SinkAttention,
    SinkLatentAttention,
    rotary_embedding,
)


class OpenPanguMixtureLayer(nn.Module):
    """Attention and experts, each with a norm before and, with `sandwich_norm`, one behind."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.kind = (getattr(config, "layer_types", None) or {layer_idx: FULL})[layer_idx]
        self.sandwich = config.sandwich_norm
        self.self_attn = _attention(config, layer_idx)
        dense = config.is_dense(layer_idx)
        self.mlp: nn.Module = (
            OpenPanguMLP(config, config.intermediate_size) if dense else _experts(config)
        )
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(size, eps=eps)
        self.post_attention_layernorm = LlamaRMSNorm(size, eps=eps)
        if self.sandwich:
            self.pre_mlp_layernorm = LlamaRMSNorm(size, eps=eps)
            self.post_mlp_layernorm = LlamaRMSNorm(size, eps=eps)

    def forward(self, x: Tensor, rotary: Any, masks: dict[str, Tensor], cache: Any) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rotary, masks[self.kind], cache)
        if not self.sandwich:
            x = x + attended
            mixed: Tensor = self.mlp(self.post_attention_layernorm(x))
            return x + mixed
        x = x + self.post_attention_layernorm(attended)
        mixed = self.post_mlp_layernorm(self.mlp(self.pre_mlp_layernorm(x)))
        return x + mixed


def _attention(config: Any, layer_idx: int) -> nn.Module:
    if isinstance(config, PanguUltraMoEConfig):
        return SinkLatentAttention(config, layer_idx)
    kind = SinkAttention if config.has_sinks else GroupedAttention
    return kind(config, layer_idx)


def _experts(config: Any) -> nn.Module:
    if isinstance(config, PanguUltraMoEConfig):
        shared = config.n_shared_experts * config.moe_intermediate_size
        return ScoredMixture(config, shared)
    if config.has_sinks:
        return ScoredMixture(config, config.shared_expert_intermediate_size)
    return GroupedMixture(config)


def _rotary_dim(config: Any) -> int:
    grouped = isinstance(config, PanguProMoEConfig) and not config.has_sinks
    if grouped:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.qk_rope_head_dim)


class OpenPanguMixturePreTrainedModel(PreTrainedModel):
    """What transformers asks of a model's class."""

    config_class = OpenPanguMixtureConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["OpenPanguMixtureLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OpenPanguExperts):
            normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class OpenPanguMixtureModel(OpenPanguMixturePreTrainedModel):
    """Embedding, layers and last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            OpenPanguMixtureLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config, _rotary_dim(config))
        self.post_init()

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Any
    ) -> Tensor:
        """inputs_embeds `[batch, seq, hidden]`; the others as transformers gives them."""
        past = 0 if cache is None else cache.get_seq_length()
        seq = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + seq, device=inputs_embeds.device)[None]
        masks = self._masks(attention_mask, inputs_embeds, past + seq)
        rotary = self.rotary_emb(inputs_embeds, position_ids)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, rotary, masks, cache)
        result: Tensor = self.norm(hidden)
        return result

    def _masks(self, given: Any, x: Tensor, total: int) -> dict[str, Tensor]:
        """By kind of layer which keys a query sees, `[batch, 1, seq, sinks + total]`, boolean."""
        if not isinstance(given, dict):
            if given is None or given.dim() == 2:
                given = _causal(given, x, total)
            window = getattr(self.config, "sliding_window", None)
            given = {FULL: given, SLIDING: _within(given, window) if window else given}
        sinks = self.config.param_sink_number
        return {kind: functional.pad(mask, (sinks, 0), value=True) for kind, mask in given.items()}


def _causal(real: Tensor | None, x: Tensor, total: int) -> Tensor:
    """Every real key up to the query's own; padding sees itself, so that its sum is finite."""
    batch, seq = x.shape[:2]
    keys = torch.arange(total, device=x.device)
    queries = keys[total - seq :, None]
    seen = (keys <= queries).expand(batch, 1, seq, total)
    if real is None:
        return seen
    return (seen & real.bool()[:, None, None]) | (keys == queries)


def _within(mask: Tensor, window: int) -> Tensor:
    """The mask without keys that lie `window` or more before their query."""
    seq, total = mask.shape[-2:]
    keys = torch.arange(total, device=mask.device)
    return mask & (keys > keys[total - seq :, None] - window)


class OpenPanguMixtureForCausalLM(OpenPanguMixturePreTrainedModel, GenerationMixin):
    """The language model; its subclasses have the names that config.json's give."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = OpenPanguMixtureModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def panguq_only_counted(self) -> dict[str, int]:
        """Pieces of the published model that are not in this one, with their number of weights."""
        pieces: dict[str, int] = self.config.unknown_pieces()
        return pieces

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' language models; the cache has two names, of which one is given."""
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        embedded = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.model(embedded, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})


class PanguProMoEForCausalLM(OpenPanguMixtureForCausalLM):
    config_class = PanguProMoEConfig


class PanguProMoEV2ForCausalLM(OpenPanguMixtureForCausalLM):
    config_class = PanguProMoEConfig


class PanguUltraMoEForCausalLM(OpenPanguMixtureForCausalLM):
    config_class = PanguUltraMoEConfig


class OpenPanguV2ForCausalLM(OpenPanguMixtureForCausalLM):
    config_class = OpenPanguV2Config


class PanguV2MoEForCausalLM(OpenPanguMixtureForCausalLM):
    config_class = PanguV2MoEConfig


_CLASSES = {
    PanguProMoEConfig: (PanguProMoEForCausalLM, PanguProMoEV2ForCausalLM),
    PanguUltraMoEConfig: (PanguUltraMoEForCausalLM,),
    OpenPanguV2Config: (OpenPanguV2ForCausalLM,),
    PanguV2MoEConfig: (PanguV2MoEForCausalLM,),
}


def register_openpangu_mixtures() -> None:
    """Let transformers know these types of models, unless it has classes of its own for them."""
    experts = get_checkpoint_conversion_mapping("qwen2_moe")  # one tensor of each expert's
    for config, models in _CLASSES.items():
        if config.model_type in CONFIG_MAPPING:
            continue
        CONFIG_MAPPING.register(config.model_type, config)
        MODEL_FOR_CAUSAL_LM_MAPPING.register(config, models)
        register_checkpoint_conversion_mapping(config.model_type, experts, overwrite=True)
