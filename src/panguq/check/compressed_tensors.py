"""Rules for folders in compressed-tensors' format, as transformers, vLLM and vllm-ascend load them.

Read in vLLM's and vllm-ascend's compressed_tensors code and in compressed-tensors itself; what
transformers loads was tried on a CPU with transformers 5.23 and compressed-tensors 0.20, and with
transformers 4.57 and compressed-tensors 0.13. Dense linears with integer codes only.
"""

from __future__ import annotations

from collections.abc import Iterator

from panguq.check.config_groups import (
    ConfigGroup,
    config_group_of,
    groups,
    is_ignored,
    linears_of,
    quantized,
)
from panguq.check.files import NOBODY, CheckedFolder, Hit, Rule, shards_of
from panguq.server_releases import Server
from panguq.servers import FUSED

_ALL: tuple[Server, ...] = ("transformers", "vllm", "vllm-ascend", "sglang")
_SERVING: tuple[Server, ...] = ("vllm", "vllm-ascend", "sglang")
_TRANSFORMERS: tuple[Server, ...] = ("transformers",)
_FLOATS = ("F32", "BF16", "F16")
_WITH_ACTIVATIONS = ("int-quantized", "naive-quantized")
_BITS_PER_WORD = 32


# --- the configuration --------------------------------------------------------------------------


def _unknown_method(folder: CheckedFolder) -> Iterator[Hit]:
    method = (folder.quantization_config or {}).get("quant_method")
    if method != "compressed-tensors":
        yield Hit("config.json", f"quant_method is {method!r}, of which panguq knows no rules")


def _no_groups(folder: CheckedFolder) -> Iterator[Hit]:
    if not groups(folder):
        yield Hit("config.json", "quantization_config has no config_groups with weights")


def _no_scheme(folder: CheckedFolder) -> Iterator[Hit]:
    for group in groups(folder):
        what = f"{group.name}: W{group.bits}, {group.strategy}, inputs {_inputs(group)}"
        if not _vllm_takes(group):
            yield Hit(group.name, f"vLLM has no dense scheme for {what}", ("vllm",))
        if not _vllm_ascend_takes(group):
            yield Hit(group.name, f"vllm-ascend has no dense scheme for {what}", ("vllm-ascend",))
        if not _vllm_ascend_takes(group) or group.is_static:
            yield Hit(group.name, f"sglang has no dense scheme for NPUs of {what}", ("sglang",))
        if _vllm_takes(group) and group.activation is None and group.bits == 8:
            yield Hit(group.name, f"vllm has a kernel for {what} on GPUs, and none on CPUs", ())


def _inputs(group: ConfigGroup) -> str:
    if group.activation is None:
        return "float"
    how = "dynamic" if group.activation.get("dynamic") else "static"
    symmetric = "" if group.activation.get("symmetric", True) else " with zero points"
    return f"{group.activation.get('num_bits')} bits {how}{symmetric}"


def _is_int8_input(group: ConfigGroup) -> bool:
    """Inputs of 8 bits: one scale that is stored, or one a token that is not."""
    given = group.activation
    if given is None or given.get("num_bits") != 8:
        return False
    wanted = "token" if given.get("dynamic") else "tensor"
    return bool(given.get("strategy") == wanted)


def _vllm_takes(group: ConfigGroup) -> bool:
    if group.activation is None:
        packed = group.format == "pack-quantized"
        bits = (4, 8) if group.symmetric else (4,)
        return packed and group.bits in bits and group.strategy in ("group", "channel")
    if not group.symmetric:
        return False
    return group.bits == 8 and group.strategy in ("tensor", "channel") and _is_int8_input(group)


def _vllm_ascend_takes(group: ConfigGroup) -> bool:
    plain = group.symmetric and group.bits == 8 and group.strategy == "channel"
    given = group.activation
    return plain and given is not None and _is_int8_input(group) and given.get("symmetric", True)


def _format_not_inferred(folder: CheckedFolder) -> Iterator[Hit]:
    for group in groups(folder):
        if not group.own_format and group.format != group.inferred_format:
            yield Hit(
                group.name,
                f"it has no format of its own; {group.inferred_format} is inferred and the "
                f"tensors are {group.format}, so that they are not found",
            )


def _activations_dropped(folder: CheckedFolder) -> Iterator[Hit]:
    for group in groups(folder):
        if group.activation is not None and group.format not in _WITH_ACTIVATIONS:
            yield Hit(
                group.name,
                f"format {group.format}: input_activations are silently dropped; use int-quantized",
            )


def _asymmetric_packed(folder: CheckedFolder) -> Iterator[Hit]:
    for group in groups(folder):
        if not group.symmetric and group.format == "pack-quantized":
            yield Hit(
                group.name,
                "packed zero points load with CompressedTensorsConfig(dequantize=True) alone: "
                "without it their shape is another one",
            )


def _split_fused(folder: CheckedFolder) -> Iterator[Hit]:
    for whole, shards in shards_of(linears_of(folder), FUSED):
        ignored = {is_ignored(folder, shard) for shard in shards}
        names = {getattr(config_group_of(folder, shard), "name", None) for shard in shards}
        if len(ignored) > 1:
            yield Hit(whole, "some of its shards are ignored and some are not: the loader stops")
        elif ignored == {False} and len(names) > 1:
            yield Hit(whole, "its shards belong to several groups: the loader stops")


