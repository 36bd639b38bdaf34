"""How torch_npu's ops are given a CPU body, a fake and a contract, with or without torch_npu.

Without torch_npu, panguq defines the schema, the body for CPU tensors and the fake. Where torch_npu
has defined the op already, its schema, its NPU kernel and its Meta kernel stay what they are and
only the CPU body is added. PyTorch loads torch_npu when `import torch` runs, so that it comes
first; a torch_npu imported by hand must be imported before this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from panguq.ir.ops.opset import admit, by_name
from panguq.kernels.ascend.vendor.contracts import Contract, register_contract

NAMESPACE = "npu"
Function = Callable[..., Any]

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class NpuOp:
    """One op of torch_npu: `schema` as of torch_npu 2.13.0, and panguq's three functions for it.

    `defined_here`: panguq defined the op, since torch_npu was not there.
    """

    op: OpOverload
    schema: str
    fake: Function
    body: Function
    contract: Contract
    defined_here: bool


_npu_ops: dict[OpOverload, NpuOp] = {}


def define_npu_op(
    schema: str, fake: Function, *, contract: Contract, keeps_strides: bool = False
) -> Callable[[Function], OpOverload]:
    """Register an op of torch_npu; the decorated function is its body for CPU tensors.

    `schema` is torch_npu's without the namespace. It and the body have the whole signature; `fake`
    and `contract` name those of the arguments that they read. The name becomes the OpOverload, as
    with `panguq.ir.ops.opset.define_op`. Results are contiguous, unless `keeps_strides`: then they
    are what the body makes.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    named_fake = by_name(fake, torch._C.parse_schema(f"{NAMESPACE}::{schema}").arguments)

    def register(body: Function) -> OpOverload:
        defined_here = not torch._C._jit_get_schemas_for_operator(qualified)
        if defined_here:
            _library.define(schema)
        _library.impl(name, body if keeps_strides else _contiguous(body), "CPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta"):
            torch.library.register_fake(qualified, named_fake, lib=_library)
        op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        register_contract(op, contract)
        _npu_ops[op] = NpuOp(op, schema, named_fake, body, contract, defined_here)
        return admit(op)

    return register


def _contiguous(body: Function) -> Function:
    """`body` with contiguous results whatever its inputs' layout, as NPU kernels have."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = body(*args, **kwargs)
        if isinstance(result, Tensor):
            return result.contiguous()
        return type(result)(tensor.contiguous() for tensor in result)

    return run


def npu_op(op: OpOverload) -> NpuOp:
    """What panguq knows of this op. Raises KeyError for an op that is not torch_npu's."""
    return _npu_ops[op]


def npu_ops() -> tuple[NpuOp, ...]:
    """All ops registered so far, in the order of their definition."""
    return tuple(_npu_ops.values())
