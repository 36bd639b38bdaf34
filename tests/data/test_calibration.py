"""Every form of calibration data, and every wrong one."""

from __future__ import annotations

import re

import pytest
import torch

from panguq.compile_report import CompileReport
from panguq.data.calibration import (
    bos_prefix,
    causal_lm_batches,
    probe_of,
    sample_sequences,
    token_windows,
)
from panguq.errors import InputError, NumericsError
from panguq.ir.edit import clone, get_tensor, set_tensor
from panguq.ir.run.interpret import run
from panguq.passes.pipeline.base import no_progress
from tests.model_shelf import VOCAB, canonical, token_ids


class Encoded(dict):
    def __getattr__(self, name: str) -> object:
        return self[name]


class Characters:
    """A tokenizer of one token a letter, with or without the habit of BOS."""

    def __init__(self, bos: bool = True) -> None:
        self.bos_token_id, self.habit = 1, bos

    def __call__(self, text, add_special_tokens=True, return_tensors=None) -> Encoded:
        ids = [2 + ord(c) % (VOCAB - 2) for c in text]
        if self.habit and add_special_tokens:
            ids = [1, *ids]
        return Encoded(input_ids=torch.tensor([ids]) if return_tensors else ids)


def batches_of(data, tokenizer=None) -> list[dict[str, torch.Tensor]]:
    return causal_lm_batches(data, canonical("llama")[1], tokenizer)


IDS = token_ids(3, 12)


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        [row for row in IDS],
        IDS.tolist(),
        (row.tolist() for row in IDS),
        [{"input_ids": row[None]} for row in IDS],
        [{"input_ids": row.tolist(), "attention_mask": None} for row in IDS],
    ],
    ids=["tensor", "rows", "lists", "generator", "mappings", "mappings of lists"],
)
def test_forms_of_token_ids(data) -> None:
    batches = batches_of(data)
    assert [b["input_ids"].shape for b in batches] == [(1, 12)] * 3
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), IDS)
    assert list(batches[0]) == list(canonical("llama")[1].inputs)
    run(canonical("llama")[0], batches[0])


def test_one_batch_of_several_sequences() -> None:
    (batch,) = batches_of({"input_ids": IDS})
    assert torch.equal(batch["input_ids"], IDS)
    (single,) = batches_of(IDS[0])
    assert torch.equal(single["input_ids"], IDS[:1])


def test_padding_is_taken_out_of_batches() -> None:
    mask = torch.ones(3, 12, dtype=torch.long)
    (whole,) = batches_of({"input_ids": IDS, "attention_mask": mask})
    assert torch.equal(whole["input_ids"], IDS)
    mask[1, :4] = 0
    rows = batches_of({"input_ids": IDS, "attention_mask": mask})
    assert [tuple(row["input_ids"].shape) for row in rows] == [(1, 12), (1, 8), (1, 12)]
    assert torch.equal(rows[1]["input_ids"], IDS[1:2, 4:])


def test_texts_with_a_tokenizer() -> None:
    batches = batches_of(["hello world", "and more"], Characters())
    assert [b["input_ids"].shape[1] for b in batches] == [12, 9]
    assert batches[0]["input_ids"][0, 0] == 1


def test_a_sequence_longer_than_the_model_takes_is_refused_by_name() -> None:
    interface = canonical("gpt2")[1]
    with pytest.raises(InputError, match="item 1 has 300 tokens, the model takes 256"):
        causal_lm_batches([IDS, token_ids(1, 300)], interface)
    rows = causal_lm_batches(["x" * 600], interface, Characters())
    assert [row["input_ids"].shape[1] for row in rows] == [256, 256, 91]


def test_one_long_text_is_cut_into_windows() -> None:
    batches = batches_of("x" * 3000, Characters())
    assert [b["input_ids"].shape for b in batches] == [(1, 512)] * 5 + [(1, 446)]
    assert all(int(b["input_ids"][0, 0]) == 1 for b in batches)


# --- windows of a text --------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "first"), [(True, 1), (False, 2 + ord("a") % (VOCAB - 2))])
def test_windows_do_not_overlap(bos, first) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = token_windows(text, Characters(bos), window=8, windows=3)
    assert windows.shape == (3, 8) and int(windows[0, 0]) == first
    body = windows[:, 1:] if bos else windows
    spelled = [2 + ord(c) % (VOCAB - 2) for c in text][: body.numel()]
    assert body.flatten().tolist() == spelled
    assert bos_prefix(Characters(bos)) == ([1] if bos else [])


def test_a_text_shorter_than_a_window_is_one_shorter_window() -> None:
    assert token_windows("abcdefghij", Characters(), window=512, windows=4).shape == (1, 11)


