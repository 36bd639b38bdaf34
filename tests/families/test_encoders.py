"""Models that are no causal language models: float is the model, 8 bits stay near it.

`make test-families` tries all of them, with every stage.
"""

from __future__ import annotations

import pytest

import panguq
from tests.families.encoder_sweep import check_encoder, inputs_of, near
from tests.families.encoders import make_encoder
from tests.families.sweep import shared_traces

SHORT = (
    "Qwen2ForSequenceClassification", "Gemma3TextModel", "BertForMaskedLM",
    "XLMRobertaForSequenceClassification", "CLIPVisionModelWithProjection", "WhisperEncoder",
)  # fmt: skip


@pytest.mark.parametrize("kind", SHORT)
def test_float_and_8_bits(kind) -> None:
    model = make_encoder(kind)
    with shared_traces():
        check_encoder(model, panguq.compile(model, "float"))
        data = [inputs_of(model, 14, seed) for seed in (2, 3)]
        near(model, panguq.compile(model, "w8a8-dynamic", calibration=data))
