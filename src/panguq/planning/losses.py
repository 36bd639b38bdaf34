"""What recipes did to yardstick models, as docs/accuracy.md has it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Loss:
    """What a recipe did to a yardstick model: perplexity above float in percent, KL divergence."""

    model: str
    perplexity_percent: float
    kl: float


def losses() -> dict[str, tuple[Loss, ...]]:
    """The losses of each recipe that was measured, the published yardstick first."""
    text = resources.files("panguq.planning").joinpath("accuracy.csv").read_text(encoding="utf-8")
    found: dict[str, tuple[Loss, ...]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        loss = Loss(row["model"], float(row["perplexity_percent"]), float(row["kl"]))
        found[row["recipe"]] = (*found.get(row["recipe"], ()), loss)
    return found
