"""Matmuls of a lowered graph: the lowering's own costs of them, and of what only it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx

from panguq.errors import LoweringError
from panguq.ir.call_arguments import arguments
from panguq.ir.edit import op_name
from panguq.ir.quant_spec import SCHEMES, Scheme
from panguq.lowering.ascend.cost.experts import grouped_cost, typical_rows
from panguq.lowering.ascend.cost.model import cost
from panguq.lowering.ascend.dispatch import CODES_OF_WORD, parse_kernel, row_for
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import SizesOf, VendorCall, value_of
from panguq.lowering.ascend.op_times.price import price
from panguq.lowering.problem import FLOAT_BYTES, FLOAT_OP, Candidate, Dtype, MatmulProblem, Storage
from panguq.lowering.target import Cost
from panguq.tensors.dtypes import dtype_name

_STORED: Mapping[torch.dtype, Storage] = {
    torch.int8: "int8",
    torch.int32: "int4",
    torch.int16: "int4_quarters",
}
CUBE_SHARE = 0.7
"""Of the cube's peak, where no kernel's own cost is known (`forecast/achieved.py`)."""


def node_matmul_cost(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    """Microseconds of a node whose op is one of `MATMULS`."""
    return MATMULS[name](node, arguments(node), sizes, machine)


def multiplied(macs: float, machine: AscendMachine) -> float:
    """Microseconds of so many products of 16-bit numbers."""
    peak = machine.chip.cube_macs * machine["cube_cores"] * machine["clock_mhz"]
    return macs / (peak * CUBE_SHARE)


def _rows(x: Tensor, sizes: SizesOf) -> int:
    return max(prod(sizes(x)[:-1]), 1)


def _dtype(value: Tensor) -> Dtype:
    """A matmul's 16-bit dtype, float32 where it has that, and bfloat16 for a vendor's int8."""
    name = dtype_name(value.dtype)
    return cast(Dtype, name) if name in FLOAT_BYTES else "bfloat16"


def _scheme(x: Tensor, weight: Tensor, per_token: bool, k: int, scale: Tensor) -> Scheme:
    """The scheme whose operands these are; the group size is what the scales say."""
    bits = 8 if weight.dtype == torch.int8 else 4
    if x.dtype == torch.int32:
        name = "W4A4"
    elif x.dtype == torch.int8:
        name = "W4A8" if bits == 4 else "W8A8_DYNAMIC" if per_token else "W8A8"
    else:
        name = f"W{bits}A16"
    scheme = SCHEMES[name]
    groups = int(scale.shape[0]) if scale.dim() > 1 else 1
    if scheme.weight is None or bits == 8:
        return scheme
    if groups == 1:
        spec = replace(scheme.weight, granularity="per_channel", group_size=None)
    else:
        spec = replace(scheme.weight, granularity="per_group", group_size=-(-k // groups))
    return replace(scheme, weight=spec)


def _quantized(
    node: fx.Node, given: Mapping[str, Any], sizes: SizesOf, machine: AscendMachine
) -> Cost:
    """The vendor's quantized matmuls, panguq's own, and a table over m of both."""
    source = next(given[n] for n in ("x1", "x") if n in given)
    stored = next(given[n] for n in ("x2", "weight") if n in given)
    scales = next(given[n] for n in ("scale", "antiquant_scale") if n in given)
    x, weight, scale = (cast(Tensor, value_of(n)) for n in (source, stored, scales))
    m, k = _rows(x, sizes), int(weight.shape[0])
    outputs = int(node.meta["val"].shape[-1])
    scheme = _scheme(x, weight, given.get("pertoken_scale") is not None, k, scale)
    cast_format = isinstance(stored, fx.Node) and op_name(stored).startswith("npu_format_cast")
    bias = given.get("bias") is not None
    problem = MatmulProblem(
        m, outputs, k, scheme, dtype=_dtype(node.meta["val"]), biased=bias,
        weight_format="NZ" if cast_format else "ND",
    )  # fmt: skip
    return cost(_candidate(node, given, m, _STORED[weight.dtype]), problem, machine)


def _candidate(node: fx.Node, given: Mapping[str, Any], m: int, storage: Storage) -> Candidate:
    name = op_name(node).partition(".")[0]
    if "kernels" in given:
        kernel = parse_kernel(given["kernels"][row_for(list(given["last_m"]), m)])
    elif "tile" in given:
        suffix = "split_k" if given["splits"] > 1 else "data_parallel"
        tile = tuple(given["tile"]) or None
        kernel = Candidate(f"{name}_{suffix}", splits=given["splits"], tile=tile)
    else:
        kernel = Candidate(name)
    schedule = next((s for s in ("split_k", "data_parallel") if kernel.kernel.endswith(s)), None)
    if schedule is None:
        return replace(kernel, storage=storage)
    return replace(kernel, schedule=cast(Any, schedule), storage=storage)


def _float(node: fx.Node, given: Mapping[str, Any], sizes: SizesOf, machine: AscendMachine) -> Cost:
    """`linear`, `mm`, `matmul` and their like; a batch of matrices is as many matmuls' work."""
    names = next(p for p in (("input", "weight"), ("mat1", "mat2"), ("self", "mat2"),
                             ("self", "other")) if all(n in given for n in p))  # fmt: skip
    x, weight = (cast(Tensor, value_of(given[name])) for name in names)
    shape, other = list(sizes(x)), list(sizes(weight))
    k = shape[-1]
    if names[1] == "weight":
        batch, n, m = 1, other[0], _rows(x, sizes)
    else:
        batch, n = prod(other[:-2]), other[-1] if len(other) > 1 else 1
        m = max(prod(shape[:-1]) // max(batch, 1), 1)
    dtype = _dtype(node.meta["val"])
    problem = MatmulProblem(m, n, k, SCHEMES["FLOAT"], dtype=dtype)
    one = cost(Candidate(FLOAT_OP), problem, machine)
    if batch == 1:
        return one
    # the kernel starts once, and moves and multiplies all of the batch
    more = multiplied((batch - 1) * m * n * k, machine)
    moved = (batch - 1) * (m * k + k * n + m * n) * FLOAT_BYTES[dtype]
    rest = max(more, moved / (machine["hbm_gb_per_s"] * 1000))
    return Cost(one.total_us + rest, {**one.terms, "batch": rest}, one.how, one.overlapped)


def _convolved(
    node: fx.Node, given: Mapping[str, Any], sizes: SizesOf, machine: AscendMachine
) -> Cost:
    """x `[b, channels, w]`, weight `[outputs, channels / groups, taps]`."""
    results, weight = (
        sizes(v) for v in (node.meta["val"], cast(Tensor, value_of(given["weight"])))
    )
    macs = prod(results) * prod(weight[1:])
    shapes = tuple(
        tuple(sizes(v)) for v in (cast(Tensor, value_of(given["input"])), node.meta["val"])
    )
    kinds = (_dtype(node.meta["val"]),) * 2
    moving = price(VendorCall("moved", shapes, kinds), machine)
    cube = multiplied(macs, machine)
    return Cost(max(moving.total_us, cube), {**moving.terms, "cube": cube}, "", ("memory", "cube"))


def _grouped(
    node: fx.Node, given: Mapping[str, Any], sizes: SizesOf, machine: AscendMachine
) -> Cost:
    """Experts' matmuls, of rows as independent tokens choose them."""
    x = given["x"][0] if isinstance(given["x"], (list, tuple)) else given["x"]
    weight = cast(Tensor, value_of(given["weight"][0]))
    scales = next((given[n] for n in ("scale", "antiquant_scale", "weight_scale") if given.get(n)),
                  None)  # fmt: skip
    codes = cast(Tensor, value_of(x))
    (rows, k), experts = sizes(codes), int(weight.shape[0])
    n = int(weight.shape[2]) * CODES_OF_WORD.get(weight.dtype, 1)
    if scales is None:
        scheme = SCHEMES["FLOAT"]
    else:
        scale = cast(Tensor, value_of(scales[0]))
        scheme = _scheme(codes, weight, True, k, scale[0] if scale.dim() > 1 else scale)
    problem = MatmulProblem(
        None, n, k, scheme, dtype=_dtype(codes), experts=experts, weight_format="NZ"
    )
    top_k = min(_chosen(node), experts)
    return grouped_cost(typical_rows(max(rows // top_k, 1), top_k, experts), problem, machine)


def _chosen(node: fx.Node) -> int:
    """Experts a token: those of the choice that the matmul's rows were made by."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        if found in seen or found.op != "call_function":
            continue
        seen.add(found)
        if op_name(found).startswith("npu_moe_init_routing"):
            return int(cast(Tensor, value_of(arguments(found)["expert_idx"])).shape[-1])
        stack += found.all_input_nodes
    raise LoweringError("its rows come from no choice of experts")


_Cost = Callable[[fx.Node, Mapping[str, Any], SizesOf, AscendMachine], Cost]
MATMULS: Mapping[str, _Cost] = {
    **dict.fromkeys(("linear", "mm", "addmm", "bmm", "matmul"), _float),
    **dict.fromkeys(("conv1d", "convolution"), _convolved),
    **dict.fromkeys(("npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2"), _grouped),
    **dict.fromkeys(
        ("npu_quant_matmul", "npu_weight_quant_batchmatmul", "w8a8", "w4a16", "dispatch_matmul"),
        _quantized,
    ),
}
"""By the op's name."""
