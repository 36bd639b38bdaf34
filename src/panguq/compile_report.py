"""What a compile did, in numbers that can be saved, printed and compared."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


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

    `is_side` marks the float matmul of outlier channels that were split from another one. Every
    matmul of every expert has a row, `model.layers.0.mlp.experts.3.down_proj:linear`, and there
    `tokens` says how many calibration tokens its router sent it, None where none were counted;
    with `on_all_tokens` they were too few, and it was calibrated on all.
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
    tokens: int | None = None
    on_all_tokens: bool = False


SAMPLED = "sampled from the model itself"


class CalibrationSummary(BaseModel):
    """What a compile was calibrated on.

    source: where it came from. sequences, tokens: what was used, the `sampled_sequences` that the
        model wrote itself among them; other modules than language models have inputs and no tokens.
    skipped_empty: rows that held nothing. cut_rows: rows longer than a sequence may be, taken in
        pieces. dropped_tokens: what was read, and is in no sequence since less than 8 were left.
    more_left: whether the source goes on behind what was taken.
    first_80_characters: how the first sequence begins, as text; "" where no tokenizer can say it.
    """

    model_config = ConfigDict(frozen=True)
    source: str = "none"
    sequences: int = 0
    tokens: int = 0
    sampled_sequences: int = 0
    skipped_empty: int = 0
    cut_rows: int = 0
    dropped_tokens: int = 0
    more_left: bool = False
    first_80_characters: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_sentence(cls, value: Any) -> Any:
        """Reports of folders that an earlier panguq saved say all of it in one sentence."""
        return {"source": value} if isinstance(value, str) else value

    def with_sampled(self, sequences: int, tokens: int, text: str) -> CalibrationSummary:
        """This data and what the model wrote besides: so many sequences of so many tokens."""
        alone = not self.sequences
        return self.model_copy(
            update={
                "source": SAMPLED if alone else self.source,
                "sequences": self.sequences + sequences,
                "tokens": self.tokens + sequences * tokens,
                "sampled_sequences": sequences,
                "first_80_characters": text[:80] if alone else self.first_80_characters,
            }
        )

    def __str__(self) -> str:
        """One line for people."""
        if not self.sequences:
            return self.source
        counted = [f"{self.sequences} sequences", f"{self.tokens} tokens"]
        said = f"{self.source}: {', '.join(counted)}" if self.tokens else self.source
        rest = {
            f"{{}} of them {SAMPLED}": self.source != SAMPLED and self.sampled_sequences,
            "{} empty rows skipped": self.skipped_empty,
            "{} long rows cut into pieces": self.cut_rows,
            "{} tokens left over": self.dropped_tokens,
            "more was there than was taken": self.more_left,
        }
        notes = [note.format(count) for note, count in rest.items() if count]
        return f"{said} ({'; '.join(notes)})" if notes else said


class EndToEnd(BaseModel):
    """The compiled model against the float model on a few rows of data, `source` says which.

    `rows` are sequences, or inputs of a plain module; `tokens` those whose logits were compared.
    `sqnr_db` is of the logits, or of all floating results (999: equal); `kl` is KL(float ‖
    compiled) in nats, mean a token, and `top1` the share of tokens for which both hold the same
    next token most likely. A plain module has no tokens.
    """

    model_config = ConfigDict(frozen=True)
    rows: int
    tokens: int | None = None
    kl: float | None = None
    sqnr_db: float
    top1: float | None = None
    source: str

    def __str__(self) -> str:
        """One line for people."""
        figures = [f"SQNR {self.sqnr_db:.1f} dB"]
        if self.kl is not None and self.top1 is not None:
            figures += [f"KL {self.kl:.4f} nats", f"top-1 {self.top1:.1%}", f"{self.tokens} tokens"]
        return f"{', '.join(figures)} in {self.rows} rows ({self.source})"


class CompileReport(BaseModel):
    """The passes in order, the matmuls, and what the user should know.

    `unused_weights`: names in the source checkpoint of weights that are not part of the model, and
    its files of weights that were not read.
    """

    model_config = ConfigDict(frozen=True)
    target: str
    passes: tuple[PassSummary, ...] = ()
    matmuls: tuple[MatmulSummary, ...] = ()
    warnings: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()
    calibration: CalibrationSummary = CalibrationSummary()
    end_to_end: EndToEnd | None = None

    @property
    def quantized_share(self) -> float:
        """The share of all linear weights, those of experts among them, that is quantized."""
        weights = {True: 0, False: 0}
        for row in self.matmuls:
            if not row.is_side:
                weights[row.scheme != "FLOAT"] += row.n * row.k
        return weights[True] / max(sum(weights.values()), 1)

    @property
    def logits_sqnr_db(self) -> float | None:
        """SQNR of the compiled model's output, in dB; 999 where it is the float model's."""
        return None if self.end_to_end is None else self.end_to_end.sqnr_db
