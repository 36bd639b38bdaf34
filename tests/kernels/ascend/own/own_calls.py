"""Legal calls of each op that panguq defines itself, all arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from panguq.ir.number_format import FLOAT8_E4M3
from panguq.ir.ops import (
    binary,
    canonical,
    encode,
    latent_attention,
    linear_attention,
    mixed_packing,
    packing,
    quantize,
)
from panguq.ir.ops.packing import pack_codes, pack_int4
from panguq.kernels.ascend.own import dynamic_quant as own_dynamic_quant
from panguq.kernels.ascend.own import int4_weight, w4a16, w8a8
from panguq.kernels.ascend.own import latent_attention as own_latent_attention
from panguq.kernels.cpu import (
    bfloat16_float,
    binary_linear,
    dequantized_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
)
from panguq.lowering.ascend import dispatch

K, N, GROUP = 64, 32, 32
BF16, FP32 = torch.bfloat16, torch.float32
FP8 = FLOAT8_E4M3.name
TILE = [16, 64, 32]
FEW = 4  # up to so many tokens a kernel for few of them runs

Call = tuple[OpOverload, Callable[[int], dict[str, Any]]]


def floats(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def scales(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.rand(*shape).add_(0.01).to(dtype)


def codes(*shape: int, bits: int = 8) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)


def attention(m: int, total: int, heads: int, mask: Tensor, value_dim: int = 16) -> dict[str, Any]:
    return {
        "query": floats(2, heads, m, 16),
        "key": floats(2, 2, total, 16),
        "value": floats(2, 2, total, value_dim),
        "mask": mask,
        "scale": 0.25,
    }


def latents(m: int, total: int) -> dict[str, Any]:
    """Two heads whose keys have 8 + 4 values and whose values have 6, from latents of 16."""
    return {
        "query_nope": floats(2, 2, m, 8),
        "query_rope": floats(2, 2, m, 4),
        "latent": floats(2, 1, total, 16),
        "rope_key": floats(2, 1, total, 4),
        "weight": floats(2 * (8 + 6), 16),
        "mask": torch.ones(2, 1, m, total, dtype=torch.bool).tril(total - m),
        "scale": 0.3,
    }


def hidden_latents(m: int, total: int) -> dict[str, Any]:
    """The same in 16 bits, with the mask that an NPU takes."""
    given = {k: v.to(BF16) if isinstance(v, Tensor) else v for k, v in latents(m, total).items()}
    hidden = given.pop("mask") == 0
    return {**given, "hidden": hidden}


def recurrence(m: int, beta: Tensor | None) -> dict[str, Any]:
    return {
        "query": floats(2, m, 2, 8),
        "key": floats(2, m, 2, 8),
        "value": floats(2, m, 4, 16, dtype=BF16),
        "decay": -scales(2, m, 4),
        "beta": beta,
        "state": floats(2, 4, 8, 16),
    }


def rotary(m: int) -> dict[str, Any]:
    return {"x": floats(2, 4, m, 16), "cos": floats(2, m, 16), "sin": floats(2, m, 16)}


def grouped_weight() -> dict[str, Any]:
    zero_point = codes(N, K // GROUP, bits=4)
    return {"scale": scales(N, K // GROUP), "zero_point": zero_point, "group_size": GROUP}


def binary_weight() -> dict[str, Any]:
    return {
        "codes": codes(N, K, bits=2),
        "magnitudes": scales(N, 4 * (K // 32)),
        "salient": codes(1, K, bits=1),
        "block_size": 32,
    }


def int4(m: int, dtype: torch.dtype) -> dict[str, Any]:
    packed, weight = pack_int4(codes(N, K, bits=4)), grouped_weight()
    kernel_scales = int4_linear.int4_kernel_scales(weight["scale"], weight["zero_point"])
    return {
        "x": floats(2, m, K, dtype=dtype),
        "kernel_weight": int4_linear.int4_kernel_weight(packed),
        "kernel_scales": kernel_scales,
        "packed": packed,
        **weight,
        "bias": floats(N),
        "few_tokens": FEW,
    }


def own_w4a16(m: int, splits: int = 1) -> dict[str, Any]:
    return {
        "x": floats(2, m, K, dtype=BF16),
        "weight": words(K, N // 8).view(torch.int16),
        "scale": scales(K // GROUP, N, dtype=BF16),
        "offset": floats(K // GROUP, N, dtype=BF16),
        "bias": floats(N),
        "group_size": GROUP,
        "splits": splits,
        "tile": TILE,
    }


def own_w8a8(m: int, splits: int = 1) -> dict[str, Any]:
    return {
        "x": codes(2, m, K),
        "weight": codes(K, N),
        "scale": scales(N),
        "pertoken_scale": scales(2, m),
        "bias": floats(N),
        "output_dtype": BF16,
        "splits": splits,
        "tile": TILE,
    }


def dispatched(m: int) -> dict[str, Any]:
    return {
        "x": codes(m, K),
        "weight": codes(K, N),
        "scale": scales(N),
        "offset": None,
        "pertoken_scale": scales(m),
        "bias": None,
        "group_size": 0,
        "output_dtype": BF16,
        "last_m": [2, dispatch.NO_LIMIT],
        "kernels": ["npu_quant_matmul", "w8a8_data_parallel tile=16x64x32"],
    }


OWN: dict[str, Call] = {
    "rms_norm": (
        canonical.rms_norm,
        lambda m: {"x": floats(2, m, K), "weight": scales(K), "eps": 1e-6},
    ),
    "rms_norm_of_two_dtypes": (
        canonical.rms_norm,
        lambda m: {"x": floats(2, m, K, dtype=BF16), "weight": scales(K), "eps": 1e-6},
    ),
    "rms_norm_rounded_once": (
        canonical.rms_norm,
        lambda m: {
            "x": floats(2, m, K, dtype=BF16),
            "weight": scales(K),
            "eps": 1e-6,
            "offset": 1.0,
            "rounds_once": True,
        },
    ),
    "layer_norm": (
        canonical.layer_norm,
        lambda m: {
            "x": floats(2, m, K),
            "weight": scales(K),
            "bias": None,
            "eps": 1e-6,
            "offset": 1.0,
        },
    ),
    "rotary": (canonical.rotary, rotary),
    "rotary_interleaved": (canonical.rotary, lambda m: {**rotary(m), "interleaved": True}),
    "geglu": (
        canonical.geglu,
        lambda m: {"gate": floats(2, m, K), "up": floats(2, m, K), "approximate": "tanh"},
    ),
    "swiglu": (canonical.swiglu, lambda m: {"gate": floats(2, m, K), "up": floats(2, m, K)}),
    "attention": (
        canonical.attention,
        lambda m: attention(m, m + 3, 4, torch.ones(2, 1, m, m + 3, dtype=torch.bool).tril(3)),
    ),
    "attention_ungrouped": (
        canonical.attention,
        lambda m: attention(m, m + 3, 2, torch.zeros(1, 1, m, m + 3), value_dim=8),
    ),
    "attention_causal": (
        canonical.attention,
        lambda m: attention(m, m, 4, torch.empty(0, dtype=torch.bool)),
    ),
    "attention_causal_past": (
        canonical.attention,
        lambda m: attention(m, m + 3, 4, torch.empty(0, dtype=torch.bool), value_dim=8),
    ),
    "bfloat16_linear": (
        bfloat16_float.bfloat16_linear,
        lambda m: {"x": floats(2, m, K), "weight": floats(N, K).bfloat16(), "bias": floats(N)},
    ),
    "bfloat16_attention_few": (
        bfloat16_float.bfloat16_attention,
        lambda m: attention(m, m + 3, 4, torch.zeros(1, 1, m, m + 3), value_dim=8),
    ),
    "bfloat16_attention": (
        bfloat16_float.bfloat16_attention,
        lambda m: attention(m + 16, m + 16, 4, torch.empty(0, dtype=torch.bool), value_dim=8),
    ),
    "latent_attention_absorbed": (
        latent_attention.latent_attention,
        lambda m: latents(m, 50 * m),
    ),
    "latent_attention_expanded": (latent_attention.latent_attention, lambda m: latents(m, m)),
    "npu_latent_attention_absorbed": (
        own_latent_attention.latent_attention,
        lambda m: hidden_latents(m, 50 * m),
    ),
    "npu_latent_attention_expanded": (
        own_latent_attention.latent_attention,
        lambda m: hidden_latents(m, m),
    ),
    "gated_linear_attention": (
        linear_attention.gated_linear_attention,
        lambda m: recurrence(m, None),
    ),
    "gated_delta_rule": (
        linear_attention.gated_linear_attention,
        lambda m: recurrence(m, scales(2, m, 4)),
    ),
    "pack_int4": (packing.pack_int4, lambda m: {"codes": codes(m, K, bits=4)}),
    "unpack_int4": (packing.unpack_int4, lambda m: {"packed": pack_int4(codes(m, K, bits=4))}),
    "pack_codes": (packing.pack_codes, lambda m: {"codes": codes(m, K, bits=3), "bits": 3}),
    "unpack_codes": (
        packing.unpack_codes,
        lambda m: {"packed": pack_codes(codes(m, K, bits=3), 3), "bits": 3, "k": K},
    ),
    "unpack_mixed_codes": (
        mixed_packing.unpack_mixed_codes,
        lambda m: {
            "packed": mixed_packing.pack_mixed_codes(
                codes(m, 32, bits=2), torch.tensor([4, 2], dtype=torch.uint8), 16
            ),
            "bits": torch.tensor([4, 2], dtype=torch.uint8),
            "group_size": 16,
        },
    ),
    "quantize_per_tensor": (
        quantize.quantize_per_tensor,
        lambda m: {
            "x": floats(2, m, K),
            "scale": scales(1),
            "zero_point": one(3),
            "quant_min": -128,
            "quant_max": 127,
        },
    ),
    "quantize_per_token": (
        quantize.quantize_per_token,
        lambda m: {"x": floats(2, m, K), "quant_max": 127},
    ),
    "quantize_per_channel": (
        quantize.quantize_per_channel,
        lambda m: {"x": floats(2, 4, m, 16), "scale": scales(4, 1, 16), "quant_max": 127},
    ),
    "dequantize": (
        quantize.dequantize,
        lambda m: {
            "codes": codes(2, m, K),
            "scale": scales(2, m, 1),
            "zero_point": one(3),
            "dtype": BF16,
        },
    ),
    "dequantize_cache": (
        quantize.dequantize,
        lambda m: {
            "codes": codes(2, 4, m, 16),
            "scale": scales(4, 1, 16),
            "zero_point": None,
            "dtype": FP32,
        },
    ),
    "quantize_weight": (
        quantize.quantize_weight,
        lambda m: {"weight": floats(N, K), **grouped_weight(), "quant_min": -8, "quant_max": 7},
    ),
    "dequantize_weight": (
        quantize.dequantize_weight,
        lambda m: {"codes": codes(N, K, bits=4), **grouped_weight(), "dtype": BF16},
    ),
    "encode_per_token": (
        encode.encode_per_token,
        lambda m: {"x": floats(2, m, K), "format": FP8},
    ),
    "decode_per_token": (
        encode.decode_per_token,
        lambda m: {
            "codes": floats(2, m, K).to(torch.float8_e4m3fn),
            "scale": scales(2, m, 1),
            "format": FP8,
            "dtype": BF16,
        },
    ),
    "encode_weight": (
        encode.encode_weight,
        lambda m: {"weight": floats(N, K), "scale": scales(N, 1), "group_size": K, "format": FP8},
    ),
    "decode_weight": (
        encode.decode_weight,
        lambda m: {
            "codes": floats(N, K).to(torch.float8_e4m3fn),
            "scale": scales(N, 1),
            "group_size": K,
            "format": FP8,
            "dtype": BF16,
        },
    ),
    "dequantize_binary": (
        binary.dequantize_binary,
        lambda m: {**binary_weight(), "dtype": BF16},
    ),
    "binary_linear": (
        binary_linear.binary_linear,
        lambda m: {
            "x": floats(2, m, K),
            **binary_weight(),
            "bias": floats(N),
            "compute_dtype": FP32,
        },
    ),
    "dequantized_linear": (
        dequantized_linear.dequantized_linear,
        lambda m: {
            "x": floats(2, m, K),
            "codes": codes(N, K),
            **grouped_weight(),
            "bias": None,
            "compute_dtype": BF16,
        },
    ),
    "int4_kernel_weight": (
        int4_linear.int4_kernel_weight,
        lambda m: {"packed": pack_int4(codes(N, K, bits=4))},
    ),
    "int4_kernel_scales": (
        int4_linear.int4_kernel_scales,
        lambda m: {"scale": scales(N, 2), "zero_point": codes(N, 2, bits=4)},
    ),
    "int4_linear": (int4_linear.int4_linear, lambda m: int4(m, FP32)),
    "int4_linear_bfloat16": (int4_linear.int4_linear, lambda m: int4(m, BF16)),
    "weight_row_sums": (int8_linear.weight_row_sums, lambda m: {"weight": codes(N, K)}),
    "int8_linear": (
        int8_linear.int8_linear,
        lambda m: {
            "codes": codes(2, m, K),
            "act_scale": scales(2, m, 1),
            "act_zero_point": one(3),
            "weight": codes(N, K),
            "weight_scale": scales(N),
            "row_sums": None,
            "bias": floats(N),
            "dtype": BF16,
        },
    ),
    "int8_weight_linear": (
        int8_weight_linear.int8_weight_linear,
        lambda m: {
            "x": floats(2, m, K),
            "weight": codes(N, K),
            "weight_scale": scales(N),
            "bias": floats(N),
            "few_tokens": FEW,
        },
    ),
    "int4_weight": (
        int4_weight.int4_weight,
        lambda m: {"packed": pack_int4(codes(N, K, bits=4))},
    ),
    "int4_quarters": (
        int4_weight.int4_quarters,
        lambda m: {"packed": pack_int4(codes(N, K, bits=4))},
    ),
    "dynamic_quant": (own_dynamic_quant.dynamic_quant, lambda m: {"x": floats(2, m, K)}),
    "w4a16": (w4a16.w4a16, own_w4a16),
    "w4a16_split_k": (w4a16.w4a16, lambda m: own_w4a16(m, splits=2)),
    "w8a8": (w8a8.w8a8, own_w8a8),
    "w8a8_split_k": (w8a8.w8a8, lambda m: own_w8a8(m, splits=2)),
    "dispatch_matmul": (dispatch.dispatch_matmul, dispatched),
}
