"""Small tools for masks: the largest piece, the piece at a point, the box as the published REN-VQL writes it."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from opsin.errors import InvalidPrompt
from opsin.geometry import mask_boxes


def largest_component(mask: Tensor) -> Tensor:
    """The largest 8-connected piece of ``mask (H, W)``, boolean, on the CPU; the first one on ties, none of none."""
    if mask.ndim != 2:
        raise InvalidPrompt("A mask has shape (H, W)", got=tuple(mask.shape))
    array = mask.detach().cpu().numpy().astype(bool)
    labels, count = ndimage.label(array, np.ones((3, 3)))
    if count > 1:
        array = labels == 1 + int(np.bincount(labels.ravel())[1:].argmax())
    return torch.from_numpy(array)


def component_at(mask: Tensor, point: Tensor) -> Tensor:
    """The 8-connected piece of ``mask (H, W)`` that holds the pixel at ``point (2,)``; empty where that is outside."""
    height, width = mask.shape
    x, y = (min(int(v), side - 1) for v, side in zip(point.tolist(), (width, height), strict=True))
    labels, _ = ndimage.label(mask.detach().cpu().numpy(), np.ones((3, 3)))
    return torch.from_numpy((labels == labels[y, x]) & (labels > 0))


def published_box(mask: Tensor) -> tuple[int, int, int, int]:
    """``(x, y, width, height)`` of ``mask (H, W)`` as the published pipeline writes it: one pixel short on both sides.

    ``opsin.geometry.mask_boxes`` gives half-open boxes. Raises ``InvalidPrompt`` for an empty mask.
    """
    if not bool(mask.any()):
        raise InvalidPrompt("A mask holds at least one pixel", got="an empty mask")
    x1, y1, x2, y2 = (int(v) for v in mask_boxes(mask[None].bool())[0].tolist())
    return x1, y1, x2 - x1 - 1, y2 - y1 - 1
