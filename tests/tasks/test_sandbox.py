"""Hostile programs: each is one failed item, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from panguq.errors import InputError
from panguq.tasks import sandbox
from panguq.tasks.code import fenced, program, run_all
from panguq.tasks.sandbox import TOOLS, ProgramLimits, run_program

LIMITS = ProgramLimits(seconds=5)


def works(tool: str) -> bool:
    return shutil.which(tool) is not None and run_program("pass", LIMITS, tool=tool).passed


THERE = [tool for tool in TOOLS if works(tool)]
needs_namespaces = pytest.mark.skipif(not THERE, reason="this kernel denies namespaces")
ATTACKS = {
    "no Python": ("def (", "SyntaxError"),
    "wrong": ("assert 1 + 1 == 3", "AssertionError"),
    "leaves before its tests": ("import sys; sys.exit(0)", "before its last line"),
    "network": ("import socket; socket.create_connection(('192.0.2.1', 80), 1)", "unreachable"),
    "fork bomb": ("import os\nwhile True: os.fork()", "Resource temporarily unavailable"),
    "writes outside": ("open('/usr/planted', 'w')", "Read-only file system"),
    "10 GiB": ("x = bytearray(10 * 2**30)", "MemoryError"),
    "fills the disk": ("f = open('a', 'wb')\nwhile True: f.write(bytes(2**20))", "too large"),
    "endless output": ("while True: print('x' * 4096)", "said more than"),
    "kills its parent": (
        "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nassert False", "",
    ),
    "a namespace of its own": (
        "import ctypes; assert ctypes.CDLL(None).unshare(1 << 28) == 0", "AssertionError",
    ),
}  # fmt: skip


@needs_namespaces
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_one_failed_item(tool: str, attack: str) -> None:
    if tool not in THERE:
        pytest.skip(f"{tool} makes no sandbox here")
    source, said = ATTACKS[attack]
    verdict = run_program(source, LIMITS, tool=tool)
    assert not verdict.passed
    assert said in verdict.reason
    assert not os.path.exists("/usr/planted")


@needs_namespaces
@pytest.mark.parametrize("tool", TOOLS)
def test_the_map_cannot_be_read_and_the_clock_runs_out(tool: str, tmp_path: Path) -> None:
    if tool not in THERE:
        pytest.skip(f"{tool} makes no sandbox here")
    (tmp_path / "map.json").write_text("{}")
    verdict = run_program(f"print(open({str(tmp_path / 'map.json')!r}).read())", tool=tool)
    assert not verdict.passed and "No such file" in verdict.reason
    slow = run_program("import time; time.sleep(60)", ProgramLimits(seconds=1), tool=tool)
    assert slow.reason == "it took more than 1 s"


@needs_namespaces
def test_a_right_program_passes_with_the_standard_library() -> None:
    right = "import re, math, collections\nassert re.sub('a', 'b', 'aa') == 'bb'"
    assert [v.passed for v in run_all([right, "assert False"])] == [True, False]


def test_where_there_is_no_sandbox_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TOOLS", ("not-a-tool",))
    sandbox.sandbox_tool.cache_clear()
    with pytest.raises(InputError, match="runs in a sandbox only") as caught:
        run_all(["pass"])
    assert "--unsafe-no-sandbox" in caught.value.hint
    sandbox.sandbox_tool.cache_clear()


def test_the_users_own_word_runs_it_without() -> None:
    assert run_all(["pass", "assert False"], unsafe=True)[0].passed


PROBLEM = {
    "prompt": 'from math import inf\n\ndef double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(f):\n    assert f(4) == 8\n",
}


@pytest.mark.parametrize(
    ("answer", "chat", "passes"),
    [
        ("    return 2 * x\n", False, True),
        ("    return x\n", False, False),
        ("Sure!\n```python\ndef double(x):\n    return min(inf, 2 * x)\n```\nDone.", True, True),
        ("```python\n    return 2 * x\n```", True, True),
        ("I cannot.", True, False),
    ],
)
def test_an_answer_becomes_a_program(answer: str, chat: bool, passes: bool) -> None:
    text = program("humaneval", PROBLEM, answer, chat)
    assert run_program(text, unsafe=True).passed is passes


def test_the_block_that_defines_what_is_asked_for_is_the_answer() -> None:
    assert fenced("```\nfirst\n```\n```py\ndef f(): 1\n```", "def f") == "def f(): 1\n"
