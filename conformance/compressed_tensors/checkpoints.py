"""The checkpoints that are compared: one for each scheme that panguq writes, and mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import panguq

VOCABULARY = 96


@dataclass(frozen=True)
class Row:
    """A checkpoint: its name, the recipe, the target, and which modes of loading do not take it.

    transformers 5's `dequantize` reads every weight by the first config group, so it cannot take
    groups of several sizes or formats; the older default has no format called mixed-precision.
    """

    name: str
    recipe: str | Mapping[str, Any]
    target: str = "cpu"
    refused: tuple[str, ...] = ()
    """Major release of transformers and mode, after the model's name if it is that model alone."""


def _searched(schemes: Mapping[str, str]) -> dict[str, Any]:
    """With the search that gives 4-bit groups negative scales."""
    passes = ["calibrate", "insert-fake-quant", {"quantize-weights": {"clip_search": True}}]
    return {"schemes": dict(schemes), "passes": passes}


def _plain(schemes: Mapping[str, str]) -> dict[str, Any]:
    return {"schemes": dict(schemes), "passes": ["insert-fake-quant", "quantize-weights"]}


def _static(schemes: Mapping[str, str]) -> dict[str, Any]:
    passes = ["smoothquant", "calibrate", "insert-fake-quant", "quantize-weights"]
    return {"schemes": dict(schemes), "passes": passes}


ROWS = (
    Row("w8a8", _static({"*": "W8A8"})),
    Row("w8a8-serving", "w8a8-serving"),
    Row("w8a8-dynamic", "w8a8-dynamic-serving"),
    Row("w8a16", "w8a16"),
    Row("w4a16-g32", _searched({"*": "W4A16-g32"})),
    Row("w4a16", "w4a16", refused=("smollm2 5 dequantize",)),
    Row("w4a16-per-channel", _searched({"*": "W4A16-per_channel"})),
    Row("w4a8", "w4a8", target="ascend910b1", refused=("smollm2 5 dequantize",)),
    Row(
        "mixed",
        _searched({"*": "W8A8_DYNAMIC", "*mlp*": "W4A16-g32"}),
        refused=("5 dequantize", "4 default"),
    ),
)


def openpangu_shaped(seed: int = 0) -> Any:
    """A random model of openPangu's form: biases on q, k, v, o and its rotary base."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=512,
        attention_bias=True, mlp_bias=False, rope_theta=16e6, rms_norm_eps=1e-5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh norms are 1 and biases 0
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_tokens(sequences: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids `[sequences, tokens]` for the random model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, tokens), generator=generator)


def compile_row(row: Row, model: Any, calibration: Tensor) -> Any:
    """The row's compiled model: in float32, for an Ascend target in bfloat16."""
    return panguq.compile(model, row.recipe, calibration=calibration, target=row.target)


def smollm2() -> tuple[Any, Tensor, Tensor]:
    """SmolLM2-135M, calibration windows and held-out windows of 256 tokens."""
    from demo.fetch import default_cache, fetch_calibration_text, fetch_model
    from panguq.data.calibration import token_windows

    folder = fetch_model(default_cache())
    text = fetch_calibration_text(default_cache()).read_text(encoding="utf-8")
    tokenizer = panguq.load_tokenizer(folder)
    calibration = token_windows(text[:100_000], tokenizer, 256, 4)
    held_out = token_windows(text[300_000:], tokenizer, 256, 2)
    return panguq.load_pretrained(folder), calibration, held_out


def rows(names: list[str]) -> Iterator[Row]:
    """The rows with these names, all without names."""
    return (row for row in ROWS if not names or row.name in names)


def folder_of(row: Row, root: Path) -> Path:
    """Where the row's checkpoint goes."""
    return root / row.name
