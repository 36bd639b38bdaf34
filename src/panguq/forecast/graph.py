"""The graph of a model of which nothing but the config is known, with schemes on its matmuls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from panguq.equal_layers import NotEqualError, short_model
from panguq.ir.encoder import Examples
from panguq.ir.interface import Interface
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.passes.pipeline.module_globs import matches
from panguq.passes.pipeline.runner import Runner
from panguq.tensors.weight_store import WeightStore
from panguq.trace_check import LARGE_BYTES, weight_bytes_of
from panguq.tracing import trace

logger = logging.getLogger("panguq")


def canonical_graph(
    model: Any,
    example_inputs: Examples = None,
    dtype: torch.dtype | None = None,
    globs: Sequence[str] = (),
) -> tuple[fx.GraphModule, Interface]:
    """The canonical graph; of layers that are equal, for the globs too, two are traced."""
    short = None
    if isinstance(model, nn.Module):
        short = short_model(model, lambda path: [bool(matches(glob, [path])) for glob in globs])
    gm, interface = _trace(short.model if short else model, example_inputs, dtype)
    if short is not None:
        try:
            return gm, short.whole(gm, interface)
        except NotEqualError as error:
            logger.info("every layer is traced: %s", error)
            return _trace(model, example_inputs, dtype)
    return gm, interface


def _trace(
    model: Any, example_inputs: Examples, dtype: torch.dtype | None
) -> tuple[fx.GraphModule, Interface]:
    compare = isinstance(model, nn.Module) and weight_bytes_of(model) <= LARGE_BYTES
    gm, interface = trace(model, example_inputs, dtype, compare)
    # a proof would need the weights
    Runner(PassContext(interface, WeightStore()), prove=False).run(gm, [Canonicalize()])
    return gm, interface


def graph_of(folder: str | Path, scheme: str, dtype: str) -> tuple[fx.GraphModule, Interface]:
    """The canonical graph of a model folder with a scheme on every matmul but the logits'. Its
    `meta["config"]` is the model's.

    Raises InputError for a folder without a config, TraceError for a model that has no graph.
    """
    from panguq.models.hf import skeleton
    from panguq.models.wrappers import language_model_of

    model = language_model_of(skeleton(folder))
    gm, interface = canonical_graph(model, None, getattr(torch, dtype))
    gm.meta["config"] = getattr(model, "config", None)
    ctx = PassContext(interface, WeightStore())
    AssignSchemes(schemes=(("*", scheme),)).run(gm, ctx)
    return gm, interface
