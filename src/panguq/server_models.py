"""Which server has a class for which model, as data: no server runs here.

A scheme that a server has kernels for (`panguq.servers`) is of no use where it cannot build the
model. transformers and the vLLMs build it by name, MindIE by type; what is not known is said so.

Sources: the installed transformers' own table of model types (not what panguq registers with it);
the registry of vLLM 0.23 (model_executor/models/registry.py), whose classes vllm-ascend 0.23 takes
over; MindIE-LLM's list of models (docs/zh/user_guide/model_support_list.md). Whether a class of
that name computes what panguq's does was not run, but for the models that the pages on serving
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from panguq.server_releases import Server

OPENPANGU_TYPES = (
    "PanguEmbedded", "PanguProMoE", "pangu_ultra_moe", "openpangu_v2", "pangu_v2_moe",
)  # fmt: skip
# Of its models of text those that transformers has, too, and openPangu's.
_VLLM_CLASSES = """
BertForSequenceClassification BertForTokenClassification BertModel ErnieForSequenceClassification
ErnieForTokenClassification ErnieModel GPT2ForSequenceClassification GPT2LMHeadModel Gemma2Model
Gemma3TextModel JambaForSequenceClassification LlamaModel MistralModel
ModernBertForSequenceClassification ModernBertForTokenClassification ModernBertModel
NomicBertModel Qwen2Model RobertaForMaskedLM RobertaForSequenceClassification RobertaModel
XLMRobertaForSequenceClassification XLMRobertaModel
"""
_VLLM_CAUSAL_CLASSES = """
AXK1 Afmoe Apertus Arcee Bamba Bloom Cohere2 Cohere2Moe Cohere Cwm Dbrx DeepseekV2 DeepseekV32
DeepseekV3 DeepseekV4 Dots1 Ernie4_5 Ernie4_5_Moe Exaone4 Falcon FalconH1 FalconMamba FlexOlmo
GPTBigCode GPTJ GPTNeoX Gemma2 Gemma3 Gemma3n Gemma4 Gemma Glm4 Glm4Moe Glm4MoeLite Glm
GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HYV3 HunYuanDenseV1
HunYuanMoEV1 HyperCLOVAX Jais2 Jamba KimiLinear Laguna Lfm2 Lfm2Moe Llama4 Llama LongcatFlash
Mamba2 Mamba Mellum MiMoV2Flash MiniCPM3 MiniMax MiniMaxM2 Ministral3 Mistral Mixtral Mpt
Nemotron NemotronH OPT Olmo2 Olmo3 Olmo OlmoHybrid Olmoe PanguEmbedded PanguProMoEV2
PanguUltraMoE Persimmon Phi3 Phi PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next SeedOss
StableLm Starcoder2 Zamba2
"""
"""These end in `ForCausalLM`."""
_NOT_IN_VLLM = ("PanguProMoEForCausalLM", "OpenPanguV2ForCausalLM", "PanguV2MoEForCausalLM")
_NOT_IN_SGLANG = """
AXK1 Bamba Bloom Cwm Dots1 Ernie4_5 Falcon FlexOlmo GPTNeoX Glm HyperCLOVAX Jais2 Jamba MiniMax Mpt
Nemotron Olmo3 OlmoHybrid PanguEmbedded PanguProMoEV2 PanguUltraMoE SeedOss Zamba2
"""
"""Of these of vLLM's, SGLang 0.5.23 has no class (srt/models); its fallback, which runs
transformers' own code, was not looked at."""
_MINDIE_TYPES = ("llama", "qwen2", "qwen3")
"""Dense models alone: its list has mixtures, too, but how it reads their experts is not known."""
DEVICES = range(2, 17)
"""How many devices of one machine may share a layer's experts."""
GROUPED_EXPERTS = 1024
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "num_routed_experts")
_INNER = ("moe_intermediate_size", "intermediate_size")


@dataclass(frozen=True)
class ClassAnswer:
    """Whether a server has a class for a model, None where that is not known; and a sentence that
    says so where it is not True."""

    has: bool | None
    reason: str = ""


