"""Reading an AscendV1 folder back, panguq's or msModelSlim's: a model that computes what it says.

The transformers model of the folder's config with linears in fake quantization: weights are
`(code - weight_offset) * weight_scale`, inputs are quantized and dequantized as their type says.
For looking and comparing; a server computes the same with integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from panguq.check.ascend import tensor_types
from panguq.check.ascend_values import floats
from panguq.check.files import CheckedFolder, open_folder
from panguq.errors import StorageError
from panguq.formats.checkpoint.ascend_v1_tensors import FLOAT, unpack_rows
from panguq.ir.ops import kronecker, quantize  # noqa: F401  (register the ops called here)
from panguq.models.hub_names import HubNames, WeightPart, hub_names

panguq = torch.ops.panguq
READABLE = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A8_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
_PARTS = (
    "weight", "weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second",
    "input_scale", "input_offset", "deq_scale", "quant_bias", "scale_bias", "bias",
    "left_trans", "right_trans", "clip_ratio",
)  # fmt: skip
_TURNED = ("W4A4_FLATQUANT_DYNAMIC",)
_FACTORS = ("left_trans", "right_trans", "clip_ratio")
_CHECK = "run panguq check on the folder; it says what is wrong with it"


class FakeQuantLinear(nn.Module):
    """A linear `[..., k] -> [..., n]` with stored codes, in fake quantization of its type.

    codes int8 `[n, k]`; weight_scale and weight_offset float32 `[n, groups]`; input_scale float32
    `[1]` and input_offset int32 `[1]` for W8A8; left_trans `[a, a]`, right_trans `[b, b]` and
    clip_ratio `[1]` for W4A4_FLATQUANT_DYNAMIC. Arithmetic is that of panguq's own ops.
    """

    codes: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    input_scale: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None
    left_trans: Tensor | None
    right_trans: Tensor | None
    clip_ratio: Tensor | None

    def __init__(self, kind: str, tensors: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.kind = kind
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight `[n, k]`."""
        group_size = self.codes.shape[1] // self.weight_scale.shape[1]
        args = (self.codes, self.weight_scale, self.weight_offset, group_size, dtype)
        found: Tensor = panguq.dequantize_weight(*args)
        return found

    def quantized_input(self, x: Tensor) -> Tensor:
        """x as the linear sees it."""
        if self.kind == "W8A16":
            return x
        if self.input_scale is not None:
            zero = self.input_offset
            codes = panguq.quantize_per_tensor(x, self.input_scale, zero, -128, 127)
            static: Tensor = panguq.dequantize(codes, self.input_scale, zero, x.dtype)
            return static
        largest, clip = 127, 1.0
        left, right = self.left_trans, self.right_trans
        if left is not None and right is not None and self.clip_ratio is not None:
            x = panguq.kronecker(x, left.to(x.dtype), right.to(x.dtype))
            largest, clip = 7, float(self.clip_ratio)
        codes, scale = panguq.quantize_per_token(x, largest, clip)
        dynamic: Tensor = panguq.dequantize(codes, scale, None, x.dtype)
        return dynamic

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(self.quantized_input(x), self.weight(x.dtype), bias)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.kind}, n={self.codes.shape[0]}, k={self.codes.shape[1]}"


