"""What a node of a lowered graph costs: the calls that it is, in the form that models of ops read.

Views cost nothing. What a fused op cannot take is spelled in ATen's ops, each of which is a kernel
that moves what it reads and writes, or a matmul.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from panguq.errors import LoweringError
from panguq.ir.call_arguments import arguments
from panguq.ir.edit import label, op_name
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import SIZES, SizesOf, VendorCall, value_of
from panguq.lowering.ascend.op_times.node_attention import attention_cost, latent_cost
from panguq.lowering.ascend.op_times.node_matmuls import MATMULS, multiplied, node_matmul_cost
from panguq.lowering.ascend.op_times.price import price
from panguq.lowering.target import Cost
from panguq.tensors.dtypes import dtype_name

VIEWS = frozenset({
    "alias", "chunk", "detach", "expand", "narrow", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "sym_size", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "view",
})  # fmt: skip
"""Ops that move nothing; where a layout must change, a `contiguous` says so."""
LOADING = frozenset({
    "int4_quarters", "int4_weight", "npu_convert_weight_to_int4pack", "npu_format_cast",
    "npu_trans_quant_param",
})  # fmt: skip
"""Ops that run once, when a model is loaded."""
# The model's name, the operands that it reads, and the attributes, which go by its own names.
_VENDOR: Mapping[str, tuple[str, tuple[str, ...], Mapping[str, str]]] = {
    "npu_add_rms_norm": ("add_rms_norm", ("x1", "x2", "gamma"), {}),
    "npu_add_rms_norm_dynamic_quant": ("add_rms_norm_dynamic_quant", ("x1", "x2", "gamma"), {}),
    "npu_add_rms_norm_quant": ("add_rms_norm_quant", ("x1", "x2", "gamma"), {}),
    "npu_dynamic_quant": ("dynamic_quant", ("input",), {}),
    "npu_geglu": ("geglu", ("input",), {"dim": "dim"}),
    "npu_gelu": ("gelu", ("input",), {}),
    "npu_moe_finalize_routing": (
        "moe_finalize_routing",
        ("expanded_permuted_rows", "skip1", "skip2", "bias", "expanded_src_to_dst_row"),
        {},
    ),
    "npu_moe_gating_top_k": ("moe_gating_top_k", ("x",), {"k": "k"}),
    "npu_moe_gating_top_k_softmax": ("moe_gating_top_k_softmax", ("x",), {"k": "k"}),
    "npu_moe_init_routing_v2": ("moe_init_routing_v2", ("x", "expert_idx"), {}),
    "npu_moe_token_unpermute": (
        "moe_token_unpermute",
        ("permuted_tokens", "sorted_indices", "probs"),
        {},
    ),
    "npu_quantize": ("quantize", ("input",), {}),
    "npu_rms_norm": ("rms_norm", ("input", "gamma"), {}),
    "npu_rotary_mul": ("rotary_mul", ("input", "r1", "r2"), {}),
    "npu_swiglu": ("swi_glu", ("input",), {"dim": "dim"}),
    "dynamic_quant": ("dynamic_quant", ("x",), {}),
    "layer_norm": ("layer_norm", ("input", "weight"), {}),
}
_CHOSEN = ("embedding", "gather", "index", "index_select")  # read no more of a table than they give
_Priced = Callable[[fx.Node, str, SizesOf, AscendMachine], Cost]


def node_cost(node: fx.Node, sizes: SizesOf, machine: AscendMachine) -> Cost | None:
    """Microseconds of one node; None where it runs no kernel, or only when a model is loaded.

    `sizes` gives the sizes of a fake tensor whose open ones are known. Raises LoweringError, naming
    the node, for an op without a price.
    """
    if not is_kernel(node):
        return None
    name = op_name(node).partition(".")[0]
    try:
        return _priced(name)(node, name, sizes, machine)
    except LoweringError as error:
        raise LoweringError(f"{label(node)}: {error.message}", error.hint) from None


def is_kernel(node: fx.Node) -> bool:
    """Whether the node runs on the device whenever the graph does."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    name = op_name(node).partition(".")[0]
    if name in VIEWS or name in LOADING or not _tensors(node.meta.get("val")):
        return False
    return not _of_weights(node)


