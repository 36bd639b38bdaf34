"""Folders with tiny random models and a tokenizer that knows bytes and a few words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

TEXT = "A quantized model computes with small integers. Its scales are chosen on such a text. " * 80
SIZES = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=264, max_position_embeddings=256, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def make_tokenizer() -> Any:
    """A tokenizer of bytes: ids 3 to 258, after <pad>, <bos> and <unk>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int = 0, **changed: Any) -> Any:
    """A random Llama whose weights are far from zero, one or each other."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SIZES, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Move every parameter: fresh norms and biases would be all 1 and 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def make_folder(path: Path, model: Any = None, tokenizer: bool = True) -> Path:
    """A model folder as transformers writes it."""
    (model or make_model()).save_pretrained(path)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return path


def with_config(folder: Path, copy: Path, **changed: Any) -> Path:
    """A copy of a model folder whose config.json says something else; None removes a key."""
    shutil.copytree(folder, copy)
    data = json.loads((copy / "config.json").read_text()) | changed
    kept = {key: value for key, value in data.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(kept))
    return copy
