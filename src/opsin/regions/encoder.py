"""The region encoder of REN (arXiv 2505.18153): point prompts attend to a feature map and become region tokens.

State-dict keys are the published ones. Positions are computed where they are needed, so any grid, any aspect and
sub-pixel prompts work; attention is fused; the keys and values of an image do not depend on the prompts and can be kept
(``RegionMemory``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import InvalidCheckpoint, InvalidConfig, UnsupportedSize
from opsin.geometry import Size

FOURIER_SEED = 42


@cache
def fourier_matrix(dim: int, seed: int = FOURIER_SEED) -> Tensor:
    """The random matrix ``(2, dim / 2)`` float32 of the position code.

    The published widths ship as data, because the same seed draws values that differ by 1e-6 between kinds of
    processor.
    """
    if seed == FOURIER_SEED:
        shipped = load_safetensors((resources.files("opsin.regions") / "fourier.safetensors").read_bytes())
        if str(dim) in shipped:
            return shipped[str(dim)]
    return torch.randn((2, dim // 2), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def fourier_positions(points: Tensor, dim: int, seed: int = FOURIER_SEED) -> Tensor:
    """Position code ``(..., dim)`` float32 of canvas fractions ``points (..., 2)``, ``(x, y)`` in [0, 1]."""
    matrix = fourier_matrix(dim, seed).to(points.device)
    phase = (2 * points.float() - 1) @ matrix * (2 * math.pi)
    return torch.cat([phase.sin(), phase.cos()], -1)


def grid_centres(grid: Size, device: torch.device | None = None) -> Tensor:
    """Centres ``(h·w, 2)`` of the cells of a grid, row-major, as canvas fractions ``(x, y)``."""
    # The published table is a running sum of ones minus one half: exact in float32, and so is this.
    y = (torch.arange(grid[0], device=device, dtype=torch.float32) + 0.5) / grid[0]
    x = (torch.arange(grid[1], device=device, dtype=torch.float32) + 0.5) / grid[1]
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)


def pixel_prompts(prompts: Tensor, resolution: int) -> Tensor:
    """Published integer prompts ``(..., 2)`` as ``(row, col)`` on a square → canvas fractions ``(x, y)``."""
    return (prompts.flip(-1).float() + 0.5) / resolution


@dataclass(frozen=True, eq=False)
class RegionOutput:
    """``pred_tokens (B, P, D)`` name the region; ``proj_tokens (B, P, D)`` live in the backbone's feature space."""

    pred_tokens: Tensor
    proj_tokens: Tensor


