"""The tasks by name: what kind each is, which file it reads, and whose protocol it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from panguq.tasks import rows
from panguq.tasks.rows import Reader

TaskKind = Literal["perplexity", "choice", "text", "code"]
VERSION = 1
"""Of the protocols here: a change of one that changes figures makes it another."""


@dataclass(frozen=True)
class Task:
    """One task.

    kind: `perplexity` of a text; `choice` among answers by likelihood; `text` that is generated and
        compared; `code` that is generated and run.
    file: in the data folder.
    config: lm-eval's file below its `tasks`, `{subject}` for a task of many; "" of perplexities.
    shots: how many items are shown before each.
    changes: what of that file the rows here make otherwise, and nothing else.
    choices: how many answers to choose among, 0 for a task that chance does not solve.
    budget: new tokens an answer may have.
    """

    name: str
    kind: TaskKind
    file: str
    config: str = ""
    read: Reader | None = None
    shots: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    choices: int = 0
    budget: int = 0
    note: str = ""

    @property
    def chance(self) -> float:
        """The accuracy of who guesses."""
        return 1 / self.choices if self.choices else 0.0

    @property
    def is_generated(self) -> bool:
        """Whether the model writes an answer."""
        return self.kind in ("text", "code")


def _choice(name: str, file: str, config: str, read: Reader, choices: int, **more: Any) -> Task:
    return Task(name, "choice", file, config, read, choices=choices, **more)


_ALL = (
    Task("wikipedia", "perplexity", "wikipedia.txt"),
    Task("code", "perplexity", "code.txt"),
    Task("chinese", "perplexity", "chinese.txt"),
    _choice("arc_easy", "arc_easy.jsonl", "arc/arc_easy.yaml", rows.one(rows.arc), 4),
    _choice("arc_challenge", "arc_challenge.jsonl", "arc/arc_challenge.yaml",
            rows.one(rows.arc), 4),
    _choice("piqa", "piqa.jsonl", "piqa/piqa.yaml", rows.one(rows.piqa), 2),
    _choice("winogrande", "winogrande.jsonl", "winogrande/default.yaml",
            rows.one(rows.winogrande), 2),
    _choice("boolq", "boolq.jsonl", "super_glue/boolq/default.yaml", rows.one(rows.boolq), 2),
    _choice("openbookqa", "openbook_qa.jsonl", "openbookqa/openbookqa.yaml",
            rows.one(rows.openbookqa), 4),
    _choice("copa", "copa.jsonl", "super_glue/copa/default.yaml", rows.one(rows.copa), 2),
    _choice("siqa", "siqa.jsonl", "siqa/siqa.yaml", rows.one(rows.siqa), 2,
            changes={"doc_to_choice": "{{[answerA, answerB]}}"}, note="two of three answers"),
    _choice("commonsense_qa", "commonsense_qa.jsonl", "commonsense_qa/default.yaml",
            rows.one(rows.commonsense_qa), 4, note="four of five answers",
            changes={
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_text": "Question: {{ question.strip() }}\nA. {{choices['text'][0]}}\n"
                "B. {{choices['text'][1]}}\nC. {{choices['text'][2]}}\nD. {{choices['text'][3]}}\n"
                "Answer:",
            }),
    Task("lambada", "choice", "lambada_openai.jsonl", "lambada/lambada_openai.yaml",
         rows.one(rows.lambada)),
    _choice("mmlu", "mmlu", "mmlu/default/mmlu_{subject}.yaml", rows.mmlu_rows, 4, shots=5),
    _choice("cmmlu", "cmmlu", "cmmlu/cmmlu_{subject}.yaml", rows.cmmlu_rows, 4, shots=5),
    Task("gsm8k", "text", "gsm8k.jsonl", "gsm8k/gsm8k.yaml", rows.gsm8k_rows, shots=5, budget=256,
         note="the first five rows of the test split are shown, not scored"),
    Task("humaneval", "code", "human_eval.jsonl", "humaneval/humaneval.yaml", rows.humaneval_rows,
         budget=1024),
    Task("mbpp", "code", "mbpp.jsonl", "mbpp/mbpp.yaml", rows.mbpp_rows, shots=3, budget=512),
)  # fmt: skip
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
