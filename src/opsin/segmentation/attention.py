"""Correlation of tokens with themselves: the kernel of SCRA and SCGA, and SCRA as the attention of a last block.

RADSeg (arXiv 2511.19704): the output of the last attention is correlated with itself, negative correlations are cut
off, and the softmax over the rest aggregates the *values* a second time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.backbones import half
from opsin.errors import InvalidConfig

_BLOCK_BYTES = 4 << 20  # of one block of the correlation matrix: it fits the cache, and memory does not grow with N²
_MIN_ROWS = 64  # fewer at a time, and reading all tokens takes longer than computing with them
_MAX_SCALING = 60.0  # exp(60), summed over any number of tokens, is within float32 and bfloat16


def check_scaling(scaling: float) -> float:
    """``scaling`` when it is usable, else ``InvalidConfig``."""
    if not 0 < scaling <= _MAX_SCALING:
        raise InvalidConfig(f"The scaling of a correlation is above 0 and at most {_MAX_SCALING:g}", got=scaling)
    return scaling


@torch.no_grad()
def correlate(unit: Tensor, values: Tensor, scaling: float, offset: float = 0.0) -> Tensor:
    """``softmax(scaling · (Z Zᵀ - offset), entries below 0 cut off) V``, block by block.

    Args:
        unit: ``Z (G, N, d)``, rows of length one (or zero) in each of ``G`` groups.
        values: ``V (G, N, e)``.
        scaling: inverse temperature, above 0.
        offset: cosine below which tokens do not see one another.

    Returns:
        ``(G, N, e)``. A softmax does not change when a constant is added, so the offset is never subtracted: it only
        sets the cut. The cut is a jump from weight 1 to 0, which makes results noisier than a plain attention's.
    """
    groups, count, _ = unit.shape
    out = torch.empty(groups, count, values.shape[2], dtype=values.dtype, device=values.device)
    per_row = count * unit.element_size()
    step = max(1, _BLOCK_BYTES // (per_row * count))  # whole groups where they are small, else rows of one group
    rows = count if step > 1 else max(_MIN_ROWS, _BLOCK_BYTES // per_row)
    limits = torch.finfo(unit.dtype)
    # an entry at the offset stays, and so does a token's own: where all tokens are alike, rounding decides otherwise
    cut = min(offset, 1 - 4 * limits.eps) - limits.tiny
    for g in range(0, groups, step):
        keys, v = unit[g : g + step].transpose(1, 2), values[g : g + step]
        for r in range(0, count, rows):
            weights = torch.bmm(unit[g : g + step, r : r + rows], keys)
            weights = torch.threshold_(weights, cut, -math.inf).mul_(scaling).exp_()  # cut before rounding once more
            total = weights.sum(2, keepdim=True, dtype=torch.float32 if unit.dtype != torch.float64 else None)
            out[g : g + step, r : r + rows] = torch.bmm(weights, v) / total.clamp_min_(1e-30)
    return out


class SelfCorrelatingAttention(nn.Module):
    """SCRA: an attention module of ``transformers``, followed by the self-correlation of its own output.

    Wraps ``attention`` (projections ``q_proj, k_proj, v_proj`` and ``o_proj`` or ``out_proj``) and takes its place.
    All tokens take part, prefix tokens too. ``scaling`` is that of :func:`correlate`, up to 60.
    """

    def __init__(self, attention: nn.Module, scaling: float) -> None:
        super().__init__()
        self.attention: Any = attention
        self.heads = int(getattr(attention, "num_heads", 0) or attention.num_attention_heads)  # type: ignore[arg-type]
        self.scaling = check_scaling(scaling)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``(B, N, C)`` layer-normed tokens to ``(B, N, C)``, and no attention weights."""
        a = self.attention
        project = a.o_proj if hasattr(a, "o_proj") else a.out_proj
        batch, count, _ = hidden_states.shape
        q, k, v = (
            layer(hidden_states).view(batch, count, self.heads, -1).transpose(1, 2)
            for layer in (a.q_proj, a.k_proj, a.v_proj)
        )
        first = half.attention(q, k, v).transpose(1, 2).reshape(batch, count, -1)
        unit = F.normalize(project(first).view(batch, count, self.heads, -1), dim=-1).transpose(1, 2)
        unit, v = (t.reshape(batch * self.heads, count, -1) for t in (unit, v))
        again = correlate(unit, v, self.scaling).view(batch, self.heads, count, -1)
        return project(again.transpose(1, 2).reshape(batch, count, -1)), None