@dataclass(frozen=True, eq=False)
class RegionMemory:
    """Keys and values ``(B, heads, N, D / heads)`` of every layer: all that prompts need to know of an image."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    grid: Size


class CrossAttention(nn.Module):
    """Multi-head cross-attention with LayerNorm on queries and keys, per head."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)

    def split(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` → ``(B, heads, N, D / heads)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """Normalised queries, per head."""
        return self.q_norm(self.split(self.q_proj(x)))

    def keys(self, memory: Tensor) -> Tensor:
        """Normalised keys, per head."""
        return self.k_norm(self.split(self.k_proj(memory)))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(self.queries(x), keys, values, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Linear, exact GELU, dropout, linear."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.gelu(self.linear1(x))))


class RegionAttention(nn.Module):
    """One layer. Only the feed-forward branch is normalised on its way out, as published."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, dropout)
        self.out_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.dropout(self.cross_attn(self.query_norm(queries), keys, values, bias)) + queries
        return self.out_norm(self.mlp(self.mlp_norm(x))) + x


class RegionEncoder(nn.Module):
    """Feature map and point prompts → region tokens.

    ``dim`` is the channel count of the backbone, a multiple of ``2 · heads``. Tokens of different prompts do not see
    each other, so ``prompt_chunk`` bounds the memory and changes nothing. Source: REN, section 3; the published
    ``model.py``.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        layers: int = 4,
        dropout: float = 0.1,
        seed: int = FOURIER_SEED,
        prompt_chunk: int = 4096,
    ) -> None:
        super().__init__()
        if dim % (2 * heads) and dim % heads:
            raise InvalidConfig(f"The width of a region encoder is a multiple of its {heads} heads", got=dim)
        self.dim, self.heads, self.seed, self.prompt_chunk = dim, heads, seed, prompt_chunk
        self.prompt_proj = nn.Linear(dim, dim)
        self.region_attention_layers = nn.ModuleList(RegionAttention(dim, heads, dropout) for _ in range(layers))
        self.out_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, dim)
        self._initialise()

    @property
    def blocks(self) -> list[RegionAttention]:
        """The layers, in order."""
        return list(self.region_attention_layers)  # type: ignore[arg-type]

    def _initialise(self) -> None:
        projections = [self.prompt_proj, self.out_proj]
        for layer in self.blocks:
            attention = layer.cross_attn
            projections += [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
        for projection in projections:
            nn.init.kaiming_normal_(projection.weight, nonlinearity="linear")

    def start_as_pooling(self) -> RegionEncoder:
        """Weights with which a token is the mean of the features around its prompt; training begins from there.

        The published start is random: thousands of steps pass before tokens say more than position. Here the query
        stream, which gains the prompt's code once a layer, is cancelled but for a small rest that tells the last layer
        where to look; queries and keys of that layer are the codes themselves, so its attention is a bell around the
        prompt; all other branches begin near zero.
        """
        layers = len(self.blocks)
        with torch.no_grad():
            eye = torch.eye(self.dim)
            self.prompt_proj.weight.copy_(-(layers + 0.2) * eye)
            self.out_proj.weight.copy_(eye)
            for layer in self.blocks:
                layer.out_norm.weight.zero_()
                layer.cross_attn.out_proj.weight.mul_(0.02)
                layer.cross_attn.q_proj.weight.copy_(-eye)
                layer.cross_attn.k_proj.weight.copy_(eye)
            self.blocks[-1].cross_attn.out_proj.weight.copy_(eye)
            for linear in [self.prompt_proj, self.out_proj, *(b.cross_attn.out_proj for b in self.blocks)]:
                linear.bias.zero_()
        return self

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, heads: int = 8, **options: int | float) -> RegionEncoder:
        """An encoder of the width and depth that a published state dict has, in its dtype, in evaluation mode."""
        try:
            dim = state["prompt_proj.weight"].shape[0]
        except KeyError as error:
            raise InvalidCheckpoint(
                'A region encoder has the key "prompt_proj.weight"', got=f"{sorted(state)[:3]} …"
            ) from error
        depth = len({key.split(".")[1] for key in state if key.startswith("region_attention_layers.")})
        encoder = cls(dim, heads=heads, layers=depth, **options)  # type: ignore[arg-type]
        try:
            encoder.load_state_dict(dict(state), assign=True)
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
            raise InvalidCheckpoint("The weights must be those of a region encoder", got=reasons) from error
        return encoder.eval()

    def positions(self, points: Tensor) -> Tensor:
        """Position code ``(..., D)`` of canvas fractions, in the dtype of the weights."""
        return fourier_positions(points, self.dim, self.seed).to(self.prompt_proj.weight.dtype)

    def memory(self, features: Tensor) -> RegionMemory:
        """Keys and values of ``features (B, D, h, w)``, once per image."""
        if features.ndim != 4 or features.shape[1] != self.dim:
            raise UnsupportedSize(
                f"A feature map has shape (B, {self.dim}, h, w)",
                got=tuple(features.shape),
                remedy="Use the backbone that this encoder was trained on.",
            )
        grid = (int(features.shape[2]), int(features.shape[3]))
        # Token-major in memory: attention over channel-first values takes a path twice as slow.
        cells = features.flatten(2).transpose(1, 2).contiguous() + self.positions(grid_centres(grid, features.device))
        attentions = [layer.cross_attn for layer in self.blocks]
        keys = tuple(a.keys(cells) for a in attentions)
        # The last layer reads the features themselves, so that its tokens stay in their space.
        values = (*(a.split(a.v_proj(cells)) for a in attentions[:-1]), attentions[-1].split(cells))
        return RegionMemory(keys, values, grid)

    def decode(self, memory: RegionMemory, points: Tensor, weights: Tensor | None = None) -> RegionOutput:
        """Tokens of canvas fractions ``points (B, P, 2)``, ``(x, y)`` in [0, 1], on a remembered image.

        ``weights (B, P, h·w)`` in [0, 1] limits what each prompt sees, where the extent of its region is known.
        """
        bias = None if weights is None else weights.to(memory.keys[0].dtype).log().clamp(min=-30)[:, None]
        starts = range(0, max(points.shape[1], 1), self.prompt_chunk)
        chunks = [
            self._decode(
                memory,
                points[:, start : start + self.prompt_chunk],
                None if bias is None else bias[:, :, start : start + self.prompt_chunk],
            )
            for start in starts
        ]
        pred = torch.cat(chunks, 1) if len(chunks) > 1 else chunks[0]
        return RegionOutput(pred, self.out_proj(self.out_norm(pred)))

    def _decode(self, memory: RegionMemory, points: Tensor, bias: Tensor | None) -> Tensor:
        prompt = self.positions(points)
        queries = self.prompt_proj(prompt)
        for layer, keys, values in zip(self.blocks, memory.keys, memory.values, strict=True):
            queries = layer(queries + prompt, keys, values, bias)
        return queries

    def forward(self, features: Tensor, points: Tensor) -> RegionOutput:
        """``features (B, D, h, w)`` and canvas fractions ``points (B, P, 2)`` → tokens."""
        return self.decode(self.memory(features), points)

    def attention(self, memory: RegionMemory, points: Tensor, layer: int = -1) -> Tensor:
        """Attention logits ``(B, heads, P, h·w)`` of one layer, before the softmax: where each prompt looks."""
        prompt = self.positions(points)
        queries = self.prompt_proj(prompt) + prompt
        index = range(len(self.blocks))[layer]
        for i in range(index):
            queries = self.blocks[i](queries, memory.keys[i], memory.values[i]) + prompt
        block = self.blocks[index]
        heads = block.cross_attn.queries(block.query_norm(queries))
        return heads @ memory.keys[index].transpose(-1, -2) * heads.shape[-1] ** -0.5
