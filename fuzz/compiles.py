"""Random recipes of every scheme and pass, compiled for a tiny language model.

A compile that succeeds computes what its fake-quant graph says, and where it is far from the float
model, `report.warnings` says so.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor

import panguq
from fuzz.kind import Case, Fault, Kind
from panguq import compiler
from panguq.errors import LoweringError
from panguq.ir.edit import clone
from panguq.ir.quant_spec import SCHEMES
from panguq.recipe import Recipe

FAR_DB, SAME_DB = 3.0, 15.0
_QUICK: dict[str, dict[str, Any]] = {
    "progressive-rounding": {"steps": 6},
    "flatquant": {"epochs": 1},
}
"""Passes that learn for seconds by default."""
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "rotate": {"sites": (["residual"], ["value"], []), "online": ([], ["down"], ["down", "heads"])},
    "smoothquant": {"alpha": (0.0, 0.3, 1.0, "search"), "statistic": ("amax", "rms")},
    "decoupled-smoothquant": {"batches": (1, 50), "rounds": (1, 3)},
    "awq": {"steps": (1, 2, 5)},
    "flatquant": {"learning_rate": (1e-6, 0.1), "blocks_at_once": (1, 100), "alpha": (0.0, 1.0)},
    "mixed-precision": {"bits": (3.0, 4.75, 8.0, 1e9), "keep": ([], ["*.down_proj"]),
                        "choices": (["W4A16", "W8A16"], ["W2A16", "W3A16", "W8A8"], ["W6A6"])},
    "weigh-tokens": {"power": (0.5, 1.0), "groups": (1, 2, 1000)},
    "calibrate": {"observer": ("minmax", "percentile", "mse", "histogram"),
                  "percentile": (50.1, 99.0, 100.0)},
    "outliers": {"treatment": ("split", "per-token", "float", "clip"),
                 "threshold": (0.0, 1.0, 2.0), "floor_db": (0.0, 40.0), "max_share": (0.0, 1.0)},
    "quantize-weights": {"clip_search": (True, False), "importance": ("activations", "none"),
                         "smallest_ratio": (0.01, 0.6, 1.0), "steps": (1, 2, 9)},
    "gptq": {"act_order": (True, False), "static_groups": (True, False),
             "damping": (0.0, 1e-9, 1.0, 1e9), "block_size": (1, 3, 128, 100_000)},
    "gptaq": {"act_order": (True, False), "damping": (0.0, 0.01, 1.0)},
    "slim-llm": {"damping": (0.0, 1.0), "steps": (1, 13), "least_gain_db": (0.0, 100.0)},
    "billm": {"block_size": (1, 7, 128), "most_salient": (1, 50, 1000),
              "residual": ("joint", "greedy")},
    "learned-rounding": {"start": ("gptq", "nearest"), "rounds": (0, 1), "steps": (0.0, 1.0)},
    "progressive-rounding": {"steps": (0, 1, 7), "batch_sequences": (1, 100),
                             "code_rate": (0.0, 0.06, 1.0), "pull": (0.1, 1.0)},
    "tune-scales": {"epochs": (1, 2), "learning_rate": (0.002, 1.0), "batch_sequences": (1, 100)},
    "quantize-kv-cache": {"keys": ("per_channel", "per_token", "float"),
                          "values": ("per_channel", "per_token")},
}  # fmt: skip
_SOLVERS = (
    "quantize-weights",
    "gptq",
    "gptaq",
    "slim-llm",
    "billm",
    "learned-rounding",
    "progressive-rounding",
)
_EARLY = (
    "rotate",
    "smoothquant",
    "decoupled-smoothquant",
    "awq",
    "flatquant",
    "mixed-precision",
    "weigh-tokens",
)
_GLOBS = ("*.down_proj", "*.mlp.*", "*.self_attn.*", "model.layers.0.*", "lm_head", "*.o_proj")
_ENDINGS = ("", "", "-g32", "-g64", "-per_channel", "-sym", "-asym", "-g32-sym")


def _entry(rng: random.Random, name: str) -> Any:
    options = {k: rng.choice(v) for k, v in _OPTIONS[name].items() if rng.random() < 0.4}
    options = {**_QUICK.get(name, {}), **options}
    if name == "mixed-precision":
        options.setdefault("bits", 4.75)
    return {name: options} if options else name


def _scheme(rng: random.Random) -> str:
    return rng.choice(tuple(SCHEMES)) + rng.choice(_ENDINGS)


def draw(rng: random.Random) -> dict[str, Any]:
    """A recipe that is likely to make sense, and often does not."""
    schemes = {"*": _scheme(rng)}
    schemes |= {rng.choice(_GLOBS): _scheme(rng) for _ in range(rng.choice((0, 0, 1, 2)))}
    names = rng.sample(_EARLY, rng.choice((0, 0, 1, 2)))
    names += ["calibrate"] * (rng.random() < 0.8) + ["outliers"] * (rng.random() < 0.2)
    names += ["insert-fake-quant", rng.choice(_SOLVERS)]
    names += ["tune-scales"] * (rng.random() < 0.15) + ["quantize-kv-cache"] * (rng.random() < 0.2)
    if rng.random() < 0.2:
        first, second = (rng.randrange(len(names)) for _ in range(2))
        names[first], names[second] = names[second], names[first]
    passes = [n if n == "insert-fake-quant" else _entry(rng, n) for n in names]
    data: dict[str, Any] = {"schemes": schemes, "passes": passes}
    if rng.random() < 0.2:
        data["precision"] = rng.choice(("float32", "bfloat16"))
    return data


def make_model() -> Any:
    """A Llama of one layer, every weight shaken."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """How much of a value is left, in decibels; inf for the value itself."""
    wanted, found = wanted.double(), found.double()
    noise = float((wanted - found).square().sum())
    signal = max(float(wanted.square().sum()), 1e-300)
    return float("inf") if noise == 0 else 10 * float(torch.log10(torch.tensor(signal / noise)))


def _prepare(folder: Path) -> Case:
    model = make_model()
    ids = torch.randint(1, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
    traced: dict[Any, Any] = {}

    def trace(*given: Any, **options: Any) -> Any:
        """The graph of one trace: tracing takes most of the time of a compile as small as these."""
        key = given[2]
        if key not in traced:
            traced[key] = original(*given, **options)
        graph, interface = traced[key]
        return clone(graph), interface

    original = compiler.trace

    def case(rng: random.Random) -> str:
        recipe = Recipe.of(draw(rng), allow_unmatched=True)
        target = rng.choice(("cpu",) * 5 + ("ascend910b1",))
        try:
            with patch.object(compiler, "trace", trace):
                compiled = panguq.compile(model, recipe, calibration=ids, target=target)
        except LoweringError as error:
            if "lowered graph keeps" in error.message:
                raise Fault(f"lowers wrongly: {error.message}") from error
            raise
        logits = compiled(ids).logits
        quantized = compiled.at_stage("fake-quant")(ids).logits
        same = sqnr_db(quantized, logits)
        # Roundings of few-bit activations fall elsewhere, and do as much as a part of their own.
        if not same > min(SAME_DB, sqnr_db(wanted, quantized) + 3):
            raise Fault(f"lowered to {same:.1f} dB of the quantized graph, without an error")
        near = sqnr_db(wanted, logits)
        if not near > FAR_DB and not compiled.report.warnings:
            raise Fault(f"{near:.1f} dB of the float model, without a warning")
        return f"compiled for {target}"

    return case


KIND = Kind("compiles", "recipes of every scheme and pass, compiled", _prepare, seconds=120)
