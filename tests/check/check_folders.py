"""Checkpoints written by hand, for the checker: a good one of each kind, to be broken.

Nothing of panguq's own writers is used, so that a fault they share with the checker is seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, VOCAB = 256, 4, 2, 64
KV = HIDDEN // HEADS * KV_HEADS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, HIDDEN),
}
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
GATE = f"{LAYER}.mlp.gate_proj"
DOWN = f"{LAYER}.mlp.down_proj"


@dataclass
class Draft:
    """A folder that is not written yet."""

    config: dict[str, Any] | None
    description: dict[str, Any] | None
    tensors: dict[str, Tensor]
    stem: str
    files: dict[str, str] = field(default_factory=lambda: {"tokenizer.json": "{}"})
    moved: dict[str, str] = field(default_factory=dict)
    """Tensors that go into another file than the first, by name."""
    index: dict[str, str] | None = None
    truncated: str = ""

    def write(self, path: Path) -> Path:
        path.mkdir()
        first = f"{self.stem}.safetensors"
        by_file: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            by_file.setdefault(self.moved.get(name, first), {})[name] = tensor
        for file, tensors in by_file.items():
            save_file(tensors, path / file, metadata={"format": "pt"})
        if self.truncated:
            whole = (path / self.truncated).read_bytes()
            (path / self.truncated).write_bytes(whole[: len(whole) // 2])
        texts = dict(self.files)
        if self.config is not None:
            texts["config.json"] = json.dumps(self.config)
        if self.description is not None:
            texts["quant_model_description.json"] = json.dumps(self.description)
        if self.index is not None:
            name = f"{self.stem}.safetensors.index.json"
            texts[name] = json.dumps({"metadata": {}, "weight_map": self.index})
        for name, text in texts.items():
            (path / name).write_text(text)
        return path


def config(bias: bool, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype,
        "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "attention_bias": bias, "tie_word_embeddings": False,
        **more,
    }  # fmt: skip


def float_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).to(dtype),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN).to(dtype),
        "model.norm.weight": torch.randn(HIDDEN).to(dtype),
        f"{LAYER}.input_layernorm.weight": torch.randn(HIDDEN).to(dtype),
        f"{LAYER}.post_attention_layernorm.weight": torch.randn(HIDDEN).to(dtype),
    }


def int8_codes(n: int, k: int) -> Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8)


def ascend(attention: str = "W8A8", mlp: str = "W8A16", dtype: str = "bfloat16") -> Draft:
    """A one-layer Llama in AscendV1: attention (biased, unless W4A8) and MLP of these types."""
    real = getattr(torch, dtype)
    bias = attention != "W4A8_DYNAMIC"
    tensors = float_weights(real)
    description = dict.fromkeys(tensors, "FLOAT")
    for name, (n, k) in SHAPES.items():
        path = f"{LAYER}.{name}"
        kind = attention if "attn" in name else mlp
        parts = ascend_linear(kind, name, n, k, "attn" in name and bias, dtype)
        tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in parts.items()}
        kinds = {f"{path}.{leaf}": "FLOAT" if leaf == "bias" else kind for leaf in parts}
        description |= kinds
    head = {"model_quant_type": attention, "version": "1.0.0", "group_size": 0}
    return Draft(config(bias, dtype), {**head, **description}, tensors, "quant_model_weights")


def ascend_linear(
    kind: str, name: str, n: int, k: int, biased: bool, dtype: str
) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    scale = torch.rand(n, 1) * 1e-3 + 1e-4
    if biased:
        parts["bias"] = torch.randn(n)
    if kind == "W4A8_DYNAMIC":
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        parts["weight"] = (codes[1::2] << 4) | (codes[0::2] & 15)
        parts["weight_scale_second"] = torch.rand(n, k // 256) + 1
        parts["weight_offset_second"] = torch.zeros(n, k // 256)
        scales = (scale * parts["weight_scale_second"]).repeat_interleave(256, dim=1)
        slices = 16 if name.endswith(("o_proj", "down_proj")) else 1
        parts["scale_bias"] = 8 * (codes * scales).reshape(n, slices, -1).sum(-1)
    else:
        top = 8 if kind == "W4A4_DYNAMIC" else 128
        codes = torch.randint(-top + 1, top, (n, k), dtype=torch.int8)
        parts["weight"] = codes
    if kind == "W8A8":
        offset = 7
        step = torch.tensor([0.03125])
        deq = (step * scale).reshape(-1)
        steps = parts["bias"] / deq if biased else torch.zeros(n)
        parts["quant_bias"] = (steps - offset * codes.sum(1)).round().to(torch.int32)
        parts["input_scale"] = step
        parts["input_offset"] = torch.tensor([float(offset)])
        half = dtype == "float16"
        parts["deq_scale"] = deq.view(torch.int32).to(torch.int64) if half else deq
    parts["weight_scale"] = scale
    parts["weight_offset"] = torch.zeros(n, 1)
    return parts


def group(bits: int, activation: str | None, form: str | None, **more: Any) -> dict[str, Any]:
    """A group of compressed-tensors: per-channel weights, unless told otherwise."""
    inputs = {
        None: None,
        "dynamic": dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True),
        "static": dict(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False),
    }[activation]
    weights = dict(num_bits=bits, type="int", symmetric=True, strategy="channel", dynamic=False)
    entry: dict[str, Any] = {"targets": ["Linear"], "weights": {**weights, **more}}
    entry |= {"input_activations": inputs, "output_activations": None}
    return entry if form is None else {**entry, "format": form}


def compressed(bits: int = 8, activation: str | None = "dynamic") -> Draft:
    """A one-layer Llama in compressed-tensors' format: int-quantized, or packed without inputs."""
    form = "int-quantized" if activation else "pack-quantized"
    tensors = float_weights(torch.bfloat16)
    for name, (n, k) in SHAPES.items():
        path = f"{LAYER}.{name}"
        half = 2 ** (bits - 1)
        if form == "pack-quantized":
            words = torch.randint(0, 2**31 - 1, (n, k * bits // 32), dtype=torch.int32)
            tensors[f"{path}.weight_packed"] = words
            tensors[f"{path}.weight_shape"] = torch.tensor([n, k])
        else:
            tensors[f"{path}.weight"] = torch.randint(-half, half, (n, k), dtype=torch.int8)
        tensors[f"{path}.weight_scale"] = torch.rand(n, 1) + 1e-3
        if activation == "static":
            tensors[f"{path}.input_scale"] = torch.tensor([0.03125])
    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group(bits, activation, form)},
    }
    settings = config(False, "bfloat16", quantization_config=quantization)
    return Draft(settings, None, tensors, "model")


def weight_only(method: str, bits: int = 4, group_size: int = 128) -> Draft:
    """A one-layer Llama in GPTQ's or AWQ's format."""
    tensors = float_weights(torch.bfloat16)
    for name, (n, k) in SHAPES.items():
        path, groups, wide = f"{LAYER}.{name}", k // group_size, n * bits // 32
        shape = (k * bits // 32, n) if method == "gptq" else (k, wide)
        tensors[f"{path}.qweight"] = torch.randint(0, 2**31 - 1, shape, dtype=torch.int32)
        tensors[f"{path}.qzeros"] = torch.full((groups, wide), 0x77777777, dtype=torch.int32)
        tensors[f"{path}.scales"] = (torch.rand(groups, n) + 1e-3).half()
        if method == "gptq":
            tensors[f"{path}.g_idx"] = torch.arange(k, dtype=torch.int32) // group_size
    settings: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": group_size}
    if method == "gptq":
        settings |= {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    else:
        settings |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]}
    return Draft(config(False, "bfloat16", quantization_config=settings), None, tensors, "model")
