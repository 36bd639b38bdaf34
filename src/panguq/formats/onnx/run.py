"""Run an exported causal language model in onnxruntime, the way panguq runs it in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panguq.data.inputs import prepare
from panguq.extras import require
from panguq.ir.interface import Interface

ACTIVATIONS_STAY_FLOAT = "session.qdq_matmulnbits_accuracy_level"
"""The accuracy of MatMulNBits that onnxruntime makes of DequantizeLinear and MatMul: 1 is float32;
by default it is 4, int8 activations."""


class OnnxModel:
    """An exported file in an onnxruntime session on the CPU.

    onnxruntime's optimizations are on unless `optimized` is False, but for one: by default it
    replaces matmuls of dequantized weights by kernels that quantize the activations too.
    """

    def __init__(self, path: str | Path, interface: Interface, optimized: bool = True) -> None:
        require("onnxruntime", "running ONNX files")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry(ACTIVATIONS_STAY_FLOAT, "1")
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.interface = interface
        self.session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name for inputs by name; 16-bit floats are widened."""
        given = {
            name: (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()
            for name, x in inputs.items()
            if name in {entry.name for entry in self.session.get_inputs()}
        }
        results = self.session.run(None, given)
        names = [entry.name for entry in self.session.get_outputs()]
        return {name: torch.from_numpy(x) for name, x in zip(names, results, strict=True)}

    def logits(self, input_ids: Tensor, past: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits `[batch, seq, vocab]` of the tokens `[batch, seq]`, and the grown cache."""
        found = self.run(prepare(self.interface, input_ids, past=list(past)))
        return found.pop("logits"), list(found.values())

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation `[batch, seq + max_new_tokens]`, token by token through the cache."""
        past: list[Tensor] = []
        ids = new = input_ids
        for _ in range(max_new_tokens):
            logits, past = self.logits(new, past)
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), dim=1)
        return ids
