"""A small reader of AscendV1 folders that owes panguq nothing, to compare with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    assert actual.shape == expected.shape
    expected = expected.detach()
    noise = (expected.double() - actual.double()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(expected.double().square().sum() / noise)


class Reference(nn.Module):
    """A linear computed from a checkpoint's tensors by the format's own formulas, in float32.

    Inputs are multiplied by the reciprocal of their scale, as NPU kernels do: in other arithmetic
    single codes would differ, and logits show nothing but that.
    """

    def __init__(self, kind: str, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.kind, self.parts = kind, parts
        codes = parts["weight"]
        if kind == "W4A8_DYNAMIC":
            nibbles = torch.stack([codes & 15, (codes >> 4) & 15], dim=1)
            codes = nibbles.reshape(-1, codes.shape[1])
            codes = torch.where(codes > 7, codes - 16, codes)
        scale = parts["weight_scale"].float() if "weight_scale" in parts else _divided(parts)
        if "weight_scale_second" in parts:
            scale = scale * parts["weight_scale_second"].float()
        self.weight = codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "W8A8":
            step, zero = self.parts["input_scale"].float(), self.parts["input_offset"].float()
            x = ((x * (1 / step) + zero).round().clamp(-128, 127) - zero) * step
        elif self.kind != "W8A16":
            step = x.abs().amax(-1, keepdim=True) / 127
            x = (x * (1 / step)).round() * step
        bias = self.parts["bias"].float() if "bias" in self.parts else None
        return nn.functional.linear(x, self.weight, bias)


def _divided(parts: dict[str, Tensor]) -> Tensor:
    """weight_scale `[n, 1]` where the file leaves it out; an int64 holds a float32's bits."""
    deq = parts["deq_scale"]
    deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
    return (deq.double() / parts["input_scale"].double()).float().reshape(-1, 1)


def reference(folder: Path) -> Any:
    """A float32 Llama with these linears, loaded by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    description = json.loads((folder / "quant_model_description.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state = model.state_dict()
    floats = {n: t.float() for n, t in tensors.items() if description[n] == "FLOAT" and n in state}
    model.load_state_dict({**state, **floats})
    for name in description:
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and path.endswith("norm"):  # an anti-outlier method left it
            _add_after(model.get_submodule(path), tensors[name].float())
    for name, kind in description.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and kind != "FLOAT":
            owner, _, last = path.rpartition(".")
            parts = {
                n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{path}.")
            }
            setattr(model.get_submodule(owner), last, Reference(kind, parts))
    return model


def _add_after(module: nn.Module, bias: Tensor) -> None:
    module.register_forward_hook(lambda module, given, result: result + bias)
