"""The whole compiled model against the float model, on a few rows of data, when a compile is done.

Local SQNR says what each matmul costs on its own. This says what all of them cost together, and
whether lowering has kept what the fake-quant graph computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.compile_report import EndToEnd
from panguq.data.inputs import prepare, takes_empty_mask
from panguq.decibels import finite_db, ratio_db, sqnr_db
from panguq.errors import LoweringError, NumericsError, PanguqError
from panguq.evaluation import Divergence, TopOne
from panguq.ir.edit import label
from panguq.ir.interface import Interface
from panguq.ir.run import interpret
from panguq.ir.views import results_of

ROWS, TOKENS, FEW = 4, 64, 16
LOGITS = 1 << 22
"""Logits that are compared at most: of each row the last ones, which have seen most."""
COLLAPSED_DB, COLLAPSED_KL = 5.0, 1.0
ALIKE_DB, APART_DB, WORSE_DB = 20.0, 10.0, 6.0
"""Two honest ways to compute a quantized matmul keep 40 dB and more of each other, a whole model of
30 layers 15 dB and more, since roundings flip; another matmul keeps none."""

BEHIND = "held out: text behind what the recipe was calibrated on"
NOT_OBSERVED = "rows of the calibration data; the recipe observes none"
OBSERVED = "rows of the calibration data, which the recipe has observed"

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Graphs:
    """The float graph, what became of it, and the interfaces before and after."""

    reference: fx.GraphModule
    fake_quant: fx.GraphModule
    lowered: fx.GraphModule
    float_interface: Interface
    interface: Interface


@dataclass(frozen=True)
class Outcome:
    """The figures, what to warn of, and what is wrong with the compile itself, if anything is."""

    figures: EndToEnd | None = None
    warnings: tuple[str, ...] = ()
    fault: PanguqError | None = None


def check_end_to_end(
    graphs: Graphs,
    batches: Sequence[Inputs],
    held_out: Sequence[Tensor],
    observed: bool,
    local: Mapping[str, float],
) -> Outcome:
    """Compare on rows of token ids that were `held_out`, or else on the last rows of `batches`.

    `observed` says whether the recipe has seen the batches; `local` is every matmul's own SQNR, in
    graph order.
    """
    runs = _Runs(graphs, batches, held_out)
    source = BEHIND if held_out else OBSERVED if observed else NOT_OBSERVED
    expected = runs.outputs(graphs.reference)
    actual = runs.outputs(graphs.lowered)
    fault: PanguqError | None = _not_finite(runs, expected, actual)
    if fault is not None:
        return Outcome(fault=fault)
    figures = _figures(runs, expected, actual, source)
    db = figures.sqnr_db
    if db < ALIKE_DB:
        fault = _lowered_otherwise(runs, expected, db)
    collapsed = db < COLLAPSED_DB or (figures.kl or 0.0) > COLLAPSED_KL
    if fault is not None or not collapsed:
        return Outcome(figures, fault=fault)
    kl = "" if figures.kl is None else f" and diverges by {figures.kl:.2g} nats a token"
    culprit = next((name for name, kept in local.items() if kept < COLLAPSED_DB), None)
    culprit = culprit or _first_apart(runs, graphs.reference, graphs.lowered, COLLAPSED_DB)
    where = f"; the first broken matmul is {culprit}" if culprit else ""
    warning = (
        f"the compiled model keeps only {db:.1f} dB of the float model's output{kl}{where}; "
        "give it more bits in the recipe"
    )
    return Outcome(figures, (warning,))


class _Runs:
    """Runs of every graph on the same few rows."""

    def __init__(
        self, graphs: Graphs, batches: Sequence[Inputs], held_out: Sequence[Tensor]
    ) -> None:
        self.graphs = graphs
        self.causal = graphs.interface.kind == "causal_lm"
        self.batches = batches[-ROWS:]
        if self.causal:
            given = [row for batch in batches for row in batch["input_ids"]]
            self.rows = _last_rows(held_out or given)
            vocab = graphs.interface.vocab_size or 1
            self.kept = max(1, min(self.rows.shape[1], LOGITS // (vocab * len(self.rows))))

    def inputs(self, gm: fx.GraphModule, few: bool = False) -> list[Inputs]:
        """The rows as this graph takes them; `few`: the start of one, for runs that keep much."""
        if not self.causal:
            return list(self.batches[-1:] if few else self.batches)
        float_graph = gm is self.graphs.reference
        interface = self.graphs.float_interface if float_graph else self.graphs.interface
        empty = takes_empty_mask(gm)
        rows, kept = (self.rows[:1, :FEW], 1) if few else (self.rows, self.kept)
        return [prepare(interface, rows, logits_to_keep=kept, empty_mask=empty)]

    def outputs(self, gm: fx.GraphModule) -> list[Tensor]:
        """Logits `[rows, kept, vocab]`, or all floating results of a plain module."""
        results = results_of(gm)
        wanted = results[:1] if self.causal else results
        found = []
        for inputs in self.inputs(gm):
            values = interpret.values(gm, inputs, wanted)
            found += [values[node] for node in wanted if values[node].is_floating_point()]
        return found


def _last_rows(rows: Sequence[Tensor]) -> Tensor:
    """Token ids `[rows, tokens]` of the last of the longest rows, cut to one length."""
    longest = sorted(reversed(rows), key=len, reverse=True)[:ROWS]
    length = min(TOKENS, *(len(row) for row in longest))
    return torch.stack([row[:length] for row in longest])


def _figures(
    runs: _Runs, expected: Sequence[Tensor], actual: Sequence[Tensor], source: str
) -> EndToEnd:
    signal = noise = 0.0
    divergence, top_one = Divergence(), TopOne()
    for wanted, got in zip(expected, actual, strict=True):
        by_row = zip(wanted, got, strict=True)  # a vocabulary in float64 is large
        for x, y in by_row if runs.causal else [(wanted, got)]:
            signal += x.double().square().sum().item()
            noise += (x.double() - y.double()).square().sum().item()
            if runs.causal:
                float_log_probs, log_probs = (v.float().log_softmax(-1) for v in (x, y))
                divergence.add(log_probs, float_log_probs, x[:, 0])
                top_one.add(log_probs, float_log_probs, x[:, 0])
    return EndToEnd(
        rows=len(runs.rows) if runs.causal else len(runs.batches),
        tokens=divergence.count if runs.causal else None,
        kl=round(divergence.result(), 6) if runs.causal else None,
        sqnr_db=finite_db(ratio_db(signal, noise)),
        top1=round(top_one.result(), 4) if runs.causal else None,
        source=source,
    )


def _not_finite(
    runs: _Runs, expected: Sequence[Tensor], actual: Sequence[Tensor]
) -> NumericsError | None:
    """The error, if a graph yields NaN or an infinity that the float model does not."""
    for gm, values, who in (
        (runs.graphs.reference, expected, "the model itself"),
        (runs.graphs.lowered, actual, "the compiled model"),
    ):
        broken = any(
            bool((~y.isfinite() & x.isfinite()).any() or y.isnan().any())
            for x, y in zip(expected, values, strict=True)
        )
        if broken:
            found = (interpret.first_non_finite(gm, inputs) for inputs in runs.inputs(gm))
            culprit = next((name for name in found if name is not None), "its output")
            return NumericsError(
                f"{who} yields NaN or Inf: first at {culprit}",
                "check the checkpoint's weights"
                if gm is runs.graphs.reference
                else "its matmul has no usable scale; choose another scheme for it in the recipe",
            )
    return None


def _lowered_otherwise(
    runs: _Runs, expected: Sequence[Tensor], lowered_db: float
) -> LoweringError | None:
    """The error, if the lowered graph is far worse than the one that it stands for."""
    faked = runs.outputs(runs.graphs.fake_quant)
    fake_db = min(sqnr_db(x, y) for x, y in zip(expected, faked, strict=True))
    if fake_db < lowered_db + WORSE_DB:
        return None
    culprit = _first_apart(runs, runs.graphs.fake_quant, runs.graphs.lowered, APART_DB)
    return LoweringError(
        f"the lowered graph keeps {lowered_db:.1f} dB of the float model's output, the quantized "
        f"graph that it was made from {fake_db:.1f} dB; the first matmul that differs is {culprit}",
        "this is a defect of the lowering: please report it with the recipe",
    )


def _first_apart(
    runs: _Runs, before: fx.GraphModule, after: fx.GraphModule, least_db: float
) -> str | None:
    """The first matmul, in graph order, whose output in `after` keeps less than `least_db`."""
    names = {label(node): node for node in after.graph.nodes}
    linear = torch.ops.aten.linear.default
    matmuls = [n for n in before.graph.nodes if n.target is linear and label(n) in names]
    pairs = [(node, names[label(node)]) for node in matmuls]
    for x, y in zip(runs.inputs(before, few=True), runs.inputs(after, few=True), strict=True):
        old = interpret.values(before, x, [node for node, _ in pairs])
        new = interpret.values(after, y, [node for _, node in pairs])
        for node, other in pairs:
            if sqnr_db(old[node], new[other]) < least_db:
                return label(node)
    return None


def other_kernel(
    quantized: Mapping[str, float], lowered: Mapping[str, float]
) -> LoweringError | None:
    """The error, if a kernel computes another matmul than the quantized one it stands for.

    Both give every matmul's SQNR against the float model. A kernel rounds otherwise, which costs
    little; noise of its own as large as a hundredth of the signal is another result.
    """
    for name, before in quantized.items():
        after = lowered.get(name, before)
        own = 10 ** (-after / 10) - 10 ** (-before / 10)
        if after < before - WORSE_DB and own > 10 ** (-ALIKE_DB / 10):
            return LoweringError(
                f"{name} keeps {after:.1f} dB of its float result once it is lowered, "
                f"{before:.1f} dB before",
                "its kernel computes something else: please report it with the recipe",
            )
    return None
