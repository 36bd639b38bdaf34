"""From a model, as a user gives it, to a graph that was compared with it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from panguq.equal_layers import NotEqualError, short_model
from panguq.errors import InputError, TraceError
from panguq.ir.causal_lm import MaskForm, makes_its_own_mask
from panguq.ir.encoder import Examples, is_encoder, trace_encoder
from panguq.ir.interface import Interface
from panguq.ir.run.equivalence import Once
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import is_causal_lm, trace_causal_lm
from panguq.trace_check import check_causal_lm, check_encoder, check_module, has_weights

logger = logging.getLogger("panguq")


def _now(what: str, graphs: Sequence[fx.GraphModule], check: Callable[..., float]) -> float:
    return check(*graphs)


def trace(
    model: nn.Module,
    example_inputs: Examples,
    dtype: torch.dtype | None,
    compare: bool = True,
    once: Once = _now,
) -> tuple[fx.GraphModule, Interface]:
    """The model's graph, by default compared with the model itself, and its interface.

    A language model's comparison is left to `once`, which may know that it was passed before.
    Raises InputError for what is no model, TraceError for one whose graph would not be the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module",
            "load it first, for example with panguq.load_pretrained(folder)",
        )
    if dtype is not None and any(p.dtype != dtype for p in model.parameters()):
        model = _cast(model, dtype, keep_buffers=is_causal_lm(model) or is_encoder(model))
    compare = compare and has_weights(model)
    if is_causal_lm(model):
        return _trace_causal_lm(model, compare, once)
    if is_encoder(model):
        gm, interface = trace_encoder(model, example_inputs)
        if compare:
            check_encoder(model, gm, interface, example_inputs)
        return gm, interface
    if example_inputs is None or isinstance(example_inputs, Mapping):
        raise InputError(
            f"{type(model).__name__} is not a model of transformers",
            "pass example_inputs=, a tuple of tensors with every size at least 2",
        )
    gm, interface = trace_module(model, example_inputs)
    if compare:
        check_module(model, gm, interface, example_inputs)
    return gm, interface


def _trace_causal_lm(
    model: nn.Module, compare: bool, once: Once
) -> tuple[fx.GraphModule, Interface]:
    """With the mask of the graph itself, and where that is not right, with the one that users
    give, if the model makes its own of it."""
    try:
        return _checked(model, "attended", compare, once)
    except TraceError:
        if not makes_its_own_mask(model):
            raise
        try:
            return _checked(model, "real_tokens", compare, once)
        except TraceError:
            pass  # the first error is the one to know of
        raise


def _checked(
    model: nn.Module, mask_form: MaskForm, compare: bool, once: Once
) -> tuple[fx.GraphModule, Interface]:
    """Of layers that are equal, two are traced, if the graph can then be compared with them all."""
    short = short_model(model) if compare else None
    if short is not None:
        try:
            gm, interface = trace_causal_lm(short.model, mask_form)
            interface = short.with_weights(gm, interface, model)
            _compare(model, gm, interface, once)
            return _warned(model, gm), interface
        except (NotEqualError, TraceError) as error:
            logger.info("every layer is traced: %s", error)
    gm, interface = trace_causal_lm(model, mask_form)
    if compare:
        _compare(model, gm, interface, once)
    return _warned(model, gm), interface


def _compare(model: nn.Module, gm: fx.GraphModule, interface: Interface, once: Once) -> None:
    def check(traced: fx.GraphModule) -> float:
        check_causal_lm(model, traced, interface)
        return 0.0

    once(f"trace of {type(model).__module__}.{type(model).__qualname__}", (gm,), check)


def _warned(model: nn.Module, gm: fx.GraphModule) -> fx.GraphModule:
    gm.meta["trace_warnings"] = (*gm.meta.get("trace_warnings", ()), *_left_out(model, gm))
    return gm


def _left_out(model: Any, gm: fx.GraphModule) -> list[str]:
    """A sentence about the towers of a wrapper, of which the graph reads no weight."""
    if model.config.get_text_config() is model.config:
        return []
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    prefix = "model." if hasattr(model, "model") else ""
    towers = [
        f"{prefix}{path} ({type(module).__name__})"
        for path, module in getattr(model, "model", model).named_children()
        if (own := {f"{prefix}{path}.{name}" for name, _ in module.named_parameters()})
        and not own & read
    ]
    name = type(model).__name__
    left = f"of this {name} the language model alone is compiled; left out: {', '.join(towers)}"
    return [left] if towers else []


def in_dtype(example_inputs: Examples, dtype: torch.dtype | None) -> Examples:
    """The examples as the cast module takes them: floating-point ones in its dtype."""
    if example_inputs is None or dtype is None:
        return example_inputs
    if isinstance(example_inputs, Mapping):
        return {name: _as(x, dtype) for name, x in example_inputs.items()}
    return tuple(_as(x, dtype) for x in example_inputs)


def _as(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _cast(model: nn.Module, dtype: torch.dtype, keep_buffers: bool) -> nn.Module:
    """A copy with its parameters cast, and its buffers, as `model.to(dtype)` would do.

    Those of a language model, such as rotary tables, keep their precision.
    """
    memo: dict[int, Any] = {
        id(b): b if keep_buffers or not b.is_floating_point() else b.detach().to(dtype)
        for b in model.buffers()
    }
    for p in model.parameters():
        cast = p.detach().to(dtype) if p.is_floating_point() else p.detach()
        memo[id(p)] = nn.Parameter(cast, requires_grad=False)
    return copy.deepcopy(model, memo)
