"""Load one folder with GPTQModel or transformers and compare it: compare.py FOLDER REFERENCE HOW.

Run in GPTQModel's environment, which has no panguq. REFERENCE holds every quantized weight as
panguq multiplies by it, `[n, k]` in float32 under its path, and the logits of `input_ids`. Prints
one JSON object: how many weights are compared, the largest difference after rounding to float16,
and the decibels of the logits.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read(folder: str, how: str) -> Any:
    """The model in float16: by GPTQModel's plain kernels, whose weights can be asked for, or by
    transformers, which chooses the kernels."""
    if how == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    from gptqmodel import GPTQModel

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        method = json.load(file)["quantization_config"]["quant_method"]
    backend = "torch_awq" if method == "awq" else "torch"
    return GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=backend).model


def multiplied_out(module: Any) -> Tensor:
    """The values `[n, k]` that a quantized linear multiplies by."""
    if type(module).__name__ == "AwqTorchLinear":
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        codes = (module.qweight, module.qzeros, module.scales)
        return dequantize_gemm(*codes, bits=module.bits, group_size=module.group_size).T
    return module.dequantize_weight().T


def main() -> None:
    """Compare and print."""
    folder, reference, how = sys.argv[1:]
    wanted = load_file(reference)
    ids, logits = wanted.pop("input_ids"), wanted.pop("logits")
    model = read(folder, how).eval()
    linears = {name: m for name, m in model.named_modules() if hasattr(m, "qweight")}
    found: dict[str, Any] = {"linears": len(linears), "wanted": len(wanted)}
    if how != "transformers":
        found["largest"] = max(
            (multiplied_out(linears[name]).half() - weight.half()).abs().max().item()
            for name, weight in wanted.items()
        )
    with torch.no_grad():
        error = model(ids).logits.float() - logits
    found["db"] = float(20 * torch.log10(logits.norm() / error.norm()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
