"""A transformers causal language model as a graph, with its cache as plain inputs and outputs."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from panguq.errors import TraceError
from panguq.ir.cache_layers import cache_layers, check_keeps_a_cache
from panguq.ir.causal_lm import CausalLMStep, MaskForm, choose_attention
from panguq.ir.causal_tables import compute_causal_tables
from panguq.ir.edit import module_path
from panguq.ir.experts import check_experts, choose_experts
from panguq.ir.export import export, fake_mode_of, naming_the_module, plain_graph, skeleton_of
from panguq.ir.exported_graph import name_symbols
from panguq.ir.interface import CachedTensor, Interface
from panguq.ir.length_limits import (
    LengthLimit,
    attends_both_ways,
    attention_windows,
    check_causal_modules,
    keep_rotary_frequencies,
    reset_rotary_frequencies,
)
from panguq.ir.recurrences import recurrences_as_ops
from panguq.tensors.dtypes import dtype_name

BATCH, SEQ, PAST, KEPT = 3, 5, 7, 2  # all different, none of them 0 or 1


def is_causal_lm(model: Any) -> bool:
    """Whether this is a transformers model that continues token sequences from a cache.

    Attention that goes both ways continues nothing: the cache would hold what the next token
    changes.
    """
    generates = hasattr(model, "config") and hasattr(model, "generate") and model.can_generate()
    return generates and not attends_both_ways(model)


def encoder_decoder(model: Any) -> TraceError:
    """The error for a model of two halves."""
    return TraceError(
        f"{type(model).__name__} is an encoder-decoder model",
        "panguq compiles its encoder alone: panguq.compile(model.get_encoder(), ...)",
    )


def trace_causal_lm(
    model: nn.Module, mask_form: MaskForm = "attended"
) -> tuple[fx.GraphModule, Interface]:
    """Trace a transformers causal language model; its weights are shared, not copied.

    mask_form: how the model is told what to attend to. Raises TraceError, naming the module at
    fault, if the model cannot be exported.
    """
    skeleton: Any = skeleton_of(model)
    config = skeleton.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise encoder_decoder(model)
    check_keeps_a_cache(model)
    check_experts(skeleton)
    choose_experts(skeleton)
    windows, limits = attention_windows(model, config)
    limits += reset_rotary_frequencies(skeleton)
    keep_rotary_frequencies(skeleton)
    choose_attention(skeleton)
    compute_causal_tables(skeleton)
    step = CausalLMStep(skeleton, mask_form, windows)
    mode = fake_mode_of(model)
    asked = CausalLMStep(skeleton_of(skeleton), mask_form, windows)  # it keeps fake buffers
    with naming_the_module(asked.model), recurrences_as_ops(asked.model):
        cached = cache_layers(asked, mode)
    dtype = next(skeleton.parameters()).dtype
    step.keep(cached, dtype_name(dtype))
    tensors = step.tensors
    with mode or nullcontext():
        positions = torch.arange(PAST, PAST + SEQ).expand(BATCH, SEQ)
        args = (
            torch.zeros(BATCH, SEQ, dtype=torch.long),
            torch.ones(BATCH, 1, SEQ, PAST + SEQ, dtype=torch.bool),
            positions,
            torch.arange(KEPT),
            [_zeros(len(places), tensors[places[0]]) for places in step.stacks],
        )
    batch, seq, kept, length = Dim("batch"), Dim("seq"), Dim("kept"), Dim("past")
    dynamic = (
        {0: batch, 1: seq},
        {0: batch, 2: seq, 3: Dim.AUTO},
        {0: batch, 1: seq},
        {0: kept},
        [
            {1: batch, 3: length} if tensors[places[0]].grows else {1: batch}
            for places in step.stacks
        ],
    )
    with recurrences_as_ops(skeleton):
        exported = export(step, args, dynamic, skeleton)
    parts = {
        f"stacks_{number}": [(at, f"past_{tensors[at].name}") for at in places]
        for number, places in enumerate(step.stacks)
    }
    gm = plain_graph(exported, model, "model.", parts)
    if mask_form == "attended" and _adds_booleans(gm):
        return trace_causal_lm(model, "added")
    named = ("input_ids", "attention_mask", "position_ids", "logit_positions")
    check_causal_modules(skeleton, {module_path(node) for node in gm.graph.nodes})
    table = _learned_positions(gm)
    if table is not None:
        limits.append(LengthLimit(table, "its table of learned positions ends there"))
    limit = min(limits, key=lambda found: found.positions, default=None)
    interface = Interface(
        kind="causal_lm",
        inputs=(*named, *(f"past_{cached.name}" for cached in tensors)),
        outputs=("logits", *(cached.name for cached in tensors)),
        input_shapes=name_symbols(gm),
        float_dtype=dtype_name(dtype),
        vocab_size=int(skeleton.get_input_embeddings().weight.shape[0]),
        max_positions=limit.positions if limit else None,
        max_positions_reason=limit.reason if limit else "",
        positions_from_mask=_numbers_real_tokens(skeleton),
        cache=cached,
    )
    return gm, interface


def _zeros(count: int, cached: CachedTensor) -> Tensor:
    sizes = (PAST if size is None else size for size in cached.sizes)
    return torch.zeros(count, BATCH, *sizes, dtype=getattr(torch, cached.dtype))


def _adds_booleans(gm: fx.GraphModule) -> bool:
    """Whether floats and booleans are added: a model that adds its mask to scores."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            values = [x.meta["val"] for x in node.all_input_nodes]
            dtypes = {x.dtype for x in values if isinstance(x, Tensor)}
            if torch.bool in dtypes and any(dtype.is_floating_point for dtype in dtypes):
                return True
    return False


def _learned_positions(gm: fx.GraphModule) -> int | None:
    """How many positions a table serves that `position_ids` look up, or None without a table."""
    sizes = []
    for node in gm.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        index, offset = node.args[1], 0
        while index.op == "call_function" and isinstance(index.args[0], fx.Node):
            if index.target is torch.ops.aten.add.Tensor and isinstance(index.args[1], int):
                offset += index.args[1]
            index = index.args[0]
        if index.target == "position_ids":
            sizes.append(int(node.args[0].meta["val"].shape[0]) - offset)
    return min(sizes, default=None)


def _numbers_real_tokens(model: nn.Module) -> bool:
    """Whether positions are counted by the attention mask where they are not given, as OPT's are.

    A table that could is given the mask; the model may number all tokens for it before, as
    BioGPT's does. So it is run on a padded prompt up to there.
    """
    for table in model.modules():
        reads = inspect.signature(table.forward).parameters
        if isinstance(table, nn.Embedding) and {"attention_mask", "position_ids"} <= reads.keys():
            given = _first_arguments(model, table).get("position_ids")
            return given is None or given.flatten().tolist() != [0, 1, 2]
    return False


class _Reached(Exception):
    """The module was called with these arguments by name."""


def _first_arguments(model: nn.Module, module: nn.Module) -> dict[str, Any]:
    """What a module is given by name when its model reads a row of one padding and two tokens."""

    def stop(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
        raise _Reached(named)

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1]]))
    except _Reached as reached:
        return dict(reached.args[0])
    finally:
        hook.remove()
    return {}
