"""Masks of the published visual query pipeline, from plain numpy to calls of the product and back."""

from __future__ import annotations

import numpy as np
import torch

from opsin.geometry import box_iou
from opsin.tracking.masks import BLURRED, largest_component, published_box, sharpness

Array = np.ndarray


def vq_largest_component(mask: Array) -> Array:
    return largest_component(torch.from_numpy(mask)).numpy()


def vq_mask_box(mask: Array) -> list[int]:
    return list(published_box(torch.from_numpy(mask)))


def vq_box_iou(a: list[float], b: list[float]) -> float:
    """Of boxes x, y, width, height."""
    first, second = (torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64) for x, y, w, h in (a, b))
    return float(box_iou(first, second))


def vq_blur(image: Array) -> tuple[float, bool]:
    """Of an image (H, W, 3) uint8: the variance of its Laplacian, and whether that counts as blurred."""
    value = sharpness(torch.from_numpy(image).permute(2, 0, 1), compat="published")
    return value, value < BLURRED
