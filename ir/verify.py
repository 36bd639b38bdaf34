"""The checks behind a graph's properties: one for each, run after every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import fx

from panguq.errors import VerifyError
from panguq.ir.edit import get_tensor, label, op_name
from panguq.ir.node_meta import meta_of, scheme_of
from panguq.ir.ops.opset import is_allowed
from panguq.ir.properties import Property
from panguq.ir.views import DequantizedWeight, Linear, QuantizedInput, QuantizedWeight

aten = torch.ops.aten
panguq = torch.ops.panguq

# By name: who defines them stands above this module.
WEIGHT_DEQUANTIZERS = ("dequantize_weight", "decode_weight", "dequantize_binary")


def check_form(gm: fx.GraphModule) -> str | None:
    """What every graph must satisfy: well formed, typed, and in step with its weights."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            return f"{label(node)} is a {node.op}; only op calls may stand in a graph"
        if node.op == "output":
            continue
        if "val" not in node.meta:
            return f"{label(node)} has no value type"
        if node.op == "get_attr":
            tensor, val = get_tensor(gm, str(node.target)), node.meta["val"]
            if tuple(tensor.shape) != tuple(val.shape) or tensor.dtype != val.dtype:
                return (
                    f"weight {node.target} is {tensor.dtype}{list(tensor.shape)} but its node "
                    f"says {val.dtype}{list(val.shape)}"
                )
    return None


def _canonical(gm: fx.GraphModule) -> str | None:
    seen = Counter(meta_of(n).label for n in gm.graph.nodes if n.op == "call_function")
    for node in gm.graph.nodes:
        if node.op == "call_function":
            if not is_allowed(node.target):
                return f"{label(node)} calls {node.target}, which is not in ir/ops/opset.py"
            known = meta_of(node).label
            if known is None or seen[known] > 1:
                return f"the label of {label(node)} is missing or not unique"
    return None


def _weighted(gm: fx.GraphModule) -> list[fx.Node]:
    found = [n for n in gm.graph.nodes if Linear.match(n) is not None]
    return [n for n in found if meta_of(n).scheme is not None]


def _float_matmuls(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if op_name(node) in WEIGHT_DEQUANTIZERS:
            return f"{label(node)} stands for a weight that is quantized"
    return None


def _float_cache(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if node.op != "placeholder" or not str(node.target).startswith(_PAST):
            continue
        if node.meta["val"].dtype == torch.int8:
            return f"{label(node)} holds codes"
        for user in node.users:
            if any(op_name(new) == "dequantize" for new in user.all_input_nodes):
                return f"{label(user)} continues {label(node)} with what was rounded"
    return None


_PAST = ("past_key_", "past_value_")


def _schemes(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        linear = Linear.match(node)
        if linear is not None and linear.is_stored and meta_of(node).scheme is None:
            return f"{label(node)} has no scheme"
    return None


def _statistics(gm: fx.GraphModule) -> str | None:
    for node in _weighted(gm):
        if not scheme_of(node).is_float and meta_of(node).input_statistics is None:
            return f"{label(node)} is to be quantized and has no statistics of its input"
    return None


def _calibrated(gm: fx.GraphModule) -> str | None:
    for node in _weighted(gm):
        activation = scheme_of(node).activation
        static = activation is not None and not activation.dynamic
        if static and meta_of(node).input_range is None:
            return f"{label(node)} is to be quantized statically and has no observed range"
    return None


def _qdq(gm: fx.GraphModule) -> str | None:
    for node in _weighted(gm):
        scheme, linear = scheme_of(node), Linear.of(node)
        if scheme.is_float:
            continue
        if op_name(linear.weight) not in WEIGHT_DEQUANTIZERS:
            return f"the weight of {label(node)} is not dequantized from codes"
        wants = scheme.activation is not None
        if wants != (QuantizedInput.match(linear.input) is not None):
            return f"{label(node)} is {scheme.name} and its input is quantized the other way"
    return None


def _open_codes(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        weight = DequantizedWeight.match(node)
        chosen = weight is not None and weight.quantizer is None
        if chosen or op_name(node) == "dequantize_binary":
            return f"the codes of {label(node)} are chosen"
    return None


def _weight_codes(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if QuantizedWeight.match(node) is not None:
            return f"{label(node)} still computes codes from a float weight"
    return None


def _lowered(gm: fx.GraphModule) -> str | None:
    dequantizers = ("dequantize", "decode_per_token", *WEIGHT_DEQUANTIZERS)
    for node in gm.graph.nodes:
        if node.target is aten.linear.default:
            for source in node.all_input_nodes:
                if op_name(source) in dequantizers:
                    return f"{label(node)} still reads {label(source)}"
    return None


def _of_stored(node: fx.Node) -> bool:
    """Whether the value follows from stored tensors alone."""
    return node.op == "get_attr" or (
        node.op == "call_function" and all(_of_stored(source) for source in node.all_input_nodes)
    )


def _ascend_ops(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue  # the rest is arithmetic on sizes and the items of tuples
        name = node.target.name()
        if op_name(node) in _AT_LOADING and _of_stored(node):
            continue
        if name.split("::")[0] not in ("aten", "npu", "panguq_npu") and name not in _ON_NPU:
            return f"{label(node)} calls {name}, which an Ascend NPU does not know"
    return None


# The first calls the NPU kernel that its table names; the others' bodies are torch ops.
_ON_NPU = (
    "panguq::dispatch_matmul", "panguq::gated_linear_attention", "panguq::latent_attention",
)  # fmt: skip
# What makes floats of stored codes is run once, where the model is loaded.
_AT_LOADING = (*WEIGHT_DEQUANTIZERS, "unpack_int4", "unpack_codes", "unpack_mixed_codes")


CHECKS: dict[Property, Callable[[fx.GraphModule], str | None]] = {
    Property.CANONICAL: _canonical,
    Property.FLOAT_MATMULS: _float_matmuls,
    Property.FLOAT_CACHE: _float_cache,
    Property.SCHEMES: _schemes,
    Property.STATISTICS: _statistics,
    Property.CALIBRATED: _calibrated,
    Property.QDQ: _qdq,
    Property.UNSOLVED: _open_codes,
    Property.WEIGHT_CODES: _weight_codes,
    Property.LOWERED: _lowered,
    Property.ASCEND_OPS: _ascend_ops,
}


def verify(gm: fx.GraphModule, properties: Iterable[Property], after: str) -> None:
    """Raises VerifyError, naming the pass, if the graph breaks its form or a property it has."""
    complaint = check_form(gm)
    if complaint is None:
        for held in sorted(properties, key=lambda p: p.name):
            complaint = CHECKS[held](gm)
            if complaint is not None:
                complaint = f"{held.name}: {complaint}"
                break
    if complaint is not None:
        raise VerifyError(
            f"after {after} the graph is wrong: {complaint}",
            "this is a defect of the pass; compile with a dump_dir and report what it shows",
        )
