"""Sliding windows: the size an image is resized to, where the windows lie, and the average of what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.errors import InvalidConfig, UnsupportedSize
from opsin.geometry import Size
from opsin.runtime import in_batches


@dataclass(frozen=True)
class WindowPlan:
    """``size (H, W)`` that the image is resized to, ``window (H, W)`` of every window, ``starts`` their (top, left)."""

    size: Size
    window: Size
    starts: tuple[Size, ...]


def published_size(size: Size, crop: int, stride: int) -> Size:
    """The published rule: multiples of *stride* stay; others grow to them, without keeping the aspect exactly."""
    if all(side % stride == 0 for side in size):
        return size
    longest = max(size)
    target = -(-longest // stride) * stride
    height, width = (max(crop, -(-int(side * target / longest) // stride) * stride) for side in size)
    return height, width


@lru_cache(maxsize=256)
def plan(size: Size, crop: int, stride: int, patch: int = 16) -> WindowPlan:
    """Windows of ``crop`` pixels every ``stride`` pixels over an image of ``size (H, W)``, the last ones shifted back.

    ``crop=0`` is one pass over the whole image, its sides rounded to whole patches. Raises ``InvalidConfig`` when crop
    or stride are no multiples of ``patch`` or leave gaps.
    """
    if min(size) < 1:
        raise UnsupportedSize("An image has at least one pixel", got=size)
    if crop == 0:
        height, width = (max(1, round(side / patch)) * patch for side in size)
        return WindowPlan((height, width), (height, width), ((0, 0),))
    if crop < 0 or crop % patch or not 0 < stride <= crop or stride % patch:
        raise InvalidConfig(
            f"crop and stride are multiples of {patch} pixels, the stride above 0 and at most the crop",
            got=f"crop={crop}, stride={stride}", remedy="crop=0 takes the whole image in one pass.",
        )
    height, width = published_size(size, crop, stride)
    window = min(crop, height), min(crop, width)
    rows, columns = (
        [min(i * stride, side - w) for i in range(max(side - crop + stride - 1, 0) // stride + 1)]
        for side, w in zip((height, width), window, strict=True)
    )
    return WindowPlan((height, width), window, tuple((y, x) for y in rows for x in columns))


def sliding_features(
    images: Sequence[Tensor], encode: Callable[[Tensor], Tensor], *, crop: int, stride: int, patch: int, batch_size: int
) -> list[Tensor]:
    """Feature maps ``(D, h, w)`` of images ``(3, H, W)`` of any sizes.

    Windows of equal size go to ``encode (B, 3, H, W) → (B, D, h, w)`` together, whichever image they are of, at most
    ``batch_size`` at once (halved when memory runs out). Where windows overlap, their features are averaged.
    """
    plans = [plan((image.shape[-2], image.shape[-1]), crop, stride, patch) for image in images]
    resized: dict[int, Tensor] = {}

    def window(key: tuple[int, Size]) -> Tensor:
        index, (y, x) = key
        if index not in resized:  # windows come image by image, so few resized images are alive at a time
            resized.clear()
            image = images[index]
            if image.shape[-2:] != plans[index].size:  # by channel: torch copies an image of several thrice
                image = F.interpolate(image[:, None], plans[index].size, mode="bilinear")[:, 0]
            resized[index] = image
        height, width = plans[index].window
        return resized[index][:, y : y + height, x : x + width]

    sums: list[Tensor | None] = [None] * len(images)

    def run(keys: Sequence[tuple[int, Size]]) -> list[None]:
        features = encode(torch.stack([window(key) for key in keys]))
        for (index, (y, x)), found in zip(keys, features, strict=True):
            height, width = (side // patch for side in plans[index].size)
            total = sums[index]
            if total is None:
                total = sums[index] = found.new_zeros((found.shape[0], height, width))
            total[:, y // patch : y // patch + found.shape[1], x // patch : x // patch + found.shape[2]] += found
        return [None] * len(keys)

    for size in dict.fromkeys(p.window for p in plans):
        keys = [(i, start) for i, p in enumerate(plans) if p.window == size for start in p.starts]
        in_batches(run, keys, batch_size)
    return [total.div_(_hits(p, patch).to(total)) for total, p in zip(sums, plans, strict=True) if total is not None]


@lru_cache(maxsize=64)
def _hits(plan: WindowPlan, patch: int) -> Tensor:
    """How many windows cover each location of the grid."""
    count = torch.zeros([side // patch for side in plan.size])
    h, w = (side // patch for side in plan.window)
    for y, x in plan.starts:
        count[y // patch : y // patch + h, x // patch : x // patch + w] += 1
    return count