def _ignored_in_memory(folder: CheckedFolder) -> Iterator[Hit]:
    """transformers looks for the names that it has in memory, where these are others."""
    if folder.model is None or folder.renamed:
        return
    for path in folder.model.linears:
        here = folder.model.names.module_in_memory(path)
        if is_ignored(folder, path) and not is_ignored(folder, here):
            yield Hit(path, f"ignored, and transformers knows it as {here}, which is not")


def _mixed_precision(folder: CheckedFolder) -> Iterator[Hit]:
    if (folder.quantization_config or {}).get("format") == "mixed-precision":
        yield Hit(
            "config.json",
            "format mixed-precision needs compressed-tensors 0.15 or later; 0.13 stops with a "
            "KeyError, and dequantize=True fails",
        )


# --- tensors ------------------------------------------------------------------------------------


def _parts(group: ConfigGroup) -> tuple[str, ...]:
    packed = group.format == "pack-quantized"
    weight = ("weight_packed", "weight_shape") if packed else ("weight",)
    zero = ("weight_zero_point",) if packed and not group.symmetric else ()
    return (*weight, "weight_scale", *zero, *(("input_scale",) if group.is_static else ()))


def _missing_part(folder: CheckedFolder) -> Iterator[Hit]:
    for path, group, _ in quantized(folder):
        for leaf in _parts(group):
            if f"{path}.{leaf}" not in folder.tensors:
                yield Hit(f"{path}.{leaf}", f"missing, and {group.name} ({group.format}) needs it")


def _not_a_target(folder: CheckedFolder) -> Iterator[Hit]:
    wanted = {path for path, _, _ in quantized(folder)}
    for name in folder.tensors:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight_scale" and path not in wanted:
            yield Hit(
                name, "no group of the config has this linear, so that its codes are not read"
            )


def _wrong_form(folder: CheckedFolder) -> Iterator[Hit]:
    for path, group, shape in quantized(folder):
        if shape is None or not group.bits:
            continue
        n, k = shape
        words = -(-k * group.bits // _BITS_PER_WORD)
        forms: dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]] = {
            "weight": (("I8",), [(n, k)]),
            "weight_packed": (("I32",), [(n, words)]),
            "weight_shape": (("I32", "I64"), [(2,)]),
            "weight_scale": (_FLOATS, [(n, group.scales(k))]),
            "weight_zero_point": (("I32",), [(-(-n * group.bits // 32), group.scales(k))]),
            "input_scale": (_FLOATS, [(1,), ()]),
        }
        for leaf in _parts(group):
            info = folder.tensors.get(f"{path}.{leaf}")
            dtypes, shapes = forms[leaf]
            if info is not None and (info.dtype not in dtypes or info.shape not in shapes):
                wanted = f"{' or '.join(dtypes)} {list(shapes[0])}"
                yield Hit(f"{path}.{leaf}", f"{info.dtype} {list(info.shape)}, not {wanted}")


def _input_scale_shape(folder: CheckedFolder) -> Iterator[Hit]:
    for path, group, _ in quantized(folder):
        for leaf in ("input_scale", "input_zero_point"):
            info = folder.tensors.get(f"{path}.{leaf}")
            if group.is_static and info is not None and info.shape == ():
                yield Hit(f"{path}.{leaf}", "shape [], and loaders make [1]: size mismatch")


def _bad_scale(folder: CheckedFolder) -> Iterator[Hit]:
    for name, info in folder.tensors.items():
        if not name.endswith((".weight_scale", ".input_scale")) or info.dtype not in _FLOATS:
            continue
        scale = folder.tensor(name).float()
        if not bool(scale.isfinite().all()) or bool((scale == 0).any()):
            yield Hit(name, "a scale is zero or not finite")


def _code_range(folder: CheckedFolder) -> Iterator[Hit]:
    for path, group, _ in quantized(folder):
        info = folder.tensors.get(f"{path}.weight")
        if group.bits != 4 or info is None or info.dtype != "I8":
            continue
        codes = folder.tensor(f"{path}.weight")
        if codes.numel() and bool((codes < -8).any() | (codes > 7).any()):
            yield Hit(f"{path}.weight", "codes of 4 bits lie outside -8 to 7")


_CODE = "vLLM, vllm-ascend and SGLang, compressed_tensors"
_TRIED = "tried on a CPU"
COMPRESSED_TENSORS_RULES = (
    Rule("unknown-method", _ALL, _unknown_method),
    Rule("no-groups", _ALL, _no_groups),
    Rule("no-scheme", _SERVING, _no_scheme, _CODE),
    Rule("format-not-inferred", _TRANSFORMERS, _format_not_inferred, _TRIED),
    Rule("activations-dropped", _SERVING, _activations_dropped, _CODE),
    Rule("asymmetric-packed", _TRANSFORMERS, _asymmetric_packed, _TRIED),
    Rule("split-fused", _SERVING, _split_fused, _CODE),
    Rule("ignored-in-memory", _TRANSFORMERS, _ignored_in_memory, _TRIED),
    Rule("mixed-precision", NOBODY, _mixed_precision, _TRIED),
    Rule("missing-part", _ALL, _missing_part, _TRIED),
    Rule("not-a-target", _ALL, _not_a_target, _TRIED),
    Rule("wrong-form", _ALL, _wrong_form),
    Rule("input-scale-shape", _TRANSFORMERS, _input_scale_shape, _TRIED),
    Rule("bad-scale", _ALL, _bad_scale),
    Rule("code-range", _ALL, _code_range),
)
