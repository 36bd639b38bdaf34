"""An instrument that measures, after every lossy pass, how well each matmul does on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import fx

from panguq.ir import interpret
from panguq.ir.edit import ancestors, get_tensor, label
from panguq.ir.node_meta import meta_of, scheme_of
from panguq.ir.views import Linear, operands_at
from panguq.passes.assign_schemes import gives_logits
from panguq.passes.base import Pass, PassContext
from panguq.passes.pipeline import PassRecord
from panguq.report.compile_report import (
    CalibrationSummary,
    CompileReport,
    MatmulSummary,
    PassSummary,
)
from panguq.report.local_sqnr import (
    MatmulReference,
    local_sqnr,
    matmul_references,
    sqnr_db,
)

aten = torch.ops.aten
POOR_DB = 5.0


class Quality:
    """Keeps the float graph's matmul inputs and compares every later graph with them."""

    def __init__(self, ctx: PassContext) -> None:
        self.ctx = ctx
        self.references: Mapping[str, MatmulReference] = {}
        self.logits: torch.Tensor | None = None
        self.latest: dict[str, float] = {}
        self.summaries: list[PassSummary] = []
        self.known: tuple[str, ...] = ()  # warnings that the compile has given already

    def before_pass(self, index: int, step: Pass, gm: fx.GraphModule) -> None:
        """In front of the first lossy pass, note what the float graph computes."""
        if not step.exact and not self.references and self.ctx.probe is not None:
            self.references, self.logits = matmul_references(gm, self.ctx.probe)

    def after_pass(self, record: PassRecord, gm: fx.GraphModule) -> None:
        """Measure the pass and add its line to the summary."""
        worst: tuple[float, str] | None = None
        if not record.step.exact and self.references:
            measured = local_sqnr(gm, self.references)
            self.latest |= measured  # what was merged into another matmul keeps its last figure
            worst = min(((db, name) for name, db in measured.items()), default=None)
        self.summaries.append(
            PassSummary(
                name=record.folder,
                changed=record.result.changed,
                skipped=len(record.result.skipped),
                seconds=round(record.seconds, 3),
                proved_difference=record.proved_difference,
                worst_local_sqnr_db=finite(worst[0]) if worst else None,
                worst_matmul=worst[1] if worst else None,
            )
        )

    def failed_pass(self, index: int, step: Pass, error: BaseException) -> None:
        """A failure says nothing about quality."""

    def report(
        self,
        target: str,
        gm: fx.GraphModule,
        fake_quant: fx.GraphModule,
        calibration: CalibrationSummary,
    ) -> CompileReport:
        """The whole compile's report; matmuls below 5 dB become warnings."""
        logits_db = None
        if self.logits is not None and self.ctx.probe is not None:
            logits_db = sqnr_db(self.logits, interpret.run(gm, self.ctx.probe)[0])
        poor = {name: db for name, db in self.latest.items() if db < POOR_DB}
        warnings = [
            f"{name} keeps only {db:.1f} dB of its float result; give it more bits in the recipe"
            for name, db in sorted(poor.items(), key=lambda entry: entry[1])
        ]
        return CompileReport(
            target=target,
            passes=tuple(self.summaries),
            matmuls=tuple(summarize_matmuls(gm, fake_quant, self.latest)),
            warnings=(*self.known, *warnings),
            calibration=calibration,
            logits_sqnr_db=finite(logits_db),
        )


def finite(value: float | None) -> float | None:
    """JSON knows no infinity: an exact result (inf) and a broken one (-inf) become +-999 dB."""
    if value is None:
        return None
    return round(max(min(value, 999.0), -999.0), 2) if not math.isnan(value) else -999.0


def summarize_matmuls(
    gm: fx.GraphModule, fake_quant: fx.GraphModule, quality: Mapping[str, float]
) -> list[MatmulSummary]:
    """Every matmul with a scheme: kernel from the lowered graph, bytes from what it stores."""
    kernels = {name: n for n in gm.graph.nodes for name in (label(n), *meta_of(n).merged)}
    rows = []
    for node in fake_quant.graph.nodes:
        linear = Linear.match(node)
        if linear is None or meta_of(node).scheme is None:
            continue
        scheme, name = scheme_of(node), label(node)
        n, k = linear.shape
        stored = ancestors([linear.weight])
        tensors = [get_tensor(fake_quant, str(s.target)) for s in stored if s.op == "get_attr"]
        rows.append(
            MatmulSummary(
                name=name,
                n=n,
                k=k,
                scheme=scheme.name,
                group_size=scheme.weight.group_size_for(k) if scheme.weight else None,
                kernel=str(_kernel_behind(kernels[name]).target).removesuffix(".default"),
                gives_logits=gives_logits(node),
                is_side=meta_of(node).split_from is not None,
                stored_bytes=sum(t.numel() * t.element_size() for t in tensors),
                local_sqnr_db=finite(quality.get(name)),
            )
        )
    return rows


def _kernel_behind(node: fx.Node) -> fx.Node:
    """The op that computes this value, behind those that only give it its place and shape."""
    while node.target in _SHAPING:
        node = operands_at(node, 0)[0]
    return node


_SHAPING = (aten.view.default, aten.slice.Tensor, aten.cat.default, aten.add.Tensor)
