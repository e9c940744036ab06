"""Points, boxes, masks and the way between original pixels and what a model sees.

Conventions: points are ``(x, y)`` in pixels of the original image, pixel centres at +0.5; boxes are absolute, half-open
``(x1, y1, x2, y2)``; sizes are ``(H, W)``. Everything follows the device and dtype of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.errors import InvalidPrompt

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageTransform:
    """How one original image was laid onto a model's canvas: ``canvas_xy = original_xy * scale + offset``.

    ``size`` and ``canvas`` are ``(H, W)``; ``scale`` and ``offset`` are ``(x, y)``, in canvas pixels.
    """

    size: Size
    canvas: Size
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def to_canvas(self, points: Tensor) -> Tensor:
        """Original pixels ``(..., 2)`` → canvas pixels."""
        return points * points.new_tensor(self.scale) + points.new_tensor(self.offset)

    def to_original(self, points: Tensor) -> Tensor:
        """Canvas pixels ``(..., 2)`` → original pixels."""
        return (points - points.new_tensor(self.offset)) / points.new_tensor(self.scale)

    def normalise(self, points: Tensor) -> Tensor:
        """Original pixels ``(..., 2)`` → canvas fractions in [0, 1]."""
        return self.to_canvas(points) / points.new_tensor((self.canvas[1], self.canvas[0]))

    def denormalise(self, points: Tensor) -> Tensor:
        """Canvas fractions ``(..., 2)`` → original pixels."""
        return self.to_original(points * points.new_tensor((self.canvas[1], self.canvas[0])))

    @property
    def content(self) -> tuple[float, float, float, float]:
        """The canvas box ``(x1, y1, x2, y2)`` that the image fills; the rest is padding."""
        (height, width), (sx, sy), (ox, oy) = self.size, self.scale, self.offset
        return ox, oy, ox + width * sx, oy + height * sy


def box_area(boxes: Tensor) -> Tensor:
    """Areas ``(...)`` of boxes ``(..., 4)``; inverted boxes count as empty."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def box_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise intersection areas ``(N, M)`` of boxes ``(N, 4)`` and ``(M, 4)``."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise IoU ``(N, M)`` in [0, 1]; two empty boxes have IoU 0."""
    inter = box_intersection(a, b)
    union = box_area(a)[:, None] + box_area(b)[None, :] - inter
    return torch.where(union > 0, inter / union.clamp(min=torch.finfo(union.dtype).tiny), torch.zeros_like(union))


def box_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices ``(K,)`` of the kept boxes, best score first.

    ``boxes (N, 4)``, ``scores (N,)``; a box goes when its IoU with a better kept one exceeds ``threshold``.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = (box_iou(boxes[order], boxes[order]) > threshold).cpu().numpy()
    alive = np.ones(len(order), dtype=bool)
    for i in range(len(order)):
        if alive[i]:
            alive[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[torch.from_numpy(alive).to(order.device)]


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Boxes ``(..., 4)`` cut to an image of ``size``."""
    height, width = size
    limit = boxes.new_tensor((width, height, width, height))
    return torch.minimum(boxes.clamp(min=0), limit)


def check_box(box: Tensor | tuple[float, ...] | list[float], size: Size) -> tuple[float, float, float, float]:
    """The box cut to the image, or ``InvalidPrompt`` when it is malformed, empty, or outside."""
    values = torch.as_tensor(box, dtype=torch.float64).flatten()
    if values.numel() != 4 or not bool(torch.isfinite(values).all()):
        raise InvalidPrompt("A box is four finite numbers x1 y1 x2 y2", got=list(map(float, values)))
    x1, y1, x2, y2 = clip_boxes(values, size).tolist()
    if x2 - x1 < 1 or y2 - y1 < 1:
        raise InvalidPrompt(
            "A box must cover at least one pixel of the image",
            got=f"{[round(float(v), 1) for v in values]} on an image of {size[1]}×{size[0]} (width×height)",
            remedy="Boxes are x1 y1 x2 y2 in pixels, with x2 > x1 and y2 > y1.",
        )
    return x1, y1, x2, y2


def check_points(points: Tensor, size: Size) -> Tensor:
    """Float points ``(P, 2)`` unchanged, or ``InvalidPrompt`` when malformed or outside the image."""
    if points.ndim != 2 or points.shape[-1] != 2 or not bool(torch.isfinite(points).all()):
        raise InvalidPrompt(
            "Points are a finite array of shape (P, 2), each (x, y)", got=f"shape {tuple(points.shape)}"
        )
    limit = points.new_tensor((size[1], size[0]))
    outside = ((points < 0) | (points > limit)).any(-1)
    if bool(outside.any()):
        first = [round(v, 1) for v in points[outside][0].tolist()]
        raise InvalidPrompt(
            "Points must lie inside the image",
            got=f"{first} on an image of {size[1]}×{size[0]} (width×height)",
            remedy="Points are (x, y) in pixels of the original image.",
        )
    return points


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight half-open boxes ``(R, 4)`` float32 of boolean masks ``(R, H, W)``; zeros for an empty mask."""
    rows, cols = masks.any(-1), masks.any(-2)

    def extent(line: Tensor) -> tuple[Tensor, Tensor]:
        length = line.shape[-1]
        first = line.float().argmax(-1)
        last = length - line.flip(-1).float().argmax(-1)
        return first, last

    (y1, y2), (x1, x2) = extent(rows), extent(cols)
    boxes = torch.stack([x1, y1, x2, y2], -1).float()
    return boxes * rows.any(-1, keepdim=True)


@dataclass(frozen=True)
class RunLengthMask:
    """A boolean mask ``size (H, W)`` as run lengths over row-major pixels, starting with a run of background."""

    size: Size
    runs: tuple[int, ...]

    @classmethod
    def encode(cls, mask: Tensor | np.ndarray) -> RunLengthMask:
        """From a mask ``(H, W)``."""
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        flat = np.concatenate([[False], array.astype(bool).ravel(), [False]])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        runs = np.diff(np.concatenate([[0], edges, [array.size]]))
        return cls((int(array.shape[0]), int(array.shape[1])), tuple(int(r) for r in runs))

    def decode(self) -> Tensor:
        """To a boolean tensor ``(H, W)``."""
        values = np.arange(len(self.runs)) % 2 == 1
        return torch.from_numpy(np.repeat(values, self.runs).reshape(self.size))

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return int(sum(self.runs[1::2]))
