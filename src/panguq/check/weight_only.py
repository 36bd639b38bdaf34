"""Rules for folders in GPTQ's and AWQ's formats, as GPTQModel, transformers and vLLM load them.

Read in GPTQModel 7.7 and in vLLM's quantization/gptq.py and awq.py; what transformers loads was
tried on a CPU with transformers 5.24 and GPTQModel 7.7. That the codes of a word lie in another
order than the format's cannot be seen in a folder: any words are some weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from panguq.check.files import CheckedFolder, Hit, Rule
from panguq.server_releases import Server

READERS: tuple[Server, ...] = ("transformers", "vllm", "sglang")
METHODS = ("gptq", "awq")
_WORD = 32
_FLOATS = ("F32", "BF16", "F16")
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_PARTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}


@dataclass(frozen=True)
class WeightKind:
    """How a linear's weight is quantized; `group_size` -1: one scale an output."""

    bits: int
    group_size: int

    def groups(self, k: int) -> int:
        """Scales of each output."""
        return 1 if self.group_size == -1 else -(-k // self.group_size)


def method_of(folder: CheckedFolder) -> str:
    """`gptq` or `awq`, or what else config.json names."""
    return str((folder.quantization_config or {}).get("quant_method"))


def quantized(folder: CheckedFolder) -> Iterator[tuple[str, WeightKind, tuple[int, int] | None]]:
    """(path, kind, (n, k)) of each linear that the config says to be quantized; of those that are
    stored, without a shape, where the architecture is not known."""
    stored = {n.removesuffix(".qweight") for n in folder.tensors if n.endswith(".qweight")}
    linears = dict.fromkeys(stored) if folder.model is None else dict(folder.model.linears)
    for path, shape in linears.items():
        kind = _kind(folder, path)
        if kind is not None:
            yield path, kind, shape


def _kind(folder: CheckedFolder, path: str) -> WeightKind | None:
    config = folder.quantization_config or {}
    bits, group_size = config.get("bits"), config.get("group_size")
    if path.rpartition(".")[2] == "lm_head" and not config.get("lm_head"):
        return None
    skipped = config.get("modules_to_not_convert")
    if any(str(name) in path for name in (skipped if isinstance(skipped, list) else ())):
        return None
    rules = config.get("dynamic")
    for pattern, settings in (rules if isinstance(rules, dict) else {}).items():
        sign, _, expression = str(pattern).partition(":")
        if not expression:
            sign, expression = "+", str(pattern)
        if not _matches(expression, path):
            continue
        if sign == "-":
            return None
        if isinstance(settings, dict):
            bits = settings.get("bits", bits)
            group_size = settings.get("group_size", group_size)
        break
    if not isinstance(bits, int) or not isinstance(group_size, int):
        return None
    return WeightKind(bits, group_size)


def _matches(expression: str, path: str) -> bool:
    try:
        return re.match(expression, path) is not None
    except re.error:
        return False


# --- rules --------------------------------------------------------------------------------------


def _bad_config(folder: CheckedFolder) -> Iterator[Hit]:
    config, method = folder.quantization_config or {}, method_of(folder)
    bits, group_size = config.get("bits"), config.get("group_size")
    if bits not in _BITS[method]:
        yield Hit("config.json", f"bits is {bits!r}; {method} has {_listed(_BITS[method])}")
    if not isinstance(group_size, int) or group_size < -1 or group_size == 0:
        yield Hit("config.json", f"group_size is {group_size!r}, not -1 or a positive number")
    if method == "awq" and config.get("version", "gemm") != "gemm":
        yield Hit("config.json", f"version is {config['version']!r}; loaders read gemm alone")


def _listed(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))


def _foreign_zero_points(folder: CheckedFolder) -> Iterator[Hit]:
    config = folder.quantization_config or {}
    if method_of(folder) != "gptq" or config.get("sym", True):
        return
    meta = config.get("meta")
    writer = str((meta if isinstance(meta, dict) else {}).get("quantizer", ""))
    if config.get("checkpoint_format", "gptq") == "gptq" and "gptqmodel" not in writer:
        yield Hit(
            "config.json",
            "weights with zero points by the convention 'gptq', which GPTQModel takes from nobody "
            "but itself; 'gptq_v2' is taken from all",
        )


