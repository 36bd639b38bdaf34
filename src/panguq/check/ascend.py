"""Rules for folders in msModelSlim's AscendV1 format: what loaders look up, and in which form.

What loaders do was read in vllm-ascend (quantization/modelslim_config.py, method_adapters.py,
methods/) and MindIE-LLM (examples/atb_models); the format in msModelSlim's writer and its pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from panguq.check.ascend_parts import FLOATS, PARTS
from panguq.check.ascend_values import VALUE_RULES
from panguq.check.files import NOBODY, CheckedFolder, Hit, Rule, shards_of
from panguq.kernels.ascend.limits import W4A8_GROUP
from panguq.server_releases import Server
from panguq.servers import ASCEND_TYPES, FUSED, NPU_SERVERS, Support, ascend_type, too_large

_VLLM: tuple[Server, ...] = ("vllm-ascend",)
_MINDIE: tuple[Server, ...] = ("mindie",)
_LOOKING_UP: tuple[Server, ...] = ("vllm-ascend", "mindie")
_LOADER = "vllm-ascend, quantization/modelslim_config.py"


def quantized(folder: CheckedFolder) -> Iterator[tuple[str, str, int, int]]:
    """(path, type, n, k) of each linear that the description says is quantized."""
    for name, kind in tensor_types(folder).items():
        path, _, leaf = name.rpartition(".")
        info = folder.tensors.get(name)
        if leaf != "weight" or kind == "FLOAT" or info is None or len(info.shape) != 2:
            continue
        n, k = info.shape
        linears = folder.model.linears if folder.model is not None else {}
        n, k = linears.get(path, (2 * n if kind == "W4A8_DYNAMIC" else n, k))
        yield path, kind, n, k


def tensor_types(folder: CheckedFolder) -> dict[str, str]:
    """The description's entries that are types of tensors; those of the model have no dot."""
    entries = (folder.description or {}).items()
    return {name: kind for name, kind in entries if "." in name and isinstance(kind, str)}


# --- the description ----------------------------------------------------------------------------


