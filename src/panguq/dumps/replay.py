"""Run the graph of a stage on the dump's probe input and compare it with the float graph."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx

from panguq.data.inputs import prepare, takes_empty_mask
from panguq.decibels import finite_db, spelled, sqnr_db
from panguq.dumps.reader import FAILED, DumpReader
from panguq.dumps.rerun import rerun_failed
from panguq.ir.run import interpret

TOP = 5


class TokenGuess(BaseModel):
    """A next token that a graph considers, and how likely it thinks it."""

    model_config = ConfigDict(frozen=True)
    token_id: int
    probability: float


class RunResult(BaseModel):
    """What a stage computes on the probe, beside the float graph `reference`.

    `output_sqnr_db` is of the first output (a language model's logits); 999 dB stands for equal,
    -999 for not finite. `kl` is KL(float ‖ stage) in nats and `top1` the share of equal most
    likely tokens, both over all tokens; they, and the tokens likely to come next, are there for
    language models only. `first_non_finite` is the first node that yields NaN or Inf.
    """

    model_config = ConfigDict(frozen=True)
    stage: str
    reference: str
    probe_tokens: int | None = None
    output_sqnr_db: float
    kl: float | None = None
    top1: float | None = None
    first_non_finite: str | None = None
    top_tokens: tuple[TokenGuess, ...] = ()
    reference_top_tokens: tuple[TokenGuess, ...] = ()
    note: str = ""

    def render(self) -> str:
        """As text."""
        lines = [f"{self.stage} against the float graph {self.reference}"]
        if self.probe_tokens is not None:
            lines[0] += f", on {self.probe_tokens} tokens"
        lines += [f"note              {self.note}"] if self.note else []
        lines.append(f"output SQNR       {spelled(self.output_sqnr_db)}")
        if self.kl is not None:
            lines.append(f"KL divergence     {self.kl:.4g} nats a token")
        if self.top1 is not None:
            lines.append(f"top-1 equal       {self.top1:.1%}")
        if self.first_non_finite is not None:
            lines.append(f"first NaN/Inf     {self.first_non_finite}")
        for name, guesses in (("", self.top_tokens), ("float ", self.reference_top_tokens)):
            listed = ", ".join(f"{g.token_id} ({g.probability:.1%})" for g in guesses)
            lines += [f"{name + 'next token':<18}{listed}"] if guesses else []
        return "\n".join(lines) + "\n"


def run_stage(reader: DumpReader, limit: str | None = None) -> RunResult:
    """Run the graph as it was after the pass `limit` (index or name; None: the last).

    For a pass that failed, the pass is run again on what it was given, so that it raises what
    it raised. Raises StorageError for a damaged dump.
    """
    stage = reader.find(limit)
    note = ""
    if stage.endswith(FAILED):
        gm = rerun_failed(reader, stage)
        note = "this pass failed when the dump was written, and did not fail now"
    else:
        gm = reader.graph(stage)
    reference = reference_stage(reader)
    actual = run_on_probe(reader, gm)
    expected = actual if stage == reference else run_on_probe(reader, reader.graph(reference))
    broken = None
    if not all(bool(torch.isfinite(t).all()) for t in actual if t.is_floating_point()):
        broken = interpret.first_non_finite(gm, probe_for(reader, gm))
    language_model = reader.info.interface.kind == "causal_lm"
    compared = _compare_logits(expected[0], actual[0]) if language_model else {}
    return RunResult(
        stage=stage,
        reference=reference,
        output_sqnr_db=finite_db(sqnr_db(expected[0], actual[0])) or 0.0,
        first_non_finite=broken,
        note=note,
        **compared,  # type: ignore[arg-type]
    )


def reference_stage(reader: DumpReader) -> str:
    """The float graph: the last stage that was reached by exact passes only."""
    last = reader.find("0")
    for stage in reader.whole_stages:
        if not reader.stage(stage).exact:
            break
        last = stage
    return last


def probe_for(reader: DumpReader, gm: fx.GraphModule) -> Mapping[str, Tensor]:
    """The probe as this graph takes it: before canonicalize, a plain causal mask is spelled out."""
    probe = reader.probe()
    interface = reader.info.interface
    if interface.kind != "causal_lm" or probe["attention_mask"].numel() or takes_empty_mask(gm):
        return probe
    return prepare(interface, probe["input_ids"], position_ids=probe["position_ids"])


def run_on_probe(reader: DumpReader, gm: fx.GraphModule) -> tuple[Tensor, ...]:
    """All outputs of a graph on the probe."""
    return interpret.run(gm, probe_for(reader, gm))


def _compare_logits(expected: Tensor, actual: Tensor) -> dict[str, object]:
    p, q = (t.double().log_softmax(-1).flatten(0, -2) for t in (expected, actual))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    usable = math.isfinite(divergence)
    return {
        "probe_tokens": p.shape[0],
        "kl": max(divergence, 0.0) if usable else None,
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()) if usable else None,
        "top_tokens": _most_likely(q[-1]),
        "reference_top_tokens": _most_likely(p[-1]),
    }


def _most_likely(log_probs: Tensor) -> tuple[TokenGuess, ...]:
    if not bool(torch.isfinite(log_probs.sum())):
        return ()
    best = log_probs.topk(min(TOP, log_probs.numel()))
    pairs = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    return tuple(TokenGuess(token_id=token, probability=p) for token, p in pairs)
