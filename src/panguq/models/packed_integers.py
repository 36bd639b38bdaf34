"""Weights that a folder holds as integers with scales, made into the floats that they stand for.

    value[n, k] = (code - zero) * scale        code, zero: 0 … 2^bits - 1

    gptq  P.qweight int32 [k * bits / 32, n] along k, P.qzeros int32 [k / g, n * bits / 32],
          P.scales [k / g, n], P.g_idx int32 [k], the scale of each input, or none; zeros are
          stored less one (checkpoint_format gptq) or as they are (gptq_v2)
    awq   P.qweight int32 [k, n / 8], eight outputs a word in AWQ's order, P.qzeros int32
          [k / g, n / 8], P.scales [k / g, n]
    compressed-tensors
          P.weight_packed int32 [n, ceil(k * bits / 32)], P.weight_shape, P.weight_scale [n, k / g],
          P.weight_zero_point int32 [ceil(n * bits / 32), k / g] or none, which is 2^(bits - 1);
          or P.weight int8 [n, k], codes less 2^7, P.weight_scale [n, k / g]

Values are float32, which holds a code times a scale of 16 bits exactly, and the whole model is
loaded as float32, whatever else is stored as. Weights of experts are made one by one. Sources:
GPTQModel (nn_modules/qlinear), vLLM (quantization/gptq.py, awq.py), compressed-tensors
(compressors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from panguq.errors import InputError, StorageError
from panguq.models.checkpoint_files import StoredTensor
from panguq.tensors.dtypes import dtype_name
from panguq.tensors.row_slices import row_slices
from panguq.tensors.weight_store import WeightStore
from panguq.tensors.word_packing import WORD, from_awq_words, unpacked_words

_BITS = (2, 3, 4, 8)
_ROWS_OF_A_WORD = 8
_AGAIN = "the checkpoint is damaged or belongs to another config; download it again"
_LEAVES = {
    "gptq": ("qweight", ("qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qzeros", "scales")),
    "compressed-tensors": (
        "weight_packed",
        ("weight_scale", "weight_shape", "weight_zero_point"),
    ),
}


@dataclass(frozen=True)
class PackedIntegers:
    """How a folder's weights are packed. `bits`: those that weights of it have; `minus_one`: zero
    points are stored less one."""

    method: str
    bits: tuple[int, ...]
    minus_one: bool = False
    dtype: torch.dtype = torch.float32

    def weights(self, tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
        """The codes of weights by the weights' names. Raises InputError where there are none, and
        for a weight without scales or with what is not read beside it."""
        names, found = {tensor.name for tensor in tensors}, {}
        for tensor in tensors:
            path, _, leaf = tensor.name.rpartition(".")
            if leaf == "weight_g_idx":
                raise InputError(
                    f"{tensor.file}: {tensor.name} orders inputs by activations, which is not read "
                    "of compressed-tensors",
                    "give the float checkpoint that it was made from",
                )
            if not self._is_codes(leaf, tensor.dtype):
                continue
            scale = f"{path}.{'scales' if self.method != 'compressed-tensors' else 'weight_scale'}"
            if scale not in names:
                raise InputError(f"{tensor.file}: {tensor.name} has no {scale}", _AGAIN)
            found[f"{path}.weight"] = tensor
        if tensors and not found:
            raise InputError(
                f"{tensors[0].file.parent}: the model is quantized already ({self.method}), says "
                "config.json, and none of its weights is stored so",
                _AGAIN,
            )
        return found

    def plain(self, tensors: list[StoredTensor]) -> list[StoredTensor]:
        """The tensors as they are after `unpack`: each weight once, in float32."""
        packed = self.weights(tensors)
        leaves = (_LEAVES[self.method][0], *_LEAVES[self.method][1])
        done = {f"{name.removesuffix('.weight')}.{leaf}" for name in packed for leaf in leaves}
        done |= packed.keys()
        kept = [tensor for tensor in tensors if tensor.name not in done]
        return kept + [
            replace(t, name=name, dtype="F32", elements=t.elements * (WORD // self.bits[0]))
            for name, t in packed.items()
        ]

    def unpack(
        self, tensors: list[StoredTensor], state: Mapping[str, Tensor], store: WeightStore
    ) -> dict[str, Tensor]:
        """The tensors of `plain` by name; those that were packed are made now, in `store`.

        Raises StorageError, naming the weight, for tensors that do not fit each other, scales that
        are not finite, and where the disk is full.
        """
        packed, made = self.weights(tensors), {}
        for name in (tensor.name for tensor in self.plain(tensors)):
            codes = packed.get(name)
            if codes is None:
                made[name] = state[name]
                continue
            path, place = name.removesuffix(".weight"), f"{codes.file}: {name}"
            own = {
                leaf: state[f"{path}.{leaf}"]
                for leaf in (*_LEAVES[self.method][1], codes.name.rpartition(".")[2])
                if f"{path}.{leaf}" in state
            }
            for leaf, tensor in own.items():
                if tensor.is_floating_point() != leaf.startswith(("scales", "weight_scale")):
                    raise StorageError(
                        f"{place}: {leaf} is stored as {dtype_name(tensor.dtype)}", _AGAIN
                    )
            try:
                made[name] = self._made(own, store, place)
            except (ArithmeticError, IndexError, KeyError, RuntimeError, ValueError) as error:
                shapes = ", ".join(f"{leaf} {list(t.shape)}" for leaf, t in own.items())
                raise StorageError(
                    f"{place}: its parts do not fit each other: {shapes}", _AGAIN
                ) from error
        return made

    def _is_codes(self, leaf: str, dtype: str) -> bool:
        whole = self.method == "compressed-tensors" and leaf == "weight" and dtype == "I8"
        return whole or (leaf == _LEAVES[self.method][0] and dtype == "I32")

    def _made(self, own: Mapping[str, Tensor], store: WeightStore, place: str) -> Tensor:
        if self.method == "compressed-tensors":
            return self._from_compressed_tensors(own, store, place)
        scales, qzeros, words = own["scales"].float(), own["qzeros"], own["qweight"]
        n = scales.shape[1]
        if self.method == "awq":
            k, zeros = len(words), from_awq_words(qzeros)
        else:
            bits = _bits_of(qzeros, scales, place)
            k, zeros = len(words) * WORD // bits, unpacked_words(qzeros, bits)
            if self.minus_one:
                zeros = _plus_one(zeros, bits, place)
        of_input = own.get("g_idx", torch.arange(k) // -(-k // len(scales))).long()
        if of_input.shape != (k,) or of_input.min() < 0 or of_input.max() >= len(scales):
            raise StorageError(f"{place}: g_idx names scales that are not there", _AGAIN)

        def codes(rows: slice) -> Tensor:
            if self.method == "gptq":
                return unpacked_words(words[:, rows].T.contiguous(), bits)
            return from_awq_words(words[:, rows.start // 8 : -(-rows.stop // 8)]).T

        return _values(codes, zeros.T, scales.T, of_input, (n, k), store, place)

    def _from_compressed_tensors(
        self, own: Mapping[str, Tensor], store: WeightStore, place: str
    ) -> Tensor:
        scale = own["weight_scale"].float()
        if "weight" in own:
            n, k, bits = *own["weight"].shape, 8
        else:
            n, k = (int(size) for size in own["weight_shape"])
            rows, words = own["weight_packed"].shape
            if rows != n:
                raise IndexError("weight_shape has other rows than weight_packed")
            bits, *more = [b for b in self.bits if -(-k * b // WORD) == words] or [0]
            if not bits or more:
                raise StorageError(
                    f"{place}: {words} words a row hold {k} codes of no one number of bits of "
                    f"config.json's ({', '.join(map(str, self.bits))})",
                    _AGAIN,
                )
        zeros = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
        if "weight_zero_point" in own:
            zeros = unpacked_words(own["weight_zero_point"].T.contiguous(), bits).T[:n]

        def codes(rows: slice) -> Tensor:
            if "weight" in own:
                return own["weight"][rows].view(torch.uint8) ^ 0x80
            return unpacked_words(own["weight_packed"][rows], bits)[:, :k]

        of_input = torch.arange(k) // -(-k // scale.shape[1])
        return _values(codes, zeros, scale, of_input, (n, k), store, place)


def packed_integers(config: Mapping[str, Any], place: object) -> PackedIntegers | None:
    """How weights are packed by a quantization_config; None where it is not said, or otherwise.

    Raises InputError, in one sentence, for a layout of these methods that is not read, and for
    quantized inputs: the graph would compute other values than servers.
    """
    method, bits = str(config.get("quant_method", "")), config.get("bits")
    if method in ("gptq", "awq") and isinstance(bits, int):
        layout = str(config.get("checkpoint_format") or config.get("version") or method).lower()
        read = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm", "awq")}[method]
        if layout not in read or bits not in (_BITS if method == "gptq" else (4,)):
            raise InputError(
                f"{place}: the model is quantized already ({method}, {layout}, {bits} bits); "
                f"of {method} the layouts {' and '.join(read)} are read",
                _FLOAT,
            )
        return PackedIntegers(method, (bits,), minus_one=layout == "gptq")
    groups = config.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return None
    parts = [g if isinstance(g, dict) else {} for g in groups.values()]
    weights = [w if isinstance(w, dict) else {} for w in (part.get("weights") for part in parts)]
    widths = [w.get("num_bits") for w in weights if w.get("type") == "int"]
    bits_read = tuple(bits for bits in (2, 4, 8) if bits in widths)
    if len(widths) < len(parts) or any(width not in bits_read for width in widths):
        return None
    if any(part.get("input_activations") for part in parts):
        raise InputError(
            f"{place}: the model is quantized already (compressed-tensors), its inputs, too, which "
            "is not read",
            _FLOAT,
        )
    return PackedIntegers(method, bits_read)


_FLOAT = "give the float checkpoint that it was made from"


def _values(
    codes: Callable[[slice], Tensor],
    zeros: Tensor,
    scales: Tensor,
    of_input: Tensor,
    shape: tuple[int, int],
    store: WeightStore,
    place: str,
) -> Tensor:
    """float32 `[n, k]` of unsigned codes of some rows, and zeros and scales `[n, groups]`."""
    if not bool(scales.isfinite().all()):
        raise StorageError(f"{place}: a scale is not finite", _AGAIN)
    out = store.empty(shape, torch.float32)
    if zeros.shape != scales.shape or len(scales) != shape[0]:
        raise IndexError("zeros and scales differ in shape")
    for rows in row_slices(out, _ROWS_OF_A_WORD):
        offsets = codes(rows).to(torch.int16) - zeros[rows].to(torch.int16)[:, of_input]
        out[rows] = offsets.float() * scales[rows][:, of_input]
    return out


def _bits_of(qzeros: Tensor, scales: Tensor, place: str) -> int:
    """Bits of a code: both hold one number for each group and output."""
    bits, rest = divmod(WORD * qzeros.numel(), max(scales.numel(), 1))
    if rest or bits not in _BITS or len(qzeros) != len(scales):
        raise StorageError(
            f"{place}: qzeros {list(qzeros.shape)} and scales {list(scales.shape)} do not fit",
            _AGAIN,
        )
    return bits


def _plus_one(zeros: Tensor, bits: int, place: str) -> Tensor:
    if bool((zeros == 2**bits - 1).any()):
        raise StorageError(
            f"{place}: a zero point is stored as {2**bits - 1}, which some readers of this layout "
            f"take for 0 and others for {2**bits}",
            "convert it to gptq_v2, which stores them as they are, or give the float checkpoint",
        )
    return zeros + 1
