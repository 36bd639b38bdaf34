"""panguq's canonical ops, and their kin on Ascend, as ONNX nodes: norms, rotary, SwiGLU, attention.

Where a 16-bit graph rounds in the middle of an op, so do the nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.step import Emitter, Step
from panguq.formats.onnx.types import NARROW, known_size


def _rms_norm(step: Step) -> str:
    given = step.arguments()
    x, weight, eps = given["x"], given["weight"], given["eps"]
    values, gain = step.read(x, step.dtype), step.read(weight, step.dtype)
    once = given["rounds_once"] or step.dtype not in NARROW
    if given["offset"]:
        gain = _raised(step, gain, given["offset"])
        gain = gain if once else step.round_to(gain, step.dtype, "gain.narrow")
    if once:
        return step.finish("RMSNormalization", values, gain, axis=-1, epsilon=eps)
    normalized = step.round_to(normalize(step, values, weight, eps), step.dtype, "normalized")
    return step.finish("Mul", normalized, gain)


def _raised(step: Step, weight: str, offset: float) -> str:
    """A norm's weight and what it adds to it, in float32."""
    return step.add("Add", weight, step.number(offset, torch.float32, "offset"), suffix="gain")


def _layer_norm(step: Step) -> str:
    given = step.arguments()
    gain = _raised(step, step.read(given["weight"], step.dtype), given["offset"])
    gain = step.round_to(gain, step.dtype, "gain.narrow")
    bias = [] if given["bias"] is None else [step.read(given["bias"], step.dtype)]
    x = step.read(given["x"], step.dtype)
    return step.finish("LayerNormalization", x, gain, *bias, axis=-1, epsilon=given["eps"])


def normalize(step: Step, values: str, weight: Any, eps: Any) -> str:
    """x / sqrt(mean(x^2) + eps) over the last axis, without the weight, in float32."""
    ones = torch.ones(int(weight.meta["val"].shape[-1]))
    unit = step.builder.add_tensor(f"{step.label}.ones", ones)
    attributes = {"axis": -1, "epsilon": eps}
    return step.add("RMSNormalization", values, unit, suffix="norm", **attributes)


def _rotary(step: Step) -> str:
    given = step.arguments()
    axis = step.integers([1], "heads_axis")
    cos, sin = (
        step.add("Unsqueeze", step.read(given[name], step.dtype), axis, suffix=name)
        for name in ("cos", "sin")
    )
    values = step.read(given["x"])
    direct = step.add("Mul", values, cos, suffix="times_cos")
    direct = step.round_to(direct, step.dtype, "direct")
    turned = _turned(step, values, 4 if given["interleaved"] else None)
    return step.finish("Add", direct, step.add("Mul", turned, sin, suffix="times_sin"))


def _npu_rotary_mul(step: Step) -> str:
    given = step.arguments()
    if given["rotate"] is not None:
        raise step.error("is given a matrix that rotates, which ONNX export does not write")
    values = step.read(given["input"])
    direct = step.add("Mul", values, step.read(given["r1"]), suffix="times_cos")
    rank = step.rank(given["input"]) if given["rotary_mode"] == "interleave" else None
    sines = step.read(given["r2"])
    turned = step.add("Mul", _turned(step, values, rank), sines, suffix="times_sin")
    return step.finish("Add", direct, turned)


def _turned(step: Step, values: str, pairs_of_rank: int | None) -> str:
    """concat(-x2, x1), x1 and x2 the halves of the last axis; or each pair (a, b) as (-b, a).

    `pairs_of_rank` is the number of axes of what has its pairs turned, None for halves.
    """
    if pairs_of_rank is None:
        first, second = _halves(step, values, -1)
        negated = step.add("Neg", second, suffix="negated")
        return step.add("Concat", negated, first, suffix="turned", axis=-1)
    outer = [0] * (pairs_of_rank - 1)  # sizes as they are
    pairs = step.add("Reshape", values, step.integers([*outer, -1, 2], "pairs"), suffix="pairs")
    first, second = _halves(step, pairs, -1)
    negated = step.add("Neg", second, suffix="negated")
    turned = step.add("Concat", negated, first, suffix="turned_pairs", axis=-1)
    return step.add("Reshape", turned, step.integers([*outer, -1], "flat"), suffix="turned")


def _halves(step: Step, values: str, axis: int) -> list[str]:
    names = [step.builder.unique(f"{step.label}.{name}_half") for name in ("first", "second")]
    step.split(values, names, axis)
    return names


def _swiglu(step: Step) -> str:
    gate, up = (step.read(argument) for argument in step.node.args)
    activated = step.add("Swish", gate, suffix="silu")
    return step.finish("Mul", step.round_to(activated, step.dtype, "activated"), up)


