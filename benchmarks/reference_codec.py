"""The published algorithm of btnk_mae, written from its description as plainly as published: what is timed against.

It follows the published way of working, costs included: the encoder computes every token of its last block although
only the first is wanted, the decoder asks a cross-attention with one query per patch over a single key, training goes
through both decoder passes, the norm of all gradients is taken and dropped, and AdamW has its default implementation.
State-dict keys are those of ``opsin.codec``, so both sides run on the same weights (a test checks that they agree).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.codec import CodecConfig
from opsin.codec.patches import patchify, sincos_positions


class Attention(nn.Module):
    """Self-attention of a ViT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim))


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ReferenceEncoder(nn.Module):
    """Images ``(B, 3, H, W)`` → all tokens ``(B, 1 + N, D)``."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        table = sincos_positions(config.dim, config.grid, class_row=True)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.mae_encoder = nn.Module()
        self.mae_encoder.patch_embed = nn.Module()
        self.mae_encoder.patch_embed.proj = nn.Conv2d(3, config.dim, config.patch, stride=config.patch)
        self.mae_encoder.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.mae_encoder.norm = nn.LayerNorm(config.dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.mae_encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = x + self.pos_embed[:, 1:]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], 1)
        for block in self.mae_encoder.blocks:
            x = block(x)
        return self.mae_encoder.norm(x)


class PatchReconstruction(nn.Module):
    """Queries, moved by a cross-attention over one key."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.q_norm, self.kv_norm, self.x_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, code: Tensor) -> Tensor:
        key = self.kv_norm(code)[:, None]
        found, _ = self.attn(self.q_norm(queries), key, key)
        x = queries + self.dropout(found)
        return x + self.dropout(self.mlp(self.x_norm(x)))


class ReferenceDecoder(nn.Module):
    """Codes ``(B, D)``, or all tokens, → patches ``(B, N, 3·p²)``."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        count, width = config.grid[0] * config.grid[1], config.decoder_dim
        self.learned_embed = nn.Parameter(0.02 * torch.randn(1, count, config.dim))
        table = sincos_positions(config.dim, config.grid, class_row=False)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.patch_recon = PatchReconstruction(config.dim, config.decoder_heads, config.dropout)
        part = self.mae_decoder = nn.Module()
        part.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_positions(width, config.grid, class_row=True)
        part.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        part.decoder_embed = nn.Linear(config.dim, width)
        part.decoder_blocks = nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        part.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        part.decoder_pred = nn.Linear(width, 3 * config.patch**2)

    def forward(self, code: Tensor) -> Tensor:
        queries = (self.learned_embed + self.pos_embed).expand(len(code), -1, -1)
        return self._rest(self.mae_decoder.decoder_embed(self.patch_recon(queries, code)))

    def full(self, tokens: Tensor) -> Tensor:
        part = self.mae_decoder
        return self._rest(part.decoder_embed(tokens) + part.decoder_pos_embed)[:, 1:]

    def _rest(self, x: Tensor) -> Tensor:
        for block in self.mae_decoder.decoder_blocks:
            x = block(x)
        return self.mae_decoder.decoder_pred(self.mae_decoder.decoder_norm(x))


class ReferenceCodec(nn.Module):
    """Both, and one step of their training."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.encoder, self.decoder = ReferenceEncoder(config), ReferenceDecoder(config)

    def loss(self, images: Tensor) -> Tensor:
        """``1 · MSE(code) + 0.1 · MSE(all tokens)``."""
        tokens = self.encoder(images)
        target = patchify(images, self.patch)
        found = ((self.decoder(tokens[:, 0]) - target) ** 2).mean()
        return found + 0.1 * ((self.decoder.full(tokens) - patchify(images, self.patch)) ** 2).mean()

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW as published."""
        halves = [[p for p in half.parameters() if p.requires_grad] for half in (self.encoder, self.decoder)]
        groups = [{"params": members} for members in halves]
        return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05)

    def step(self, images: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Forward, backward, norm of the gradients, update."""
        loss = self.loss(images)
        value = loss.item()
        loss.backward()
        norms = [torch.norm(p.grad.detach(), 2) for p in self.parameters() if p.grad is not None]
        torch.norm(torch.stack(norms), 2)
        optimizer.step()
        optimizer.zero_grad()
        return value
