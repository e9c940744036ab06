"""Two random views of a photograph, image and regions moved by one and the same map (REN's training recipe)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """Ranges that a view is drawn from: probability of a mirror image, strength of brightness, contrast and saturation,
    degrees of rotation and shear, smallest side of the square crop as a fraction of the image."""

    flip: float = 0.5
    jitter: float = 0.4
    rotation: float = 45.0
    shear: float = 15.0
    crop: float = 0.3


@dataclass(frozen=True)
class View:
    """One draw: ``angle`` and ``shear`` in radians, ``corner`` and ``side`` of the crop in pixels of the photograph."""

    flip: bool
    brightness: float
    contrast: float
    saturation: float
    sharpness: float
    angle: float
    shear: tuple[float, float]
    corner: tuple[int, int]
    side: int


def draw_view(rng: np.random.Generator, size: int, augmentation: Augmentation) -> View:
    """A random view of a ``size`` × ``size`` image."""
    a = augmentation
    colour = rng.uniform(1 - a.jitter, 1 + a.jitter, 3) if a.jitter else np.ones(3)
    # Sharpness belongs to the colour changes: without them a view is only moved.
    sharpness = float(rng.uniform(0, 2)) if a.jitter else 1.0
    side = int(rng.integers(int(a.crop * size), size + 1))
    return View(
        flip=bool(rng.random() < a.flip),
        brightness=float(colour[0]),
        contrast=float(colour[1]),
        saturation=float(colour[2]),
        sharpness=sharpness,
        angle=math.radians(rng.uniform(-a.rotation, a.rotation)),
        shear=(math.radians(rng.uniform(0, a.shear)), math.radians(rng.uniform(0, a.shear))),
        corner=(int(rng.integers(0, size - side + 1)), int(rng.integers(0, size - side + 1))),
        side=side,
    )


def recolour(images: Tensor, views: Sequence[View]) -> Tensor:
    """Brightness, contrast, saturation and sharpness of each view applied to ``images (B, 3, H, W)`` in [0, 1]."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(v, name) for v in views], dtype=images.dtype)[:, None, None, None]

    weights = torch.tensor(GREY, dtype=images.dtype)[:, None, None]
    images = (images * column("brightness")).clamp_(0, 1)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, column("contrast")).clamp_(0, 1)
    grey = (images * weights).sum(1, keepdim=True)
    images = torch.lerp(grey, images, column("saturation")).clamp_(0, 1)
    # 3 × 3 smoothing of weight 5 in the middle and 1 around, from sums over rows and columns; the border stays.
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1].mul_(4).add_(rows[..., :-2]).add_(rows[..., 1:-1]).add_(rows[..., 2:]).div_(13)
    return torch.lerp(smooth, images, column("sharpness")).clamp_(0, 1)


def _linear(view: View) -> Tensor:
    """The matrix that takes a point of the view, relative to the centre, to the mirrored photograph."""
    cos, sin = math.cos(view.angle), math.sin(view.angle)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    shear = torch.tensor([[1.0, math.tan(view.shear[0])], [math.tan(view.shear[1]), 1.0]], dtype=torch.float64)
    return torch.linalg.inv(turn @ shear)


def sampling_grid(view: View, size: int, *, crop: bool = True) -> Tensor:
    """Where each pixel of the view comes from: ``(size, size, 2)`` float32 (x, y) in pixels of the photograph.

    ``crop=False`` stops before the crop: only mirror, rotation and shear.
    """
    (a, b), (c, d) = _linear(view).tolist()
    pixels = torch.arange(size, dtype=torch.float32) + 0.5
    # Affine, so a column vector and a row vector add up to the grid.
    x, y = (pixels * (view.side / size) + o for o in view.corner) if crop else (pixels, pixels)
    x, y = x - size / 2, y[:, None] - size / 2
    column = a * x + b * y + size / 2
    return torch.stack([size - column if view.flip else column, c * x + d * y + size / 2], -1)


def warp_image(images: Tensor, grids: Tensor, mode: str = "bilinear") -> Tensor:
    """``images (B, 3, S, S)`` at ``grids (B, H, W, 2)``; black outside."""
    return F.grid_sample(images, grids * (2 / images.shape[-1]) - 1, mode=mode, align_corners=False)


def warp_labels(layers: Tensor, grid: Tensor) -> Tensor:
    """``layers (L, S, S)`` at ``grid (H, W, 2)`` by the nearest pixel; -1 outside."""
    size = layers.shape[-1]
    # A frame of -1 around the map stands for everything outside.
    framed = F.pad(layers, (1, 1, 1, 1), value=-1).flatten(1)
    x, y = (grid[..., i].floor().clamp_(-1, size).int().add_(1) for i in (0, 1))
    return framed[:, y.mul_(size + 2).add_(x).flatten()].view(-1, *grid.shape[:2])


def make_views(
    images: Tensor, layers: Sequence[Tensor], views: Sequence[View], *, published: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The views of photographs: ``images (B, 3, S, S)`` in [0, 1] and ``layers`` ``B`` × ``(L, S, S)``, moved alike.

    Mirror, rotation, shear, crop and resize are one map, so pixels are interpolated once. ``published=True`` does what
    the published loader does: nearest pixel for the rotation, then a bicubic resize of the crop, in which only mask
    pixels that stay at full value survive (regions lose their edge).
    """
    size = images.shape[-1]
    images = recolour(images, views)
    if not published:
        grids = torch.stack([sampling_grid(v, size) for v in views])
        return warp_image(images, grids), [warp_labels(m, g) for m, g in zip(layers, grids, strict=True)]
    grids = torch.stack([sampling_grid(v, size, crop=False) for v in views])
    turned = warp_image(images, grids, "nearest")
    pixels, moved = [], []
    for image, maps, grid, view in zip(turned, layers, grids, views, strict=True):
        (left, top), side = view.corner, view.side
        window = (..., slice(top, top + side), slice(left, left + side))
        pixels.append(_bicubic(image[window][None], size)[0].clamp(0, 1))
        labels = warp_labels(maps, grid)[window]
        kept = torch.full((len(maps), size, size), -1, dtype=maps.dtype)
        for region in labels.unique().tolist():
            if region >= 0:
                kept[_bicubic((labels == region).float()[None], size)[0] >= 1 - 1e-5] = region
        moved.append(kept)
    return torch.stack(pixels), moved


def _bicubic(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, (size, size), mode="bicubic", align_corners=False)
