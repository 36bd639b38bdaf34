"""Run by msModelSlim's Python: quantize a small random model of openPangu's form on the CPU.

    python quantize.py OUT KIND DTYPE

KIND: w8a8, w8a8_dynamic, w8a16, w4a8, or w8a8_norm_bias (with its anti-outlier method m4).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    tie_word_embeddings=False, mlp_bias=False,
)  # fmt: skip
SHARED: dict[str, Any] = dict(dev_type="cpu", disable_names=["lm_head"], mm_tensor=False)
CONFIGS: dict[str, dict[str, Any]] = {
    "w8a8": dict(w_bit=8, a_bit=8, act_method=1),
    "w8a8_norm_bias": dict(w_bit=8, a_bit=8, act_method=1),
    "w8a8_dynamic": dict(w_bit=8, a_bit=8, act_method=1, is_dynamic=True),
    "w8a16": dict(w_bit=8, a_bit=16),
    "w4a8": dict(
        w_bit=4, a_bit=8, act_method=1, is_dynamic=True, group_size=256, is_lowbit=True,
        open_outlier=False,
    ),
}  # fmt: skip


def main() -> None:
    """Write the float model, quantize it, and write what msModelSlim makes of it."""
    out, kind, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    shutil.rmtree(out, ignore_errors=True)
    source = out / "float"
    torch.manual_seed(0)
    # The int8 x int4 kernel takes no bias, so that model has none.
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=kind != "w4a8"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(source)
    # Its CPU kernels compute in float32; the config says which dtype the checkpoint is for.
    model = LlamaForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    model.config.torch_dtype = dtype
    needs_data = CONFIGS[kind]["a_bit"] == 8
    ids = [torch.randint(0, 512, (1, 32)) for _ in range(4)]
    data = [[row, torch.ones_like(row)] for row in ids] if needs_data else []
    if kind == "w8a8_norm_bias":
        config = AntiOutlierConfig(anti_method="m4", dev_type="cpu")
        AntiOutlier(model, calib_data=data, cfg=config, norm_class_name="LlamaRMSNorm").process()
    calibrator = Calibrator(
        model, QuantConfig(**SHARED, **CONFIGS[kind]), calib_data=data, disable_level="L0"
    )
    calibrator.run()
    calibrator.save(str(out), save_type=["ascendV1"])
    shutil.copy(source / "config.json", out / "config.json")  # as its users do
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
