# ruff: noqa: RUF001  (Chinese text has full-width colons)
"""Folders as openPangu's own: names, config keys, shards, tokenizer; with random weights."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MARKS = [f"[unused{index}]" for index in range(34)]
SPECIAL = ["<unk>", "<s>", "</s>", *MARKS]
PIECES = 600
CONFIG: dict[str, Any] = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": SPECIAL.index("[unused10]"),
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "model_type": "PanguEmbedded",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 16e6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": 640,
}
# The sizes of the published models; everything else is as above.
SIZES_1B = dict(
    hidden_size=1536, intermediate_size=6144, num_hidden_layers=26, num_attention_heads=12,
    num_key_value_heads=6, rope_theta=4e6, tie_word_embeddings=True, vocab_size=153376,
    max_position_embeddings=32768, eos_token_id=45892, torch_dtype="bfloat16",
)  # fmt: skip
SIZES_7B = dict(
    hidden_size=4096, intermediate_size=12800, num_hidden_layers=34, num_attention_heads=32,
    num_key_value_heads=8, rope_theta=16e6, tie_word_embeddings=False, vocab_size=153376,
    max_position_embeddings=32768, eos_token_id=45892, torch_dtype="bfloat16",
)  # fmt: skip
TEXT = (
    "A quantized model computes with small integers. Its scales are chosen on such a text.\n"
    "def double(x):\n    return x + x  # 2024, 3.14\n"
    "大语言模型的权重可以用八位整数表示，激活也可以。系统：用户：助手：工具：\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '[unused9]系统：[unused10]' }}"
    "{% endif %}{% if message['role'] == 'system' %}"
    "{{ '[unused9]系统：' + message['content'] + '[unused10]' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{'[unused9]助手：' + message['content'] + '[unused10]'}}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{'[unused9]用户：' + message['content'] + '[unused10]'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[unused9]助手：' }}{% endif %}"
)


def make_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights under the checkpoint's names, rotary frequencies included."""
    torch.manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    size = hidden // config["num_attention_heads"]
    shared = config["num_key_value_heads"] * size

    def linear(name: str, n: int, k: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = torch.randn(n, k) / k**0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(n) * 0.3

    weights: dict[str, Tensor] = {}
    linear("model.embed_tokens", config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name in "qkvo":
            n = shared if name in "kv" else hidden
            linear(f"{layer}.self_attn.{name}_proj", n, hidden, config["bias"])
        linear(f"{layer}.mlp.gate_proj", ffn, hidden)
        linear(f"{layer}.mlp.up_proj", ffn, hidden)
        linear(f"{layer}.mlp.down_proj", hidden, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = 1 + 0.3 * torch.randn(hidden)
        powers = torch.arange(0, size, 2) / size
        weights[f"{layer}.self_attn.rotary_emb.inv_freq"] = config["rope_theta"] ** -powers
    weights["model.norm.weight"] = 1 + 0.3 * torch.randn(hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden)
    return weights


def make_openpangu(
    path: Path, shards: int = 1, weights: dict[str, Tensor] | None = None, **changed: Any
) -> Path:
    """A model folder in the published layout, with a tokenizer."""
    path.mkdir(parents=True)
    config = CONFIG | changed
    write_json(path / "config.json", config)
    write_shards(path, weights or make_weights(config), shards)
    for name in ("configuration", "modeling", "tokenization"):
        suffix = "" if name == "tokenization" else "_dense"
        (path / f"{name}_openpangu{suffix}.py").write_text("raise SystemExit('this ran')")
    write_tokenizer(path)
    return path


def write_shards(path: Path, weights: dict[str, Tensor], shards: int) -> None:
    """One model.safetensors, or several with an index, layers in order."""
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return
    names = list(weights)
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: weights[name] for name in own}, path / file)
        places |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(path / "model.safetensors.index.json", index)


@functools.cache
def sentencepiece_model(**options: Any) -> bytes:
    """A small sentencepiece model with openPangu's marks, trained on TEXT."""
    import sentencepiece

    written = io.BytesIO()
    settings: dict[str, Any] = dict(
        model_type="bpe", vocab_size=PIECES, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols=MARKS, minloglevel=2,
    )  # fmt: skip
    settings |= {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}
    lines = iter(TEXT.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=written, **settings
    )
    return written.getvalue()


def tokenizer_settings() -> dict[str, Any]:
    """tokenizer_config.json as published, for the small vocabulary."""
    token = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": {
            str(index): {"content": content, **token} for index, content in enumerate(SPECIAL)
        },
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[unused10]",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<unk>",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "PanguTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(path: Path, **options: Any) -> Path:
    """tokenizer.model and its settings; `options` are for training sentencepiece."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    settings = tokenizer_settings()
    write_json(path / "tokenizer_config.json", settings)
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    write_json(path / "special_tokens_map.json", {role: settings[role] for role in roles})
    return path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
