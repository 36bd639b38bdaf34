"""lm-eval's own numbers over a compiled model: any batch, and panguq's decoder beside its own."""

from __future__ import annotations

from typing import Any

import pytest

import panguq
from panguq.tasks import harness
from panguq.tasks.language_model import Decoding, language_model
from panguq.tasks.rows import TaskRows, arc, gsm8k
from panguq.tasks.task_list import TASKS
from tests.model_folders import make_model, make_tokenizer

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
QUESTIONS = [
    arc({"query": f"Question: What is {i}?", "choices": ["x", "yy", "z z"], "gold": i % 3})
    for i in range(6)
]
SUMS = [
    gsm8k({"context": f"{i} + 1?", "chain_of_thought": "Add.", "answer": str(i + 1)})
    for i in range(7)
]


@pytest.fixture(scope="module")
def compiled() -> Any:
    return panguq.compile(make_model(), "w8a16")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.eos_token = "<bos>"
    return made


def test_every_batch_scores_alike(compiled: Any, tokenizer: Any) -> None:
    found = []
    for batch in (1, 4):
        model = language_model(compiled, tokenizer, Decoding(batch=batch))
        samples = harness.run(TASKS["arc_easy"], [TaskRows(QUESTIONS)], model)
        found.append([[score for score, _ in s["filtered_resps"]] for s in samples])
        assert [s["doc"]["question"] for s in samples] == [q["question"] for q in QUESTIONS]
        assert samples[0]["arguments"][1] == ("Question: What is 0?\nAnswer:", " yy")
    assert [x for row in found[0] for x in row] == pytest.approx(
        [x for row in found[1] for x in row], rel=1e-4
    )


def test_panguqs_decoder_says_what_lm_evals_does(compiled: Any, tokenizer: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    rows = TaskRows(SUMS[5:], SUMS[:5])
    decoding = Decoding(budget=12, batch=2)
    ours = language_model(compiled, tokenizer, decoding)
    samples = harness.run(TASKS["gsm8k"], [rows], ours)
    with harness.quiet():
        theirs = HFLM(pretrained=compiled, tokenizer=tokenizer, batch_size=2, max_length=256)
        made = harness.make(TASKS["gsm8k"], rows)
        made.build_all_requests()
        for request in made.instances:
            request.args[1]["max_gen_toks"] = 12
        said = theirs.generate_until(made.instances, disable_tqdm=True)
    assert said == [sample["resps"][0][0] for sample in samples]


def test_code_is_asked_without_lm_evals_way_to_run_it() -> None:
    problem = {"task_id": 11, "text": "Add.", "code": "", "test_list": ["assert 1"] * 3}
    config = harness.task_config(TASKS["mbpp"], TaskRows([problem]))
    assert config["metric_list"] == [{"metric": "bypass"}] and not config["unsafe_code"]
    assert len(config["fewshot_config"]["samples"]) == 3
