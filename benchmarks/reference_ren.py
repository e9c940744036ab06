"""The published algorithm of REN, written from its description as plainly as it was published: what is timed against.

It follows the published way of working, costs included: a position table of every pixel of the square image, prompts
looked up one by one, explicit softmax attention whose logits are all kept, and grouping with Python lists of edges and
a loop per group. The numbers are those of ``opsin.regions`` (a test checks both against the same golden numbers); only
the way differs. float32 and evaluation mode, as in published inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Published:
    """One published model: width, square side, patch, prompts per side, cosine at which prompts merge."""

    name: str
    dim: int
    resolution: int
    patch: int
    prompts_per_side: int
    threshold: float = 0.975

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.resolution // self.patch

    @property
    def prompts(self) -> int:
        """Prompts per image."""
        return self.prompts_per_side**2


PUBLISHED = (
    Published("dino-vitb8", 768, 384, 8, 48),
    Published("dinov2-vitl14", 1024, 518, 14, 37),
    Published("openclip-vitg14", 1408, 224, 14, 16, 0.875),
)


def position_table(dim: int, height: int, width: int, fourier: Tensor) -> Tensor:
    """``(D, height, width)``: sine and cosine of random projections of the cell centres, x before y."""
    ones = torch.ones(height, width)
    y = (ones.cumsum(0) - 0.5) / height
    x = (ones.cumsum(1) - 0.5) / width
    phase = 2 * math.pi * ((2 * torch.stack([x, y], -1) - 1) @ fourier)
    return torch.cat([phase.sin(), phase.cos()], -1).permute(2, 0, 1)


class Attention(nn.Module):
    """Cross-attention with normalised queries and keys; returns the logits as well."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(dim, dim))
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)

    def split(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        return x.view(batch, count, self.heads, dim // self.heads).permute(0, 2, 1, 3)

    def forward(self, queries: Tensor, memory: Tensor, project_values: bool) -> tuple[Tensor, Tensor]:
        q = self.q_norm(self.split(self.q_proj(queries)))
        k = self.k_norm(self.split(self.k_proj(memory)))
        v = self.split(self.v_proj(memory) if project_values else memory)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        mixed = (logits.softmax(dim=-1) @ v).permute(0, 2, 1, 3).flatten(2)
        return self.out_proj(mixed), logits


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class Layer(nn.Module):
    """Attention and MLP; the last norm sits on the MLP's output."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query_norm, self.mlp_norm, self.out_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attn, self.mlp = Attention(dim, heads), Mlp(dim)

    def forward(self, queries: Tensor, memory: Tensor, project_values: bool) -> tuple[Tensor, Tensor]:
        mixed, logits = self.cross_attn(self.query_norm(queries), memory, project_values)
        x = mixed + queries
        return self.out_norm(self.mlp(self.mlp_norm(x))) + x, logits


class ReferenceEncoder(nn.Module):
    """The published region encoder with the published keys. The tables are built once, at construction."""

    def __init__(self, dim: int, resolution: int, patch: int, fourier: Tensor, heads: int = 8, layers: int = 4) -> None:
        super().__init__()
        self.prompt_proj = nn.Linear(dim, dim)
        self.region_attention_layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.out_norm, self.out_proj = nn.LayerNorm(dim), nn.Linear(dim, dim)
        side = resolution // patch
        self.prompt_table = position_table(dim, resolution, resolution, fourier).contiguous()
        self.feature_table = position_table(dim, side, side, fourier)

    def forward(self, features: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``features (B, D, h, w)``, ``prompts (B, P, 2)`` int (row, col) → pred tokens, proj tokens, logits of all
        layers.
        """
        memory = features.flatten(2).transpose(1, 2) + self.feature_table.flatten(1).T
        looked_up = [torch.stack([self.prompt_table[:, row, col] for row, col in image]) for image in prompts.tolist()]
        positions = torch.stack(looked_up)
        queries, kept = self.prompt_proj(positions), []
        for i, layer in enumerate(self.region_attention_layers):
            queries, logits = layer(queries + positions, memory, i < len(self.region_attention_layers) - 1)
            kept.append(logits)
        return queries, self.out_proj(self.out_norm(queries)), kept


@dataclass(frozen=True)
class ReferenceGroups:
    """Members of every group, mean tokens, and the prompt nearest to each group's middle."""

    members: list[list[int]]
    pred: Tensor
    proj: Tensor
    points: Tensor


def reference_group(
    pred: Tensor, proj: Tensor, prompts: Tensor, threshold: float, min_size: int = 3, chunk: int = 2048
) -> ReferenceGroups:
    """Published grouping of one image: ``pred``, ``proj (P, D)``, ``prompts (P, 2)``.

    The published code also averages the last layer's logits over each group; that is left out on both sides.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    unit = F.normalize(pred, dim=-1)
    count = len(unit)
    rows: list[np.int64] = []
    cols: list[np.int64] = []
    for start in range(0, count, chunk):
        near = (unit[start : start + chunk] @ unit.T >= threshold).nonzero().numpy()
        rows.extend(near[:, 0] + start)
        cols.extend(near[:, 1])
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, cols)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    grouped: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        grouped.setdefault(int(label), []).append(index)
    members = [m for m in grouped.values() if len(m) >= min_size]
    if not members:
        return ReferenceGroups([], pred[:0], proj[:0], prompts[:0])
    pred_means, proj_means, points = [], [], []
    for group in members:
        pred_means.append(pred[group].mean(0))
        proj_means.append(proj[group].mean(0))
        own = prompts[group].float()
        points.append(prompts[group[int((own - own.mean(0)).norm(dim=-1).argmin())]])
    return ReferenceGroups(members, torch.stack(pred_means), torch.stack(proj_means), torch.stack(points))
