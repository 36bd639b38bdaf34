"""Wrong calls of the ops of a mixture of experts; see `wrong_calls`."""

from __future__ import annotations

from typing import Any

from conformance.calls import BFLOAT16, FLOAT16, call
from conformance.wrong_calls import NONE, WrongCall

GMM, TILING = "aclnnGroupedMatmulV5", "GroupedMatmul's tiling"
SWIGLU = "aclnnGroupedMatmulSwigluQuantWeightNzV2"
ROUTING, UNPERMUTE = "aclnnMoeInitRoutingV3", "aclnnMoeTokenUnpermute"
FINALIZE = "aclnnMoeFinalizeRoutingV2"
GATING, SOFTMAX = "aclnnMoeGatingTopK", "aclnnMoeGatingTopKSoftmax"


def _grouped(why: str, documented: str | None, **changed: Any) -> WrongCall:
    """Float experts with something changed."""
    arguments: dict[str, Any] = {
        "x": ["bfloat16[m, 512]"], "weight": ["bfloat16[8, 512, 256]"], "split_item": 2,
        "group_list": "int64[8]", "group_type": 0, "group_list_type": 1,
    }  # fmt: skip
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in ("x", "weight")]
    return WrongCall(why, call("npu_grouped_matmul", *first, **merged), documented)


def _int8(why: str, documented: str | None, **changed: Any) -> WrongCall:
    """W8A8_DYNAMIC experts with something changed."""
    arguments: dict[str, Any] = {
        "x": ["int8[m, 512]"], "weight": ["int8[8, 512, 256]"], "scale": ["bfloat16[8, 256]"],
        "per_token_scale": ["float32[m]"], "output_dtype": BFLOAT16,
    }  # fmt: skip
    return _grouped(why, documented, **arguments | changed)


def _w4a8(why: str, documented: str | None, **changed: Any) -> WrongCall:
    """W4A8 experts with something changed."""
    arguments: dict[str, Any] = {
        "weight": ["int32[8, 512, 32]"], "scale": ["int64[8, 1, 256]"],
        "bias": ["float32[8, 256]"],
    }  # fmt: skip
    return _int8(why, documented, **arguments | changed)


def _weight_only(why: str, documented: str | None, **changed: Any) -> WrongCall:
    """W4A16 experts with something changed."""
    arguments: dict[str, Any] = {
        "weight": ["int32[8, 512, 32]"], "antiquant_scale": ["bfloat16[8, 4, 256]"],
        "antiquant_offset": ["bfloat16[8, 4, 256]"],
    }  # fmt: skip
    return _grouped(why, documented, **arguments | changed)


def _swiglu(why: str, documented: str | None, **changed: Any) -> WrongCall:
    """The fused gate and up projection with something changed."""
    arguments: dict[str, Any] = {
        "x": "int8[m, 512]", "weight": ["int8[8, 512, 256]"], "weight_scale": ["float32[8, 256]"],
        "x_scale": "float32[m]", "group_list": "int64[8]",
    }  # fmt: skip
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in ("x", "weight", "weight_scale", "x_scale", "group_list")]
    return WrongCall(why, call("npu_grouped_matmul_swiglu_quant_v2", *first, **merged), documented)


def _routing(why: str, documented: str | None, **changed: Any) -> WrongCall:
    """Routing of tokens with something changed."""
    arguments: dict[str, Any] = {
        "x": "bfloat16[m, 512]", "expert_idx": "int32[m, 2]", "expert_num": 8,
        "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "active_expert_range": [0, 8],
    }  # fmt: skip
    merged = {**arguments, **changed}
    first = [merged.pop(name) for name in ("x", "expert_idx")]
    return WrongCall(why, call("npu_moe_init_routing_v2", *first, **merged), documented)


def _finalize(why: str, documented: str | None, *args: Any, **kwargs: Any) -> WrongCall:
    return WrongCall(why, call("npu_moe_finalize_routing", *args, **kwargs), documented)


def _gating(why: str, documented: str | None, x: str, k: int, **kwargs: Any) -> WrongCall:
    return WrongCall(why, call("npu_moe_gating_top_k", x, k, **kwargs), documented)


def _softmax(why: str, documented: str | None, *args: Any) -> WrongCall:
    return WrongCall(why, call("npu_moe_gating_top_k_softmax", *args), documented)


def _unpermute(why: str, documented: str | None, *args: Any, **kwargs: Any) -> WrongCall:
    return WrongCall(why, call("npu_moe_token_unpermute", *args, **kwargs), documented)


