"""Which server has a class for which model, and what `panguq check` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from panguq.check.report import check_folder
from panguq.cli import main
from panguq.models.architectures import config_classes
from panguq.server_models import OPENPANGU_TYPES, class_answer, missing_classes
from panguq.servers import SERVERS, Server
from tests.check.check_folders import ascend, compressed


@pytest.mark.parametrize(
    ("server", "model_type", "architecture", "has"),
    [
        ("transformers", "llama", "LlamaForCausalLM", True),
        ("transformers", "qwen3_moe", "Qwen3MoeForCausalLM", True),
        ("transformers", "PanguProMoE", "PanguProMoEV2ForCausalLM", False),
        ("vllm", "PanguProMoE", "PanguProMoEV2ForCausalLM", True),
        ("vllm-ascend", "pangu_ultra_moe", "PanguUltraMoEForCausalLM", True),
        ("vllm", "PanguProMoE", "PanguProMoEForCausalLM", False),
        ("vllm-ascend", "openpangu_v2", "OpenPanguV2ForCausalLM", False),
        ("vllm", "bert", "BertModel", True),
        ("vllm", "albert", "AlbertModel", None),
        ("mindie", "llama", "LlamaForCausalLM", True),
        ("mindie", "PanguProMoE", "PanguProMoEForCausalLM", False),
        ("mindie", "mistral", "MistralForCausalLM", None),
    ],
)
def test_classes_of_servers(
    server: Server, model_type: str, architecture: str, has: bool | None
) -> None:
    answer = class_answer(server, {"model_type": model_type, "architectures": [architecture]})
    assert answer.has is has
    assert bool(answer.reason) == (has is not True)


def test_what_panguq_registers_with_transformers_does_not_count() -> None:
    assert "pangu_ultra_moe" in config_classes()  # after this, AutoConfig builds it
    for model_type in OPENPANGU_TYPES:
        assert class_answer("transformers", {"model_type": model_type}).has is False


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("config", [{}, {"model_type": ["x"], "architectures": 3}])
def test_a_config_that_names_nothing_is_not_known(server: Server, config: dict[str, Any]) -> None:
    answer = class_answer(server, config)
    assert answer.has is None and answer.reason


def test_code_that_a_folder_brings_is_not_known() -> None:
    config = {"model_type": "PanguEmbedded", "auto_map": {"AutoConfig": "x.Config"}}
    assert class_answer("transformers", config).has is None
    assert missing_classes(("transformers",), config) == []


def test_check_says_which_server_cannot_build_the_model(tmp_path: Path, capsys: Any) -> None:
    draft = compressed()
    draft.config = {**(draft.config or {}), "model_type": "PanguProMoE"}
    draft.config["architectures"] = ["PanguProMoEV2ForCausalLM"]
    report = check_folder(draft.write(tmp_path / "pangu"))
    (said,) = [finding for finding in report.findings if finding.rule == "no-class"]
    assert said.breaks == ("transformers",) and "'PanguProMoE'" in said.message
    assert report.servers["transformers"] == "refuses"


def test_check_says_what_is_not_known(tmp_path: Path, capsys: Any) -> None:
    draft = ascend("W8A8_DYNAMIC", "W8A8_DYNAMIC")
    assert draft.config is not None
    draft.config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = draft.write(tmp_path / "mistral")
    report = check_folder(folder)
    assert report.servers["vllm-ascend"] == "takes" and report.servers["mindie"] == "not known"
    assert main(["check", str(folder)]) == 0  # nobody surely refuses it
    assert main(["check", str(folder), "--server", "mindie"]) == 1
    assert "mindie: not known (MindIE's list of models" in capsys.readouterr().out
