"""`panguq check` of GPTQ's and AWQ's folders: good ones are taken, and each rule fires."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from panguq.check.report import check_folder
from panguq.check.weight_only import WEIGHT_ONLY_RULES
from tests.check.check_folders import DOWN, Draft, Q, weight_only

Change = Callable[[Draft], object]
READERS = {"transformers", "vllm", "sglang"}
BEYOND = torch.full((256,), 2, dtype=torch.int32)
RULES = {"-:.*lm_head": {}, "+:^x$": {"bits": 8}}


def setting(**changed: Any) -> Change:
    return lambda draft: draft.config["quantization_config"].update(changed)  # type: ignore[index]


def store(name: str, tensor: torch.Tensor) -> Change:
    return lambda draft: draft.tensors.update({name: tensor})


def drop(name: str) -> Change:
    return lambda draft: draft.tensors.pop(name)


@pytest.mark.parametrize(
    ("method", "bits"), [("gptq", 4), ("gptq", 8), ("gptq", 3), ("gptq", 2), ("awq", 4)]
)
def test_a_good_folder_is_taken(method: str, bits: int, tmp_path: Path) -> None:
    report = check_folder(weight_only(method, bits).write(tmp_path / "out"))
    assert report.format == method and report.types == {f"W{bits}A16": 7}
    on_npus = bits in (4, 8)
    assert {finding.rule for finding in report.findings} == (set() if on_npus else {"sglang-gptq"})
    taking = READERS if on_npus else READERS - {"sglang"}
    assert {name for name, answer in report.servers.items() if answer == "takes"} == taking
    assert report.servers["mindie"] == "does not read this format"


BROKEN: list[tuple[str, str, Change, str, set[str]]] = [
    ("bad-config", "gptq", setting(bits=5), "bits is 5", READERS),
    ("bad-config", "gptq", setting(group_size="128"), "group_size is '128'", READERS),
    ("bad-config", "awq", setting(version="gemv"), "gemv", READERS),
    ("foreign-zero-points", "gptq", setting(sym=False), "gptq_v2", {"transformers"}),
    ("rules-unknown", "gptq", setting(dynamic=RULES), "one kind", {"transformers"}),
    ("sglang-gptq", "gptq", setting(sym=False, checkpoint_format="gptq_v2"), "subtracts",
     {"sglang"}),
    ("sglang-gptq", "gptq", setting(dynamic=RULES), "on GPUs", {"sglang"}),
    ("missing-part", "awq", drop(f"{DOWN}.qzeros"), f"{DOWN}.qzeros", READERS),
    ("not-a-target", "awq", setting(modules_to_not_convert=["lm_head", "q_proj"]), Q, READERS),
    ("not-a-target", "gptq", setting(dynamic={"-:.*q_proj$": {}}), Q, READERS),
    ("wrong-form", "gptq", store(f"{Q}.scales", torch.ones(3, 256).half()), "[2, 256]", READERS),
    ("wrong-form", "gptq", setting(dynamic={"+:.*q_proj$": {"bits": 8}}), "[64, 256]", READERS),
    ("bad-scale", "awq", store(f"{Q}.scales", torch.zeros(2, 256).half()), "zero", READERS),
    ("bad-groups", "gptq", store(f"{Q}.g_idx", BEYOND), "the 2 that", READERS),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "method", "change", "said", "breaks"), BROKEN)
def test_a_broken_folder_is_found(
    rule: str, method: str, change: Change, said: str, breaks: set[str], tmp_path: Path
) -> None:
    draft = weight_only(method)
    change(draft)
    report = check_folder(draft.write(tmp_path / "out"))
    (found, *_) = [finding for finding in report.findings if finding.rule == rule]
    assert said in f"{found.tensor} {found.message}"
    assert breaks <= set(found.breaks)
    assert all(report.servers[server] == "refuses" for server in breaks)


def test_every_rule_has_a_broken_folder() -> None:
    assert {rule for rule, *_ in BROKEN} == {rule.name for rule in WEIGHT_ONLY_RULES}