MOE_WRONG_CALLS = (
    _grouped("no group_type", NONE, group_type=None),
    _grouped("no group_list", GMM, group_list=None),
    _grouped("an int32 group_list", GMM, group_list="int32[8]"),
    _grouped("a group_list of another length", GMM, group_list="int64[7]"),
    _grouped("pairs for float inputs", TILING, group_list="int64[8, 2]", group_list_type=2),
    _grouped("K differs: 512 and 511", GMM, weight=["bfloat16[8, 511, 256]"]),
    _grouped("a bfloat16 bias beside bfloat16 inputs", GMM, bias=["bfloat16[8, 256]"]),
    _grouped("a bias of one row", GMM, bias=["float32[256]"]),
    _grouped("inputs of two dtypes", GMM, weight=["float16[8, 512, 256]"]),
    _grouped("a float16 result of bfloat16 inputs", GMM, output_dtype=FLOAT16),
    _grouped("N = 65536", GMM, x=["bfloat16[m, 8]"], weight=["bfloat16[8, 8, 65536]"]),
    _grouped("1025 experts", GMM, x=["bfloat16[m, 8]"], weight=["bfloat16[1025, 8, 8]"],
             group_list="int64[1025]"),
    _int8("a float32 scale for a bfloat16 result", GMM, scale=["float32[8, 256]"]),
    _int8("a float16 scale", GMM, scale=["float16[8, 256]"], output_dtype=FLOAT16),
    _int8("a scale of one row", GMM, scale=["bfloat16[256]"]),
    _int8("no scale and a bfloat16 result", GMM, scale=None, per_token_scale=None),
    _int8("a bfloat16 per_token_scale", GMM, per_token_scale=["bfloat16[m]"]),
    _int8("per_token_scale of two dimensions", GMM, per_token_scale=["float32[m, 1]"]),
    _int8("a float32 bias", GMM, bias=["float32[8, 256]"]),
    _w4a8("no bias", GMM, bias=None),
    _w4a8("an int32 bias", GMM, bias=["int32[8, 256]"]),
    _w4a8("a float32 scale", GMM, scale=["float32[8, 1, 256]"]),
    _w4a8("a scale of two dimensions", TILING, scale=["int64[8, 256]"]),
    _w4a8("ends for counts", GMM, group_list_type=0),
    _w4a8("K = 96, not a multiple of 64", TILING, x=["int8[m, 96]"], weight=["int32[8, 96, 32]"]),
    _w4a8("an int32 result", GMM, output_dtype=3),
    _weight_only("no antiquant_offset", GMM, antiquant_offset=None),
    _weight_only("a float32 antiquant_scale", GMM, antiquant_scale=["float32[8, 4, 256]"]),
    _weight_only("5 groups of K = 512", GMM, antiquant_scale=["bfloat16[8, 5, 256]"],
                 antiquant_offset=["bfloat16[8, 5, 256]"]),
    _weight_only("groups of int8 weights", GMM, weight=["int8[8, 512, 256]"]),
    _swiglu("bfloat16 x", SWIGLU, x="bfloat16[m, 512]"),
    _swiglu("two weights", NONE, weight=["int8[8, 512, 256]", "int8[8, 512, 256]"]),
    _swiglu("K differs: 512 and 511", SWIGLU, weight=["int8[8, 511, 256]"]),
    _swiglu("N = 10242", SWIGLU, weight=["int8[8, 512, 10242]"],
            weight_scale=["float32[8, 10242]"]),
    _swiglu("an int64 scale of int8 weights", SWIGLU, weight_scale=["int64[8, 256]"]),
    _swiglu("4-bit weights without an assist matrix", SWIGLU, weight=["int32[8, 512, 32]"],
            weight_scale=["int64[8, 256]"]),
    _routing("x of three dimensions", NONE, x="bfloat16[m, 8, 64]"),
    _routing("expert_idx of one dimension", NONE, expert_idx="int32[m]"),
    _routing("expert_idx of other tokens", NONE, expert_idx="int32[7, 2]"),
    _routing("int64 expert_idx", ROUTING, expert_idx="int64[m, 2]"),
    _routing("a range that is empty", NONE, active_expert_range=[3, 3]),
    _routing("a range beyond the experts", ROUTING, active_expert_range=[4, 9]),
    _routing("expert_tokens_num_type 3", NONE, expert_tokens_num_type=3),
    _routing("row_idx_type 2", NONE, row_idx_type=2),
    _routing("quant_mode 10", NONE, quant_mode=10),
    _routing("a scale of two dimensions, not quantizing", NONE, scale="float32[m, 1]"),
    _routing("a smooth scale of 7 experts", NONE, scale="float32[7, 512]", quant_mode=1),
    _routing("no range of experts", NONE, active_expert_range=[]),
    _routing("counts of 128 experts for rows of 2048", "aclnnMoeInitRoutingV2",
             x="bfloat16[m, 2048]", expert_num=128, active_expert_range=[0, 128]),
    _routing("int8 x to be quantized", ROUTING, x="int8[m, 512]", quant_mode=1),
    _unpermute("int64 indices", UNPERMUTE, "bfloat16[m, 64]", "int64[m]"),
    _unpermute("probs of one dimension", NONE, "bfloat16[m, 64]", "int32[m]", "bfloat16[m]"),
    _unpermute("padded_mode", UNPERMUTE, "bfloat16[m, 64]", "int32[m]", "bfloat16[m, 1]", True),
    _finalize("a float16 scale beside bfloat16 rows", FINALIZE, "bfloat16[m, 64]", None, None, None,
              "float16[m, 1]", "int32[m]", None, 2),
    _finalize("skip2 alone", FINALIZE, "bfloat16[m, 64]", None, "bfloat16[m, 64]", None,
              "bfloat16[m, 1]", "int32[m]", None, 2),
    _finalize("int64 rows", FINALIZE, "bfloat16[m, 64]", None, None, None, "bfloat16[m, 1]",
              "int64[m]", None, 2),
    _gating("x of three dimensions", NONE, "bfloat16[2, m, 64]", 8),
    _gating("a float32 bias beside bfloat16 x", NONE, "bfloat16[m, 64]", 8, bias="float32[64]"),
    _gating("renorm 1", GATING, "bfloat16[m, 64]", 8, renorm=1),
    _gating("groups of 2 experts", GATING, "bfloat16[m, 64]", 8, k_group=8, group_count=32),
    _gating("more experts than are kept", GATING, "bfloat16[m, 64]", 9, k_group=1, group_count=8),
    _gating("token ids without a table", NONE, "bfloat16[m, 64]", 8, input_ids="int64[m]"),
    _softmax("x of one dimension", NONE, "bfloat16[64]", None, 8),
    _softmax("k above the experts", SOFTMAX, "bfloat16[m, 64]", None, 65),
    _softmax("int8 finished", SOFTMAX, "bfloat16[m, 64]", "int8[m]", 8),
)  # fmt: skip
