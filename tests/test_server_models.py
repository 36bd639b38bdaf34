"""Which server has a class for which model, and what `panguq check` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

import panguq
from panguq.check.report import check_folder
from panguq.cli import main
from panguq.models.architectures import config_classes
from panguq.models.openpangu.mixture_config import PanguProMoEConfig
from panguq.models.openpangu.mixture_models import PanguProMoEForCausalLM
from panguq.planning.format_check import check_format
from panguq.recipe import Recipe
from panguq.server_models import OPENPANGU_TYPES, class_answer, expert_notes, missing_classes
from panguq.server_releases import SERVERS, Server
from panguq.server_verdicts import verdicts
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
        ("mindie", "qwen3_moe", "Qwen3MoeForCausalLM", None),
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


def test_a_dry_run_says_which_server_cannot_build_the_model() -> None:
    config = PanguProMoEConfig(
        hidden_size=64, moe_intermediate_size=34, shared_expert_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=4, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = PanguProMoEForCausalLM(config)
    plan = panguq.plan(model, "w8a8-dynamic-serving", dtype=torch.bfloat16)
    assert (plan.model_type, plan.architectures) == ("PanguProMoE", ("PanguProMoEForCausalLM",))
    verdict = verdicts(plan, "transformers")
    assert not verdict.takes and verdict.no_class in verdict.render()
    _, warnings = check_format(
        "compressed-tensors", model, Recipe.of("w8a8-dynamic-serving"), planned=plan
    )
    assert any(text.startswith("transformers will not load") for text in warnings)


@pytest.mark.parametrize(
    ("experts", "inner", "said"),
    [
        (61, 1343, ["no number of devices from 2 to 16 divides either"]),
        (61, 1344, []),  # tensor parallelism
        (64, 1343, []),  # expert parallelism
        (1026, 64, ["a grouped matmul of an NPU takes 1024"]),
        (1, 7, []),
    ],
)
def test_experts_that_no_server_shards(experts: int, inner: int, said: list[str]) -> None:
    notes = expert_notes({"num_experts": experts, "moe_intermediate_size": inner})
    assert len(notes) == len(said) and all(a in b for a, b in zip(said, notes, strict=True))


def test_a_plan_says_that_no_server_shards_the_experts(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=19, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_experts=17, num_experts_per_tok=2,
        vocab_size=64, max_position_embeddings=64, head_dim=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    plan = panguq.plan(tmp_path, "w8a8-dynamic")
    assert any("17 experts of inner size 19" in warning for warning in plan.warnings)


def test_check_says_what_is_not_known(tmp_path: Path, capsys: Any) -> None:
    draft = ascend("W8A8_DYNAMIC", "W8A8_DYNAMIC")
    assert draft.config is not None
    draft.config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = draft.write(tmp_path / "mistral")
    report = check_folder(folder)
    assert report.servers["vllm-ascend"] == "takes" and report.servers["mindie"] == "not known"
    assert main(["check", str(folder)]) == 0  # nobody surely refuses it
    assert main(["check", str(folder), "--server", "mindie"]) == 1
    assert "mindie: not known (whether MindIE takes" in capsys.readouterr().out
