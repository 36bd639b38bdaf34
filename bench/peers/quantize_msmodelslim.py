"""msModelSlim in its own environment: python -m bench.peers.quantize_msmodelslim JOB.json

It writes a folder in its AscendV1 format, which panguq reads back as the model that it describes,
activations' quantization included.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig

from bench.peers.job import Job, Measurement

ASCEND_V1 = "ascend-v1"


def main() -> None:
    """Smooth, quantize, and save as AscendV1."""
    job = Job.from_command_line()
    measurement = Measurement(job, ("msmodelslim",))
    rows = [[w[None], torch.ones_like(w)[None]] for w in job.windows()]
    model = measurement.load(job.load_model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # it saves no tied tensors
    options: dict[str, Any] = dict(
        w_bit=8, a_bit=8, act_method=1, mm_tensor=False, is_dynamic=job.method == "w8a8-dynamic",
    )  # fmt: skip

    def quantize() -> Calibrator:
        smooth = AntiOutlierConfig(anti_method="m4", dev_type="cpu")
        AntiOutlier(model, calib_data=rows, cfg=smooth, norm_class_name="LlamaRMSNorm").process()
        config = QuantConfig(dev_type="cpu", disable_names=["lm_head"], **options)
        calibrator = Calibrator(model, config, calib_data=rows, disable_level="L0")
        calibrator.run()
        return calibrator

    calibrator = measurement.quantize(quantize, {**options, "anti_method": "m4"})
    folder = Path(job.out) / ASCEND_V1
    calibrator.save(str(folder), save_type=["ascendV1"])
    shutil.copy(Path(job.model) / "config.json", folder / "config.json")  # as its users do
    measurement.write()


if __name__ == "__main__":
    main()