def _rules_unknown(folder: CheckedFolder) -> Iterator[Hit]:
    rules = (folder.quantization_config or {}).get("dynamic")
    told = [str(name) for name in (rules if isinstance(rules, dict) else {})]
    if any("lm_head" not in name for name in told):
        yield Hit(
            "config.json", "it gives all linears of the layers one kind and knows no `dynamic`"
        )


def _sglang_gptq(folder: CheckedFolder) -> Iterator[Hit]:
    config = folder.quantization_config or {}
    if method_of(folder) != "gptq":
        return
    if not config.get("sym", True):
        yield Hit(
            "config.json",
            "SGLang's kernel for NPUs subtracts zero points where it should add them, and computes "
            "something else without a word; awq has them right",
        )
    if config.get("bits") in (2, 3):
        yield Hit("config.json", f"SGLang has no kernel of {config['bits']} bits for NPUs")
    rules = config.get("dynamic")
    if any("lm_head" not in str(name) for name in (rules if isinstance(rules, dict) else {})):
        yield Hit("config.json", "SGLang reads `dynamic` on GPUs, and not on NPUs")


def _missing_part(folder: CheckedFolder) -> Iterator[Hit]:
    for path, _, _ in quantized(folder):
        for leaf in _PARTS[method_of(folder)]:
            if f"{path}.{leaf}" not in folder.tensors:
                yield Hit(f"{path}.{leaf}", "missing, and the config says it is quantized")


def _not_a_target(folder: CheckedFolder) -> Iterator[Hit]:
    wanted = {path for path, _, _ in quantized(folder)}
    for name in folder.tensors:
        path, _, leaf = name.rpartition(".")
        if leaf == "qweight" and path not in wanted:
            yield Hit(
                name, "the config leaves this linear in float, so that its codes are not read"
            )


def _wrong_form(folder: CheckedFolder) -> Iterator[Hit]:
    method = method_of(folder)
    for path, kind, shape in quantized(folder):
        if shape is None or kind.bits not in _BITS[method] or kind.group_size in (0, None):
            continue
        n, k = shape
        groups = kind.groups(k)
        by_column = n * kind.bits // _WORD
        code_shape = (k * kind.bits // _WORD, n) if method == "gptq" else (k, by_column)
        forms = {
            "qweight": (("I32",), code_shape),
            "qzeros": (("I32",), (groups, by_column)),
            "scales": (_FLOATS, (groups, n)),
            "g_idx": (("I32",), (k,)),
        }
        for leaf in _PARTS[method]:
            info = folder.tensors.get(f"{path}.{leaf}")
            dtypes, wanted = forms[leaf]
            if info is not None and (info.dtype not in dtypes or info.shape != wanted):
                what = f"{' or '.join(dtypes)} {list(wanted)}"
                yield Hit(f"{path}.{leaf}", f"{info.dtype} {list(info.shape)}, not {what}")


def _bad_scale(folder: CheckedFolder) -> Iterator[Hit]:
    for name, info in folder.tensors.items():
        if name.endswith(".scales") and info.dtype in _FLOATS:
            scale = folder.tensor(name).float()
            if not bool(scale.isfinite().all()) or bool((scale == 0).any()):
                yield Hit(name, "a scale is zero or not finite")


def _bad_groups(folder: CheckedFolder) -> Iterator[Hit]:
    for name, info in folder.tensors.items():
        scales = folder.tensors.get(f"{name.removesuffix('.g_idx')}.scales")
        if not name.endswith(".g_idx") or info.dtype != "I32" or scales is None:
            continue
        of_input = folder.tensor(name)
        if (
            of_input.numel()
            and not 0 <= int(of_input.min()) <= int(of_input.max()) < scales.shape[0]
        ):
            yield Hit(name, f"it names scales beyond the {scales.shape[0]} that there are")


_TRIED = "tried on a CPU with GPTQModel 7.7"
WEIGHT_ONLY_RULES = (
    Rule("bad-config", READERS, _bad_config),
    Rule("foreign-zero-points", ("transformers",), _foreign_zero_points, _TRIED),
    Rule("rules-unknown", ("transformers",), _rules_unknown, "optimum, gptq/quantizer.py"),
    Rule("sglang-gptq", ("sglang",), _sglang_gptq, "SGLang 0.5.23, npu/quantization, read"),
    Rule("missing-part", READERS, _missing_part),
    Rule("not-a-target", READERS, _not_a_target),
    Rule("wrong-form", READERS, _wrong_form),
    Rule("bad-scale", READERS, _bad_scale),
    Rule("bad-groups", READERS, _bad_groups),
)
