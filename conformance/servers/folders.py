"""The folders that servers load: small random models of several families, and SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import panguq
from panguq.check.ascend_read import FakeQuantLinear, load_ascend_v1
from panguq.recipe import Recipe

VOCABULARY = 256
TOKENS = 33
_TOKEN_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_SIZES = dict(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=512, **_TOKEN_IDS,
)  # fmt: skip
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    # openPangu is a llama with biases in its attention and its rotary base.
    "openpangu": transformers.LlamaConfig(
        **_SIZES, attention_bias=True, mlp_bias=False, rms_norm_eps=1e-5, rope_theta=16e6,
        tie_word_embeddings=False,
    ),
    "qwen2": transformers.Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=64, tie_word_embeddings=False),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **_SIZES, head_dim=64, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, tie_word_embeddings=False,
    ),
}  # fmt: skip
W4A8 = {
    "name": "w4a8-plain",
    "schemes": {"*": "W4A8"},
    "passes": ["calibrate", "insert-fake-quant", {"quantize-weights": {"clip_search": True}}],
}


@dataclass(frozen=True)
class Folder:
    """What is compiled and written: `model` is a name of CONFIGS or `smollm2`."""

    model: str
    recipe: str | Mapping[str, Any]
    dtype: str = "bfloat16"
    target: str = "ascend910b1"
    format: str = "ascend"


def write(folder: Folder, to: Path) -> None:
    """Write `to/checkpoint` and `to/reference.safetensors`: token ids `ids` `[2, TOKENS]` and the
    compiled model's `logits` `[2, TOKENS, VOCABULARY]` for them, in the model's dtype. Of W4A8
    also `served_logits`, with the server's float inputs; of some others `tp2_logits`, by an
    independent dequantization of the checkpoint, shared out among two devices."""
    model, calibration, ids = model_and_tokens(folder.model)
    dtype = getattr(torch, folder.dtype)
    compiled = panguq.compile(
        model, folder.recipe, calibration=calibration, target=folder.target, dtype=dtype
    )
    compiled.save(to / "checkpoint", format=folder.format)
    with torch.no_grad():
        logits = compiled(ids).logits
        reference = {"ids": ids, "logits": logits.contiguous()}
        if folder.recipe == W4A8:
            reference["served_logits"] = _as_w4a16(folder)(ids).logits.contiguous()
        elif folder.format == "ascend" and folder.model in ("llama", "openpangu"):
            reference["tp2_logits"] = _on_two_devices(to / "checkpoint")(ids).logits.contiguous()
    save_file(reference, to / "reference.safetensors")


def _as_w4a16(folder: Folder) -> Any:
    """The model as vllm-ascend 0.23 computes W4A8: with the same codes, as the recipe has no step
    that looks at how inputs are rounded, and float inputs."""
    model, calibration, _ = model_and_tokens(folder.model)
    recipe = Recipe.of(folder.recipe).with_schemes({"*": "W4A16-g256"})
    dtype = getattr(torch, folder.dtype)
    return panguq.compile(model, recipe, calibration=calibration, target=folder.target, dtype=dtype)


def _on_two_devices(checkpoint: Path) -> Any:
    """The checkpoint as two devices compute it that share its matmuls: of the linears whose inputs
    are shared out (o_proj, down_proj), each quantizes its half of a token with a scale of its own,
    and the halves' results are added in the model's dtype."""
    model = load_ascend_v1(checkpoint)
    for layer in model.model.layers:
        layer.self_attn.o_proj = _Halves(layer.self_attn.o_proj)
        layer.mlp.down_proj = _Halves(layer.mlp.down_proj)
    return model


class _Halves(nn.Module):
    """A `FakeQuantLinear` of one scale an output, with its inputs on two devices."""

    def __init__(self, whole: FakeQuantLinear) -> None:
        super().__init__()
        tensors = dict(whole.named_buffers())
        self.parts = nn.ModuleList()
        for index, codes in enumerate(whole.codes.chunk(2, 1)):
            bias = tensors.get("bias") if index == 0 else None
            self.parts.append(FakeQuantLinear(whole.kind, {
                "weight_offset": None, "input_scale": None, "input_offset": None, **tensors,
                "codes": codes, "bias": bias,
            }))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first, second = (part(half) for part, half in zip(self.parts, x.chunk(2, -1), strict=True))
        total: Tensor = first + second
        return total


def random_model(name: str) -> Any:
    """A model of CONFIGS with the same random weights each time, its norms and biases too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def model_and_tokens(name: str) -> tuple[Any, Tensor, Tensor]:
    """The model, ids to calibrate with and ids to compare with."""
    if name != "smollm2":
        generator = torch.Generator().manual_seed(5)
        calibration = torch.randint(3, VOCABULARY, (4, 64), generator=generator)
        return (
            random_model(name),
            calibration,
            torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator),
        )
    from conformance.compressed_tensors.checkpoints import smollm2

    model, calibration, held_out = smollm2()
    return model, calibration, held_out[:, :128].contiguous()
