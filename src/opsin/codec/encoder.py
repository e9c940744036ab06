"""From an image to its tokens; the first of them is the code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from opsin.codec.config import ACTIVATIONS, CodecConfig, as_size
from opsin.codec.layers import EPS, Block, Norm, assign, count_blocks, initialise, shape_of, square, wide
from opsin.codec.patches import grid_of, resample_rows, sincos_positions
from opsin.errors import UnsupportedSize
from opsin.geometry import Size


class _PatchEmbedding(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)


class _Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbedding(dim, patch)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = Norm(dim, eps=EPS)


class CodecEncoder(nn.Module):
    """The encoder of btnk_mae (REMI, arXiv 2507.02064): a ViT whose class token is the code of the image.

    ``forward(images (B, 3, H, W))``, normalised, gives all tokens ``(B, 1 + N, D)`` after the activation;
    :meth:`bottleneck` only the code ``(B, D)``, with less work. State-dict keys are the published ones.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.dim, self.patch, self.grid = config.dim, config.patch, config.grid
        self.activation = config.activation
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        count = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, count, config.dim), requires_grad=False)
        self.mae_encoder = _Transformer(config.dim, config.depth, config.heads, config.patch)
        if not self.cls_token.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the published training starts without MAE, and compute the positions."""
        self.pos_embed.copy_(sincos_positions(self.dim, self.grid, class_row=True))
        nn.init.normal_(self.cls_token, std=0.02, generator=generator)
        initialise(self, generator)
        conv = self.mae_encoder.patch_embed.proj
        nn.init.xavier_uniform_(conv.weight.view(self.dim, -1), generator=generator)
        bound = 1 / math.sqrt(conv.weight[0].numel())
        nn.init.uniform_(conv.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, heads: int, activation: str | None = None, size: int | Size | None = None
    ) -> CodecEncoder:
        """Weights under the published keys, in their dtype; widths and depth are read off the shapes.

        ``size`` of the images: by default the square that fits the positions. A file without the fixed positions gets
        them. ``InvalidCheckpoint`` for other keys or shapes.
        """
        dim, patch = shape_of(state, "cls_token")[-1], shape_of(state, "mae_encoder.patch_embed.proj.weight")[-1]
        if size is None:
            size = square(shape_of(state, "pos_embed")[1] - 1) * patch
        depth = count_blocks(state, "mae_encoder.blocks")
        config = CodecConfig(dim, depth, heads, patch=patch, size=as_size(size), activation=activation or "")
        state = {**state}
        state.setdefault("pos_embed", sincos_positions(dim, config.grid, class_row=True).to(state["cls_token"].dtype))
        with torch.device("meta"):
            encoder = cls(config)
        return assign(encoder, state, "the encoder of a codec")

    @property
    def size(self) -> Size:
        """``(H, W)`` of the images it takes."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` → tokens ``(B, 1 + N, D)``. ``UnsupportedSize`` for another size."""
        tokens = self._embed(images)
        for block in self.mae_encoder.blocks:
            tokens = block(tokens)
        return ACTIVATIONS[self.activation](self.mae_encoder.norm(tokens))

    def bottleneck(self, images: Tensor) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` → codes ``(B, D)``, the first of the tokens of :meth:`forward`."""
        tokens = self._embed(images)
        *blocks, last = self.mae_encoder.blocks
        for block in blocks:
            tokens = block(tokens)
        token = cast(Block, last).first(tokens)[:, 0]
        return ACTIVATIONS[self.activation](self.mae_encoder.norm(token))

    def _embed(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.size:
            raise UnsupportedSize(
                f"This encoder takes (B, 3, {self.size[0]}, {self.size[1]})", got=tuple(images.shape),
                remedy="resize() makes a codec for another size.",
            )  # fmt: skip
        patches = self.mae_encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([first.to(patches.dtype), patches + self.pos_embed[:, 1:]], 1).to(wide(patches.dtype))

    def resize(self, size: int | Size, *, compat: Literal["published"] | None = None) -> None:
        """Take images of another ``size``: positions are resampled (bicubic), in the same ``Parameter``.

        ``compat="published"`` computes a frozen table anew instead, with positions beyond those of training.
        """
        grid = grid_of(as_size(size), self.patch)
        if grid == self.grid:
            return
        table = self.pos_embed
        if compat == "published" and not table.requires_grad:
            table.data = sincos_positions(self.dim, grid, class_row=True).to(table)
        else:
            table.data = resample_rows(table.data, self.grid, grid)
        self.grid = grid
