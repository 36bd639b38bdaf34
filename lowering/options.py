"""What a recipe may say about lowering to an Ascend target."""

from __future__ import annotations

from dataclasses import dataclass

from panguq.lowering.choice import DEFAULT_MIX, TokenMix
from panguq.lowering.problem import FormatOption


@dataclass(frozen=True)
class AscendOptions:
    """Options that change what runs on an NPU; other targets do not read them.

    allow_float: leave matmuls in float that are predicted to be faster so, over `tokens`.
    allow_inexact: let the vendor's ops that quantize inside a norm, or behind experts' SwiGLU,
        round in other places.
    own_kernels: let panguq's own kernels run where they are predicted to be faster. They need
        triton-ascend on the NPU's machine, and torchair cannot convert them.
    weight_format: how int8 weights of integer matmuls lie in memory: ND, row by row, which
        panguq's own kernels read, too; NZ, in the cube core's fractals, which only the vendor's
        ops read; `auto` takes for each matmul what is predicted to be faster.
    tokens: how often a matmul sees how many tokens; decides `allow_float` and `auto`.
    """

    allow_float: bool = False
    allow_inexact: bool = False
    own_kernels: bool = True
    weight_format: FormatOption = "auto"
    tokens: TokenMix = DEFAULT_MIX


DEFAULT_OPTIONS = AscendOptions()
