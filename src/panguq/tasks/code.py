"""Code that a model wrote: which program an answer stands for, and whether it passes its tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from panguq.tasks.data_folder import TaskRow
from panguq.tasks.sandbox import ProgramLimits, ProgramResult, run_program, sandbox_tool

_FENCE = re.compile(r"```(?:[\w+]*)\n(.*?)(?:```|\Z)", re.DOTALL)
AT_ONCE = 2
CHAT_HUMANEVAL = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```"
)
CHAT_MBPP = (
    "You are an expert Python programmer, and here is your task:\n{text}\n"
    "Your code should pass the test:\n{test}"
)


def chat_question(task: str, item: TaskRow) -> str:
    """The question of a chat: lm-eval's humaneval_instruct and mbpp_instruct, without the answer's
    beginning, since a model that thinks begins with that."""
    if task == "humaneval":
        return CHAT_HUMANEVAL.format(prompt=item["prompt"].strip())
    return CHAT_MBPP.format(text=item["text"], test=item["test_list"][0])


def program(task: str, item: TaskRow, answer: str, chat: bool) -> str:
    """An answer and the item's tests as one program.

    In a chat, the first fenced block that defines what is asked for is the answer, or the first
    one, or all of it; HumanEval's imports stand before it.
    """
    if task == "humaneval":
        before, name = item["prompt"], item["entry_point"]
        if chat:
            code = fenced(answer, f"def {name}")
            whole = f"def {name}" in code
            body = f"{_imports(before)}\n{code}" if whole else before + code
        else:
            body = before + answer
        return f"{body}\n{item['test']}\ncheck({name})\n"
    code = fenced(answer, "def ") if chat else answer
    return "\n".join([code, *item["test_list"]])


def fenced(answer: str, wanted: str) -> str:
    """The first fenced block that holds `wanted`, else the first one, else the answer."""
    blocks: list[str] = _FENCE.findall(answer)
    return next((b for b in blocks if wanted in b), blocks[0] if blocks else answer)


def _imports(prompt: str) -> str:
    return "\n".join(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))


def run_all(
    programs: Sequence[str], *, unsafe: bool = False, limits: ProgramLimits | None = None
) -> list[ProgramResult]:
    """Run programs in the sandbox, two at a time. Raises InputError where there is none."""
    if not unsafe:
        sandbox_tool()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda text: run_program(text, limits, unsafe=unsafe), programs))
