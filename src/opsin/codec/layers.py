"""Transformer blocks of the codec, under the published key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opsin.backbones.half import attend
from opsin.errors import InvalidCheckpoint
from opsin.hub import check_keys
from opsin.runtime import has_fast_bfloat16

M = TypeVar("M", bound=nn.Module)

EPS = 1e-6  # of every LayerNorm but those of the cross-attention


def lean(function: Callable[[Tensor], Tensor], tokens: Tensor, *, random: bool = False) -> Tensor:
    """``function(tokens)``; for its gradient only ``tokens`` are kept, and what lies before its last matrix made again.

    Recomputation stops at the first tensor that is no longer missing, so a matrix product at the end is not repeated.
    Norms and GELUs cost little and hold two fifths of what training keeps. ``random``: the function draws numbers.
    """
    if not torch.is_grad_enabled():
        return function(tokens)
    return checkpoint(function, tokens, use_reentrant=False, preserve_rng_state=random)


def product(linear: nn.Linear, tokens: Tensor, *, gelu: bool = False) -> Tensor:
    """``linear(tokens)`` without a gradient, with ``gelu`` the GELU of it: on CPUs one kernel, which writes once."""
    fused = tokens.device.type == "cpu" and tokens.dtype == linear.weight.dtype and tokens.dtype in _fused_dtypes()
    if not fused or torch.is_autocast_enabled("cpu"):
        found = linear(tokens)
        return F.gelu(found) if gelu else found
    kind = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise(tokens, linear.weight, linear.bias, kind, [], "none")


@cache
def _fused_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN's product with bias and GELU takes on this CPU; nothing where torch comes without it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if has_fast_bfloat16(torch.device("cpu")) else (torch.float32,)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the sum over all blocks is kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Norm(nn.LayerNorm):
    """A LayerNorm whose input may be more exact than its weights: the sum over all blocks of a bfloat16 model is."""

    def forward(self, tokens: Tensor) -> Tensor:
        """``(..., D)`` → the same, in the dtype of the weights."""
        if tokens.dtype == self.weight.dtype:
            return super().forward(tokens)
        weight, bias = self.weight.to(tokens.dtype), self.bias.to(tokens.dtype)
        return F.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, norm: nn.Module) -> Tensor:
        """``(B, N, D)``, normed by ``norm`` first → the same."""
        if torch.is_grad_enabled():
            mixed = lean(lambda given: self.qkv(norm(given)), tokens)
        else:
            mixed = product(self.qkv, norm(tokens))
        query, key, value = mixed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self._attend(query, key, value)

    def first(self, tokens: Tensor, norm: nn.Module) -> Tensor:
        """The first token's row alone, ``(B, 1, D)``: what :meth:`forward` gives there, without the other queries."""
        tokens, dim = norm(tokens), tokens.shape[-1]
        query = F.linear(tokens[:, :1], self.qkv.weight[:dim], self.qkv.bias[:dim])
        pairs = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:])
        key, value = pairs.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self._attend(query.unflatten(-1, (self.heads, -1)).transpose(1, 2), key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device.type == "cpu" and not torch.is_grad_enabled():
            found = attend(query, key, value, query.shape[-1] ** -0.5)
        else:
            found = F.scaled_dot_product_attention(query, key, value)
        rows = found.transpose(1, 2).flatten(2)
        return self.proj(rows) if torch.is_grad_enabled() else product(self.proj, rows)


class Mlp(nn.Module):
    """Two layers, four times as wide between them, with the exact GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor, norm: nn.Module) -> Tensor:
        """``(..., D)``, normed by ``norm`` first → the same."""
        if not torch.is_grad_enabled():
            return product(self.fc2, product(self.fc1, norm(tokens), gelu=True))
        hidden = lean(lambda given: self.fc1(norm(given)), tokens)
        return lean(lambda given: self.fc2(F.gelu(given)), hidden)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Norm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = Norm(dim, eps=EPS)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` → the same."""
        tokens = tokens + self.attn(tokens, self.norm1)
        return tokens + self.mlp(tokens, self.norm2)

    def first(self, tokens: Tensor) -> Tensor:
        """The first token's row alone, ``(B, 1, D)``."""
        token = tokens[:, :1] + self.attn.first(tokens, self.norm1)
        return token + self.mlp(token, self.norm2)


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """MAE's start for all layers inside: Xavier-uniform matrices without bias, LayerNorms that change nothing."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of one tensor of a state dict; ``InvalidCheckpoint`` when it is not there or a scalar."""
    if key not in state or not getattr(state[key], "ndim", 0):
        raise InvalidCheckpoint(f"The weights of a codec hold {key}", got=f"{len(state)} other tensors")
    return tuple(state[key].shape)


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are below ``prefix``."""
    found = {key.removeprefix(f"{prefix}.").split(".")[0] for key in state if key.startswith(f"{prefix}.")}
    if not found:
        raise InvalidCheckpoint(f"The weights of a codec hold {prefix}", got=f"{len(state)} other tensors")
    return len(found)


def square(count: int) -> int:
    """The side of a square grid of ``count`` patches."""
    side = math.isqrt(count)
    if side * side != count:
        raise InvalidCheckpoint("Without a stated image size the patch grid is square", got=f"{count} patches")
    return side


def assign(module: M, state: Mapping[str, Tensor], what: str) -> M:
    """Put ``state`` in the place of the parameters of ``module``, exactly; ready for inference."""
    check_keys(state, {key: value.shape for key, value in module.state_dict().items()}, what)
    module.load_state_dict(dict(state), assign=True)
    return module.eval()
