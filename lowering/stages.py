"""Which passes bring a graph to a target, before and after quantization."""

from __future__ import annotations

import torch

from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.ascend.merge_gate_up import MergeGateUp
from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Precision
from panguq.lowering.targets import find_target
from panguq.passes.pipeline.base import Pass


def default_dtype(target: str) -> torch.dtype | None:
    """What a model is cast to for the target unless the user says; None: it keeps its own."""
    return torch.bfloat16 if find_target(target).kind == "ascend" else None


def fitting(target: str, options: AscendOptions) -> list[Pass]:
    """After assign-schemes: what the target needs decided before calibration."""
    if find_target(target).kind != "ascend":
        return []
    return [FitSchemes(target, options)]


def lowering_passes(target: str, precision: Precision, options: AscendOptions) -> list[Pass]:
    """From the fake-quant graph to the graph that runs on the target."""
    lower = LowerMatmuls(target, precision, options)
    if find_target(target).kind != "ascend":
        return [lower]
    return [MergeGateUp(), lower, FuseAscend(options.allow_inexact)]
