"""What an image is asked: prompts on its canvas, and what is known of their regions before any token is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from opsin.errors import InvalidConfig, InvalidPrompt
from opsin.geometry import ImageTransform, RunLengthMask, Size, check_box, check_points, mask_boxes
from opsin.images import resize
from opsin.regions import prompts
from opsin.regions.aggregate import Groups
from opsin.regions.extent import mask_weights

Prompts = Literal["slic", "grid"]


@dataclass(frozen=True, eq=False)
class Asked:
    """The prompts of one image: canvas fractions ``points (P, 2)`` and ``original`` pixels ``(P, 2)``.

    ``owners`` groups prompts that were given together; ``superpixels (h, w)`` with their own transform where prompt
    ``i`` stands for superpixel ``i``; ``boxes (K, 4)`` and ``masks`` of regions that were given as such.
    """

    points: Tensor
    original: Tensor
    owners: Groups | None = None
    superpixels: Tensor | None = None
    superpixel_transform: ImageTransform | None = None
    boxes: Tensor | None = None
    masks: tuple[RunLengthMask, ...] | None = None
    weights: Tensor | None = None


def one_each(count: int, device: torch.device | None = None) -> Groups:
    """Every prompt a region of its own."""
    return Groups(torch.arange(count, device=device), torch.ones(count, dtype=torch.long, device=device))


def own_prompts(kind: str, given: Any, transform: ImageTransform, grid: Size) -> Asked:
    """Prompts from a user's ``points (P, 2)``, ``boxes (K, 4)`` or ``masks (K, H, W)``, in original pixels."""
    if kind == "points":
        original = check_points(torch.as_tensor(given, dtype=torch.float32).reshape(-1, 2), transform.size)
        return Asked(transform.normalise(original), original, one_each(len(original)))
    if kind == "boxes":
        rows = torch.as_tensor(given, dtype=torch.float32).reshape(-1, 4)
        boxes = torch.tensor([check_box(row, transform.size) for row in rows]).reshape(-1, 4)
        inside = prompts.box_prompts(boxes)
        return _grouped(list(inside), transform, boxes)
    masks = torch.as_tensor(given).bool()
    if masks.ndim != 3 or tuple(masks.shape[1:]) != transform.size:
        raise InvalidPrompt(f"Masks have shape (K, {transform.size[0]}, {transform.size[1]})", got=tuple(masks.shape))
    encoded = tuple(RunLengthMask.encode(m) for m in masks)
    asked = _grouped([prompts.mask_prompts(m) for m in masks], transform, mask_boxes(masks), encoded)
    if asked.owners is None:
        return asked
    return replace(asked, weights=mask_weights(masks, transform, grid)[asked.owners.labels])


def _grouped(
    inside: list[Tensor], transform: ImageTransform, boxes: Tensor, masks: tuple[RunLengthMask, ...] | None = None
) -> Asked:
    counts = torch.tensor([len(points) for points in inside], dtype=torch.long)
    original = torch.cat(inside) if inside else torch.zeros((0, 2))
    owners = Groups(torch.arange(len(inside)).repeat_interleave(counts), counts)
    return Asked(transform.normalise(original), original, owners, boxes=boxes, masks=masks)


def spread_prompts(kind: Prompts, picture: Tensor | None, transform: ImageTransform, count: int) -> Asked:
    """Prompts over the whole image: a grid of ``count`` per side, or about ``count²`` superpixels of ``picture``."""
    if kind not in ("slic", "grid"):
        raise InvalidConfig('prompts is "slic" or "grid"', got=kind)
    x1, y1, x2, y2 = transform.content
    inner: Size = (max(1, round(y2 - y1)), max(1, round(x2 - x1)))
    offset = torch.tensor(transform.offset)
    canvas = torch.tensor((transform.canvas[1], transform.canvas[0]), dtype=torch.float32)
    if kind == "grid":
        points = prompts.grid_points(inner, count) + offset
        return Asked(points / canvas, transform.to_original(points))
    if picture is None:
        raise InvalidPrompt("Superpixels need the pictures", remedy='Pass pictures, or prompts="grid".')
    share = inner[0] * inner[1] / float(canvas.prod())
    found = prompts.slic(resize(picture, inner), round(count**2 * share))
    points = found.points + offset
    own = ImageTransform(transform.size, inner, (inner[1] / transform.size[1], inner[0] / transform.size[0]))
    return Asked(points / canvas, transform.to_original(points), None, found.labels, own)
