"""The ops a panguq graph may contain, and how panguq's own ones are defined.

An op of panguq is a schema, a body and a fake. The body is the op's meaning: it runs on any
device PyTorch knows, so that every graph at every stage runs on a plain CPU. The fake gives
shape and dtype of the result without computing it.

Files name ops as text (`aten.mm.default`); `resolve` maps such a name to the op and to nothing
else: what is not listed here cannot be reached from a file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

Body = Callable[..., Any]

_libraries: dict[str, torch.library.Library] = {}
_own_ops: dict[str, OpOverload] = {}


def define_op(schema: str, fake: Body, namespace: str = "panguq") -> Callable[[Body], OpOverload]:
    """Register an op; the decorated function becomes its body and the name its OpOverload.

    `schema` is PyTorch's, without a namespace: `"swiglu(Tensor gate, Tensor up) -> Tensor"`.
    `fake` takes the same arguments and returns empty tensors of the right shape and dtype.
    """
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))

    def register(body: Body) -> OpOverload:
        name = schema.split("(", 1)[0]
        library.define(schema)
        library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake)
        op: OpOverload = getattr(getattr(torch.ops, namespace), name).default
        _own_ops[str(op)] = op
        return op

    return register
