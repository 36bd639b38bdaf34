"""What passes know about a node: one record, kept in `node.meta` beside fx's own `val`.

fx copies `node.meta` key by key when a graph is copied, so the record is frozen: `annotate` puts a
new one in its place, and no copy of a graph hears of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor, fx

from panguq.ir.input_statistics import InputStatistics
from panguq.ir.quant_spec import QuantSpec, Scheme

KEY = "panguq"
_T = TypeVar("_T")


@dataclass(frozen=True)
class NodeMeta:
    """Every field is empty until a pass fills it.

    Who a node is; each node has its own:
      label             a name that is stable across passes and torch releases (canonicalize)
      module_path       the module of the source model that computed it, `model.layers.0.mlp`
      stored_type       the value type that a file states, until it is compared (serialize)
    How a matmul is quantized; its kernel has the same:
      scheme            assign-schemes
      expert_schemes    each expert's, where they differ (assign-schemes, mixed-precision); up to
                        insert-fake-quant, which makes a matmul for each scheme
      split_from        the label of the matmul that this one computes a part of (outliers)
      merged            the labels of the matmuls that this one computes (merge-gate-up,
                        fuse-latent-attention)
    What calibration saw of a matmul's input; its kernel reads another value:
      input_statistics  calibrate; matmuls that read one value share one object
      input_range       (low, high), calibrate
      input_clip        the share of a token's largest magnitude that its largest code stands for
                        (flatquant)
      token_weights     float32 `[tokens]` for each calibration batch, or `[groups, tokens]` for
                        runs of outputs (weigh-tokens)
    """

    label: str | None = None
    module_path: str = ""
    stored_type: str | None = None
    scheme: Scheme | None = None
    expert_schemes: tuple[Scheme, ...] = ()
    split_from: str | None = None
    merged: tuple[str, ...] = ()
    input_statistics: InputStatistics | None = None
    input_range: tuple[float, float] | None = None
    input_clip: float | None = None
    token_weights: tuple[Tensor, ...] | None = None

    def filled(self) -> dict[str, Any]:
        """The fields that are not empty, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, "", ())}


_NOTHING = NodeMeta()
_OWN = ("label", "module_path", "stored_type")
_OF_THE_INPUT = ("input_statistics", "input_range", "input_clip", "token_weights")


def meta_of(node: fx.Node) -> NodeMeta:
    """What passes know about the node."""
    found: NodeMeta = node.meta.get(KEY, _NOTHING)
    return found


def annotate(node: fx.Node, **changes: Any) -> None:
    """Fill fields of the node's NodeMeta. Raises TypeError for one that it does not have."""
    node.meta[KEY] = replace(meta_of(node), **changes)


def carry(old: fx.Node, new: fx.Node) -> None:
    """Let `new`, which does `old`'s work, have what passes know about `old` and not yet about it.

    What calibration saw of the input goes along where both are calls of one op.
    """
    left = (*_OWN, *(() if new.target is old.target else _OF_THE_INPUT))
    known = meta_of(new).filled()
    found = meta_of(old).filled().items()
    annotate(new, **{name: v for name, v in found if name not in left and name not in known})


def carry_merged(parts: Sequence[fx.Node], new: fx.Node) -> None:
    """Let `new`, which does the work of `parts` on the value that they read, have theirs."""
    carry(parts[0], new)
    labels = (meta_of(part).merged or (meta_of(part).label or part.name,) for part in parts)
    annotate(new, merged=tuple(name for names in labels for name in names))


def scheme_of(node: fx.Node) -> Scheme:
    """How the matmul is quantized. Raises LookupError, with its name, where that is not known."""
    return _known(node, meta_of(node).scheme, "scheme")


def weight_spec_of(node: fx.Node) -> QuantSpec:
    """How the matmul's weight is quantized. Raises LookupError, with its name, if it is not."""
    return _known(node, scheme_of(node).weight, "quantized weight")


def statistics_of(node: fx.Node) -> InputStatistics:
    """What calibration saw of the matmul's input. Raises LookupError as `scheme_of` does."""
    return _known(node, meta_of(node).input_statistics, "input statistics")


def range_of(node: fx.Node) -> tuple[float, float]:
    """(low, high) of the matmul's static input. Raises LookupError as `scheme_of` does."""
    return _known(node, meta_of(node).input_range, "input range")


def is_quantized(node: fx.Node) -> bool:
    """Whether the node has a scheme that is not float."""
    scheme = meta_of(node).scheme
    return scheme is not None and not scheme.is_float


def _known(node: fx.Node, value: _T | None, what: str) -> _T:
    if value is None:
        raise LookupError(f"{meta_of(node).label or node.name} has no {what}")
    return value
