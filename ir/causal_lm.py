"""A transformers causal language model as a module of plain tensors, to be traced.

How a model wants its mask is here, and what its layers keep in their cache.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from panguq.errors import TraceError
from panguq.ir.interface import CacheLayer
from panguq.ir.kv_cache import cache_argument, cache_of, layer_tensors, make_cache
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)

MaskForm = Literal["attended", "real_tokens"]
"""`attended` is the graph's own mask, `[batch, 1, seq, total]`, True where a query attends;
`real_tokens` is what users give, `[batch, total]`, of which a model makes its own."""
OWN_ATTENTION = "panguq"


class CausalLMStep(nn.Module):
    """A transformers causal language model with its cache as two stacked tensors.

    Stacking gives all layers one symbol for the length of the past; the stacks disappear
    again when the graph is unlifted. `windows` are the sizes of attention's sliding windows by kind
    of layer, or by "" where all layers share one mask; None is no window.
    """

    def __init__(self, model: Any, form: MaskForm, windows: dict[str, int | None]) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.windows = windows

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
    ) -> tuple[Tensor, ...]:
        total = past_keys.shape[3] + input_ids.shape[1]
        torch._check(attention_mask.shape[3] == total)  # no symbol of its own
        layers = zip(past_keys.unbind(0), past_values.unbind(0), strict=True)
        past = [tensor for pair in layers for tensor in pair]
        output = self.call(input_ids, attention_mask, position_ids, logit_positions, past)
        return output.logits, *layer_tensors(cache_of(output))

    def call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor | int,
        past: list[Tensor],
    ) -> Any:
        """What the model itself returns, as a transformers output."""
        return self.model(
            input_ids=input_ids,
            attention_mask=self._mask(attention_mask),
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=logit_positions,
            **{cache_argument(self.model.forward): make_cache(past)},
        )

    def _mask(self, attended: Tensor) -> Any:
        """The mask as the model reads it; one for each kind of layer where their windows differ."""
        if self.form == "real_tokens":  # the last token attends to every real one
            return attended[:, 0, -1].long()
        masks = {kind: _windowed(attended, size) for kind, size in self.windows.items()}
        return masks.get("", masks) if masks else attended


def _windowed(attended: Tensor, window: int | None) -> Tensor:
    """The mask without keys that lie `window` or more tokens before their query."""
    if window is None:
        return attended
    seq, total = attended.shape[-2:]
    keys = torch.arange(total, device=attended.device)
    queries = torch.arange(seq, device=attended.device)[:, None] + (total - seq)
    return torch.logical_and(attended, keys > queries - window)


def choose_attention(skeleton: Any) -> None:
    """Let a copied model attend through one op that a trace shows whole.

    Where torch's scaled_dot_product_attention is not enough, since scores are capped or there are
    sinks, it is `panguq.attention`.
    """
    try:
        skeleton.set_attn_implementation("sdpa")
    except ValueError:
        ALL_ATTENTION_FUNCTIONS.register(OWN_ATTENTION, _attention)
        skeleton.set_attn_implementation(OWN_ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `[batch, seq, heads, d]`, and no weights.

    A window is in the mask already; dropout is off.
    """
    if attention_mask is None or position_bias is not None:
        raise TraceError(
            f"{type(module).__name__} attends without a mask or with a bias of positions",
            "panguq.attention has a mask, sinks and a cap of its scores",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attention = torch.ops.panguq.attention.default
    result = attention(query, key, value, attention_mask, scale, s_aux, softcap or 0.0)
    return result.transpose(1, 2), None


def makes_its_own_mask(model: Any) -> bool:
    """Whether the model's attention is older than transformers' attention functions, so that it may
    read a mask in a way of its own."""
    follows = getattr(model, "_can_set_attn_implementation", None)
    return follows is not None and not follows()


def check_dense(model: nn.Module) -> None:
    """Raises TraceError for a mixture of experts: a graph does not show its matmuls one by one."""
    for path, module in model.named_modules():
        named = path.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
        if named and any(True for _ in module.parameters()):
            raise TraceError(
                f"mixture of experts is not supported yet: module {path} "
                f"({type(module).__name__}) of {type(model).__name__}",
                "panguq quantizes the matmuls of dense models",
            )


def cache_layers(step: CausalLMStep, mode: FakeTensorMode | None) -> tuple[CacheLayer, ...]:
    """What each layer keeps of a token, asked of one forward on fake tensors.

    mode: that of the model's tensors, if they are fake. Raises TraceError for a layer that keeps
    something else than one key and one value a token.
    """
    batch, seq = 3, 5
    with mode or FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        output = step.call(
            torch.zeros(batch, seq, dtype=torch.long),
            torch.ones(batch, 1, seq, seq, dtype=torch.bool),
            torch.arange(seq).expand(batch, seq),
            1,
            [],
        )
    layers = []
    for index, layer in enumerate(cache_of(output).layers):
        shapes = [getattr(getattr(layer, name, None), "shape", None) for name in ("keys", "values")]
        sizes = [tuple(shape) for shape in shapes if shape is not None and len(shape) == 4]
        plain = [size for size in sizes if (size[0], size[2]) == (batch, seq)]
        if len(plain) != 2 or plain[0][1] != plain[1][1]:
            raise TraceError(
                f"layer {index} of {type(step.model).__name__} keeps a {type(layer).__name__} of "
                f"{' and '.join(str(list(s)) for s in sizes) or 'no keys and values'}",
                "panguq traces a cache of one key and one value a token",
            )
        key, value = plain
        layers.append(CacheLayer(heads=key[1], key_dim=key[3], value_dim=value[3]))
    if len(set(layers)) != 1:
        raise TraceError(
            f"the layers of {type(step.model).__name__} keep caches of {len(set(layers))} sizes",
            "panguq traces models whose layers all keep the same",
        )
    return tuple(layers)
