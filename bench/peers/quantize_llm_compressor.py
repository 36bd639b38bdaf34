"""llm-compressor in its own environment: python -m bench.peers.quantize_llm_compressor JOB.json"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader

from bench.peers.job import Job, Measurement


def recipe_of(job: Job) -> tuple[list[Any], str]:
    """Its modifiers, all else at its defaults, and what was set, in words."""
    if job.method == "w8a8-dynamic":
        shared = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
        smooth = SmoothQuantModifier(smoothing_strength=0.8)
        return [smooth, GPTQModifier(**shared)], "SmoothQuant 0.8, then GPTQ, scheme W8A8"
    weights = QuantizationArgs(
        num_bits=4, strategy="group", group_size=job.group_size, symmetric=job.method != "awq-asym"
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    grid = f"int4, group {job.group_size}, symmetric {weights.symmetric}"
    if job.method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])], f"GPTQ, {grid}"
    quantize = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return [AWQModifier(), quantize], f"AWQ, then round to nearest, {grid}"


def main() -> None:
    """Quantize in memory; its fake-quantized weights are the dequantized ones."""
    job = Job.from_command_line()
    measurement = Measurement(job, ("llmcompressor", "compressed-tensors"))
    windows = job.windows()
    rows = [{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in windows]
    loader = DataLoader(rows, batch_size=1, shuffle=False)
    if not torch.accelerator.is_available():
        # Its AWQ pins cached tensors for copies to an accelerator, which fails where none is.
        IntermediatesCache.pin_memory = lambda *arguments, **named: None
    model = measurement.load(job.load_model)
    recipe, said = recipe_of(job)
    options = {
        "recipe": said,
        "pipeline": "its default for the recipe",
        "patched": "IntermediatesCache.pin_memory does nothing",
    }

    def quantize() -> None:
        oneshot(
            model=model,
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
        )

    measurement.quantize(quantize, options)
    names = {name for name, _ in job.load_model().named_parameters()}
    measurement.write(dequantized(model, names))


def dequantized(model: Any, names: set[str]) -> dict[str, torch.Tensor]:
    """The float model's tensors with the values that its quantized forward multiplies by."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    found = {n: p for n, p in model.named_parameters() if n in names}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            found[f"{name}.weight"] = fake_quantize(
                module.weight,
                module.weight_scale,
                getattr(module, "weight_zero_point", None),
                scheme.weights,
            )
    return found


if __name__ == "__main__":
    main()
