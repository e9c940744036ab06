"""bfloat16 on CPUs: an attention made of matrix products, and a residual stream that is not rounded in every block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK_BYTES = 2 << 20  # of one block of attention weights: it stays in the cache


def tune(backbone: nn.Module) -> None:
    """Make the transformer inside ``backbone.model`` faster and more exact; only in bfloat16 on the CPU, else nothing.

    The attention becomes :func:`attend`. Blocks with LayerScale, which are RADIO's, get norms and gains in float32, so
    that the sum over all blocks is kept in float32 (the features are rounded once, at the end). Matrices stay bfloat16.
    """
    from transformers import AttentionInterface

    network: Any = backbone.model
    weight = next(network.parameters())
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return
    AttentionInterface.register("opsin", _transformers_attention)
    network.set_attn_implementation("opsin")
    layers: Any = getattr(getattr(network, "encoder", None), "layer", [])
    if not len(layers) or not hasattr(layers[0], "layer_scale1"):
        return
    for layer in layers:
        if isinstance(layer.norm1, RoundedNorm):
            return
        layer.norm1, layer.norm2 = (RoundedNorm(norm, _matrix(layer)) for norm in (layer.norm1, layer.norm2))
        layer.layer_scale1.float()
        layer.layer_scale2.float()
    layers[-1].register_forward_hook(lambda layer, given, tokens: tokens.to(_matrix(layer).weight.dtype))


def _matrix(layer: Any) -> Any:
    """One of the matrices of a block: its dtype is that of the block."""
    return getattr(layer.attention, "attention", layer.attention).q_proj  # SCRA wraps the attention


class RoundedNorm(nn.Module):
    """A LayerNorm computed in float32 at least, its result in the dtype of the layer that takes it."""

    def __init__(self, norm: Any, taker: Any) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias
        self.float()
        self._taker = (taker,)  # in a tuple: not registered a second time

    def forward(self, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        found = F.layer_norm(tokens.to(wide), tokens.shape[-1:], self.weight.to(wide), self.bias.to(wide), self.eps)
        return found.to(self._taker[0].weight.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of ``(B, h, N, d)`` by matrix products, in blocks: ``(B, h, N, d)``, laid out as ``(B, N, h, d)``.

    torch's own kernel for CPUs takes 1.7 times as long in bfloat16 (449 tokens, 64 channels a head).
    """
    batch, heads, count, dim = query.shape
    length = key.shape[2]
    out = query.new_empty((batch, count, heads, dim)).transpose(1, 2)
    query = query * scaling
    step = min(heads, max(1, _BLOCK_BYTES // (count * length * query.element_size())))
    rows = count if step > 1 else max(1, 2 * _BLOCK_BYTES // (length * query.element_size()))
    for b in range(batch):
        for h in range(0, heads, step):
            keys, values = key[b, h : h + step].transpose(1, 2), value[b, h : h + step]
            for r in range(0, count, rows):
                weights = torch.bmm(query[b, h : h + step, r : r + rows], keys).softmax(-1)
                out[b, h : h + step, r : r + rows] = torch.bmm(weights, values)
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """torch's attention, or :func:`attend` where that is the faster one."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled():
        return attend(query, key, value, scaling)
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)


def _transformers_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """:func:`attention` for ``transformers``; with a mask or dropout its usual one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None or options.get("dropout") or options.get("is_causal"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attention(query, key, value, options.get("scaling")).transpose(1, 2), None
