"""What region tokens are measured against: colours of a segment, and the mean backbone feature of its patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidPrompt
from opsin.geometry import ImageTransform
from opsin.types import FeatureMap


def colour_histograms(image: Tensor, masks: Tensor, *, bins: int = 8, root: bool = True) -> Tensor:
    """Joint RGB histograms ``(R, bins³)``, of unit length, of the pixels under boolean ``masks (R, H, W)``.

    ``image (3, H, W)`` in [0, 1]. ``root`` takes square roots first, so that a dot product is the Hellinger affinity;
    without it the dot product is the cosine of counts.
    """
    level = (image * bins).long().clamp(max=bins - 1)
    code = ((level[0] * bins + level[1]) * bins + level[2]).flatten()
    rows = [torch.bincount(code[mask.flatten()], minlength=bins**3).double() for mask in masks]
    counts = torch.stack(rows) if rows else torch.zeros((0, bins**3), dtype=torch.float64)
    return F.normalize(counts.sqrt() if root else counts, dim=-1).float()


def patch_weights(masks: Tensor, transform: ImageTransform, grid: tuple[int, int]) -> Tensor:
    """Share ``(R, h, w)`` in [0, 1] of every grid cell that lies under each boolean mask ``(R, H, W)``, by area.

    The masks go the way of the image: scaled into the canvas by area, surrounded by padding, averaged over the cells.
    """
    if tuple(masks.shape[-2:]) != tuple(transform.size):
        raise InvalidPrompt(f"Masks of this image have size {transform.size}", got=tuple(masks.shape[-2:]))
    x1, y1, x2, y2 = (round(v) for v in transform.content)
    inner = F.interpolate(masks[None].float(), size=(max(1, y2 - y1), max(1, x2 - x1)), mode="area")
    canvas = F.pad(inner, (x1, transform.canvas[1] - x2, y1, transform.canvas[0] - y2))
    return F.adaptive_avg_pool2d(canvas, grid)[0]


def patch_means(features: FeatureMap, masks: Tensor) -> Tensor:
    """Mean feature ``(R, D)`` under each boolean mask ``(R, H, W)``, patches weighted by the area they share with it.

    A mask too small to touch a cell gets a zero row.
    """
    values = features.features.flatten(1).float().cpu()
    weights = patch_weights(masks, features.transform, features.grid).flatten(1)
    return weights @ values.T / weights.sum(1, keepdim=True).clamp(min=1e-12)