def _no_description(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.description is not None:
        return
    others = sorted(file.name for file in folder.path.glob("quant_model_description_*.json"))
    more = f"; rename {others[0]}" if others else ""
    yield Hit("quant_model_description.json", f"missing: the loader opens it by this name{more}")


def _leftover_quantization_config(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.quantization_config is not None:
        yield Hit(
            "config.json",
            "it has a quantization_config, which contradicts --quantization ascend; remove it",
        )


def _described_missing(folder: CheckedFolder) -> Iterator[Hit]:
    for name, kind in tensor_types(folder).items():
        tied = folder.is_tied and name in (
            folder.model.tied if folder.model else ("lm_head.weight",)
        )
        if name not in folder.tensors and not tied:
            yield Hit(name, f"described as {kind}, and in no file")


def _undescribed_module(folder: CheckedFolder) -> Iterator[Hit]:
    """The type of every linear and embedding is looked up; there is no default."""
    if folder.description is None:  # which another rule says
        return
    known = tensor_types(folder)
    if folder.model is not None:
        paths = [*folder.model.embeddings, *folder.model.linears]
        names = [f"{path}.weight" for path in paths]
    else:
        stored = folder.tensors.items()
        names = [n for n, t in stored if n.endswith(".weight") and len(t.shape) == 2]
    for name in names:
        if name not in known:
            yield Hit(name, "the description has no entry for it: KeyError in the loader")


def _undescribed_norm_bias(folder: CheckedFolder) -> Iterator[Hit]:
    """vllm-ascend makes norm biases only if the description speaks of one."""
    known = tensor_types(folder)
    for name in folder.tensors if known else ():
        if name.endswith("norm.bias") and name not in known:
            yield Hit(name, "not described, so that norms get no bias and this one is dropped")


def _undescribed_tensor(folder: CheckedFolder) -> Iterator[Hit]:
    known = tensor_types(folder)
    for name in folder.tensors if known else ():
        if name not in known and not name.endswith((".weight", "norm.bias")):
            yield Hit(name, "the description has no entry for it")


def _unknown_type(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, _, _ in quantized(folder):
        if kind not in ASCEND_TYPES:
            yield Hit(f"{path}.weight", f"type {kind!r} is none that panguq knows a kernel for")


# --- kernels ------------------------------------------------------------------------------------


def _entries(folder: CheckedFolder) -> Iterator[tuple[str, str, Server, Support]]:
    """(path, type, server, its table's entry) of every quantized linear."""
    for path, kind, _, _ in quantized(folder):
        is_expert = _EXPERT.match(f"{path}.weight") is not None
        for server in NPU_SERVERS:
            version = folder.versions.get(server)
            entry = ascend_type(server, kind, experts=is_expert, version=version)
            if entry is not None:
                yield path, kind, server, entry


def _no_kernel(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, server, entry in _entries(folder):
        if not entry.takes:
            message = f"{server} cannot run {kind}: {entry.reason}; use {entry.instead}"
            yield Hit(f"{path}.weight", message, (server,))


def _computes_otherwise(folder: CheckedFolder) -> Iterator[Hit]:
    said = set()
    for path, _, server, entry in _entries(folder):
        if entry.takes and entry.note and (server, entry.note) not in said:
            said.add((server, entry.note))
            yield Hit(f"{path}.weight", f"{server}: {entry.note}")


def _too_large(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, n, k in quantized(folder):
        for server in NPU_SERVERS:
            why = too_large(server, kind, n, k)
            if why:
                yield Hit(f"{path}.weight", f"{why} ({server})", (server,))


def _mixed_fused_types(folder: CheckedFolder) -> Iterator[Hit]:
    types = tensor_types(folder)
    paths = [name.removesuffix(".weight") for name in types if name.endswith(".weight")]
    for whole, shards in shards_of(paths, FUSED):
        kinds = {shard: types[f"{shard}.weight"] for shard in shards}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(
                f"{shard.rpartition('.')[2]} {kind}" for shard, kind in kinds.items()
            )
            yield Hit(whole, f"its shards have several types ({listed}): the loader stops")


def _mixed_expert_types(folder: CheckedFolder) -> Iterator[Hit]:
    """The loader gives all of a layer's experts the type of the first one's."""
    types: dict[str, dict[str, str]] = {}
    for name, kind in tensor_types(folder).items():
        found = _EXPERT.match(name)
        if found:
            types.setdefault(found[1], {}).setdefault(kind, name)
    for layer, kinds in types.items():
        if len(kinds) > 1:
            listed = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
            yield Hit(layer, f"its experts have several types, and the loader takes one: {listed}")


_EXPERT = re.compile(r"(.+\.experts)\.\d+\.\w+\.weight$")


def _w4a8_bias(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, server, entry in _entries(folder):
        if entry.takes and entry.no_bias and f"{path}.bias" in folder.tensors:
            yield Hit(f"{path}.bias", f"{server}, {kind}: {entry.no_bias}", (server,))


def _w4a8_groups(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, _, k in quantized(folder):
        if kind != "W4A8_DYNAMIC":
            continue
        name = f"{path}.weight_scale_second"
        if name not in folder.tensors:
            breaks = _MINDIE if _EXPERT.match(f"{path}.weight") else None
            yield Hit(name, "missing: the loader multiplies weight_scale by it", breaks)
        elif k % W4A8_GROUP:
            yield Hit(name, f"k = {k} is no multiple of the kernel's group of {W4A8_GROUP}")


def _w8a16_bias(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.dtype != "bfloat16":
        return
    for path, kind, _, _ in quantized(folder):
        if kind == "W8A16" and f"{path}.bias" in folder.tensors:
            yield Hit(
                f"{path}.bias",
                "vllm-ascend hands it over in bfloat16, where npu_weight_quant_batchmatmul's page "
                "wants float32; whether the NPU takes it is not established",
            )
            return  # once is enough


def _float32_model(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.config is not None and folder.dtype not in ("float16", "bfloat16"):
        what = folder.dtype or "not given"
        yield Hit("config.json", f"dtype is {what}: servers choose one, and deq_scale must fit it")


# --- forms --------------------------------------------------------------------------------------


def _missing_part(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, _, _ in quantized(folder):
        for leaf, part in PARTS.get(kind, {}).items():
            if part.required and f"{path}.{leaf}" not in folder.tensors:
                yield Hit(f"{path}.{leaf}", f"missing, and {kind} needs it")


def _wrong_dtype(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, _, _ in quantized(folder):
        for leaf, part in PARTS.get(kind, {}).items():
            info = folder.tensors.get(f"{path}.{leaf}")
            if info is not None and info.dtype not in part.dtypes:
                wanted = " or ".join(part.dtypes)
                yield Hit(f"{path}.{leaf}", f"{info.dtype}, and {kind} wants {wanted}")
    for name, kind in tensor_types(folder).items():
        info = folder.tensors.get(name)
        if kind == "FLOAT" and info is not None and info.dtype not in FLOATS:
            yield Hit(name, f"{info.dtype}, and described as FLOAT")


def _wrong_shape(folder: CheckedFolder) -> Iterator[Hit]:
    for path, kind, n, k in quantized(folder):
        for leaf, part in PARTS.get(kind, {}).items():
            info = folder.tensors.get(f"{path}.{leaf}")
            shapes = part.shapes(n, k)
            if info is not None and info.shape not in shapes:
                wanted = " or ".join(str(list(shape)) for shape in shapes)
                yield Hit(f"{path}.{leaf}", f"{list(info.shape)}, and {kind} wants {wanted}")
    parameters = folder.model.parameters if folder.model is not None else {}
    for name, kind in tensor_types(folder).items():
        info = folder.tensors.get(name)
        expected = parameters.get(name)
        if kind == "FLOAT" and info is not None and expected not in (None, info.shape):
            yield Hit(name, f"{list(info.shape)}, and the architecture's is {list(expected or ())}")


def _deq_scale_dtype(folder: CheckedFolder) -> Iterator[Hit]:
    wanted = {"bfloat16": "F32", "float16": "I64"}.get(folder.dtype)
    for path, kind, _, _ in quantized(folder):
        name = f"{path}.deq_scale"
        info = folder.tensors.get(name)
        if kind in ("W8A8", "W8A8_MIX") and wanted and info is not None and info.dtype != wanted:
            yield Hit(name, f"{info.dtype}, and a {folder.dtype} model wants {wanted}")


ASCEND_RULES = (
    Rule("no-description", NPU_SERVERS, _no_description, _LOADER),
    Rule("leftover-quantization-config", _VLLM, _leftover_quantization_config, _LOADER),
    Rule("described-missing", NPU_SERVERS, _described_missing),
    Rule("undescribed-module", _LOOKING_UP, _undescribed_module, "vllm-ascend #569, #580, #619"),
    Rule("undescribed-norm-bias", _VLLM, _undescribed_norm_bias, "vllm-ascend, ops/layernorm.py"),
    Rule("undescribed-tensor", NOBODY, _undescribed_tensor),
    Rule("unknown-type", NPU_SERVERS, _unknown_type, _LOADER),
    Rule("no-kernel", NPU_SERVERS, _no_kernel, "see panguq.servers"),
    Rule("computes-otherwise", NOBODY, _computes_otherwise, "see panguq.servers"),
    Rule("too-large", NPU_SERVERS, _too_large, "op-plugin, npu_quant_matmul"),
    Rule("mixed-fused-types", _VLLM, _mixed_fused_types, "vllm-ascend #2588"),
    Rule("mixed-expert-types", _VLLM, _mixed_expert_types, _LOADER),
    Rule("w4a8-bias", NPU_SERVERS, _w4a8_bias, "see panguq.servers"),
    Rule("w4a8-groups", _LOOKING_UP, _w4a8_groups, "MindIE-LLM, atb_llm/utils/quantize/w4a8.py"),
    Rule("w8a16-bias", NOBODY, _w8a16_bias, "vllm-ascend, methods/w8a16.py; op-plugin"),
    Rule("float32-model", NOBODY, _float32_model, "vllm-ascend, methods/w8a8/w8a8_static.py"),
    Rule("missing-part", NPU_SERVERS, _missing_part),
    Rule("wrong-dtype", NPU_SERVERS, _wrong_dtype),
    Rule("wrong-shape", NPU_SERVERS, _wrong_shape),
    Rule("deq-scale-dtype", NPU_SERVERS, _deq_scale_dtype, "vllm-ascend, w8a8_static.py"),
    *VALUE_RULES,
)
