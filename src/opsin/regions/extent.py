"""How far a region reaches: masks and boxes from superpixels, else from the attention of its prompts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidPrompt, check_compat
from opsin.geometry import ImageTransform, RunLengthMask, mask_boxes
from opsin.images import unfit
from opsin.regions.aggregate import Groups
from opsin.regions.encoder import RegionEncoder, RegionMemory


def region_labels(superpixels: Tensor, groups: Groups, transform: ImageTransform) -> np.ndarray:
    """Region of every original pixel, ``(H, W)`` int64, -1 for none; prompt ``i`` stands for superpixel ``i``."""
    canvas = groups.labels.cpu()[superpixels]
    # Labels are looked up one by one: float32 holds them exactly, and nearest never mixes two.
    return unfit(canvas[None].float(), transform, nearest=True)[0].round().long().numpy()


def label_boxes(labels: np.ndarray, count: int) -> Tensor:
    """Tight boxes ``(count, 4)`` of the regions of a label map; a region without a pixel gets zeros."""
    from scipy.ndimage import find_objects

    found = find_objects(labels + 1, max_label=count)
    rows = [(0, 0, 0, 0) if f is None else (f[1].start, f[0].start, f[1].stop, f[0].stop) for f in found]
    return torch.tensor(rows, dtype=torch.float32).reshape(count, 4)


def label_run_lengths(labels: np.ndarray, count: int) -> tuple[RunLengthMask, ...]:
    """One run-length mask per region of a label map ``(H, W)``, from a single pass over its runs."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    ends = np.append(starts[1:], flat.size)
    owner = flat[starts]
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(count + 1))
    masks = []
    for low, high in pairwise(bounds):
        mine = order[low:high]
        edges = np.stack([starts[mine], ends[mine]], -1).ravel()
        runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
        masks.append(RunLengthMask((int(labels.shape[0]), int(labels.shape[1])), tuple(runs.tolist())))
    return tuple(masks)


def attention_maps(
    encoder: RegionEncoder, memory: RegionMemory, points: Tensor, groups: Groups, chunk: int = 256
) -> Tensor:
    """Where each region looks, ``(R, h, w)``, maximum 1: last layer's attention, mean over heads and members."""
    maps = []
    for part in points.split(chunk, dim=1):
        logits = encoder.attention(memory, part)[0]
        maps.append(logits.float().softmax(-1).mean(0))
    region = groups.mean(torch.cat(maps) if maps else points.new_zeros((0, memory.grid[0] * memory.grid[1])))
    return (region / region.amax(-1, keepdim=True).clamp(min=1e-12)).unflatten(-1, memory.grid)


def attention_extent(
    maps: Tensor, transform: ImageTransform, *, level: float = 0.5, with_masks: bool = False
) -> tuple[Tensor, tuple[RunLengthMask, ...] | None]:
    """Boxes ``(R, 4)`` in original pixels, and masks on request, of where ``maps (R, h, w)`` reach ``level``."""
    if with_masks:
        masks = [(unfit(m[None].float(), transform)[0] >= level) for m in maps.cpu()]
        boxes = mask_boxes(torch.stack(masks)) if masks else torch.zeros((0, 4))
        return boxes, tuple(RunLengthMask.encode(m) for m in masks)
    cells = mask_boxes(maps >= level)
    step = cells.new_tensor((maps.shape[2], maps.shape[1])).repeat(2)
    corners = transform.denormalise((cells / step).reshape(-1, 2, 2))
    limit = corners.new_tensor((transform.size[1], transform.size[0]))
    return torch.minimum(corners.clamp(min=0), limit).reshape(-1, 4), None


def mask_weights(
    masks: Tensor, transform: ImageTransform, grid: tuple[int, int], *, compat: str | None = None
) -> Tensor:
    """How much of each patch lies in each region: ``masks (R, H, W)`` in original pixels → ``(R, h·w)`` in [0, 1].

    By default the covered share of the patch. ``compat="published"`` takes the mask's value at the top-left pixel of
    the patch, and needs masks at the size of the canvas.
    """
    if check_compat(compat):
        if tuple(masks.shape[1:]) != transform.canvas:
            raise InvalidPrompt(
                "The published rule needs masks of the canvas size",
                got=tuple(masks.shape[1:]),
                remedy=f"{transform.canvas}",
            )
        return F.interpolate(masks[:, None].float(), size=grid, mode="nearest")[:, 0].flatten(1)
    x1, y1, x2, y2 = (round(v) for v in transform.content)
    inner = F.interpolate(masks[:, None].float(), size=(max(1, y2 - y1), max(1, x2 - x1)), mode="area")
    height, width = transform.canvas
    canvas = F.pad(inner, (x1, width - x2, y1, height - y2))
    return F.adaptive_avg_pool2d(canvas, grid)[:, 0].flatten(1)
