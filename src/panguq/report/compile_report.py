"""What a compile did, in numbers that can be saved, printed and compared."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PassSummary(BaseModel):
    """One line of the summary: what a pass changed and what it cost."""

    model_config = ConfigDict(frozen=True)
    name: str
    changed: int
    skipped: int
    seconds: float
    proved_difference: float | None = None
    worst_local_sqnr_db: float | None = None
    worst_matmul: str | None = None


class MatmulSummary(BaseModel):
    """One matmul: sizes, scheme, kernel, bytes stored, and its local SQNR.

    `is_side` marks the float matmul of outlier channels that were split from another one.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    n: int
    k: int
    scheme: str
    group_size: int | None = None
    kernel: str
    stored_bytes: int
    gives_logits: bool = False
    is_side: bool = False
    local_sqnr_db: float | None = None


class CompileReport(BaseModel):
    """The passes in order, the matmuls, and what the user should know.

    `unused_weights`: names in the source checkpoint of weights that are not part of the model.
    """

    model_config = ConfigDict(frozen=True)
    target: str
    passes: tuple[PassSummary, ...] = ()
    matmuls: tuple[MatmulSummary, ...] = ()
    warnings: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()
    calibration: str = "none"
    logits_sqnr_db: float | None = None
