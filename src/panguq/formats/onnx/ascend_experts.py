"""A mixture of experts in an Ascend graph as ONNX nodes: routing, grouped matmuls, sums."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.expert_matmuls import from_nibbles, int8_product, nibbles
from panguq.formats.onnx.experts import (
    OwnValues,
    Split,
    by_counts,
    by_ends,
    each_expert,
    rows_by_expert,
    stored,
    weighted_sum,
)
from panguq.formats.onnx.step import Emitter, Step
from panguq.ir.ops.quantize import SMALLEST_AMAX
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.grouped_matmul import full_scales
from panguq.kernels.ascend.vendor.grouped_matmul_rules import COUNTS, CUMULATIVE
from panguq.kernels.ascend.vendor.moe_combine import ROWS
from panguq.kernels.ascend.vendor.moe_gating import LARGEST, SIGMOID
from panguq.kernels.ascend.vendor.moe_routing import GATHER, NOT_QUANTIZED

# --- the choice and the rows ----------------------------------------------------------------------


def _largest(step: Step, scores: str, k: int, suffix: str) -> tuple[str, str]:
    """Values and int64 places of the k largest of the last axis."""
    count = step.integers([k], f"{suffix}_k")
    names = [step.builder.unique(f"{step.label}.{suffix}{part}") for part in ("", "_at")]
    step.several("TopK", scores, count, results=names, axis=-1)
    return names[0], names[1]


def _chosen(step: Step, weights: str, experts: str) -> Value:
    """Weights in the graph's dtype, and experts int32."""
    names = [step.result_name(index) for index in range(2)]
    step.call_it(step.round_to(weights, step.dtype, "rounded"), names[0])
    step.call_it(step.add("Cast", experts, suffix="int32", to=TensorProto.INT32), names[1])
    return (*names, "")


def _gating_softmax(step: Step) -> Value:
    given = step.arguments()
    if given["finished"] is not None:
        raise step.error("marks tokens as finished, which ONNX export does not write")
    scores = step.add("Softmax", step.read(given["x"], torch.float32), suffix="softmax", axis=-1)
    return _chosen(step, *_largest(step, scores, given["k"], "largest"))


def _gating(step: Step) -> Value:
    given = step.arguments()
    if given["out_flag"]:
        raise step.error("returns all scores, which ONNX export does not write")
    sigmoid = given["norm_type"] == SIGMOID
    x = step.read(given["x"], torch.float32)
    named = {"suffix": "scores"} if sigmoid else {"suffix": "scores", "axis": -1}
    scores = step.add("Sigmoid" if sigmoid else "Softmax", x, **named)
    ranked = scores
    if given["bias"] is not None:
        bias = step.read(given["bias"], torch.float32)
        ranked = step.add("Add", scores, bias, suffix="ranked")
    if given["group_count"] > given["k_group"]:
        ranked = _best_groups(step, ranked, given)
    experts = _largest(step, ranked, given["k"], "largest")[1]
    weights = step.add("GatherElements", scores, experts, suffix="weights", axis=-1)
    if sigmoid:
        total = step.add("ReduceSum", weights, step.integers([-1], "last"), suffix="sum")
        least = step.number(given["eps"], torch.float32, "eps")
        total = step.add("Add", total, least, suffix="divisor")
        weights = step.add("Div", weights, total, suffix="normalized")
    factor = step.number(given["routed_scaling_factor"], torch.float32, "factor")
    return _chosen(step, step.add("Mul", weights, factor, suffix="scaled"), experts)


