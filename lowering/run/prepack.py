"""Run once what depends only on stored weights: layouts that only a machine's kernels know."""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.canonical_views import LatentAttention
from panguq.ir.edit import ancestors, finish, get_tensor, label, replace, tensor_node
from panguq.ir.ops.mixed_packing import unpack_mixed_codes
from panguq.ir.ops.packing import unpack_codes
from panguq.ir.run.interpret import compute, without_inputs
from panguq.kernels.ascend.vendor import format_cast as npu_format_cast  # noqa: F401  (registers the op)
from panguq.lowering.known_targets import known_targets

aten = torch.ops.aten
_OF_ALL_TARGETS = (unpack_codes, unpack_mixed_codes)
# Of integer codes alone: a float weight that is turned or sliced may be as large as the model.
FORMAT_CAST = torch.ops.npu.npu_format_cast.default
LAYOUTS = (
    aten.t.default, aten.clone.default, aten.slice.Tensor, aten.transpose.int, aten.view.default,
)  # fmt: skip


def prepack(gm: fx.GraphModule, keep_formats: bool = False) -> fx.GraphModule:
    """Replace every prepacking call of a stored weight by its result; returns `gm`.

    The results depend on the machine, so a prepacked graph is run and never saved. With
    `keep_formats`, casts to an NPU's memory formats stay, to be run there. Latent attention's
    weight becomes floats once, from which both of its forms multiply.
    """
    float_weights = _weights_of_latents(gm)
    ops = {*_OF_ALL_TARGETS, *(op for target in known_targets() for op in target.prepacking)}
    for node in list(gm.graph.nodes):
        sources = node.all_input_nodes
        if not sources or any(source.op != "get_attr" for source in sources):
            continue
        if node.target is FORMAT_CAST and not keep_formats:
            replace(node, sources[0])  # a CPU knows one memory format
        elif (
            node.target in ops
            or node in float_weights
            or (node.target in LAYOUTS and _is_codes(gm, sources[0]))
        ):
            values = {s: compute(gm, s, {}) for s in sources}
            name = label(node).replace(":", ".")
            replace(node, tensor_node(node, f"prepacked.{name}", compute(gm, node, values)))
    finish(gm)
    return _with_plain_attributes(gm)


def _weights_of_latents(gm: fx.GraphModule) -> set[fx.Node]:
    """What is computed of stored tensors alone on the way to a weight of latent attention."""
    found = (LatentAttention.match(node) for node in gm.graph.nodes)
    return ancestors(view.weight for view in found if view is not None) & without_inputs(gm)


def _is_codes(gm: fx.GraphModule, source: fx.Node) -> bool:
    return get_tensor(gm, str(source.target)).dtype in (torch.int8, torch.uint8, torch.int32)


def _with_plain_attributes(gm: fx.GraphModule) -> fx.GraphModule:
    """Weights as plain attributes under short names: a nested module's buffer takes several
    look-ups in Python to reach, a twelfth of a decoding step on a small model."""
    names: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            name = names.setdefault(str(node.target), f"weight_{len(names)}")
            object.__setattr__(gm, name, get_tensor(gm, str(node.target)))
            node.target = name
    gm._modules.clear()
    gm._buffers.clear()
    gm.recompile()
    return gm
