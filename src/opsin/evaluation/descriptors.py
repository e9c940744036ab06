"""What region tokens are measured against: colours of a segment, and the mean backbone feature of its patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.regions.transfer import mask_weights, mean_pool
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


def patch_means(features: FeatureMap, masks: Tensor) -> Tensor:
    """Mean feature ``(R, D)`` under each boolean mask ``(R, H, W)``, patches weighted by the area they share with it.

    A mask too small to touch a patch gets a zero row.
    """
    weights = mask_weights(masks, features.transform, features.grid)
    return mean_pool(features.features.flatten(1).T.float().cpu(), weights)
