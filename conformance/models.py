"""Models whose lowered graphs are checked: real widths, few layers, random weights."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import transformers
from torch import Tensor, fx, nn

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.ir.text.size_expression import evaluate_size

TARGET = "ascend910b1"
VOCABULARY = 512
# hidden, ffn, heads, key and value heads. openPangu is a llama with biases in its attention; the
# 1B ties its embeddings, as SmolLM2 does.
WIDTHS = {
    "smollm2-135m": (576, 1536, 9, 3),
    "openpangu-1b": (1536, 6144, 12, 6),
    "openpangu-7b": (4096, 12800, 32, 8),
}
LAYERS = {"smollm2-135m": 2, "openpangu-1b": 1, "openpangu-7b": 1}
SCHEMES = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16", "W4A16_ASYM", "W4A8", "W4A4", "FLOAT")
# Nothing that looks at numbers and may therefore choose otherwise for other random weights.
PASSES = ["calibrate", "insert-fake-quant", {"quantize-weights": {"clip_search": False}}]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"batch": 2, "seq": 17, "past": 5, "kept": 1}

_MIXTURE = dict(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128, moe_intermediate_size=256, num_experts_per_tok=4,
    vocab_size=VOCABULARY, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1,
    eos_token_id=None, dtype=torch.bfloat16,
)  # fmt: skip
# The routers: a softmax; and sigmoid scores with a bias, within groups, beside a shared expert.
MIXTURES: dict[str, transformers.PretrainedConfig] = {
    "qwen3-moe": transformers.Qwen3MoeConfig(**_MIXTURE, num_experts=16),
    "glm4-moe": transformers.Glm4MoeConfig(
        **_MIXTURE, n_routed_experts=16, n_group=4, topk_group=2, n_shared_experts=1,
        first_k_dense_replace=0,
    ),
}  # fmt: skip


def make_model(name: str) -> nn.Module:
    """A model of these widths with random weights."""
    if name in MIXTURES:
        return random_model(MIXTURES[name])
    hidden, ffn, heads, key_heads = WIDTHS[name]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=LAYERS[name],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        attention_bias=name.startswith("openpangu"),
        tie_word_embeddings=name != "openpangu-7b",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    return random_model(config)


def random_model(config: transformers.PretrainedConfig) -> nn.Module:
    """A model of this configuration with the same random weights each time."""
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


@functools.lru_cache(maxsize=1)
def compiled(name: str, scheme: str, dtype: str) -> CompiledCausalLM:
    """The model compiled for Ascend; calibrated on a few random tokens, which the graph's types
    do not depend on."""
    tokens = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    result = panguq.compile(
        make_model(name),
        {"name": scheme.lower(), "schemes": {"*": scheme}, "passes": PASSES},
        target=TARGET,
        dtype=DTYPES[dtype],
        calibration=[tokens[:1], tokens[1:]],
    )
    assert isinstance(result, CompiledCausalLM)
    return result


def with_graph(model: CompiledCausalLM, graph: fx.GraphModule) -> CompiledCausalLM:
    """The compiled model with another lowered graph."""
    return CompiledCausalLM(replace(model.artifact, stages={"lowered": graph}))


def inputs_of(
    model: CompiledCausalLM, graph: fx.GraphModule, sizes: dict[str, int]
) -> list[Tensor]:
    """Zeros of the graph's input types."""
    shapes = model.interface.input_shapes
    return [
        torch.zeros(
            [int(evaluate_size(str(size), sizes)) for size in shapes[str(node.target)]],
            dtype=node.meta["val"].dtype,
        )
        for node in graph.graph.nodes
        if node.op == "placeholder"
    ]
