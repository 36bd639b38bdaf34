"""GPTQModel in its own environment: python -m bench.peers.quantize_gptqmodel JOB.json

The model is float16: its kernels, and so its packing, refuse float32.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from torch import Tensor, nn

from bench.peers.job import Job, Measurement


def config_of(job: Job) -> tuple[Any, dict[str, Any]]:
    """Its configuration, all else at its defaults, and the options that were set."""
    options: dict[str, Any] = {"bits": 4, "group_size": job.group_size}
    if job.method == "gptq":
        return GPTQConfig(**options, sym=True), {**options, "sym": True}
    symmetric = job.method == "awq"
    return AWQConfig(**options, sym=symmetric), {**options, "sym": symmetric}


def multiplied_out(module: Any) -> Tensor:
    """The values `[n, k]` that a quantized linear multiplies by, in float16 as it computes them."""
    if isinstance(module, AwqTorchLinear):
        codes = (module.qweight, module.qzeros, module.scales)
        return dequantize_gemm(*codes, bits=module.bits, group_size=module.group_size).T
    return module.dequantize_weight().T


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model under transformers' names, quantized linears multiplied out."""
    found: dict[str, Tensor] = {}
    for name, module in model.eval().named_modules():
        for kind, tensor in module.named_parameters(recurse=False):
            found[f"{name}.{kind}"] = tensor
        if hasattr(module, "qweight"):
            found[f"{name}.weight"] = multiplied_out(module)
    return found


def main() -> None:
    """Quantize, save, load what was saved, write weights and figures."""
    job = Job.from_command_line()
    measurement = Measurement(job, ("gptqmodel",))
    rows = [
        {"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in job.windows()
    ]
    config, options = config_of(job)
    model = measurement.load(
        lambda: GPTQModel.load(job.model, config, device="cpu", dtype=torch.float16)
    )
    workers = os.environ.get("GPTQMODEL_CPU_WORKERS")
    options |= {"GPTQMODEL_CPU_WORKERS": workers, "dtype": str(model.model.dtype)}
    options["everything"] = repr(config)
    measurement.quantize(lambda: model.quantize(rows, batch_size=1), options)
    saved = f"{job.out}/gptqmodel"
    model.save(saved)
    reloaded = GPTQModel.load(saved, device="cpu", dtype=torch.float16, backend="torch")
    measurement.write(dequantized(reloaded.model))


if __name__ == "__main__":
    main()