def test_a_text_that_says_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="the text has 7 tokens; 8 are the least"):
        token_windows("abcdefg", Characters(), window=512, windows=4)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the calibration data is empty: no tokens\n"),
        (torch.zeros(0, 5, dtype=torch.long), "the calibration data is empty"),
        ([[], [], torch.zeros(2, 0)], "empty: no tokens, 4 empty rows skipped"),
        (7, "calibration data is a int"),
        (None, "calibration data is a NoneType"),
        ([3.5], "calibration item 0 is a float, not text or token ids"),
        ([[3, 4], [3.5, 2]], "calibration item 1 is a list of numbers that are no ids"),
        ([object()], "calibration item 0 is a object, not text or token ids"),
        ([[1, 2], ["a", "b"]], "calibration item 1, row 0: calibration texts need a tokenizer"),
        ([{"ids": [1, 2]}], "calibration item 0 has no input_ids, text or messages, but ids"),
        (torch.rand(2, 9), "calibration item 0: token ids are torch.float32"),
        (torch.ones(2, 9) > 0, "calibration item 0: token ids are torch.bool"),
        (torch.ones(2, 2, 9).long(), r"calibration item 0: token ids have shape \[1, 2, 9\]"),
        (torch.full((2, 9), VOCAB), "calibration item 0: .*\n.*another model's tokenizer"),
        ([IDS, [4, -1]], r"calibration item 1: token ids lie in \[-1, 4\]"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(3, 11)}], "attention_mask has shape"),
        (["a text without its tokenizer"], "calibration texts need a tokenizer"),
        ("a text without its tokenizer", "calibration texts need a tokenizer"),
    ],
)
def test_what_is_refused(data, message) -> None:
    with pytest.raises(InputError) as caught:
        batches_of(data)
    assert re.search(message, str(caught.value))


def test_reports_of_earlier_folders_say_it_in_a_sentence() -> None:
    text = '{"target": "cpu", "calibration": "given by the caller: 3 sequences, 48 tokens"}'
    report = CompileReport.model_validate_json(text, strict=True)
    assert str(report.calibration) == "given by the caller: 3 sequences, 48 tokens"
    assert CompileReport.model_validate_json(report.model_dump_json(), strict=True) == report
    assert str(CompileReport(target="cpu").calibration) == "none"


# --- sampled from the model ---------------------------------------------------------------------


def sampled(seed: int, tokens: int = 12, family: str = "llama") -> torch.Tensor:
    gm, interface = canonical(family)
    generator = torch.Generator().manual_seed(seed)
    return sample_sequences(gm, interface, 1, generator, 3, tokens, no_progress)


def test_sampling_follows_the_seed() -> None:
    first = sampled(0)
    assert first.shape == (3, 12) and (first[:, 0] == 1).all()
    assert torch.equal(first, sampled(0))
    assert not torch.equal(first, sampled(1))
    assert int(first.min()) >= 0 and int(first.max()) < VOCAB


def test_samples_are_likely_to_the_model() -> None:
    """Drawn at temperature 1: far likelier than random tokens."""
    gm, interface = canonical("llama")
    likelihood = []
    for ids in (sampled(0, 64), token_ids(3, 64)):
        logits = run(
            gm, causal_lm_batches([ids], interface)[0] | {"logit_positions": torch.arange(64)}
        )
        log_probs = logits[0][:, :-1].log_softmax(-1)
        likelihood.append(float(log_probs.gather(2, ids[:, 1:, None]).mean()))
    assert likelihood[0] > likelihood[1] + 0.1


def test_sampling_stays_within_learned_positions() -> None:
    assert sampled(0, 300, "gpt2").shape == (3, 256)


def test_a_model_that_yields_nan_is_named_while_sampling() -> None:
    gm, interface = canonical("llama")
    gm = clone(gm)
    weight = get_tensor(gm, "model.layers.1.mlp.up_proj.weight")
    set_tensor(gm, "model.layers.1.mlp.up_proj.weight", torch.full_like(weight, 3e38))
    with pytest.raises(NumericsError, match=r"first at model\.layers\.1\.mlp\.(up_proj|):"):
        sample_sequences(gm, interface, 1, torch.Generator(), 2, 4, no_progress)


# --- the probe ----------------------------------------------------------------------------------


def test_the_probe_is_the_start_of_the_first_batch() -> None:
    interface = canonical("llama")[1]
    batches = batches_of(token_ids(2, 100))
    probe = probe_of(batches, interface)
    assert torch.equal(probe["input_ids"], token_ids(2, 100)[:1, :64])
    assert probe["logit_positions"].tolist() == list(range(64))
