"""Where the recipe's smoothquant can move scales, and that it is said where it cannot anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from panguq.ir.analysis.channels import find_scale_sites
from panguq.ir.edit import label
from panguq.ir.interface import Interface
from panguq.passes.pipeline.base import Pass
from panguq.passes.smoothquant import SmoothQuant


def smoothing_sites(
    gm: fx.GraphModule, interface: Interface, passes: Sequence[Pass]
) -> tuple[dict[str, int], dict[str, str]]:
    """How many sites of each kind the recipe's smoothquant finds; what cannot move, and why."""
    smoothing = [p for p in passes if isinstance(p, SmoothQuant)]
    kinds = {kind for p in smoothing for kind in p.sites}
    if not kinds:
        return {}, {}
    sites, blocked = find_scale_sites(gm, interface)
    found = [s for s in sites if smoothing[0].refuse(s) is None]
    counts = {kind: sum(site.kind == kind for site in found) for kind in sorted(kinds)}
    return counts, {label(entry.node): entry.reason for entry in blocked}


def nowhere_to_smooth(counts: dict[str, int], interface: Interface) -> list[str]:
    """A sentence if a model of transformers has none of the sites that smoothquant asks for.

    Other modules are often a matmul or two, of which nobody expects it.
    """
    if not counts or any(counts.values()) or interface.kind == "module":
        return []
    return [
        f"smoothquant finds no site of kind {' or '.join(counts)} in this model and moves nothing: "
        "inputs are rounded as they are"
    ]
