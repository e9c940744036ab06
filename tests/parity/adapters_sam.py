"""SAM's decoder and RADSeg+'s refinement under the published names of SAM's weights, as numpy in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opsin.segmentation.refine import Regions, find_regions, frame, refine
from opsin.segmentation.sam import SamDecoder

Array = np.ndarray


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def sam_decoder(weights: dict[str, Array]) -> SamDecoder:
    """``weights`` under the names of segment-anything."""
    return SamDecoder.from_state_dict({key: _tensor(value) for key, value in weights.items()})


def sam_embed(weights: dict[str, Array], features: Array) -> Array:
    """``(B, D, h, w)`` → ``(B, 256, 64, 64)``."""
    with torch.no_grad():
        return sam_decoder(weights).embed(_tensor(features)).numpy()


def sam_decode(
    weights: dict[str, Array], features: Array, *, points: Array, boxes: Array, mask: Array, batch_size: int = 4
) -> dict[str, Array]:
    """Objects prompted by points ``(K, 2)``, boxes ``(K, 4)`` of the frame and one mask ``(1, 256, 256)`` for all."""
    decoder = sam_decoder(weights)
    with torch.no_grad():
        logits, iou = decoder.decode(
            decoder.embed(_tensor(features)), _tensor(points), _tensor(boxes), _tensor(mask)[None],
            mask_index=torch.zeros(len(points), dtype=torch.int64), batch_size=batch_size, compat="published",
        )  # fmt: skip
    return {"logits": logits.numpy(), "iou": iou.numpy()}


def sam_refine(
    weights: dict[str, Array], features: Array, labels: Array, probabilities: Array, *, fed: tuple[int, int],
    coarse_threshold: float, min_area: int, mask_coefficient: float, iou: float,
) -> dict[str, Any]:  # fmt: skip
    """The published refinement of one image."""
    decoder = sam_decoder(weights)
    coarse = _tensor(probabilities)
    scores = torch.empty_like(coarse)
    with torch.no_grad():
        embedding = decoder.embed(_tensor(features))
    found = refine(
        _tensor(labels), coarse, embedding, decoder, fed=fed, coarse_threshold=coarse_threshold, min_area=min_area,
        mask_coefficient=mask_coefficient, iou=iou, compat="published", out=scores,
    )  # fmt: skip
    return {"labels": found.labels.numpy(), "probs": scores.numpy(), "iou": found.iou[found.accepted].numpy()}


def sam_regions(labels: Array, probabilities: Array, *, coarse_threshold: float, min_area: int) -> Regions:
    """The published regions of one image and their prompts."""
    size = labels.shape[0], labels.shape[1]
    return find_regions(
        _tensor(labels), _tensor(probabilities), frame(size, compat="published"), coarse_threshold=coarse_threshold,
        min_area=min_area, compat="published",
    )  # fmt: skip
