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
    layers = getattr(getattr(network, "encoder", None), "layer", ())
    if not len(layers) or not hasattr(layers[0], "layer_scale1"):
        return
    for layer in layers:
        layer.norm1, layer.norm2 = RoundedNorm(layer.norm1), RoundedNorm(layer.norm2)
        layer.layer_scale1.float()
        layer.layer_scale2.float()
    layers[-1].register_forward_hook(lambda module, given, tokens: tokens.to(weight.dtype))


class RoundedNorm(nn.Module):
    """A LayerNorm computed in float32, its result in the dtype that it had."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        if isinstance(norm, RoundedNorm):
            raise TypeError("tuned twice")
        self.dtype, self.eps = norm.weight.dtype, norm.eps
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach().float(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens.float(), tokens.shape[-1:], self.weight, self.bias, self.eps).to(self.dtype)


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


def _transformers_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What :func:`attend` is for ``transformers``; with a mask, dropout or gradients its usual one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = attention_mask is None and not options.get("dropout") and not options.get("is_causal")
    if not plain or query.dtype != torch.bfloat16 or query.device.type != "cpu" or torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    found = attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return found.transpose(1, 2), None
