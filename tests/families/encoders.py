"""One tiny random model of every kind that is no causal language model; see models.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.families.models import FULL, GROUPED, IDS, POSITIONS, SIZED, SLIDING, WINDOW, randomize

TEXT = dict(
    **{**IDS, "eos_token_id": 2}, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=POSITIONS, num_labels=3,
)  # fmt: skip
IMAGE = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    image_size=32, patch_size=8, num_labels=3,
)  # fmt: skip
SOUND = dict(
    **IDS, d_model=128, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=40,
    max_source_positions=32,
)  # fmt: skip
SCORED = dict(num_labels=1)
WINDOWED = dict(**SIZED, sliding_window=WINDOW, layer_types=[SLIDING, FULL])

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForSequenceClassification": ("llama", dict(**GROUPED, num_labels=3)),
    "Qwen2ForSequenceClassification": ("qwen2", dict(**GROUPED, **SCORED)),
    "Qwen2ForTokenClassification": ("qwen2", dict(**GROUPED, num_labels=3)),
    "Qwen2ForCausalLM": ("qwen2", dict(**GROUPED, is_causal=False)),
    "Qwen3ForSequenceClassification": ("qwen3", dict(**SIZED, **SCORED)),
    "Qwen3Model": ("qwen3", SIZED),
    "Gemma3TextModel": ("gemma3_text", dict(**WINDOWED, use_bidirectional_attention=True)),
    "BertModel": ("bert", TEXT),
    "BertForSequenceClassification": ("bert", TEXT),
    "BertForTokenClassification": ("bert", TEXT),
    "BertForMaskedLM": ("bert", TEXT),
    "XLMRobertaForSequenceClassification": ("xlm-roberta", dict(TEXT, **SCORED)),
    "ModernBertModel": ("modernbert", TEXT),
    "T5EncoderModel": (
        "t5", dict(vocab_size=256, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    ),
    "CLIPTextModelWithProjection": ("clip_text_model", dict(TEXT, projection_dim=64)),
    "CLIPVisionModelWithProjection": ("clip_vision_model", dict(IMAGE, projection_dim=64)),
    "ViTModel": ("vit", IMAGE),
    "ViTForImageClassification": ("vit", IMAGE),
    "WhisperEncoder": ("whisper", SOUND),
}  # fmt: skip
INNER: dict[str, Callable[[Any], Any]] = {
    "WhisperEncoder": lambda config: transformers.WhisperModel(config).encoder,
}


def make_encoder(kind: str) -> Any:
    """A new model of the class, in float32."""
    model_type, settings = ENCODERS[kind]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = INNER.get(kind, getattr(transformers, kind, None))(config).eval()
    randomize(model)
    return model