def class_answer(server: Server, config: Mapping[str, Any]) -> ClassAnswer:
    """Whether the server can build the model of a config.json, out of which `model_type`,
    `architectures` and `auto_map` are read."""
    model_type = config.get("model_type")
    names = config.get("architectures")
    architectures = [str(name) for name in names] if isinstance(names, list | tuple) else []
    if server == "transformers":
        return _of_transformers(model_type, "auto_map" in config)
    if server == "mindie":
        return _of_mindie(model_type)
    if server == "sglang":
        return _of_sglang(architectures)
    return _of_vllm(architectures, "" if server == "vllm" else f", whose classes {server} takes,")


def missing_classes(servers: Iterable[Server], config: Mapping[str, Any]) -> list[str]:
    """A sentence for each of the servers that has no class for the model of a config.json."""
    answers = {server: class_answer(server, config) for server in servers}
    return [
        f"{server} will not load this checkpoint: {answer.reason}"
        for server, answer in answers.items()
        if answer.has is False
    ]


def expert_notes(config: Mapping[str, Any]) -> list[str]:
    """A sentence for each reason why servers cannot share out a mixture's experts evenly, or why
    one NPU cannot hold them; none for other models.

    vLLM's tensor parallelism cuts the inner size of each expert into equal parts and stops where
    that does not go; its expert parallelism gives some devices one expert more, but neither it nor
    vllm-ascend balances their load then (fused_moe/layer.py, eplb/core/eplb_utils.py). One grouped
    matmul of an NPU takes 1024 experts (aclnnGroupedMatmul).
    """
    experts = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), 0)
    inner = next((config[key] for key in _INNER if isinstance(config.get(key), int)), 0)
    if experts < 2 or inner < 1:
        return []
    notes = []
    if not any(experts % size == 0 or inner % size == 0 for size in DEVICES):
        notes.append(
            f"{experts} experts of inner size {inner}: no number of devices from {DEVICES[0]} to "
            f"{DEVICES[-1]} divides either, so that no server shards them evenly"
        )
    if experts > GROUPED_EXPERTS:
        notes.append(
            f"{experts} experts: a grouped matmul of an NPU takes {GROUPED_EXPERTS}, so that they "
            f"need expert parallelism on {-(-experts // GROUPED_EXPERTS)} NPUs or more"
        )
    return notes


def _of_transformers(model_type: object, brings_code: bool) -> ClassAnswer:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not isinstance(model_type, str):
        return ClassAnswer(None, "config.json says no model_type, by which transformers chooses")
    if model_type in CONFIG_MAPPING_NAMES:
        return ClassAnswer(True)
    none = f"transformers {transformers.__version__} has no class for model type {model_type!r}"
    if brings_code:
        return ClassAnswer(None, f"{none}, and the code that the folder names was not run")
    return ClassAnswer(False, none)


def _of_vllm(architectures: list[str], how: str) -> ClassAnswer:
    if any(map(_is_in_vllm, architectures)):
        return ClassAnswer(True)
    listed = " or ".join(architectures)
    if not listed:
        return ClassAnswer(None, "config.json names no architectures, by which vLLM chooses")
    if all(name in _NOT_IN_VLLM for name in architectures):
        return ClassAnswer(False, f"vLLM 0.23{how} has no class {listed}")
    return ClassAnswer(None, f"whether vLLM 0.23{how} has a class for {listed} was not looked up")


def _of_sglang(architectures: list[str]) -> ClassAnswer:
    absent = _NOT_IN_SGLANG.split()
    for name in architectures:
        stem = name.removesuffix("ForCausalLM")
        if stem != name and stem in _VLLM_CAUSAL_CLASSES.split() and stem not in absent:
            return ClassAnswer(True)
    listed = " or ".join(architectures) or "a model whose config.json names no architectures"
    return ClassAnswer(
        None,
        f"SGLang 0.5.23 has no class of its own for {listed}, or it was not "
        "looked up; whether its fallback takes it is not known",
    )


def _is_in_vllm(name: str) -> bool:
    stem = name.removesuffix("ForCausalLM")
    return name in _VLLM_CLASSES.split() or (stem != name and stem in _VLLM_CAUSAL_CLASSES.split())


def _of_mindie(model_type: object) -> ClassAnswer:
    if model_type in OPENPANGU_TYPES:
        llama = "; alias it to the Llama architecture" if model_type == "PanguEmbedded" else ""
        return ClassAnswer(False, f"MindIE has no openPangu{llama}")
    if model_type in _MINDIE_TYPES:
        return ClassAnswer(True)
    return ClassAnswer(None, f"whether MindIE takes model type {model_type!r} was not looked up")
