"""Where to ask: point prompts from a grid, from superpixels, or inside the boxes and masks that a user gives.

Points here are canvas pixels ``(x, y)``, pixel centres at +0.5, unless a docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.errors import InvalidConfig, InvalidPrompt, MissingExtra
from opsin.geometry import Size


@dataclass(frozen=True, eq=False)
class Superpixels:
    """A partition of an image: ``labels (H, W)`` int64 from 0, and ``points (S, 2)``, one inside each superpixel."""

    labels: Tensor
    points: Tensor


def grid_points(size: Size, count: int | Size) -> Tensor:
    """``count × count`` evenly spaced prompts ``(P, 2)``, row-major, one pixel away from the border.

    Integer positions, as the published grid (linspace from 1 to size - 2, truncated), at their pixel centres.
    """
    rows, cols = (count, count) if isinstance(count, int) else count
    if rows < 1 or cols < 1:
        raise InvalidConfig("A prompt grid has at least one row and one column", got=f"{rows}×{cols}")
    ys = np.linspace(min(1, size[0] - 1), max(size[0] - 2, 0), rows).astype(np.int64)
    xs = np.linspace(min(1, size[1] - 1), max(size[1] - 2, 0), cols).astype(np.int64)
    x, y = np.meshgrid(xs, ys)
    return torch.from_numpy(np.stack([x, y], -1).reshape(-1, 2) + 0.5).float()


def superpixel_points(labels: np.ndarray, pad_to: int | None = None) -> np.ndarray:
    """One pixel ``(S, 2)`` int64 ``(row, col)`` inside each label ``0 … max`` of ``labels (H, W)``.

    The centre of mass, rounded half to even; where that pixel belongs to a neighbour, the middle one of the label's
    own pixels. ``pad_to`` repeats the last point up to that many, as the published code does to make batches.
    """
    height, width = labels.shape
    flat = labels.ravel().astype(np.int64)
    count = np.bincount(flat)
    rows, cols = np.divmod(np.arange(flat.size), width)
    with np.errstate(invalid="ignore"):
        centre = np.stack([np.bincount(flat, rows), np.bincount(flat, cols)], -1) / count[:, None]
    present = count > 0
    points = np.round(centre[present]).astype(np.int64).clip(0, (height - 1, width - 1))
    order = np.argsort(flat, kind="stable")
    middle = order[(np.cumsum(count) - count + count // 2)[present]]
    outside = labels[points[:, 0], points[:, 1]] != np.flatnonzero(present)
    points[outside] = np.stack([rows[middle], cols[middle]], -1)[outside]
    if pad_to is not None and len(points) < pad_to:
        points = np.concatenate([points, np.repeat(points[-1:], pad_to - len(points), 0)])
    return points


def slic(image: Tensor, count: int, *, compactness: float = 10.0) -> Superpixels:
    """About ``count`` superpixels of ``image (3, H, W)`` in [0, 1], by scikit-image's SLIC (deterministic)."""
    try:
        from skimage.segmentation import slic as skimage_slic
    except ImportError as error:
        raise MissingExtra.of("scikit-image", "regions", 'find superpixels (prompts="grid" does without)') from error
    pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
    if min(pixels.shape[:2]) < 2:  # nothing to partition, and SLIC refuses it
        found = np.zeros(pixels.shape[:2], dtype=np.int64)
    else:
        found = skimage_slic(pixels, n_segments=max(1, count), compactness=compactness, start_label=0, channel_axis=-1)
    labels = np.unique(found, return_inverse=True)[1].reshape(found.shape)
    points = superpixel_points(labels)[:, ::-1] + 0.5
    return Superpixels(torch.from_numpy(labels), torch.from_numpy(np.ascontiguousarray(points)).float())


def box_prompts(boxes: Tensor, side: int = 3) -> Tensor:
    """Points ``(K, side², 2)`` spread evenly over the central half of each box ``(K, 4)``, where the object is."""
    steps = torch.linspace(0.25, 0.75, side, dtype=boxes.dtype, device=boxes.device)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    fractions = torch.stack([x, y], -1).reshape(-1, 2)
    return boxes[:, None, :2] + fractions * (boxes[:, None, 2:] - boxes[:, None, :2])


def mask_prompts(mask: Tensor, most: int = 16) -> Tensor:
    """Up to ``most`` points ``(P, 2)`` inside a mask ``(H, W)``, spread evenly, far from its border first.

    The first is the pixel farthest from the border (the published query rule). ``InvalidPrompt`` for an empty mask.
    """
    from scipy.ndimage import distance_transform_edt

    array = mask.cpu().numpy().astype(bool)
    if not array.any():
        raise InvalidPrompt("A mask must cover at least one pixel of the image", got=f"an empty mask {array.shape}")
    depth = distance_transform_edt(np.pad(array, 1))[1:-1, 1:-1]
    spacing = max(1, int(np.sqrt(array.sum() / most)))
    chosen = [int(depth.argmax())]
    # One candidate per cell of a coarse lattice, its deepest pixel: an even spread that stays off the border.
    rows, cols = np.nonzero(array)
    cell = (rows // spacing) * (array.shape[1] // spacing + 1) + cols // spacing
    order = np.lexsort((-depth[rows, cols], cell))
    first = order[np.unique(cell[order], return_index=True)[1]]
    best = first[np.argsort(-depth[rows[first], cols[first]], kind="stable")][:most]
    chosen += [i for i in (rows[best] * array.shape[1] + cols[best]).tolist() if i != chosen[0]]
    flat = torch.tensor(chosen[:most])
    return torch.stack([flat % array.shape[1], flat // array.shape[1]], -1).float() + 0.5
