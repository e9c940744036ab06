"""SCGA: every location takes the mean of the locations that are more like it than the image is like itself.

RADSeg (arXiv 2511.19704): self-correlating global aggregation of a whole feature map, after its windows are stitched.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.errors import check_compat
from opsin.segmentation.attention import check_scaling, correlate


@torch.no_grad()
def aggregate(features: Tensor, scaling: float = 10.0, compat: Literal["published"] | None = None) -> Tensor:
    """Features ``(B, D, h, w)`` averaged over similar locations of the same image; same shape and dtype.

    Weights are ``softmax(scaling · (cosine - mean))`` over the locations whose cosine is not below ``mean``, the mean
    cosine over all pairs of the image. The published code takes one mean over the whole batch, so that a result
    depends on the other images; ``compat="published"`` does the same.
    """
    published = check_compat(compat)
    check_scaling(scaling)
    batch, dim, h, w = features.shape
    tokens = features.flatten(2).transpose(1, 2)
    unit = F.normalize(tokens, dim=2)
    # the mean over all pairs of z·z' is |mean z|²: no matrix needed
    means = unit.mean(1, dtype=torch.float64).square().sum(1)
    if published:
        means = means.mean().expand(batch)
    rows = [
        correlate(unit[i : i + 1], tokens[i : i + 1], scaling, offset) for i, offset in enumerate(means.tolist())
    ]
    found = rows[0] if batch == 1 else torch.cat(rows)  # a panorama is not copied
    return found.transpose(1, 2).reshape(batch, dim, h, w)


def aggregate_all(
    maps: list[Tensor], scaling: float = 10.0, compat: Literal["published"] | None = None
) -> list[Tensor]:
    """:func:`aggregate` of maps ``(D, h, w)`` of any sizes; as published, those of one size are a batch."""
    if compat == "published" and len({m.shape for m in maps}) == 1:
        return list(aggregate(torch.stack(maps), scaling, compat))
    return [aggregate(m[None], scaling)[0] for m in maps]
