"""The `quantization_config` of a compressed-tensors checkpoint, and which scheme it gives a linear.

Every group names its format, since loaders infer another where it is missing (a W4A8 group would
count as packed, and vLLM then drops its activations). Scales are symmetric for weights; activations
are per token and symmetric, or per tensor with a zero point. Source of names and values: the
compressed-tensors package, `QuantizationArgs`, `QuantizationScheme` and `QuantizationConfig`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from panguq.errors import ExportError
from panguq.formats.checkpoint.linear import QuantizedLinear
from panguq.ir.number_format import INT4, INT8
from panguq.ir.quant_spec import QuantSpec

CodesFormat = Literal["int-quantized", "pack-quantized"]
MIXED = "mixed-precision"


@dataclass(frozen=True)
class Group:
    """A scheme in the format's terms. `group_size` None is one scale for each output."""

    bits: int
    group_size: int | None
    activation: QuantSpec | None
    symmetric: bool = True

    @property
    def format(self) -> CodesFormat:
        """Codes one by one as int8 where activations are integers, packed into int32 otherwise.

        It is what compressed-tensors infers for these schemes, and what vLLM has kernels for.
        """
        return "pack-quantized" if self.activation is None else "int-quantized"

    def entry(self, targets: Sequence[str]) -> dict[str, Any]:
        """The group as config.json has it."""
        strategy = "channel" if self.group_size is None else "group"
        return {
            "targets": list(targets),
            "format": self.format,
            "weights": _arguments(self.bits, strategy, self.group_size, self.symmetric),
            "input_activations": _activation(self.activation),
            "output_activations": None,
        }


def group_of(linear: QuantizedLinear) -> Group:
    """The scheme of a linear. Raises ExportError for weights of other bits, and for zero points
    where inputs are quantized, too."""
    weight = linear.scheme.weight
    packs = linear.scheme.activation is None
    if weight is None or weight.format not in (INT4, INT8) or not (weight.symmetric or packs):
        raise ExportError(
            f"{linear.path}: compressed-tensors loaders take no weights of {linear.scheme.name}",
            "choose another scheme in the recipe",
        )
    by_group = weight.granularity == "per_group"
    size = linear.group_size if by_group else None
    return Group(weight.bits, size, linear.scheme.activation, weight.symmetric)


def quantization_config(
    linears: Sequence[QuantizedLinear],
    ignored: Iterable[str],
    in_memory: Callable[[str], str] = lambda path: path,
) -> dict[str, Any]:
    """The config for quantized linears; `ignored` are the paths of all linears that stay float.

    One group targets the class Linear without those; several target their linears by name. Servers
    look for the published names, transformers for those that it has in memory (`in_memory`), so
    both are there where they differ.
    """

    def both(paths: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(name for path in paths for name in (path, in_memory(path))))

    groups: dict[Group, list[str]] = defaultdict(list)
    for linear in linears:
        groups[group_of(linear)].append(linear.path)
    formats = sorted({group.format for group in groups})
    names = ["Linear"] if len(groups) == 1 else None
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "ignore": both(ignored),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{index}": group.entry(names or both(paths))
            for index, (group, paths) in enumerate(groups.items())
        },
    }


def _arguments(
    bits: int,
    strategy: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dynamic: bool = False,
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def _activation(spec: QuantSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    strategy = "token" if spec.dynamic else "tensor"
    return _arguments(spec.bits, strategy, symmetric=spec.symmetric, dynamic=spec.dynamic)
