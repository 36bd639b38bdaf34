"""Which passes bring a graph to a target, before and after quantization."""

from __future__ import annotations

import torch

from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Precision
from panguq.lowering.targets import find_target
from panguq.passes.pipeline.base import Pass


def default_dtype(target: str) -> torch.dtype | None:
    """What a model is cast to for the target unless the user says; None: it keeps its own."""
    return find_target(target).float_dtype


def fitting(target: str, options: AscendOptions) -> list[Pass]:
    """After assign-schemes: what the target needs decided before calibration."""
    return [FitSchemes(target, options)] if find_target(target).fits_schemes else []


def lowering_passes(target: str, precision: Precision, options: AscendOptions) -> list[Pass]:
    """From the fake-quant graph to the graph that runs on the target."""
    found, lower = find_target(target), LowerMatmuls(target, precision, options)
    return [*found.passes_before(options), lower, *found.passes_after(options)]
