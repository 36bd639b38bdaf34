"""Which server takes which scheme, as data: no server runs here.

What a server cannot take is said before anything is calibrated (`verdicts`), when a checkpoint is
written, and when a folder is checked (`panguq check`), always out of this table.

Sources: the public repositories of vllm-ascend (quantization/, August 2026), vLLM
(compressed_tensors.py), MindIE-LLM (atb_models) and msModelSlim, and the pages of op-plugin and
aclnn for the NPU ops that those servers call. Nothing of it was run on an NPU by panguq's authors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from panguq.errors import InputError
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.limits import W4A8_GROUP

Server: TypeAlias = Literal["vllm-ascend", "mindie", "vllm", "transformers"]
ServedFormat: TypeAlias = Literal["ascend", "compressed-tensors"]
SERVERS: tuple[Server, ...] = ("vllm-ascend", "mindie", "vllm", "transformers")
NPU_SERVERS: tuple[Server, ...] = ("vllm-ascend", "mindie")
READS: dict[Server, tuple[ServedFormat, ...]] = {
    "vllm-ascend": ("ascend", "compressed-tensors"),
    "mindie": ("ascend",),
    "vllm": ("compressed-tensors",),
    "transformers": ("compressed-tensors",),
}
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
_ASYMMETRIC = "it takes 4-bit weights without zero points only"
_NOT_WRITTEN = "panguq writes no checkpoint of this scheme for it"


def _no(reason: str, instead: str, source: str = "") -> Support:
    return Support(False, reason, instead, source)


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
        "W4A16_ASYM": _no(_ASYMMETRIC, "W8A16, format='ascend'", _ASCEND_CT),
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
        "W4A16_ASYM": _no(_ASYMMETRIC, "W4A16", _VLLM_CT),
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
            "packed zero points do not load: their shape is not the one it makes",
            "W4A16",
            "transformers 5.23 with compressed-tensors 0.20, run on a CPU",
        ),
        "W4A8": _YES,
        "W4A4": _no(_NOT_WRITTEN, "W4A8 or W8A8_DYNAMIC"),
    },
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


class Matmul(Protocol):
    """What a verdict needs of a matmul `[m, k] x [n, k]^T`; a `MatmulPlan` has it."""

    @property
    def name(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def scheme(self) -> str: ...
    @property
    def group_size(self) -> int | None: ...


@runtime_checkable
class _Plan(Protocol):
    @property
    def matmuls(self) -> tuple[Matmul, ...]: ...


@dataclass(frozen=True)
class Refusal:
    """A matmul that a server has no kernel for, why, and what to choose instead."""

    matmul: str
    scheme: str
    reason: str
    instead: str
    source: str


@dataclass(frozen=True)
class ServerVerdict:
    """What a server will say to a compiled model written in `format`."""

    server: Server
    format: ServedFormat
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]

    @property
    def takes(self) -> bool:
        """Whether it has a kernel for every matmul."""
        return not self.refusals

    def render(self) -> str:
        """The verdict as text; matmuls that are refused for one reason share a line."""
        head = f"{self.server} with format={self.format!r}"
        if self.takes:
            lines = [f"{head}: takes every matmul"]
        else:
            lines = [f"{head}: refuses {len(self.refusals)} matmuls"]
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for entry in self.refusals:
            key = (entry.scheme, entry.reason, entry.instead, entry.source)
            groups.setdefault(key, []).append(entry.matmul)
        for (scheme, reason, instead, source), names in groups.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            where = f" [{source}]" if source else ""
            lines.append(f"  {names[0]}{more} ({scheme}): {reason}; choose {instead}{where}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def verdicts(
    plan_or_matmuls: _Plan | Iterable[Matmul],
    server: str,
    *,
    splits_outliers: bool = False,
    format: str | None = None,
) -> ServerVerdict:
    """The matmuls that a server has no kernel for, in the format of which it takes most.

    plan_or_matmuls: a dry run's result, or its matmuls. splits_outliers: whether the recipe may
    split channels off into a second matmul, which no format can express. format: the format to
    judge instead. Raises InputError for a server that panguq knows nothing of, or a
    format that it does not read.
    """
    known = find_server(server)
    plan = plan_or_matmuls
    rows = tuple(plan.matmuls if isinstance(plan, _Plan) else plan)
    forms = [form for form in READS[known] if format in (None, form)]
    if not forms:
        raise InputError(
            f"{server} does not read the format {format!r}", f"it reads {', '.join(READS[known])}"
        )
    refusals = {form: _refusals(rows, known, form) for form in forms}
    best = min(refusals, key=lambda form: len(refusals[form]))
    return ServerVerdict(known, best, refusals[best], _notes(rows, known, splits_outliers))


def find_server(name: str) -> Server:
    """A server by name. Raises InputError for one that panguq knows nothing of."""
    for server in SERVERS:
        if server == name:
            return server
    raise InputError(f"unknown server {name!r}", f"the servers are {', '.join(SERVERS)}")


def _refusals(rows: Iterable[Matmul], server: Server, form: ServedFormat) -> tuple[Refusal, ...]:
    found = []
    for row in rows:
        of_experts = getattr(row, "experts", 1) > 1
        entry = support(server, form, row.scheme, row.group_size, of_experts)
        limit = too_large(server, row.scheme, row.n, row.k)
        if not entry.takes:
            found.append(Refusal(row.name, row.scheme, entry.reason, entry.instead, entry.source))
        elif limit:
            found.append(Refusal(row.name, row.scheme, limit, "FLOAT", "op-plugin"))
    return tuple(found)


def _notes(rows: tuple[Matmul, ...], server: Server, splits: bool) -> tuple[str, ...]:
    notes = []
    schemes = {row.scheme.partition("-")[0] for row in rows}
    if splits:
        notes.append(
            "the recipe may split outlier channels off into float matmuls, which no checkpoint "
            "format can express; take w8a8-serving or w8a8-dynamic-serving, or another treatment"
        )
    if server == "mindie" and "W4A8" in schemes:
        notes.append("its W4A8 kernel takes no bias: choose W8A8_DYNAMIC for linears that have one")
    if server == "vllm-ascend" and "W8A16" in schemes:
        notes.append(
            "it hands a W8A16 linear's bias over in the model's dtype, where the op's page wants "
            "float32 for bfloat16: not established on an NPU"
        )
    if server in NPU_SERVERS:
        notes.append("compile with dtype=bfloat16 or float16: no NPU kernel takes float32 inputs")
    return tuple(notes)
