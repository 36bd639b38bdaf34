"""From a Triton kernel to linalg, by triton-ascend 3.2.0 itself, without a driver or a device."""

from __future__ import annotations

from conformance.triton.variants import Variant

TARGETS = ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")


def linalg_of(variant: Variant, target: str = TARGETS[0]) -> str:
    """The module that triton-ascend hands to AscendNPU IR's compiler, as MLIR text."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu_target = GPUTarget("npu", target, 0)
    backend = compiler.AscendBackend(gpu_target)
    source = ASTSource(variant.function, variant.signature, variant.constants)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), {}, context)
    metadata = {**options.__dict__, "target": gpu_target}
    module = compiler.make_ttir(module, metadata, options)
    text = compiler.ttir_to_linalg(module, metadata, options, named_ops=True)
    return compiler._parse_linalg_metadata(text, metadata)[0]
