"""Which passes bring a graph to a target, before and after quantization."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from panguq.errors import LoweringError
from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Precision
from panguq.lowering.targets import find_target
from panguq.passes.pipeline.base import Pass


def default_dtype(target: str) -> torch.dtype | None:
    """What a model is cast to for the target unless the user says; None: it keeps its own."""
    return find_target(target).float_dtype


def check_formats(passes: Sequence[Pass], target: str) -> None:
    """Raises LoweringError for a scheme of these passes whose codes no kernel of the target reads,
    and for a pass that gives a layer's experts several where no kernel takes that.

    Nothing takes its place: whoever asked for FP8 wants neither integers nor floats instead.
    """
    found = find_target(target)
    for scheme in (scheme for step in passes for scheme in step.given_schemes):
        unread = [known for known in scheme.formats if not found.reads(known)]
        if unread:
            raise LoweringError(
                f"target {found.name} has no kernel for {unread[0]}, the number format of "
                f"{scheme.name}",
                "compile for the target reference, which runs the fake-quantized model without "
                "kernels, or choose a scheme of integers, such as W8A8_DYNAMIC",
            )
    dividing = [step.name for step in passes if step.divides_experts]
    if dividing and not found.takes_mixed_experts:
        raise LoweringError(
            f"target {found.name} has no kernel for a matmul whose experts have several schemes, "
            f"which {dividing[0]} may give them",
            "leave by_expert out",
        )


def fitting(target: str, options: AscendOptions) -> list[Pass]:
    """After assign-schemes: what the target needs decided before calibration."""
    return [FitSchemes(target, options)] if find_target(target).fits_schemes else []


def lowering_passes(target: str, precision: Precision, options: AscendOptions) -> list[Pass]:
    """From the fake-quant graph to the graph that runs on the target."""
    found, lower = find_target(target), LowerMatmuls(target, precision, options)
    if not found.lowers:
        return []
    return [*found.passes_before(options), lower, *found.passes_after(options)]
