"""One trace for many compiles of the same model, which must not change between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from panguq import compiler
from panguq.ir.edit import clone


@contextmanager
def shared_traces() -> Iterator[None]:
    """All compiles of one model, dtype and set of example inputs begin with copies of one trace."""
    made: dict[Any, Any] = {}
    original = compiler.trace

    def trace(
        model: Any, examples: Any, dtype: torch.dtype | None, compare: bool = True, **once: Any
    ) -> Any:
        key = id(model), id(examples), dtype, compare
        if key not in made:
            made[key] = model, examples, original(model, examples, dtype, compare, **once)
        gm, interface = made[key][-1]
        return clone(gm), interface

    compiler.trace = trace
    try:
        yield
    finally:
        compiler.trace = original