class FakeQuantExperts(nn.Module):
    """A layer's routed experts with stored codes, in place of transformers' module for them.

    linears: by the name of a stacked weight (`gate_up_proj`) for each expert its linears, which
    together have the weight's rows. act: what stands between the two matmuls.
    """

    def __init__(
        self,
        linears: Mapping[str, Sequence[Sequence[FakeQuantLinear]]],
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.act = act
        self.first, self.last = linears
        for name, experts in linears.items():
            setattr(self, name, nn.ModuleList(nn.ModuleList(parts) for parts in experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[t, k]`, the others `[t, top_k]`; the weighted sum `[t, k]`."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            x = self._linear(self.first, expert, hidden_states[token])
            x = self._linear(self.last, expert, self.act(x))
            weighted = x * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in getattr(self, name)[expert]], dim=-1)


def load_ascend_v1(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The transformers model in an AscendV1 folder, its linears in fake quantization.

    `dtype`: what it computes in; None: what config.json says. Codes and scales stay memory-mapped.
    Raises StorageError, naming the tensor, for a folder that is incomplete or holds types other
    than `READABLE`; InputError for an architecture that
    transformers does not have.
    """
    from transformers import AutoModelForCausalLM

    from panguq.models.hf import read_config

    folder = open_folder(path)
    for name, why in folder.damaged.items():
        raise StorageError(f"{folder.path / name}: {why}", _CHECK)
    config = read_config(folder.path)
    dtype = dtype or getattr(torch, folder.dtype or "float32")
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    names = hub_names(model).as_stored(folder.tensors)
    left = dict.fromkeys(folder.tensors)
    linears = {}
    for path_, kind in _linears(folder).items():
        linears[path_] = FakeQuantLinear(kind, _linear_tensors(folder, path_, kind))
        for leaf in _PARTS:
            left.pop(f"{path_}.{leaf}", None)
    _replace_experts(model, names, linears)
    for path_, linear in linears.items():
        _replace(model, names.module_in_memory(path_), linear)
    stacked = {
        name: _stack(folder, parts).to(dtype)
        for name, parts in names.merged.items()
        if parts and all(part.name in left for part in parts)
    }
    for name in stacked:
        for part in names.merged[name]:
            del left[part.name]
    _load_floats(model, folder, {names.in_memory.get(n, n): n for n in left}, stacked, dtype)
    model.requires_grad_(False)
    return model


def _linears(folder: CheckedFolder) -> dict[str, str]:
    found = {}
    for name, kind in tensor_types(folder).items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and kind != FLOAT:
            if kind not in READABLE:
                raise StorageError(
                    f"{folder.path}: {name} is {kind}, which panguq does not read back",
                    f"the types it reads are {', '.join(READABLE)}",
                )
            found[path] = kind
    return found


def _linear_tensors(folder: CheckedFolder, path: str, kind: str) -> dict[str, Tensor | None]:
    """What `FakeQuantLinear` holds, out of the parts that the folder has of it."""

    def read(leaf: str, optional: bool = False) -> Tensor | None:
        name = f"{path}.{leaf}"
        if name in folder.tensors:
            return folder.tensor(name)
        if optional:
            return None
        raise StorageError(f"{folder.path}: {name} is missing, and {kind} needs it", _CHECK)

    codes = read("weight")
    assert codes is not None
    static = kind == "W8A8"
    offset = read("input_offset") if static else None
    return {
        "codes": unpack_rows(codes) if kind == "W4A8_DYNAMIC" else codes,
        "weight_scale": _weight_scale(folder, path, read),
        "weight_offset": _weight_offset(read),
        "input_scale": _as_float(read("input_scale")) if static else None,
        "input_offset": None if offset is None else offset.to(torch.int32),
        "bias": read("bias", optional=True),
        **{leaf: read(leaf) if kind in _TURNED else None for leaf in _FACTORS},
    }


def _weight_scale(
    folder: CheckedFolder, path: str, read: Callable[..., Tensor | None]
) -> Tensor | None:
    """float32 `[n, groups]`; msModelSlim may leave it out of W8A8, where it is in deq_scale."""
    scale = _as_float(read("weight_scale", optional=True))
    if scale is None:
        deq, step = floats(folder, f"{path}.deq_scale"), read("input_scale")
        if deq is None or step is None:
            raise StorageError(f"{folder.path}: {path}.weight_scale is missing", _CHECK)
        return (deq / step.double()).float().reshape(-1, 1)
    second = _as_float(read("weight_scale_second", optional=True))
    return scale if second is None else scale * second


def _weight_offset(read: Callable[..., Tensor | None]) -> Tensor | None:
    """None where it is zero, as it is unless a tool quantized weights asymmetrically."""
    offset = _as_float(read("weight_offset", optional=True))
    return offset if offset is not None and bool((offset != 0).any()) else None


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _replace_experts(
    model: nn.Module, names: HubNames, linears: dict[str, FakeQuantLinear]
) -> None:
    """Take the linears of experts out of `linears`, and put them where their layers have them."""
    owners: dict[str, dict[str, list[list[FakeQuantLinear]]]] = {}
    for name, parts in names.merged.items():
        paths = [part.name.removesuffix(".weight") for part in parts]
        found = [path for path in paths if path in linears]
        if not found:
            continue
        if len(found) < len(paths) or any(part.expert is None for part in parts):
            raise StorageError(
                f"{found[0]}.weight is quantized, and other parts of {name} are not", _CHECK
            )
        owner, _, leaf = name.rpartition(".")
        experts: dict[int, list[FakeQuantLinear]] = {}
        for part, path in sorted(zip(parts, paths, strict=True), key=lambda one: one[0].start):
            linear = linears.pop(path)
            if linear.codes.shape[0] != part.end - part.start:
                raise StorageError(f"{path}.weight has codes {list(linear.codes.shape)}", _CHECK)
            experts.setdefault(int(part.expert or 0), []).append(linear)
        owners.setdefault(owner, {})[leaf] = [experts[e] for e in sorted(experts)]
    for owner, leaves in owners.items():
        old: Any = model.get_submodule(owner)
        first = "gate_up_proj" if old.has_gate else "up_proj"
        act = old._apply_gate if old.has_gate else old.act_fn
        ordered = {leaf: leaves[leaf] for leaf in (first, "down_proj")}
        parent, _, leaf = owner.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FakeQuantExperts(ordered, act))


def _replace(model: nn.Module, path: str, linear: FakeQuantLinear) -> None:
    owner, _, leaf = path.rpartition(".")
    try:
        old = model.get_submodule(path)
    except AttributeError:
        old = None
    if not isinstance(old, nn.Linear) or old.weight.shape != linear.codes.shape:
        what = "no linear" if not isinstance(old, nn.Linear) else f"{list(old.weight.shape)}"
        raise StorageError(
            f"{path}.weight has codes {list(linear.codes.shape)}, and in the architecture that "
            f"config.json names it is {what}",
            _CHECK,
        )
    setattr(model.get_submodule(owner), leaf, linear)


def _stack(folder: CheckedFolder, parts: Sequence[WeightPart]) -> Tensor:
    """The weight in memory of experts that are stored one by one, `[experts, n, k]`."""
    experts: dict[int, list[Tensor]] = {}
    for part in sorted(parts, key=lambda part: part.start):
        experts.setdefault(int(part.expert or 0), []).append(folder.tensor(part.name))
    return torch.stack([torch.cat(experts[expert]) for expert in sorted(experts)])


def _load_floats(
    model: nn.Module,
    folder: CheckedFolder,
    names: dict[str, str],
    stacked: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """`names`: of the tensors that are left, as they are stored, by those of the model. `stacked`:
    values that are stored in parts."""
    wanted = set(model.state_dict())
    values = stacked | {
        n: folder.tensor(there).to(dtype) for n, there in names.items() if n in wanted
    }
    held = {name for name in wanted if _is_quantized(model, name)}
    tied = {"lm_head.weight"} if folder.is_tied else set()
    missing = sorted(wanted - held - values.keys() - tied)
    if missing:
        listed = ", ".join(missing[:4])
        raise StorageError(f"{folder.path}: {len(missing)} weights are missing: {listed}", _CHECK)
    model.load_state_dict(values, strict=False, assign=True)
    if folder.is_tied:
        model.tie_weights()  # type: ignore[operator]
    for name in sorted(names.keys() - wanted):
        _add_norm_bias(model, folder, name, dtype)


def _is_quantized(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), FakeQuantLinear)


def _add_norm_bias(model: nn.Module, folder: CheckedFolder, name: str, dtype: torch.dtype) -> None:
    """A bias that an anti-outlier method left at a norm that has none, as vllm-ascend adds it."""
    path, _, leaf = name.rpartition(".")
    if path.endswith(".module"):  # the older format's second copy
        return
    if leaf != "bias" or not path.endswith("norm"):
        raise StorageError(
            f"{folder.path}: {name} has no place in the architecture", "panguq does not read it"
        )
    bias = folder.tensor(name).to(dtype)
    model.get_submodule(path).register_forward_hook(lambda module, given, result: result + bias)
