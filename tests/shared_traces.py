"""One trace for many compiles of the same model, which must not change between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from panguq import compiler
from panguq.ir.edit import clone
from panguq.planning import dry_run


@contextmanager
def shared_traces() -> Iterator[None]:
    """All compiles of one model, dtype and set of example inputs begin with copies of one trace.

    So do its plans, where recipes name the same layers.
    """
    made: dict[Any, Any] = {}
    planned: dict[Any, Any] = {}
    original, canonical = compiler.trace, dry_run.canonical_graph

    def trace(
        model: Any, examples: Any, dtype: torch.dtype | None, compare: bool = True, **once: Any
    ) -> Any:
        key = id(model), id(examples), dtype, compare
        if key not in made:
            made[key] = model, examples, original(model, examples, dtype, compare, **once)
        gm, interface = made[key][-1]
        return clone(gm), interface

    def canonical_graph(
        model: Any, examples: Any = None, dtype: torch.dtype | None = None, globs: Any = ()
    ) -> Any:
        key = id(model), id(examples), dtype, tuple(globs)
        if key not in planned:
            planned[key] = model, examples, canonical(model, examples, dtype, globs)
        gm, interface = planned[key][-1]
        return clone(gm), interface

    compiler.trace, dry_run.canonical_graph = trace, canonical_graph
    try:
        yield
    finally:
        compiler.trace, dry_run.canonical_graph = original, canonical
