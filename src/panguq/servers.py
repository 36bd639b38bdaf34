"""Which server takes which scheme, as data: no server runs here.

What a server cannot take is said before anything is calibrated (`server_verdicts`), when a
checkpoint is written, and when a folder is checked (`panguq check`), always out of this table.
`SUPPORT` holds for the newest release of each server, `CHANGES` what is otherwise in another one.

Sources: vllm-ascend 0.18 and 0.23 (PyPI) and its main branch of August 2026, vLLM 0.23 and 0.32,
SGLang 0.5.23, MindIE-LLM (atb_models), msModelSlim, and the pages of op-plugin and aclnn for the
NPU ops that those servers call. What was run of it `panguq.server_releases` says; nothing was run
on an NPU by panguq's authors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.limits import W4A8_GROUP
from panguq.server_releases import MAIN, Server

ServedFormat: TypeAlias = Literal["ascend", "compressed-tensors", "gptq", "awq"]
NPU_SERVERS: tuple[Server, ...] = ("vllm-ascend", "mindie", "sglang")
READS: dict[Server, tuple[ServedFormat, ...]] = {
    "vllm-ascend": ("ascend", "compressed-tensors"),
    "mindie": ("ascend",),
    "sglang": ("ascend", "compressed-tensors", "gptq", "awq"),
    "vllm": ("compressed-tensors", "gptq", "awq"),
    "transformers": ("compressed-tensors", "gptq", "awq"),
}
WEIGHT_ONLY: tuple[ServedFormat, ...] = ("gptq", "awq")
"""These hold weights alone, with or without zero points."""
# Modules that servers join into one matmul, by the last part of their names.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Support:
    """Whether a server has a dense kernel for a scheme out of a format, and what to do if not.

    note: what a server that takes it computes otherwise than panguq does.
    no_bias: why it takes none with a bias; empty if it does.
    """

    takes: bool
    reason: str = ""
    instead: str = ""
    source: str = ""
    note: str = ""
    no_bias: str = ""


_YES = Support(True)
_MODELSLIM = "vllm-ascend, quantization/modelslim_config.py and methods/"
_ASCEND_CT = "vllm-ascend, quantization/compressed_tensors_config.py"
_SGLANG = "SGLang 0.5.23, layers/quantization/modelslim/modelslim.py"
_SGLANG_CT = "SGLang 0.5.23, layers/quantization/compressed_tensors/"
_SGLANG_GPTQ = "SGLang 0.5.23, hardware_backend/npu/quantization/gptq_kernels.py"
_VLLM_CT = "vLLM, quantization/compressed_tensors/compressed_tensors.py"
_MINDIE = "MindIE-LLM, examples/atb_models/atb_llm/utils/quantize/"
_NOT_WRITTEN = "panguq writes no checkpoint of this scheme for it"


_WRONG = (
    "it takes the codes for float weights and computes something else without a word (it logs "
    "'Unsupported Linear modelslim scheme')"
)
_MARLIN = "its kernel of weight-only schemes is for CUDA"
_ONE_RULE = "on an NPU it reads every linear by the config's bits, whatever `dynamic` says"


def _no(reason: str, instead: str, source: str = "") -> Support:
    return Support(False, reason, instead, source)


_FEWER_BITS = {"W3A16": _YES, "W2A16": _YES}
SUPPORT: dict[tuple[Server, ServedFormat], dict[str, Support]] = {
    ("vllm-ascend", "ascend"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": _YES,
        "W4A8": Support(
            True,
            source="vllm-ascend 0.23, quantization/methods/w4a8.py, run on CPU tensors",
            note="it computes dense W4A8 as W4A16: the inputs stay float",
            no_bias="it leaves the bias of dense W4A8 out without a word",
        ),
        "W4A16": _no("it has no dense W4A16 (vllm-ascend issue #6481)", "W8A16", _MODELSLIM),
        "W4A16_ASYM": _no("it has no dense W4A16 (issue #6481)", "W8A16", _MODELSLIM),
        "W4A4": _no(_NOT_WRITTEN, "recipe w4a4-flat, or W8A8_DYNAMIC", _MODELSLIM),
        "W4A4_FLATQUANT": _YES,
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
        "W4A8": Support(
            True,
            source="MindIE-LLM, w4a8_operation.cpp; aclnnQuantMatmulV5",
            no_bias="its int8 x int4 kernel takes no bias",
        ),
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
        "W4A4_FLATQUANT": _no("panguq knows no kernel of it", "W8A8_DYNAMIC", _MINDIE),
    },
    ("sglang", "ascend"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": _no(_WRONG, "W8A8_DYNAMIC, or W4A16 with format='gptq'", _SGLANG),
        "W4A8": _no(_WRONG, "W8A8_DYNAMIC, or W4A16 with format='gptq'", _SGLANG),
        "W4A16": _no(_WRONG, "format='gptq' or 'awq'", _SGLANG),
        "W4A16_ASYM": _no(_WRONG, "format='awq'", _SGLANG),
        "W4A4": _no(_NOT_WRITTEN, "W8A8_DYNAMIC", _SGLANG),
        "W4A4_FLATQUANT": _no(_WRONG, "W8A8_DYNAMIC", _SGLANG),
    },
    ("sglang", "compressed-tensors"): {
        "W8A8": _no("it refuses static inputs on an NPU", "format='ascend'", _SGLANG_CT),
        "W8A8_DYNAMIC": _YES,
        "W8A16": _no(_MARLIN, "format='gptq'", _SGLANG_CT),
        "W4A16": _no(_MARLIN, "format='gptq' or 'awq'", _SGLANG_CT),
        "W4A16_ASYM": _no(_MARLIN, "format='awq'", _SGLANG_CT),
        "W4A8": _no("it has W4A8 for experts alone", "W8A8_DYNAMIC", _SGLANG_CT),
        "W4A4": _no(_NOT_WRITTEN, "W8A8_DYNAMIC", _SGLANG_CT),
    },
    ("sglang", "gptq"): {
        "W4A16": Support(True, source=_SGLANG_GPTQ, note=_ONE_RULE),
        "W8A16": Support(True, source=_SGLANG_GPTQ, note=_ONE_RULE),
        "W4A16_ASYM": _no(
            "its kernel for NPUs subtracts zero points where it should add them, and computes "
            "something else without a word",
            "format='awq'",
            _SGLANG_GPTQ,
        ),
    },
    ("sglang", "awq"): {"W4A16": _YES, "W4A16_ASYM": _YES},
    ("vllm", "compressed-tensors"): {
        "W8A8": _YES,
        "W8A8_DYNAMIC": _YES,
        "W8A16": Support(
            True,
            source="vLLM 0.32 on a CPU, run: no kernel for uint8b128",
            note="it has a kernel of 8-bit weights alone for GPUs, and none for CPUs",
        ),
        "W4A16": _YES,
        "W4A16_ASYM": _YES,
        "W4A8": _no(
            "its only kernel for 4-bit weights with int8 inputs runs on CPUs (run there, 0.32)",
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

CHANGES: dict[tuple[Server, str], dict[tuple[ServedFormat, str], Support]] = {
    ("vllm-ascend", MAIN): {
        ("ascend", "W4A8"): _no(
            "its main branch has W4A8 kernels for experts of MoE models alone, per channel; the "
            "releases to 0.23 take dense ones",
            "W8A8_DYNAMIC",
            _MODELSLIM,
        ),
    },
}
"""What is otherwise in a release than in the newest one."""


# Of a mixture's experts, where that is otherwise than for dense linears.
EXPERTS: dict[tuple[Server, ServedFormat], dict[str, Support]] = {
    ("vllm-ascend", "ascend"): {
        "W8A8": _no("its experts have dynamic inputs alone", "W8A8_DYNAMIC", _MODELSLIM),
        "W8A16": _no("it has no W8A16 for experts", "W8A8_DYNAMIC", _MODELSLIM),
        "W4A8": _YES,
    },
    ("vllm-ascend", "compressed-tensors"): {"W4A8": _YES, "W4A16": _YES},
    ("sglang", "ascend"): {
        "W8A8": _no("its experts have dynamic inputs alone", "W8A8_DYNAMIC", _SGLANG),
        "W8A16": _no("it has no W8A16 for experts", "W8A8_DYNAMIC", _SGLANG),
        "W4A8": _YES,
    },
    ("sglang", "compressed-tensors"): {"W4A8": _YES, "W4A16": _YES},
}
PER_CHANNEL_EXPERTS = ("W4A8",)
"""The schemes of experts that vllm-ascend takes with one scale for each output alone."""


# The format's types of linears, whoever wrote them: panguq's scheme of the name, or what differs.
ASCEND_TYPES: dict[str, str] = {
    "W8A8": "W8A8",
    "W8A8_DYNAMIC": "W8A8_DYNAMIC",
    "W8A8_MIX": "W8A8",
    "W8A16": "W8A16",
    "W4A16": "W4A16",
    "W4A8_DYNAMIC": "W4A8",
    "W4A4_DYNAMIC": "W4A4",
    "W4A4_FLATQUANT_DYNAMIC": "W4A4_FLATQUANT",
}
_OF_OTHERS: dict[tuple[Server, str], Support] = {
    ("sglang", "W8A8_MIX"): _no(_WRONG, "W8A8_DYNAMIC", _SGLANG),
    ("mindie", "W4A16"): _YES,
    ("vllm-ascend", "W4A4_DYNAMIC"): _YES,
    ("sglang", "W4A4_DYNAMIC"): _YES,
    ("mindie", "W4A4_DYNAMIC"): _no("panguq knows no kernel of it", "W4A8_DYNAMIC", _MINDIE),
}


def ascend_type(
    server: Server, kind: str, *, experts: bool = False, version: str | None = None
) -> Support | None:
    """Whether a server has a kernel for a type of AscendV1's; None for an unknown type. experts:
    for those of a mixture. version: that of a `Release`."""
    if kind not in ASCEND_TYPES:
        return None
    of_others = _OF_OTHERS.get((server, kind))
    return of_others or support(server, "ascend", ASCEND_TYPES[kind], None, experts, version)


def support(
    server: Server,
    form: ServedFormat,
    scheme: str,
    group_size: int | None = None,
    experts: bool = False,
    version: str | None = None,
    has_bias: bool = False,
) -> Support:
    """The table's entry for a scheme's name, with or without options (`W4A16-g64`).

    group_size: None for one scale for each output. experts: for those of a mixture. version: that
    of a `Release`; None for the newest. has_bias: for a linear with a bias.

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
    if not experts:
        entry = CHANGES.get((server, version or ""), {}).get((form, base), entry)
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
    if entry.takes and has_bias and entry.no_bias:
        return _no(entry.no_bias, "W8A8_DYNAMIC for linears with a bias", entry.source)
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
