"""Masks of the published visual query pipeline, from plain numpy to calls of the product and back."""

from __future__ import annotations

import numpy as np
import torch

from opsin.tracking.masks import largest_component, published_box

Array = np.ndarray


def vq_largest_component(mask: Array) -> Array:
    return largest_component(torch.from_numpy(mask)).numpy()


def vq_mask_box(mask: Array) -> list[int]:
    return list(published_box(torch.from_numpy(mask)))