def _of_weights(node: fx.Node) -> bool:
    """Whether it is made of weights alone, when a model is loaded."""
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(map(_of_weights, inputs))


def _priced(name: str) -> _Priced:
    if name in MATMULS:
        return node_matmul_cost
    if name == "npu_fused_infer_attention_score":
        return attention_cost
    if name == "latent_attention":
        return latent_cost
    if name == "gated_linear_attention":
        return _recurrence
    if name == "npu_kronecker_quant":
        return _turned_and_quantized
    return _vendor if name in _VENDOR else _moved


def _vendor(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    op, operands, attributes = _VENDOR[name]
    given = arguments(node)
    values = [value_of(given[operand]) for operand in operands]
    if name == "npu_moe_finalize_routing":  # each token's rows, by its weights or its one place
        places = values.pop()
        values += [None, places, value_of(given["scales"])]
        values[-1] = values[-1] if values[-1] is not None else places
    attrs = {attribute: given[argument] for attribute, argument in attributes.items()}
    return price(call_of(op, values, sizes, attrs), machine)


def _moved(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    """A kernel that reads its operands and writes its results, once."""
    if not str(node.target).startswith("aten."):
        raise LoweringError(f"no price of {node.target} is known")
    results: list[Tensor | None] = [*_tensors(node.meta["val"])]
    reads = [value for n in node.all_input_nodes for value in _tensors(n.meta.get("val"))]
    read = [*reads[1:], *results] if name in _CHOSEN else reads
    return price(call_of("moved", [*read, *results], sizes), machine)


def _recurrence(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    """Torch ops over chunks of 64 tokens; see `ir/ops/linear_attention.py` for the matmuls. Their
    vector ops are taken to be hidden behind nothing: each chunk starts so many kernels."""
    given = arguments(node)
    batch, tokens, heads, width = sizes(given["value"].meta["val"])
    key = sizes(given["key"].meta["val"])[-1]
    chunks, delta = -(-tokens // _CHUNK), given["beta"] is not None
    chunk = min(tokens, _CHUNK)
    each: float = chunk * (2 * key * width + chunk * (key + width))
    if delta:
        each += chunk * (key * width + chunk * (key + width / 2))
    cube = multiplied(chunks * batch * heads * each, machine)
    kernels = chunks * (_DELTA_KERNELS if delta else _KERNELS)
    shape = (batch, heads, chunk, key + 2 * width)
    one = price(VendorCall("moved", (shape,), ("float32",)), machine)
    terms = {name: us * kernels for name, us in one.terms.items()} | {"cube": cube}
    return Cost(one.total_us * kernels + cube, terms)


def _turned_and_quantized(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    """x `[m, a, b]` quantized as `dynamic_quant` does rows of a * b, after products with `[a, a]`
    and `[b, b]` on the cube, taken to be hidden behind nothing: the op has no published times."""
    x = arguments(node)["x"].meta["val"]
    rows, left, right = sizes(x)
    one = price(VendorCall("dynamic_quant", ((rows, left * right),), (_dtype(x),)), machine)
    cube = multiplied(rows * left * right * (left + right), machine)
    return Cost(one.total_us + cube, {**one.terms, "cube": cube})


PRICED = frozenset({
    *_VENDOR, "npu_fused_infer_attention_score", "latent_attention", "gated_linear_attention",
    "npu_kronecker_quant",
})  # fmt: skip
"""Ops of torch_npu's and panguq's own that have a price, but for matmuls."""
_CHUNK = 64
_KERNELS, _DELTA_KERNELS = 20, 32  # that `_chunk` runs, counted in its text


def call_of(
    op: str, values: list[Tensor | None], sizes: SizesOf, attrs: Mapping[str, Any] | None = None
) -> VendorCall:
    """A call whose operands are these fake tensors; None: not given."""
    shapes = tuple(None if v is None else tuple(sizes(v)) or (1,) for v in values)
    dtypes = tuple(None if v is None else _dtype(v) for v in values)
    return VendorCall(op, shapes, dtypes, attrs or {})


def _dtype(value: Tensor) -> str:
    name = dtype_name(value.dtype)
    if name not in SIZES:
        raise LoweringError(f"an operand is {name}, whose size is not known")
    return name


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (tuple, list)) else []
