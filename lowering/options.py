"""What a recipe may say about lowering to an Ascend target."""

from __future__ import annotations

from dataclasses import dataclass

from panguq.lowering.select_kernel import DEFAULT_MIX, TokenMix


@dataclass(frozen=True)
class AscendOptions:
    """Options that change what runs on an NPU; a CPU target does not read them.

    allow_float: leave matmuls in float that are predicted to be faster so, over `tokens`.
    allow_inexact: let the vendor's ops that quantize inside a norm round in other places.
    tokens: how often a matmul sees how many tokens; decides `allow_float`.
    """

    allow_float: bool = False
    allow_inexact: bool = False
    tokens: TokenMix = DEFAULT_MIX
