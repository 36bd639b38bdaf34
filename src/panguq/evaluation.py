"""How good a compiled model is: perplexity, KL divergence and top-1 agreement with the float model.

The text is tokenized once and cut into non-overlapping windows; the first token of a window
is not scored. A metric is one class in `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from panguq.errors import InputError
from panguq.ir.run.interpret import first_non_finite
from panguq.ir.run.sweep import Progress
from panguq.passes.pipeline.base import no_progress

COLLAPSED = 10.0  # times the float model's perplexity: the model says nothing any more
POOR_DB = 5.0  # of local SQNR: a matmul below it is named in warnings

Logits = Callable[[Tensor], Tensor]
"""From token ids `[1, seq]` to logits `[1, seq, vocab]`."""


class Metric(Protocol):
    """Something measured over windows. `needs_float` metrics compare with the float model."""

    name: str
    needs_float: bool

    def add(self, log_probs: Tensor, float_log_probs: Tensor | None, targets: Tensor) -> None:
        """One window: log probabilities `[tokens, vocab]` of this and the float model."""

    def result(self) -> float:
        """The metric over all windows so far."""


class Perplexity:
    """exp of the mean negative log likelihood."""

    name = "perplexity"
    needs_float = False

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, log_probs: Tensor, float_log_probs: Tensor | None, targets: Tensor) -> None:
        """Score the tokens that really came next."""
        self.total -= float(log_probs.gather(1, targets[:, None]).double().sum())
        self.count += len(targets)

    def result(self) -> float:
        """inf where the likelihood underflows, nan where logits are not finite."""
        mean = self.total / max(self.count, 1)
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


class FloatPerplexity(Perplexity):
    """The float model's perplexity on the same tokens."""

    name = "float_perplexity"
    needs_float = True

    def add(self, log_probs: Tensor, float_log_probs: Tensor | None, targets: Tensor) -> None:
        """Score the float model."""
        assert float_log_probs is not None
        super().add(float_log_probs, None, targets)


class Divergence:
    """KL(float ‖ compiled) in nats, mean per token."""

    name = "kl"
    needs_float = True

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, log_probs: Tensor, float_log_probs: Tensor | None, targets: Tensor) -> None:
        """Sum over the vocabulary, then over tokens."""
        assert float_log_probs is not None
        terms = float_log_probs.exp().mul_(float_log_probs - log_probs)
        terms.masked_fill_(float_log_probs == -math.inf, 0.0)  # 0 log 0 is 0
        self.total += float(terms.sum(dtype=torch.float64))
        self.count += len(targets)

    def result(self) -> float:
        """nan where logits are not finite."""
        return self.total / max(self.count, 1)


class TopOne:
    """Share of tokens for which both models hold the same next token most likely."""

    name = "top1"
    needs_float = True

    def __init__(self) -> None:
        self.equal, self.count = 0, 0

    def add(self, log_probs: Tensor, float_log_probs: Tensor | None, targets: Tensor) -> None:
        """Compare the most likely tokens."""
        assert float_log_probs is not None
        self.equal += int((log_probs.argmax(1) == float_log_probs.argmax(1)).sum())
        self.count += len(targets)

    def result(self) -> float:
        """Between 0 and 1."""
        return self.equal / max(self.count, 1)


METRICS: tuple[type[Any], ...] = (Perplexity, FloatPerplexity, Divergence, TopOne)


def logits_of(model: Any) -> Logits:
    """The logits function of a transformers model or a compiled one.

    Raises InputError for a model that does not continue text.
    """
    if getattr(getattr(model, "interface", None), "kind", "causal_lm") != "causal_lm":
        raise InputError(
            "perplexity and its kin are of models that continue text, which this one does not",
            "compare its outputs with the float model's: compiled.report.end_to_end has a figure",
        )

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(input_ids=ids, use_cache=False).logits
        return result

    return logits


def evaluate(
    models: Mapping[str, Logits],
    windows: Tensor,
    against: Logits | None = None,
    metrics: Sequence[type[Any]] = METRICS,
    progress: Progress = no_progress,
) -> dict[str, dict[str, float]]:
    """Every metric for every model over token windows `[windows, seq]`, in one pass over them.

    The float model `against` runs once a window. Metrics that need it are left out without it.
    """
    chosen = [m for m in metrics if against is not None or not m.needs_float]
    state = {name: [metric() for metric in chosen] for name in models}
    for done, row in enumerate(windows):
        progress("evaluate", done, len(windows))
        ids, targets = row[None], row[1:]
        reference = None if against is None else _log_probs(against, ids)
        for name, model in models.items():
            log_probs = _log_probs(model, ids)
            for metric in state[name]:
                metric.add(log_probs, reference, targets)
    progress("evaluate", len(windows), len(windows))
    return {name: {m.name: m.result() for m in measured} for name, measured in state.items()}


def _log_probs(model: Logits, ids: Tensor) -> Tensor:
    return model(ids)[0, :-1].float().log_softmax(-1)


def weight_figures(model: Any) -> dict[str, float]:
    """bits_per_weight and the shares of decoder linears' weights, from the compile's report.

    Decoder linears are all matmuls but the one that gives the logits. Bits count codes, scales,
    zero points and padding; a share is static, dynamic or float by its matmul's activations (a
    weight-only matmul's activations are float).
    """
    from panguq.ir.quant_spec import parse_scheme

    rows = [m for m in model.report.matmuls if not m.gives_logits]
    weights = sum(m.n * m.k for m in rows if not m.is_side) or 1
    shares = {"static": 0, "dynamic": 0, "float": 0}
    for row in rows:
        activation = parse_scheme(row.scheme).activation
        kind = "float" if activation is None else "dynamic" if activation.dynamic else "static"
        shares[kind] += row.n * row.k
    total = sum(shares.values()) or 1
    figures = {f"{kind}_share": count / total for kind, count in shares.items()}
    return {"bits_per_weight": 8 * sum(m.stored_bytes for m in rows) / weights, **figures}


def worst_matmul(model: Any) -> str | None:
    """The first matmul that keeps next to nothing of its float result, else the worst one."""
    rated = [m for m in model.report.matmuls if m.local_sqnr_db is not None]
    broken = [m for m in rated if m.local_sqnr_db < POOR_DB]
    if broken:
        return str(broken[0].name)
    return str(min(rated, key=lambda m: m.local_sqnr_db).name) if rated else None


def first_broken_node(model: Any, windows: Tensor) -> str | None:
    """The label of the first op of a compiled model that yields NaN or Inf on these windows."""
    from panguq.data.inputs import prepare

    for row in windows:
        inputs = prepare(model.interface, row[None], empty_mask=model.empty_mask)
        found = first_non_finite(model.graph, inputs)
        if found is not None:
            return found
    return None
