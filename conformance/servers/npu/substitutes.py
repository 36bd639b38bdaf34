"""What vllm-ascend calls that has no CPU body, put in its place: as little as makes it run.

The NPU ops of its layers need none of this: `panguq.kernels.ascend.vendor.ops` gives torch_npu's
real `npu::` ops, with their schemas and Meta kernels, bodies for CPU tensors. Here are:

- `Tensor.npu()`: the tensor stays where it is;
- vLLM's custom ops, registered for CPU tensors where the server would for NPU tensors;
- `torch_npu._npu_rotary_embedding`, in place, by panguq's body of `npu_rotary_mul`;
- the paged attention: one causal call for one sequence of panguq's body of
  `npu_fused_infer_attention_score`, in the layout BNSD. So nothing here says anything about the
  server's cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
import vllm.utils.torch_utils
from torch import Tensor


def install() -> None:
    """Put everything in place; to be called before anything of vllm_ascend is imported."""
    # Not before torch_npu, whose ops and schemas it finds then and gives bodies for CPU tensors.
    import panguq.kernels.ascend.vendor.ops  # noqa: F401

    torch.Tensor.npu = lambda self, *_, **__: self  # type: ignore[attr-defined]
    vllm.utils.torch_utils.direct_register_custom_op = _on_cpu(
        vllm.utils.torch_utils.direct_register_custom_op
    )
    torch_npu._npu_rotary_embedding = _rotary


def install_attention() -> None:
    """The same for what can be imported once a config is set."""
    from vllm.model_executor.layers.attention import Attention
    from vllm_ascend.quantization.methods import w4a8, w8a8_dynamic

    Attention.forward = _attention
    for module in (w4a8, w8a8_dynamic):  # experts ask for HCCL's group and do without one
        module.get_mc2_group = object


def _on_cpu(register: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dispatch_key") in ("PrivateUse1", None):
            kwargs["dispatch_key"] = "CPU"
        return register(*args, **kwargs)

    return wrapped


def _rotary(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox_style: bool = True,
) -> None:
    """`query`, `key`: `[tokens, heads * head_size]`; `cos_sin_cache`: `[positions, head_size]`."""
    assert is_neox_style
    cos, sin = (
        torch.cat((half, half), -1)[None, :, None].to(query.dtype)
        for half in cos_sin_cache.index_select(0, positions).chunk(2, -1)
    )
    for x in (query, key):
        heads = x.view(1, x.shape[0], -1, head_size)
        x.copy_(torch.ops.npu.npu_rotary_mul(heads, cos, sin).reshape(x.shape))


def _attention(
    self: Any, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, **_: Any
) -> Tensor:
    """`query`: `[tokens, heads * head_size]` of one sequence from its start."""
    tokens = query.shape[0]
    q, k, v = (
        x.view(1, tokens, heads, self.head_size).transpose(1, 2).contiguous()
        for x, heads in (
            (query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads)
        )
    )  # fmt: skip
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None].contiguous()
    result = torch.ops.npu.npu_fused_infer_attention_score(
        q, k, v, atten_mask=mask, num_heads=self.num_heads,
        num_key_value_heads=self.num_kv_heads, scale=self.head_size**-0.5, input_layout="BNSD",
    )[0]  # fmt: skip
    return result.transpose(1, 2).reshape(tokens, -1).to(query.dtype)
