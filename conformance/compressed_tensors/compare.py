"""Load a checkpoint with transformers and compare it with panguq's reference, without panguq.

    python compare.py CHECKPOINT REFERENCE

prints the figures of each way of loading: `default`, and what the release calls decompressing
while loading, `dequantize` (transformers 5) or `run_compressed=False` (transformers 4).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

LEAST_DB = 60.0
LARGEST_PERPLEXITY_CHANGE = 0.01


def modes() -> tuple[str, str]:
    """The ways in which the installed transformers loads such a checkpoint."""
    is_five = int(transformers.__version__.partition(".")[0]) >= 5
    return ("default", "dequantize" if is_five else "run_compressed=False")


def load(checkpoint: Path, mode: str) -> nn.Module:
    """The model in float32, every weight of it out of the checkpoint."""
    options: dict[str, Any] = {}
    if mode != "default":
        name = mode.partition("=")[0]
        settings = {name: mode == "dequantize"}
        options["quantization_config"] = transformers.CompressedTensorsConfig(**settings)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=torch.float32, output_loading_info=True, **options
    )
    missing = [*info["missing_keys"], *info["mismatched_keys"], *info.get("error_msgs", [])]
    if missing:
        raise RuntimeError(f"not in the checkpoint: {missing[:3]}")
    return model.eval()


def compare(checkpoint: Path, reference: Path, mode: str) -> dict[str, Any]:
    """The figures: `unequal` weights by name, the worst SQNR in dB of a linear that is fed what
    panguq's was fed, quantized (`quantized_db`) or not (`raw_db`, by the loader's own rule for
    activations), and the perplexity with its change. `raw_panguq_db` is the worst by panguq's rule.
    `rounds` says whether activations are quantized that the checkpoint wants quantized: a model
    that was decompressed while loading leaves them float.
    """
    with safe_open(str(reference), framework="pt") as file:
        notes = json.loads(file.metadata()["reference"])
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = load(checkpoint, mode)
    with torch.no_grad():
        perplexity = _perplexity(model, given["ids"])  # the first call decompresses
        modules = dict(model.named_modules())
        unequal: list[str] = []
        rounds = True
        figures: dict[str, list[float]] = {"quantized": [], "raw": [], "raw_panguq": []}
        for name, digests in notes["digests"].items():
            linear: Any = modules[name]
            same = [kind for kind, digest in digests.items() if digest == _digest(linear.weight)]
            if not same:
                unequal.append(name)
            # One sequence: a token is a row of the second axis for the loaders.
            leaves = ("x", "xq", (same or ["exact"])[0])
            x, xq, y = (given[f"{name}.{leaf}"][None] for leaf in leaves)
            figures["quantized"].append(sqnr_db(y, _without_quantizing(linear, xq)))
            raw, kind = linear(x), notes["kinds"][name]
            if kind != "float" and not _quantizes(linear):
                kind, rounds = "float", False
            own = {"float": x, "static": xq, "dynamic": _per_token(x)}[kind]
            expected = nn.functional.linear(own, linear.weight, linear.bias)
            figures["raw"].append(sqnr_db(expected, raw))
            figures["raw_panguq"].append(sqnr_db(y, raw))
    return {
        "unequal": unequal,
        **{f"{key}_db": min(values) for key, values in figures.items()},
        "perplexity": perplexity,
        "perplexity_change": perplexity / notes["perplexity"] - 1,
        "rounds": rounds,
        "linears": len(notes["digests"]),
    }


def problems(figures: dict[str, Any]) -> list[str]:
    """What is wrong with these figures; empty if the checkpoint is right.

    Where activations stay float the perplexity may be better than panguq's, and not worse.
    """
    found = [f"{len(figures['unequal'])} weights differ"] if figures["unequal"] else []
    for key in ("quantized_db", "raw_db"):
        if not figures[key] >= LEAST_DB:
            found.append(f"{key} is {figures[key]:.1f}")
    change = figures["perplexity_change"]
    if not (abs(change) if figures["rounds"] else change) <= LARGEST_PERPLEXITY_CHANGE:
        found.append(f"perplexity changes by {change:.2%}")
    return found


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to noise of `value` in dB, at most 200."""
    noise = float((value.double() - reference.double()).square().sum())
    signal = float(reference.double().square().sum())
    return min(200.0, 10 * math.log10(signal / noise)) if noise else 200.0


def _quantizes(linear: Any) -> bool:
    """Whether calling this module rounds its input; without a scheme it is a plain linear."""
    scheme = getattr(linear, "quantization_scheme", None)
    return scheme is not None and scheme.input_activations is not None


def _without_quantizing(linear: Any, x: Tensor) -> Tensor:
    linear.quantization_enabled = False
    result: Tensor = linear(x)
    linear.quantization_enabled = True
    return result


def _per_token(x: Tensor) -> Tensor:
    """compressed-tensors' own dynamic int8 rule: scale `amax / 127.5`, codes from -128 to 127.

    Integer kernels, vLLM's among them, divide by 127 as panguq does.
    """
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().float().contiguous().numpy().tobytes()).hexdigest()


def _perplexity(model: Any, ids: Tensor) -> float:
    """Of windows `[windows, tokens]`; the first token of a window is not scored."""
    total, count = 0.0, 0
    for window in ids:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        wanted = window[1:, None]
        total -= float(logits.log_softmax(-1).gather(1, wanted).double().sum())
        count += len(wanted)
    return math.exp(total / count)


def main(checkpoint: str, reference: str) -> None:
    """Print the figures of every mode as one line of JSON."""
    torch.set_num_threads(1)
    result: dict[str, dict[str, Any]] = {}
    for mode in modes():
        try:
            result[mode] = compare(Path(checkpoint), Path(reference), mode)
        except Exception as error:  # whatever a loader raises is the answer
            lines = str(error).strip().splitlines()
            result[mode] = {"error": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
