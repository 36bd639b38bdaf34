"""An instrument that measures, after every lossy pass, how well each matmul does on its own."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import fx

from panguq.compile_report import (
    CalibrationSummary,
    CompileReport,
    MatmulSummary,
    PassSummary,
)
from panguq.decibels import finite_db
from panguq.errors import PanguqError
from panguq.evaluation import POOR_DB
from panguq.ir.call_arguments import operands_at
from panguq.ir.edit import ancestors, get_tensor, label
from panguq.ir.expert_groups import expert_path, whole_label
from panguq.ir.node_meta import meta_of, scheme_of
from panguq.ir.views import ExpertLinear, Linear
from panguq.passes.assign_schemes import gives_logits
from panguq.passes.pipeline.base import ExpertTokens, Pass, PassContext
from panguq.passes.pipeline.runner import PassRecord
from panguq.report.end_to_end import Graphs, Outcome, check_end_to_end, other_kernel
from panguq.report.local_sqnr import MatmulReference, local_sqnr, matmul_references

aten = torch.ops.aten
logger = logging.getLogger("panguq")


class DataUsed(Protocol):
    """What the report says of a compile's data."""

    @property
    def summary(self) -> CalibrationSummary:
        """Where it came from."""

    @property
    def held_out(self) -> Sequence[torch.Tensor]:
        """Rows of token ids `[seq]` that no pass has observed."""

    @property
    def calibrated(self) -> bool:
        """Whether passes observed the batches."""

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Weights of the source checkpoint that the model does not use."""


class Quality:
    """Keeps the float graph's matmul inputs and compares every later graph with them."""

    def __init__(self, ctx: PassContext) -> None:
        self.ctx = ctx
        self.float_interface = ctx.interface
        self.references: Mapping[str, MatmulReference] = {}
        self.latest: dict[str, float] = {}
        self.quantized: dict[str, float] = {}
        self.fault: PanguqError | None = None  # what is wrong with the compile as a whole
        self.summaries: list[PassSummary] = []
        self.known: tuple[str, ...] = ()  # warnings that the compile has given already

    def before_pass(self, index: int, step: Pass, gm: fx.GraphModule) -> None:
        """In front of the first lossy pass, note what the float graph computes."""
        if not step.exact and not self.references and self.ctx.probe is not None:
            self.references = matmul_references(gm, self.ctx.probe)

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
                worst_local_sqnr_db=finite_db(worst[0]) if worst else None,
                worst_matmul=worst[1] if worst else None,
            )
        )

    def failed_pass(self, index: int, step: Pass, error: BaseException) -> None:
        """A failure says nothing about quality."""

    def warn(self, warnings: Iterable[str]) -> None:
        """Give warnings now, and with the report."""
        for warning in warnings:
            logger.warning(warning)
            self.known = (*self.known, warning)

    def conclude(self, report: CompileReport) -> None:
        """Give the report's other warnings. Raises what makes the compiled model useless."""
        if self.fault is not None:
            raise self.fault
        for warning in report.warnings:
            if warning not in self.known:
                logger.warning(warning)

    def before_lowering(self) -> None:
        """Note what quantization alone costs; what comes next is to cost next to nothing."""
        self.quantized = dict(self.latest)

    def report(
        self,
        target: str,
        gm: fx.GraphModule,
        fake_quant: fx.GraphModule,
        data: DataUsed,
    ) -> CompileReport:
        """The whole compile's report; matmuls below 5 dB, and a whole below it, become warnings.

        An error that makes the compiled model useless is left in `fault`, to be raised.
        """
        outcome = Outcome()
        if self.ctx.reference is not None and self.ctx.batches:
            graphs = Graphs(
                self.ctx.reference, fake_quant, gm, self.float_interface, self.ctx.interface
            )
            outcome = check_end_to_end(
                graphs, self.ctx.batches, data.held_out, data.calibrated, self.latest
            )
        self.fault = other_kernel(self.quantized, self.latest) or outcome.fault
        poor = {name: db for name, db in self.latest.items() if db < POOR_DB}
        warnings = [
            f"{name} keeps only {db:.1f} dB of its float result; give it more bits in the recipe"
            for name, db in sorted(poor.items(), key=lambda entry: entry[1])
        ]
        return CompileReport(
            target=target,
            passes=tuple(self.summaries),
            matmuls=tuple(summarize_matmuls(gm, fake_quant, self.latest, self.ctx.expert_tokens)),
            warnings=(
                *self.known,
                *self.ctx.warnings,
                *outcome.warnings,
                *warnings,
                *_few_tokens(self.ctx),
            ),
            calibration=data.summary,
            unused_weights=data.unused_weights,
            end_to_end=outcome.figures,
        )


def summarize_matmuls(
    gm: fx.GraphModule,
    fake_quant: fx.GraphModule,
    quality: Mapping[str, float],
    expert_tokens: Mapping[str, ExpertTokens],
) -> list[MatmulSummary]:
    """Every matmul with a scheme: kernel from the lowered graph, bytes from what it stores.

    Experts' matmuls one by one, each with its share of the bytes, and the SQNR of all together.
    """
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
        experts = ExpertLinear.match(node)
        count = 1 if experts is None else experts.experts
        whole = whole_label(node)
        seen = expert_tokens.get(whole)
        rows += [
            MatmulSummary(
                name=name if experts is None else _of_expert(whole, expert),
                n=n,
                k=k,
                scheme=scheme.name,
                group_size=scheme.weight.group_size_for(k) if scheme.weight else None,
                kernel=str(_kernel_behind(kernels[name]).target).removesuffix(".default"),
                gives_logits=gives_logits(node),
                is_side=meta_of(node).split_from is not None,
                stored_bytes=sum(t.numel() * t.element_size() for t in tensors) // count,
                local_sqnr_db=finite_db(quality[whole]) if whole in quality else None,
                tokens=None if seen is None else int(seen.routed[expert]),
                on_all_tokens=seen is not None and expert in seen.underfed,
            )
            for expert in ((0,) if experts is None else experts.each)
        ]
    return rows


def _few_tokens(ctx: PassContext) -> list[str]:
    """That experts were calibrated on all tokens, in a sentence, if some were."""
    experts = sum(len(seen.routed) for seen in ctx.expert_tokens.values())
    few = sum(len(seen.underfed) for seen in ctx.expert_tokens.values())
    if not few:
        return []
    none = sum(int((seen.routed == 0).sum()) for seen in ctx.expert_tokens.values())
    least = max(seen.least for seen in ctx.expert_tokens.values())
    return [
        f"{few} of {experts} matmuls of experts get fewer than {least} calibration tokens, "
        f"{none} of them none, and were calibrated on all tokens instead; report.matmuls has each "
        "one's number, more calibration data makes them fewer, and least_tokens: 0 follows the "
        "router alone"
    ]


def _of_expert(name: str, expert: int) -> str:
    """`mlp.experts.down_proj:expert_linear` as expert 3's `mlp.experts.3.down_proj:linear`."""
    path, _, op = name.partition(":")
    return f"{expert_path(path, expert)}:{op.removeprefix('expert_')}"


def _kernel_behind(node: fx.Node) -> fx.Node:
    """The op that computes this value, behind those that only give it its place and shape."""
    while node.target in _SHAPING:
        node = operands_at(node, 0)[0]
    return node


_SHAPING = (
    aten.view.default, aten.slice.Tensor, aten.cat.default, aten.add.Tensor, operator.getitem,
)  # fmt: skip
