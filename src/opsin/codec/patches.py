"""Images to rows of patches and back, their fixed positions, and what is measured between patches in training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opsin.errors import InvalidImage, UnsupportedSize
from opsin.geometry import Size


def grid_of(size: Size, patch: int) -> Size:
    """Patch grid ``(h, w)`` of an image of ``size (H, W)``; ``UnsupportedSize`` unless both are multiples of it."""
    height, width = size
    if height < patch or width < patch or height % patch or width % patch:
        near = tuple(max(patch, round(side / patch) * patch) for side in size)
        raise UnsupportedSize(
            f"Both sides are multiples of the patch of {patch} pixels", got=f"{height}×{width} (height × width)",
            remedy=f"The nearest size is {near[0]}×{near[1]}.",
        )  # fmt: skip
    return height // patch, width // patch


def patchify(images: Tensor, patch: int) -> Tensor:
    """``(B, 3, H, W)`` → ``(B, N, 3·p²)``: patches row by row, in each its pixels row by row, channels innermost."""
    if images.ndim != 4:
        raise InvalidImage("Images to cut into patches have shape (B, C, H, W)", got=tuple(images.shape))
    batch, channels, height, width = images.shape
    h, w = grid_of((height, width), patch)
    cut = images.reshape(batch, channels, h, patch, w, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, grid: Size | None = None) -> Tensor:
    """``(B, N, C·p²)`` → ``(B, C, H, W)``; the inverse of :func:`patchify`. ``grid=None``: a square one."""
    side = round(tokens.shape[1] ** 0.5)
    h, w = grid or (side, side)
    channels, rest = divmod(tokens.shape[-1], patch * patch)
    if tokens.ndim != 3 or tokens.shape[1] != h * w or rest:
        raise UnsupportedSize(f"Patches of a {h}×{w} grid, {patch} pixels a side", got=tuple(tokens.shape))
    cut = tokens.reshape(-1, h, w, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, h * patch, w * patch)


def sincos_positions(dim: int, grid: Size, *, class_row: bool) -> Tensor:
    """The fixed positions of MAE (arXiv 2111.06377), ``(1, [1 +] h·w, dim)`` float32; the class token's row is zero.

    The first half of a row tells the column, the second the row, each as sines then cosines of ``dim / 4`` frequencies.
    """
    if dim % 4:
        raise UnsupportedSize("The width of sine-cosine positions is a multiple of 4", got=dim)
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    parts = []
    for axis in (columns, rows):
        angles = axis.reshape(-1, 1) * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(parts, 1).astype(np.float32)
    if class_row:
        table = np.concatenate([np.zeros((1, dim), np.float32), table])
    return torch.from_numpy(table)[None]


def resample_rows(table: Tensor, old: Size, new: Size) -> Tensor:
    """Rows ``(1, [1 +] h·w, D)`` of one grid resampled to another, bicubic; a class token's row is kept."""
    first = table.shape[1] - old[0] * old[1]
    head, rows = table[:, :first], table[:, first:]
    maps = rows.reshape(1, *old, -1).permute(0, 3, 1, 2)
    maps = torch.nn.functional.interpolate(maps, size=new, mode="bicubic", align_corners=False)
    return torch.cat([head, maps.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)], 1)


def patch_target(images: Tensor, patch: int, *, norm_pix: bool = False) -> Tensor:
    """Normalised images ``(B, 3, H, W)`` as patches ``(B, N, 3·p²)``; ``norm_pix``: each of mean 0 and variance 1."""
    target = patchify(images, patch)
    if not norm_pix:
        return target
    centred = target - target.mean(-1, keepdim=True)
    return centred / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(images: Tensor, predicted: Tensor, patch: int, *, norm_pix: bool = False) -> Tensor:
    """Mean squared difference of predicted patches ``(B, N, 3·p²)`` to those of ``images``: a scalar."""
    return (predicted - patch_target(images, patch, norm_pix=norm_pix)).square().mean()
