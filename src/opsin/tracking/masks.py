"""Small tools for masks: the largest piece, the box as the published code writes it, and whether a picture is blurred.

Source: REN-VQL (arXiv 2505.18153), whose functions of this kind are OpenCV's.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidImage, InvalidPrompt, check_compat
from opsin.geometry import mask_boxes

# Weights of the channels in OpenCV's grey, in units of 2^-15.
_GREY = (9798, 19235, 3735)
BLURRED = 100.0  # published: a picture of less sharpness is blurred


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


def sharpness(picture: Tensor, *, compat: Literal["published"] | None = None) -> float:
    """Variance of the Laplacian of the grey of ``picture (3, H, W)``, uint8 or float in [0, 1]: low is blurred.

    On the scale of grey values 0–255. ``compat="published"`` takes red for blue, as the published code does.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise InvalidImage("A picture has shape (3, H, W)", got=tuple(picture.shape))
    pixels = picture if picture.dtype == torch.uint8 else (picture.float() * 255).round()
    weights = torch.tensor(_GREY[::-1] if check_compat(compat) else _GREY, device=picture.device)
    # round to whole grey values, as OpenCV does
    grey = ((pixels.long() * weights[:, None, None]).sum(0) + (1 << 14) >> 15).double()
    pad = "reflect" if min(grey.shape) > 1 else "replicate"
    around = F.pad(grey[None, None], (1, 1, 1, 1), mode=pad)[0, 0]
    centre = around[1:-1, 1:-1]
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * centre
    return float(laplacian.var(correction=0))