def _geglu(step: Step) -> str:
    given = step.arguments()
    gate, up = step.read(given["gate"]), step.read(given["up"])
    activated = step.add("Gelu", gate, suffix="gelu", approximate=given["approximate"])
    return step.finish("Mul", step.round_to(activated, step.dtype, "activated"), up)


def _npu_gelu(step: Step) -> str:
    given = step.arguments()
    return step.finish("Gelu", step.read(given["input"]), approximate=given["approximate"])


def _npu_geglu(step: Step) -> Value:
    given, result = step.arguments(), step.result_name(0)
    gate, up = _halves(step, step.read(given["input"]), given["dim"])
    if not given["activate_left"]:
        gate, up = up, gate
    form = "tanh" if given["approximate"] else "none"
    activated = step.add("Gelu", gate, suffix="gelu", approximate=form)
    wide = step.add("Mul", activated, up, suffix="wide")
    dtype = step.node.meta["val"][0].dtype
    return (step.call_it(step.round_to(wide, dtype, "rounded"), result), "")


def _npu_swiglu(step: Step) -> str:
    given = step.arguments()
    gate, up = _halves(step, step.read(given["input"]), given["dim"])
    return step.finish("Mul", step.add("Swish", gate, suffix="silu"), up)


# --- attention ----------------------------------------------------------------------------------


def _attention(step: Step) -> str:
    query, key, value, mask, scale, sinks, softcap = step.arguments().values()
    if sinks is not None or softcap:
        raise step.error("attention with sinks or a cap of its scores is not written")
    return _attend(step, query, key, value, _attended(step, mask, query, key), scale)


def _attended(step: Step, mask: fx.Node | None, query: fx.Node, key: fx.Node) -> str:
    """The mask of panguq's attention; no name where there is none."""
    if mask is None:
        return ""
    if any(known_size(size) == 0 for size in mask.meta["val"].shape):
        return _causal(step, query, key)
    return _read_mask(step, mask)


def _sdpa(step: Step) -> str:
    given = step.arguments()
    mask, causal = given["attn_mask"], given["is_causal"]
    attended = _read_mask(step, mask) if mask is not None else ""
    if causal:
        attended = _causal(step, given["query"], given["key"], aligned_to_first=True)
    parts = (given["query"], given["key"], given["value"])
    return _attend(step, *parts, attended, given["scale"])


def _latent_attention(step: Step) -> str:
    """In the expanded form, for prompts and single tokens alike."""
    given = step.arguments()
    heads, nope = (int(given["query_nope"].meta["val"].shape[axis]) for axis in (1, 3))
    width = int(given["weight"].meta["val"].shape[0]) // heads
    axis = step.integers([1], "head_axis")
    latent = step.add("Squeeze", step.read(given["latent"]), axis, suffix="latent")
    weight = step.turned(given["weight"], step.dtype)
    made = step.add("MatMul", latent, weight, suffix="expanded")
    shape = step.integers([0, 0, heads, width], "heads")
    apart = step.add("Reshape", made, shape, suffix="apart")
    batched = step.add("Transpose", apart, suffix="batched", perm=[0, 2, 1, 3])
    ends = [step.integers([at], f"at_{at}") for at in (0, nope, width)]
    last = step.integers([3], "last_axis")
    keys = step.add("Slice", batched, ends[0], ends[1], last, suffix="key_nope")
    values = step.add("Slice", batched, ends[1], ends[2], last, suffix="value")
    of_all = step.integers([1, heads, 1, 1], "all_heads")
    turned = step.add("Expand", step.read(given["rope_key"]), of_all, suffix="key_rope")
    key = step.add("Concat", keys, turned, suffix="key", axis=3)
    parts = [step.read(given[name]) for name in ("query_nope", "query_rope")]
    query = step.add("Concat", *parts, suffix="query", axis=3)
    if "hidden" in given:
        attended = _not_hidden(step, given["hidden"])
    else:
        attended = _attended(step, given["mask"], given["query_nope"], given["latent"])
    return step.finish("Attention", query, key, values, attended, scale=given["scale"])


def _not_hidden(step: Step, hidden: Any) -> str:
    """The mask of what is attended to; nothing where nothing is hidden."""
    if hidden is None:
        return ""
    return step.add("Not", step.read(hidden, torch.bool), suffix="attended")


def _npu_attention(step: Step) -> Value:
    given = step.arguments()
    if given["input_layout"] != "BNSD" or given["sparse_mode"] != 0 or given["softmax_lse_flag"]:
        raise step.error("only layout BNSD with a mask in full and without lse is written")
    if given["query_rope"] is not None:
        raise step.error("a rotary part apart is not written")
    result = step.result_name(0)
    attended = _not_hidden(step, given["atten_mask"])
    parts = [step.read(given[name]) for name in ("query", "key", "value")]
    wide = step.add("Attention", *parts, attended, suffix="attention", scale=given["scale"])
    return (step.call_it(step.round_to(wide, step.dtype, "rounded"), result), "")