def _best_groups(step: Step, ranked: str, given: dict[str, Any]) -> str:
    """-inf for experts outside the best groups."""
    groups = given["group_count"]
    experts = int(given["x"].meta["val"].shape[-1])
    apart = step.integers([-1, groups, experts // groups], "groups")
    grouped = step.add("Reshape", ranked, apart, suffix="grouped")
    members = 1 if given["group_select_mode"] == LARGEST else 2
    best = _largest(step, grouped, members, "best")[0]
    last = step.integers([-1], "group_axis")
    worth = step.add("ReduceSum", best, last, suffix="worth", keepdims=0)
    kept = _largest(step, worth, given["k_group"], "kept")[1]
    shape = step.add("Shape", kept, suffix="kept_shape")
    ones = step.add("Expand", step.number(0.0, torch.float32, "zero"), shape, suffix="zeros")
    outside = step.add("Shape", worth, suffix="worth_shape")
    infinite = step.number(-torch.inf, torch.float32, "infinite")
    nothing = step.add("Expand", infinite, outside, suffix="nothing")
    mask = step.add("ScatterElements", nothing, kept, ones, suffix="mask", axis=-1)
    column = step.add("Unsqueeze", mask, last, suffix="mask_column")
    masked = step.add("Add", grouped, column, suffix="masked")
    return step.add("Reshape", masked, step.integers([-1, experts], "flat"), suffix="candidates")


def _init_routing(step: Step) -> Value:
    given = step.arguments()
    everything = [0, given["expert_num"]]
    if list(given["active_expert_range"]) != everything or given["row_idx_type"] != GATHER:
        raise step.error("only all experts, and places to gather from, are written")
    if given["quant_mode"] != NOT_QUANTIZED or given["expert_tokens_num_type"] not in _KINDS:
        raise step.error("only plain rows, and ends or numbers of rows, are written")
    names = [step.result_name(index) for index in range(4)]
    top_k = int(given["expert_idx"].meta["val"].shape[1])
    ids = step.read(given["expert_idx"], torch.int64)
    order, counts = rows_by_expert(step, ids, given["expert_num"])
    token = step.add("Div", order, step.number(top_k, torch.int64, "top_k"), suffix="token")
    rows = step.add("Gather", step.read(given["x"]), token, suffix="rows", axis=0)
    step.call_it(rows, names[0])
    count = step.add("Size", order, suffix="count")
    zero, one = (step.number(value, torch.int64, f"number_{value}") for value in (0, 1))
    at = step.add("Range", zero, count, one, suffix="at")
    places = step.add("ScatterElements", order, order, at, suffix="places", axis=0)
    step.call_it(step.add("Cast", places, suffix="int32", to=TensorProto.INT32), names[1])
    ends = counts
    if given["expert_tokens_num_type"] == CUMULATIVE:
        ends = by_counts(step, counts).ends
    step.call_it(ends, names[2])
    if given["scale"] is not None:
        scale = step.add("Gather", step.read(given["scale"]), token, suffix="scale", axis=0)
        step.call_it(scale, names[3])
    return tuple(names)


_KINDS = (CUMULATIVE, COUNTS)


def _finalize(step: Step) -> str:
    given = step.arguments()
    rows, scales = given["expanded_permuted_rows"], given["scales"]
    if given["skip1"] is not None or scales is None or given["drop_pad_mode"] != ROWS:
        raise step.error("only weighted sums of rows in their own order are written")
    if rows.meta["val"].dtype == torch.float16:
        raise step.error("adds up in float16, which ONNX export does not write")
    places = step.read(given["expanded_src_to_dst_row"])
    return step.finish(*weighted_sum(step, rows, places, scales))


def _unpermute(step: Step) -> str:
    given = step.arguments()
    if given["probs"] is None:
        raise step.error("only weighted sums are written")
    places = step.read(given["sorted_indices"])
    return step.finish(*weighted_sum(step, given["permuted_tokens"], places, given["probs"]))


# --- grouped matmuls ------------------------------------------------------------------------------


def _only(tensors: Any) -> Any:
    """The one tensor of a list; None of None."""
    return None if tensors is None else tensors[0]


def _split(step: Step, given: dict[str, Any]) -> Split:
    kind = given["group_list_type"]
    if kind not in _KINDS:
        raise step.error("only ends or numbers of rows are written")
    listed = step.read(given["group_list"])
    return by_ends(step, listed) if kind == CUMULATIVE else by_counts(step, listed)


def _grouped_matmul(step: Step) -> Value:
    given = step.arguments()
    if step.dtype in (torch.int8, torch.int32):
        raise step.error(f"only float results are written, not {step.dtype}")
    x, weight = _only(given["x"]), _only(given["weight"])
    packed = weight.meta["val"].dtype == torch.int32
    split, rows = _split(step, given), [step.read(x)]
    if x.meta["val"].dtype == torch.int8:
        rows.append(_column(step, _only(given["per_token_scale"])))
        own, make = (_int8_by_int4 if packed else _int8)(step, given)
    elif _only(given["antiquant_scale"]) is not None:
        own, make = _weight_only(step, given)
    else:
        own, make = [stored(step, weight), stored(step, _only(given["bias"]))], _float(step)
    name = step.result_name(0)
    width = int(step.node.meta["val"][0].shape[1])
    sequence = each_expert(step, split, rows, own, width, make)
    wide = step.add("ConcatFromSequence", sequence, suffix="wide", axis=0)
    return (step.call_it(step.round_to(wide, step.dtype, "rounded"), name),)


def _column(step: Step, per_token: fx.Node) -> str:
    axis = step.integers([-1], "column")
    return step.add("Unsqueeze", step.read(per_token), axis, suffix="token_scale")


def _float(step: Step) -> Any:
    def make(rows: list[str], own: OwnValues) -> str:
        assert own[0] is not None
        return _biased(step, step.add("MatMul", rows[0], own[0], suffix="product"), own[1])

    return make


def _biased(step: Step, product: str, bias: str | None) -> str:
    return product if bias is None else step.add("Add", product, bias, suffix="biased")


def _int8(step: Step, given: dict[str, Any]) -> tuple[list[str | None], Any]:
    scales, bias = step.known(_only(given["scale"])).float(), _only(given["bias"])
    if bias is not None and bias.meta["val"].dtype == torch.int32:
        raise step.error("has an int32 bias, which ONNX export does not write")
    scale = step.builder.add_tensor(f"{step.label}.deq_scale", scales)
    own = [stored(step, _only(given["weight"])), scale, stored(step, bias)]

    def make(rows: list[str], own: OwnValues) -> str:
        total = int8_product(step, rows[0], own[0], own[1])
        return _biased(step, step.add("Mul", total, rows[1], suffix="scaled"), own[2])

    return own, make


def _int8_by_int4(step: Step, given: dict[str, Any]) -> tuple[list[str | None], Any]:
    """(sum over groups of (x - 8) @ weight * scale, plus bias) * per_token_scale."""
    weight = _only(given["weight"])
    k, n = int(weight.meta["val"].shape[1]), int(weight.meta["val"].shape[2]) * CODES_PER_WORD
    scales = full_scales(step.known(_only(given["scale"])))
    scales = scales.reshape(scales.shape[0], -1, 1, n)
    groups = int(scales.shape[1])
    own = [
        nibbles(step, weight),
        step.builder.add_tensor(f"{step.label}.group_scale", scales),
        stored(step, _only(given["bias"])),
    ]
    shift = step.number(8, torch.int8, "shift")

    def make(rows: list[str], own: OwnValues) -> str:
        assert own[0] is not None and own[1] is not None and own[2] is not None
        codes = from_nibbles(step, own[0], [groups, k // groups, n])
        codes = step.add("Cast", codes, suffix="weight_int8", to=TensorProto.INT8)
        shape = step.integers([-1, groups, k // groups], "x_shape")
        apart = step.add("Reshape", rows[0], shape, suffix="x_groups")
        apart = step.add("Transpose", apart, suffix="x_batched", perm=[1, 0, 2])
        total = int8_product(step, apart, codes, own[1], shift)
        axis = step.integers([0], "groups_axis")
        total = step.add("ReduceSum", total, axis, suffix="sum", keepdims=0)
        total = step.add("Add", total, own[2], suffix="unshifted")
        return step.add("Mul", total, rows[1], suffix="scaled")

    return own, make


def _weight_only(step: Step, given: dict[str, Any]) -> tuple[list[str | None], Any]:
    """(codes + offset) * scale in x's dtype; a scale for each output or each group of inputs."""
    weight, dtype = _only(given["weight"]), _only(given["x"]).meta["val"].dtype
    packed = weight.meta["val"].dtype == torch.int32
    k, columns = (int(size) for size in weight.meta["val"].shape[1:])
    n = columns * (CODES_PER_WORD if packed else 1)
    steps, offsets = (
        step.known(_only(given[name])).float().reshape(weight.meta["val"].shape[0], -1, 1, n)
        for name in ("antiquant_scale", "antiquant_offset")
    )
    groups = int(steps.shape[1])
    own = [
        nibbles(step, weight) if packed else stored(step, weight),
        step.builder.add_tensor(f"{step.label}.weight_scale", steps),
        step.builder.add_tensor(f"{step.label}.offset", offsets),
        stored(step, _only(given["bias"])),
    ]

    def make(rows: list[str], own: OwnValues) -> str:
        assert own[0] is not None and own[1] is not None and own[2] is not None
        shape = [groups, k // groups, n]
        if packed:
            codes = from_nibbles(step, own[0], shape)
        else:
            codes = step.add("Cast", own[0], suffix="codes", to=TensorProto.FLOAT)
            codes = step.add("Reshape", codes, step.integers(shape, "groups"), suffix="groups")
        codes = step.add("Add", codes, own[2], suffix="shifted")
        codes = step.round_to(codes, dtype, "shifted_rounded")
        codes = step.add("Mul", codes, own[1], suffix="weight_wide")
        codes = step.add("Reshape", codes, step.integers([k, n], "matrix"), suffix="weight")
        codes = step.round_to(codes, dtype, "weight_rounded")
        return _biased(step, step.add("MatMul", rows[0], codes, suffix="product"), own[3])

    return own, make


def _swiglu_quant(step: Step) -> Value:
    """The product of halves in the Loop; codes of all rows behind it, rounded twice as the op."""
    given = step.arguments()
    (weight,), (scale,) = given["weight"], given["weight_scale"]
    if weight.meta["val"].dtype != torch.int8:
        raise step.error("only 8-bit weights are written")
    scales = step.builder.add_tensor(f"{step.label}.deq_scale", step.known(scale).float())
    rows = [step.read(given["x"]), _column(step, given["x_scale"])]
    half = int(scale.meta["val"].shape[-1]) // 2
    names = [step.result_name(index) for index in range(2)]

    def make(rows: list[str], own: OwnValues) -> str:
        assert own[1] is not None
        total = step.add("MatMulInteger", rows[0], own[0] or "", suffix="int32")
        wide = step.add("Cast", total, suffix="float32", to=TensorProto.FLOAT)
        wide = step.add("Mul", wide, rows[1], suffix="row_scaled")
        wide = step.add("Mul", wide, own[1], suffix="scaled")
        parts = [step.builder.unique(f"{step.label}.{name}") for name in ("gate", "up")]
        step.split(wide, parts, -1)
        activated = step.add("Swish", parts[0], suffix="silu")
        return step.add("Mul", activated, parts[1], suffix="gated")

    sequence = each_expert(
        step, _split(step, given), rows, [stored(step, weight), scales], half, make
    )
    product = step.add("ConcatFromSequence", sequence, suffix="product", axis=0)
    last = step.integers([-1], "last")
    size = step.add("Abs", product, suffix="abs")
    largest = step.add("ReduceMax", size, last, suffix="amax")
    least = step.number(SMALLEST_AMAX, torch.float32, "smallest_amax")
    largest = step.add("Max", largest, least, suffix="limited")
    most = step.number(127.0, torch.float32, "quant_max")
    row_scale = step.add("Div", largest, most, suffix="row_scale")
    factor = step.add("Reciprocal", row_scale, suffix="factor")
    scaled = step.round_to(
        step.add("Mul", product, factor, suffix="quotient"), torch.float16, "quotient_rounded"
    )
    codes = step.add("Round", scaled, suffix="rounded_codes")
    step.call_it(step.add("Cast", codes, suffix="int8", to=TensorProto.INT8), names[0])
    step.call_it(step.add("Squeeze", row_scale, last, suffix="row_scales"), names[1])
    return tuple(names)


EMITTERS: dict[str, Emitter] = {
    "npu.npu_grouped_matmul.default": _grouped_matmul,
    "npu.npu_grouped_matmul_swiglu_quant_v2.default": _swiglu_quant,
    "npu.npu_moe_finalize_routing.default": _finalize,
    "npu.npu_moe_gating_top_k.default": _gating,
    "npu.npu_moe_gating_top_k_softmax.default": _gating_softmax,
    "npu.npu_moe_init_routing_v2.default": _init_routing,
    "npu.npu_moe_token_unpermute.default": _unpermute,
}
