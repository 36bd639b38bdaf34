"""What a call of a torch_npu op must satisfy, checked before anything is sent to an NPU.

Each op's file holds its contract: a generator that names the op's parameters that it reads, and
`chip` where a limit is the chip's, and yields one `Broken` per rule the call breaks. Sizes may be
symbolic: a rule then speaks only where it is broken whatever the size turns out to be, and never
adds a guard.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from panguq.errors import LoweringError
from panguq.ir.ops.opset import bind, read_by
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.vendor.operators import SOURCE, unlisted
from panguq.tensors.dtypes import dtype_name

Size = int | torch.SymInt

# Where the rules stand. The aclnn pages are part of CANN's operator documentation.
OP_PLUGIN = "op-plugin's page on {}"
PANGUQ = "panguq's reference body"


class Broken(NamedTuple):
    """A broken rule: what must hold, with the values that break it, and where that is written."""

    rule: str
    source: str


Contract = Callable[..., Iterator[Broken]]
_contracts: dict[OpOverload, Contract] = {}


@dataclass(frozen=True)
class Violation:
    """A rule that a call breaks. `rule` says what must hold and the values; `source` is public."""

    op: str
    rule: str
    source: str

    def __str__(self) -> str:
        return f"{self.op}: {self.rule} ({self.source})"


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether this holds whatever a symbolic size turns out to be. Adds no guard."""
    return condition if isinstance(condition, bool) else bool(statically_known_true(condition))


def names(dtypes: Sequence[torch.dtype]) -> str:
    """`float16 or bfloat16`."""
    return " or ".join(map(dtype_name, dtypes))


def wrong_dtype(
    what: str, tensor: Tensor | None, allowed: Sequence[torch.dtype], source: str
) -> Iterator[Broken]:
    """Finds a tensor of a dtype that is not allowed; None is a tensor that was not given."""
    if tensor is not None and tensor.dtype not in allowed:
        yield Broken(f"{what} must be {names(allowed)}, not {names([tensor.dtype])}", source)


def wrong_shape(
    what: str, tensor: Tensor | None, allowed: Sequence[Sequence[Size]], source: str
) -> Iterator[Broken]:
    """Finds a tensor whose shape is surely none of those allowed."""
    if tensor is None:
        return
    if not any(_may_be(tensor.shape, shape) for shape in allowed):
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        yield Broken(f"{what} must have shape {shapes}, not {list(tensor.shape)}", source)


def _may_be(shape: Sequence[Size], expected: Sequence[Size]) -> bool:
    return len(shape) == len(expected) and not any(
        surely(size != wanted) for size, wanted in zip(shape, expected, strict=True)
    )


def not_contiguous(what: str, tensor: Tensor, source: str) -> Iterator[Broken]:
    """Finds a tensor whose rows surely do not lie one after the other."""
    expected: Size = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if surely(size != 1) and surely(stride != expected):
            yield Broken(f"{what} must be contiguous, not of strides {tensor.stride()}", source)
            return
        expected = expected * size


def not_given(arguments: Mapping[str, object], source: str) -> Iterator[Broken]:
    """Finds arguments that must be left out, of those named here."""
    for name, value in arguments.items():
        if value is not None:
            yield Broken(f"{name} must not be given", source)


def register_contract(op: OpOverload, contract: Contract) -> None:
    """Make `violations` use this contract for this op."""
    _contracts[op] = contract


def violations(
    op: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    chip: Chip = ATLAS_A2,
    formats: Mapping[str, str] | None = None,
) -> list[Violation]:
    """Every rule that this call breaks on the chip; an empty list for a legal one.

    Tensors may be real, fake or on the meta device, sizes symbolic. `formats` names the operands
    that are "NZ", all others being ND; None: formats are not known. Raises LoweringError for an op
    that has no contract.
    """
    contract = _contracts.get(op)
    if contract is None:
        raise LoweringError(
            f"{op} has no contract", "import panguq.kernels.ascend.vendor.ops, which has them all"
        )
    try:
        given = bind(op._schema.arguments, args, kwargs)
    except TypeError as error:
        return [Violation(str(op), f"the arguments must fit the schema: {error}", str(op._schema))]
    limits = {"chip": chip} if "chip" in inspect.signature(contract).parameters else {}
    found = list(contract(**read_by(contract, given | limits)))
    if not found and chip.lists_operators:
        found = list(_unlisted(op, given, formats))
    return [Violation(str(op), rule, source) for rule, source in found]


def _unlisted(
    op: OpOverload, given: Mapping[str, Any], formats: Mapping[str, str] | None
) -> Iterator[Broken]:
    """Finds a call for which CANN has no operator of these dtypes and formats."""
    first = {n: v[0] if isinstance(v, list | tuple) and v else v for n, v in given.items()}
    dtypes = {n: dtype_name(v.dtype) for n, v in first.items() if isinstance(v, Tensor)}
    reason = unlisted(op._schema.name.partition("::")[2], dtypes, formats)
    if reason is not None:
        yield Broken(reason, SOURCE)


def check_call(
    op: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    where: str,
    chip: Chip = ATLAS_A2,
    formats: Mapping[str, str] | None = None,
) -> None:
    """Raises LoweringError that names `where` and each broken rule with its source."""
    if broken := violations(op, args, kwargs, chip, formats):
        rules = "; ".join(f"{violation.rule} ({violation.source})" for violation in broken)
        raise LoweringError(
            f"{where}: an Ascend NPU cannot run {op}: {rules}",
            "choose another scheme for this module in the recipe",
        )
