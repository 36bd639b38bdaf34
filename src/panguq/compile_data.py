"""The data of a compile: what it calibrates on, and what its result is measured with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from panguq.compile_report import CalibrationSummary
from panguq.data.calibration import (
    SAMPLED_SEQUENCES,
    SAMPLED_TOKENS,
    Batches,
    causal_lm_batches,
    encoder_batches,
    sample_sequences,
)
from panguq.data.calibration_data import GIVEN, CalibrationData, decoded, read_calibration
from panguq.data.calibration_modules import module_batches
from panguq.data.encoder_inputs import lacks_data, needs_data
from panguq.data.inputs import takes_empty_mask
from panguq.errors import InputError
from panguq.ir.encoder import Examples, encoder_examples, is_encoder, reads_text
from panguq.ir.trace_causal_lm import is_causal_lm
from panguq.lowering.targets import find_target
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.work_folder import Finished

logger = logging.getLogger("panguq")


MOST_SAMPLED = 1 << 14
RANDOM_TOKENS = 32


@dataclass
class CompileData:
    """What the caller gave, first as it was read, then as batches of the graph's inputs.

    `sampled` is how many more sequences a causal language model writes itself. `batches` is None
    until `sample` where all of them are the model's own. `summary` says what was used. `calibrated`
    is whether passes observe it; if not, it only serves to measure the result.
    """

    model: nn.Module
    given: Any
    sampled: int
    tokenizer: Any
    example_inputs: Examples
    calibrated: bool
    batches: Batches | None = None
    written: int = 0
    summary: CalibrationSummary = field(default_factory=CalibrationSummary)

    @classmethod
    def read(
        cls,
        model: nn.Module,
        given: Any,
        sampled: int,
        tokenizer: Any,
        example_inputs: Examples,
        calibrated: bool,
    ) -> CompileData:
        """Raises InputError, before any long work, for what is no calibration data."""
        if sampled < 0:
            raise InputError(f"sampled {sampled}: a number of sequences is not negative")
        if sampled > MOST_SAMPLED:
            raise InputError(
                f"sampled {sampled}: at most {MOST_SAMPLED} sequences are written side by side",
                "a hundred are plenty",
            )
        encodes = is_encoder(model)
        if given is not None and (is_causal_lm(model) or (encodes and reads_text(model))):
            config: Any = model.config
            longest = getattr(config, "max_position_embeddings", None)
            given = read_calibration(given, tokenizer, longest=longest)
        if given is None and calibrated and lacks_data(model, example_inputs):
            raise needs_data(model)
        if sampled and not is_causal_lm(model):
            raise InputError("sampled: only a causal language model writes text of its own")
        return cls(
            model, given, sampled if calibrated else 0, tokenizer, example_inputs, calibrated
        )

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Weights of the source checkpoint that the model does not use."""
        return tuple(getattr(self.model, "panguq_unused_weights", ()))

    @property
    def held_out(self) -> Sequence[Tensor]:
        """Rows of token ids that calibration does not see, if there are any."""
        return self.given.held_out if isinstance(self.given, CalibrationData) else ()

    def prepare(self, gm: fx.GraphModule, ctx: PassContext, target: str) -> None:
        """Make batches of what was given; a graph that is no language model has them all then."""
        if ctx.interface.kind == "causal_lm":
            if isinstance(self.given, CalibrationData):
                self.batches = self._causal_lm_batches(gm, ctx, target, self.given)
                self.summary = self.given.summary
            return
        if self.given is None and self.calibrated:
            logger.warning("calibration data: none given, so the example inputs serve for it")
        source = "the example inputs" if self.given is None else GIVEN
        if ctx.interface.kind == "encoder":
            if self.given is None and self.example_inputs is None:
                source = "random inputs, which no pass observes"
            examples = encoder_examples(self.model, self.example_inputs, 1, RANDOM_TOKENS)
            data = [examples] if self.given is None else self.given
            self.batches = encoder_batches(data, ctx.interface)
        else:
            inputs = tuple(x for x in self.example_inputs or () if isinstance(x, Tensor))
            data = [inputs] if self.given is None else self.given
            self.batches = module_batches(data, ctx.interface, inputs or None)
        self.summary = CalibrationSummary(source=source, sequences=len(self.batches))
        if isinstance(self.given, CalibrationData):
            self.summary = self.given.summary

    def sample(self, gm: fx.GraphModule, ctx: PassContext, target: str) -> Batches:
        """All batches, those included that the model writes itself."""
        if self.batches is None or self.sampled:
            ids = self._sampled(gm, ctx)
            own = self._causal_lm_batches(gm, ctx, target, ids)
            text = decoded(self.tokenizer, ids[0])
            self.summary = self.summary.with_sampled(len(ids), ids.shape[1], text)
            self.batches = [*(self.batches or ()), *own]
            self.written = len(own)
        logger.info("calibration data: %s", self.summary)
        return self.batches

    def _sampled(self, gm: fx.GraphModule, ctx: PassContext) -> Tensor:
        """Token ids `[sequences, tokens]` of a causal language model's own."""
        count, length = self.sampled or SAMPLED_SEQUENCES, SAMPLED_TOKENS
        if self.batches is not None:
            length = max(batch["input_ids"].shape[1] for batch in self.batches)
        elif not self.calibrated:
            count, length = 1, 32
        config: Any = self.model.config
        start = getattr(config, "bos_token_id", None) or 0

        def compute() -> Finished:
            shape = (count, length)
            ids = sample_sequences(gm, ctx.interface, start, ctx.generator(), *shape, ctx.progress)
            return Finished({"ids": ids})

        ids = ctx.store.once("calibration/sampled", compute).tensors["ids"]
        if self.calibrated and not self.sampled:
            logger.warning(
                "calibration data: none given, so sampled from the model itself: %d sequences of "
                "%d tokens (seed %d)",
                *ids.shape,
                ctx.seed,
            )
        return ids

    def _causal_lm_batches(
        self, gm: fx.GraphModule, ctx: PassContext, target: str, data: Any
    ) -> Batches:
        empty_mask = takes_empty_mask(gm) and find_target(target).takes_empty_masks
        return causal_lm_batches(data, ctx.interface, None, empty_mask)
