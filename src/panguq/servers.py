"""Which server takes which scheme, as data: no server runs here.

What a server cannot take is said before anything is calibrated (`server_verdicts`), when a
checkpoint is written, and when a folder is checked (`panguq check`), always out of this table.

Sources: the public repositories of vllm-ascend (quantization/, August 2026), vLLM
(compressed_tensors.py), MindIE-LLM (atb_models) and msModelSlim, and the pages of op-plugin and
aclnn for the NPU ops that those servers call. Nothing of it was run on an NPU by panguq's authors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from panguq.errors import InputError
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.limits import W4A8_GROUP

Server: TypeAlias = Literal["vllm-ascend", "mindie", "vllm", "transformers"]
ServedFormat: TypeAlias = Literal["ascend", "compressed-tensors", "gptq", "awq"]
SERVERS: tuple[Server, ...] = ("vllm-ascend", "mindie", "vllm", "transformers")
NPU_SERVERS: tuple[Server, ...] = ("vllm-ascend", "mindie")
READS: dict[Server, tuple[ServedFormat, ...]] = {
    "vllm-ascend": ("ascend", "compressed-tensors"),
    "mindie": ("ascend",),
    "vllm": ("compressed-tensors", "gptq", "awq"),
    "transformers": ("compressed-tensors", "gptq", "awq"),
}
WEIGHT_ONLY: tuple[ServedFormat, ...] = ("gptq", "awq")
"""These hold weights alone, with or without zero points."""
# Modules that servers join into one matmul, by the last part of their names.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Support:
    """Whether a server has a dense kernel for a scheme out of a format, and what to do if not."""

    takes: bool
    reason: str = ""
    instead: str = ""
    source: str = ""


_YES = Support(True)
_MODELSLIM = "vllm-ascend, quantization/modelslim_config.py and methods/"
_ASCEND_CT = "vllm-ascend, quantization/compressed_tensors_config.py"
_VLLM_CT = "vLLM, quantization/compressed_tensors/compressed_tensors.py"
_MINDIE = "MindIE-LLM, examples/atb_models/atb_llm/utils/quantize/"
_NOT_WRITTEN = "panguq writes no checkpoint of this scheme for it"


def _no(reason: str, instead: str, source: str = "") -> Support:
    return Support(False, reason, instead, source)


_FEWER_BITS = {"W3A16": _YES, "W2A16": _YES}
SUPPORT: dict[tuple[Server, ServedFormat], dict[str, Support]] = {
    ("vllm-ascend", "ascend"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": _YES,
        "W4A8": _no(
            "its W4A8 kernels are for experts of MoE models alone, per channel",
            "W8A8_DYNAMIC",
            _MODELSLIM,
        ),
        "W4A16": _no("it has no dense W4A16 (vllm-ascend issue #6481)", "W8A16", _MODELSLIM),
        "W4A16_ASYM": _no("it has no dense W4A16 (issue #6481)", "W8A16", _MODELSLIM),
        "W4A4": _no(_NOT_WRITTEN, "W8A8_DYNAMIC", _MODELSLIM),
    },
    ("vllm-ascend", "compressed-tensors"): {
        "W8A8": _no(
            "it wants static activations without zero points", "format='ascend'", _ASCEND_CT
        ),
        "W8A8_DYNAMIC": _YES,
        "W8A16": _no("no compressed-tensors scheme of it fits", "format='ascend'", _ASCEND_CT),
        "W4A8": _no("its W4A8 is for MoE models alone", "W8A8_DYNAMIC", _ASCEND_CT),
        "W4A16": _no("its W4A16 is for MoE models alone", "W8A16, format='ascend'", _ASCEND_CT),
        "W4A16_ASYM": _no(
            "it takes 4-bit weights without zero points only", "W8A16, format='ascend'", _ASCEND_CT
        ),
        "W4A4": _no(_NOT_WRITTEN, "W8A8_DYNAMIC", _ASCEND_CT),
    },
    ("mindie", "ascend"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": _YES,
        "W4A8": _YES,
        "W4A16": _no(
            "it reads msModelSlim's older per-group W4A16, which panguq does not write",
            "W8A16 or W4A8",
            _MINDIE,
        ),
        "W4A16_ASYM": _no(
            "it reads msModelSlim's older per-group W4A16, which panguq does not write",
            "W8A16 or W4A8",
            _MINDIE,
        ),
        "W4A4": _no(_NOT_WRITTEN, "W8A8_DYNAMIC", _MINDIE),
    },
    ("vllm", "compressed-tensors"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": _YES,
        "W4A16": _YES,
        "W4A16_ASYM": _YES,
        "W4A8": _no(
            "its only kernel for 4-bit weights with int8 inputs runs on CPUs",
            "W8A8_DYNAMIC",
            _VLLM_CT,
        ),
        "W4A4": _no("no scheme of it has 4-bit inputs", "W8A8_DYNAMIC", _VLLM_CT),
    },
    ("transformers", "compressed-tensors"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": _YES,
        "W4A16": _YES,
        "W4A16_ASYM": _no(
            "packed zero points load with CompressedTensorsConfig(dequantize=True) alone",
            "W4A16, or format='gptq'",
            "transformers 5.24 with compressed-tensors 0.20, run on a CPU",
        ),
        "W4A8": _YES,
        "W4A4": _no(_NOT_WRITTEN, "W4A8 or W8A8_DYNAMIC"),
    },
    ("vllm", "gptq"): {"W4A16": _YES, "W4A16_ASYM": _YES, **_FEWER_BITS, "W8A16": _YES},
    ("vllm", "awq"): {"W4A16": _YES, "W4A16_ASYM": _YES},
    ("transformers", "gptq"): {"W4A16": _YES, "W4A16_ASYM": _YES, **_FEWER_BITS, "W8A16": _YES},
    ("transformers", "awq"): {"W4A16": _YES, "W4A16_ASYM": _YES},
}


# Of a mixture's experts, where that is otherwise than for dense linears.
EXPERTS: dict[tuple[Server, ServedFormat], dict[str, Support]] = {
    ("vllm-ascend", "ascend"): {
        "W8A8": _no("its experts have dynamic inputs alone", "W8A8_DYNAMIC", _MODELSLIM),
        "W8A16": _no("it has no W8A16 for experts", "W8A8_DYNAMIC", _MODELSLIM),
        "W4A8": _YES,
    },
    ("vllm-ascend", "compressed-tensors"): {"W4A8": _YES, "W4A16": _YES},
}
PER_CHANNEL_EXPERTS = ("W4A8",)
"""The schemes of experts that vllm-ascend takes with one scale for each output alone."""


def _dense(vllm_ascend: Support, mindie: Support) -> dict[Server, Support]:
    return {"vllm-ascend": vllm_ascend, "mindie": mindie}


_ASCEND, _MINDIE_TAKES = SUPPORT["vllm-ascend", "ascend"], SUPPORT["mindie", "ascend"]
# The format's types of linears, whoever wrote them.
ASCEND_TYPES: dict[str, dict[Server, Support]] = {
    "W8A8": _dense(_YES, _YES),
    "W8A8_DYNAMIC": _dense(_YES, _YES),
    "W8A8_MIX": _dense(_YES, _YES),
    "W8A16": _dense(_YES, _YES),
    "W4A16": _dense(_ASCEND["W4A16"], _YES),
    "W4A8_DYNAMIC": _dense(_ASCEND["W4A8"], _MINDIE_TAKES["W4A8"]),
    "W4A4_DYNAMIC": _dense(_YES, _no("panguq knows no kernel of it", "W4A8_DYNAMIC", _MINDIE)),
}


def support(
    server: Server,
    form: ServedFormat,
    scheme: str,
    group_size: int | None = None,
    experts: bool = False,
) -> Support:
    """The table's entry for a scheme's name, with or without options (`W4A16-g64`).

    group_size: None for one scale for each output. experts: for those of a mixture.

    No server takes from panguq a scheme without an entry (weights of 6, 3, 2 or 1 bits, another
    symmetry).
    """
    from panguq.ir.number_format import Integer  # these two import torch, which --help does without
    from panguq.ir.quant_spec import SCHEMES

    base, *options = scheme.upper().split("-")
    if base == "FLOAT":
        return _YES
    if form not in READS[server]:
        return _no(f"it does not read the format {form!r}", f"format={READS[server][0]!r}")
    entry = SUPPORT[server, form].get(base)
    if form in WEIGHT_ONLY:
        return entry or _no(f"the format has no {base}", "W4A16")
    if experts:
        entry = EXPERTS.get((server, form), {}).get(base, entry)
        if server == "vllm-ascend" and base in PER_CHANNEL_EXPERTS and group_size is not None:
            return _no("its W4A8 experts have one scale for each output", "W4A8-per-channel")
    formats = SCHEMES[base].formats if base in SCHEMES else ()
    if not all(isinstance(known, Integer) for known in formats):
        return _no(f"panguq writes no codes of {formats[0]} for it", "W8A8_DYNAMIC")
    if entry is None or "SYM" in options or "ASYM" in options:
        return _no(f"panguq knows no kernel of it for {scheme}", "W8A8_DYNAMIC")
    if entry.takes and form == "ascend" and base == "W4A8" and group_size not in (None, W4A8_GROUP):
        return _no(
            f"its int8 x int4 kernel takes one scale per {W4A8_GROUP} inputs, not {group_size}",
            "W4A8 where k is a multiple of 256, W8A8_DYNAMIC elsewhere",
            "aclnnQuantMatmulV5",
        )
    return entry


def too_large(server: Server, scheme: str, n: int, k: int) -> str:
    """Why a quantized matmul `[m, k] x [n, k]^T` is beyond the NPU ops; empty if it is not."""
    if server not in NPU_SERVERS or scheme == "FLOAT":
        return ""
    largest = ATLAS_A2.largest_dimension
    if k > largest:
        return f"k = {k} is more than the {largest} that the NPU's quantized matmuls take"
    in_chunks = server == "vllm-ascend" and scheme == "W8A8_DYNAMIC"
    if n > largest and not in_chunks:
        return f"n = {n} is more than the {largest} that the NPU's quantized matmuls take"
    return ""


def find_server(name: str) -> Server:
    """A server by name. Raises InputError for one that panguq knows nothing of."""
    for server in SERVERS:
        if server == name:
            return server
    raise InputError(f"unknown server {name!r}", f"the servers are {', '.join(SERVERS)}")