def _read_mask(step: Step, mask: fx.Node) -> str:
    dtype = mask.meta["val"].dtype
    return step.read(mask, torch.bool if dtype == torch.bool else step.dtype)


def _attend(step: Step, query: Any, key: Any, value: Any, mask: str, scale: float | None) -> str:
    parts = [step.read(argument, step.dtype) for argument in (query, key, value)]
    return step.finish("Attention", *parts, mask, scale=scale)


def _causal(step: Step, query: Any, key: Any, aligned_to_first: bool = False) -> str:
    """bool `[seq, total]`: query i attends to keys 0 … i, counted from the last key or the first.

    ONNX's own is_causal leaves open which, where seq is not total.
    """
    seq = step.add("Shape", step.read(query), suffix="seq", start=2, end=3)
    total = step.add("Shape", step.read(key), suffix="total", start=2, end=3)
    shape = step.add("Concat", seq, total, suffix="mask_shape", axis=0)
    ones = step.add("Expand", step.number(True, torch.bool, "true"), shape, suffix="all_keys")
    if aligned_to_first:
        past = step.number(0, torch.int64, "diagonal")
    else:
        past = step.add("Squeeze", step.add("Sub", total, seq, suffix="past"), suffix="diagonal")
    return step.add("Trilu", ones, past, suffix="causal_mask", upper=0)


# --- norms of the vendor ------------------------------------------------------------------------


def _npu_rms_norm(step: Step) -> Value:
    x, gamma, eps = _norm_arguments(step, "input")
    result = step.result_name(0)
    values = step.read(x)
    gain = step.read(gamma)
    wide = step.add("RMSNormalization", values, gain, suffix="wide", axis=-1, epsilon=eps)
    return (step.call_it(step.round_to(wide, step.dtype, "rounded"), result), "")


def _npu_add_rms_norm(step: Step) -> Value:
    given = step.arguments()
    _, gamma, eps = _norm_arguments(step, "x1")
    norm, total = step.result_name(0), step.result_name(2)
    added = step.add("Add", step.read(given["x1"]), step.read(given["x2"]), suffix="sum.wide")
    step.call_it(step.round_to(added, step.dtype, "sum"), total)
    normalized = step.round_to(normalize(step, total, gamma, eps), step.dtype, "normalized")
    scaled = step.add("Mul", normalized, step.read(gamma), suffix="scaled")
    return (step.call_it(step.round_to(scaled, step.dtype, "rounded"), norm), "", total)


def _norm_arguments(step: Step, x: str) -> tuple[Any, Any, float]:
    given = step.arguments()
    gamma = given["gamma"]
    if gamma.meta["val"].dim() != 1:
        raise step.error("normalizes several axes at once, which ONNX export does not write")
    return given[x], gamma, given["epsilon"]


def _convolution(step: Step) -> str:
    given = step.arguments()
    axes = step.rank(given["input"]) - 2
    sizes = {
        name: [*given[name]] * axes if len(given[name]) == 1 else [*given[name]]
        for name in ("stride", "padding", "dilation")
    }
    read = [step.read(given[name], step.dtype) for name in ("input", "weight")]
    if given["bias"] is not None:
        read.append(step.read(given["bias"], step.dtype))
    return step.result(
        "Conv", *read, strides=sizes["stride"], pads=[*sizes["padding"], *sizes["padding"]],
        dilations=sizes["dilation"], group=given["groups"],
    )  # fmt: skip


EMITTERS: dict[str, Emitter] = {
    "aten.conv1d.default": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.scaled_dot_product_attention.default": _sdpa,
    "npu.npu_add_rms_norm.default": _npu_add_rms_norm,
    "npu.npu_fused_infer_attention_score.default": _npu_attention,
    "npu.npu_geglu.default": _npu_geglu,
    "npu.npu_gelu.default": _npu_gelu,
    "npu.npu_rms_norm.default": _npu_rms_norm,
    "npu.npu_rotary_mul.default": _npu_rotary_mul,
    "npu.npu_swiglu.default": _npu_swiglu,
    "panguq.attention.default": _attention,
    "panguq.latent_attention.default": _latent_attention,
    "panguq_npu.latent_attention.default": _latent_attention,
    "panguq.geglu.default": _geglu,
    "panguq.layer_norm.default": _layer_norm,
    "panguq.rms_norm.default": _rms_norm,
    "panguq.rotary.default": _rotary,
    "panguq.swiglu.default": _swiglu,
}
