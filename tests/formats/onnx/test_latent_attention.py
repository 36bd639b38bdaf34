"""Latent attention of an Ascend graph in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import torch

from panguq.formats.onnx.export import export_graph
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.properties import TRACED, Property
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.fuse_latent_attention import FuseLatentAttention
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import LatentAttention, latent_inputs, run_pipeline, trace_tiny


def test_a_prompt_and_a_step(tmp_path: Path) -> None:
    """The file has the expanded form; the graph absorbs the step."""
    inputs = [tensor.to(torch.bfloat16) for tensor in latent_inputs(2, 3)]
    gm, interface = trace_tiny(LatentAttention().to(torch.bfloat16), *inputs)
    held = TRACED | {Property.CANONICAL, Property.LOWERED}
    ctx = PassContext(interface, WeightStore())
    run_pipeline(gm, [FuseLatentAttention(), FuseAscend()], ctx, held=held)
    assert any(str(n.target) == "panguq_npu.latent_attention.default" for n in gm.graph.nodes)
    export_graph(gm, interface, tmp_path / "model.onnx")
    model = OnnxModel(tmp_path / "model.onnx", interface)
    for seq, total in ((5, 5), (1, 40)):
        given = [tensor.to(torch.bfloat16) for tensor in latent_inputs(seq, total)]
        expected = gm(*given)[0].float()
        (result,) = model.run(dict(zip(interface.inputs, given, strict=True))).values()
        assert (result.float() - expected).norm() < 2**-6 * expected.norm()
