"""RADSeg+: the connected regions of a segmentation become prompts of SAM's decoder, whose masks have sharper edges.

RADSeg (arXiv 2511.19704), after Trident (arXiv 2411.09219). Every region asks with its box, its most probable point
and the probability map of its class; masks that SAM itself doubts are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from opsin.errors import InputError, check_compat
from opsin.geometry import Size
from opsin.segmentation.prediction import UNKNOWN
from opsin.segmentation.sam import FRAME, LOW_RESOLUTION, PATCH, Compat, SamDecoder

_TOGETHER = 256  # regions whose masks, at low resolution, are alive at a time
_HALF = 4  # pixels in one pixel of half resolution, the unit of `min_area`


class ClassMaps:
    """Probabilities ``(C, h, w)``, each class enlarged to ``size (H, W)`` when it is asked for by its index.

    For :func:`refine` in little memory: the tensor ``(C, H, W)`` of 150 classes at 2048×1024 has 1.2 GB.
    """

    def __init__(self, grid: Tensor, size: Size) -> None:
        self.grid, self.size = grid, size

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, index: int) -> Tensor:
        return _resized(self.grid[index], self.size)


@dataclass(frozen=True, eq=False)
class Regions:
    """``K`` connected regions of a coarse segmentation, by class, and the prompts made of them.

    ``classes (K,)``; ``areas (K,)`` in pixels of the grid ``size (h, w)`` that they were found on; ``points (K, 2)``
    and ``boxes (K, 4)`` half-open, continuous coordinates of SAM's 1024 frame; ``masks (M, 1, 256, 256)`` mask prompts
    of the classes that have regions, ``mask_index (K,)`` the one of each region; ``places``: rows and columns of each
    region on the grid, and ``shapes``: which pixels there are inside.
    """

    classes: Tensor
    areas: Tensor
    points: Tensor
    boxes: Tensor
    masks: Tensor
    mask_index: Tensor
    places: tuple[tuple[slice, slice], ...]
    shapes: tuple[np.ndarray, ...]
    size: Size

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True, eq=False)
class Refinement:
    """A refined segmentation.

    ``labels (H, W)``; ``scores (H, W)``: probability of the coarse label where it was kept (0 where unknown), else the
    product of the class's probability and the mask's; ``refined (H, W)`` bool: pixels that SAM decided; ``regions``,
    the IoU ``iou (K,)`` that SAM predicts of their masks, and ``accepted (K,)`` bool.
    """

    labels: Tensor
    scores: Tensor
    refined: Tensor
    regions: Regions
    iou: Tensor
    accepted: Tensor


def frame(size: Size, *, compat: Compat = None) -> Size:
    """The size ``(H, W)`` at which an image of ``size`` is fed, to lie at the top left of SAM's 1024 frame.

    SAM scales the longest side to 1024 and rounds the other to a pixel; RADIO needs multiples of 16. So the other side
    is rounded to the nearest multiple of 16, at least 16, and each axis gets its own scale, fed / original: the image
    is stretched by at most 8 pixels of the frame, and prompts and masks lie exactly where it lies.
    ``compat="published"`` rounds down (300×437: 688 rows), while its prompts follow SAM's rule (705 rows for the half
    resolution they are made at) and so lie up to 17 pixels off.
    """
    check_compat(compat)
    if min(size) < 1:
        raise InputError("An image has at least one pixel", got=f"{size[0]}×{size[1]}")
    longest = max(size)
    rounded = int if compat == "published" else round
    height, width = (max(1, rounded(side * (FRAME // PATCH) / longest)) * PATCH for side in size)
    return height, width


@torch.no_grad()
def refine(
    labels: Tensor,
    probabilities: Tensor | ClassMaps,
    embedding: Tensor,
    decoder: SamDecoder,
    *,
    fed: Size | None = None,
    coarse_threshold: float = 0.10,
    min_area: int = 225,
    mask_coefficient: float = 0.005,
    iou: float = 0.9,
    batch_size: int = 4,
    compat: Compat = None,
    out: Tensor | None = None,
) -> Refinement:
    """Let SAM redraw the regions of one segmented image.

    A pixel gets the class whose accepted masks give it the highest score, mask probability × class probability. It
    keeps its coarse label where there is no mask, in regions whose mask was not accepted, and where it is unknown.
    The decoder sees all regions of the image together, in micro-batches, and masks are reduced class by class as they
    come: memory does not grow with their number.

    Args:
        labels: ``(H, W)`` integers, the most probable class of each pixel; -1 (unknown) stays as it is.
        probabilities: ``(C, H, W)`` in [0, 1], or :class:`ClassMaps` for less memory.
        embedding: ``(1, dim, 64, 64)`` of the image, from :meth:`SamDecoder.embed`.
        decoder: from :func:`opsin.segmentation.sam.load`.
        fed: ``(H, W)`` at which the image was fed; by default :func:`frame` of the size of ``labels``.
        coarse_threshold: less probable pixels belong to no region; 0 takes all.
        min_area: smallest region, in pixels of half resolution (225: 30×30 pixels of the image).
        mask_coefficient: probabilities × this are the logits of the mask prompt.
        iou: accept a mask whose predicted IoU is above this.
        batch_size: regions at a time in the decoder; halved when memory runs out.
        compat: ``"published"``: regions on a grid of half resolution; prompts placed by SAM's rule, whatever the fed
            size, at the one most probable pixel; mask prompts as in :meth:`SamDecoder.decode`; in regions whose mask
            was not accepted the coarse probabilities count among the scores, but other masks still take the pixels.
        out: ``(C, H, W)``, receives the scores of all classes: probabilities where the coarse label was kept, under
            ``compat`` 0 there except in regions that were not accepted, or the probabilities when none was accepted.

    Raises:
        InputError: shapes that do not belong together.  InvalidConfig: another ``compat``.
    """
    size = _check(labels, probabilities, out, compat)
    labels = labels.long()
    fed = fed or frame(size, compat=compat)
    regions = find_regions(
        labels, probabilities, fed, coarse_threshold=coarse_threshold, min_area=min_area,
        mask_coefficient=mask_coefficient, compat=compat,
    )  # fmt: skip
    predicted = torch.zeros(len(regions), dtype=torch.float64)
    best = torch.zeros_like(probabilities[0])
    winner = labels
    if out is not None:
        out.zero_()

    def masks() -> Iterator[tuple[int, Tensor]]:
        for rows in torch.arange(len(regions)).split(_TOGETHER):
            logits, quality = decoder.decode(
                embedding, regions.points[rows], regions.boxes[rows], regions.masks,
                mask_index=regions.mask_index[rows], batch_size=batch_size, compat=compat,
            )  # fmt: skip
            predicted[rows] = quality.to(predicted)
            for row, mask in zip(rows.tolist(), logits, strict=True):
                if predicted[row] > iou:
                    yield int(regions.classes[row]), _at_size(mask.to(best), fed, size)

    for index, group in groupby(masks(), key=itemgetter(0)):
        # the best mask of a class has the highest logit: its probabilities do not differ between regions
        logits = reduce(torch.maximum, (mask for _, mask in group))
        score = logits.sigmoid() * probabilities[index] * (logits > 0)
        winner = torch.where(score > best, index, winner)
        best = torch.maximum(best, score)
        if out is not None:
            out[index] = score
    accepted = predicted > iou
    doubted = _cover(regions, (~accepted).tolist(), size).to(best.device)
    kept = (best <= 0) | (labels == UNKNOWN)
    whole = compat is None or not accepted.any()  # regions that were not accepted stay as they are
    if whole:
        kept |= doubted
        scores = torch.where(kept, _own(labels, probabilities), best)
    else:
        scores = torch.maximum(best, _own(labels, probabilities) * doubted)
    if out is not None:
        for index, plane in enumerate(out):
            p = probabilities[index]
            plane.copy_(torch.where(kept, p, plane) if whole else torch.maximum(p * doubted, plane))
    return Refinement(torch.where(kept, labels, winner), scores, ~kept, regions, predicted, accepted)


def find_regions(
    labels: Tensor,
    probabilities: Tensor | ClassMaps,
    fed: Size,
    *,
    coarse_threshold: float = 0.10,
    min_area: int = 225,
    mask_coefficient: float = 0.005,
    compat: Compat = None,
) -> Regions:
    """The 8-connected regions of each class and the prompts made of them; arguments as for :func:`refine`."""
    published = compat == "published"
    size = _check(labels, probabilities, None, compat)
    grid = _half_labels(labels, probabilities, coarse_threshold) if published else labels.long().cpu().numpy()
    h, w = grid.shape
    smallest = min_area if published else min_area * _HALF
    classes: list[int] = []
    areas: list[int] = []
    points: list[tuple[int, int]] = []
    boxes: list[tuple[int, int, int, int]] = []
    prompts: list[Tensor] = []
    rows: list[int] = []
    places: list[tuple[slice, slice]] = []
    shapes: list[np.ndarray] = []
    for index, place in enumerate(ndimage.find_objects(np.maximum(grid + 1, 0))):
        if place is None:
            continue
        p = _resized(probabilities[index], (h, w))
        if published and p.max() < coarse_threshold:
            continue
        values = p[place].cpu().numpy()
        inside = grid[place] == index
        if not published:
            inside &= values >= coarse_threshold
        numbers, count = ndimage.label(inside, np.ones((3, 3)))
        sizes = np.bincount(numbers.ravel(), minlength=count + 1)
        for number, (dy, dx) in enumerate(ndimage.find_objects(numbers), 1):
            if sizes[number] < smallest:
                continue
            shape = numbers[dy, dx] == number
            y, x = _best_point(np.where(shape, values[dy, dx], -1), compat)
            top, left = place[0].start + dy.start, place[1].start + dx.start
            bottom, right = top + shape.shape[0], left + shape.shape[1]
            classes.append(index)
            areas.append(int(sizes[number]))
            points.append((left + x, top + y))
            boxes.append((left, top, right, bottom))
            rows.append(len(prompts))
            places.append((slice(top, bottom), slice(left, right)))
            shapes.append(shape)
        if classes and classes[-1] == index:
            prompts.append(_mask_prompt(p, size, fed, coarse_threshold, mask_coefficient, compat))
    xy = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    if published:  # numbers of the first and last pixels are scaled, and the results taken for numbers of pixels again
        scale = torch.tensor([_sam_side(w, (h, w), FRAME) / w, _sam_side(h, (h, w), FRAME) / h], dtype=torch.float64)
        xy, corners = xy * scale + 0.5, (corners - corners.new_tensor([0, 0, 1, 1])) * scale.repeat(2) + 0.5
    else:
        scale = torch.tensor([fed[1] / w, fed[0] / h], dtype=torch.float64)
        xy, corners = (xy + 0.5) * scale, corners * scale.repeat(2)
    side = (LOW_RESOLUTION, LOW_RESOLUTION)
    return Regions(
        torch.tensor(classes, dtype=torch.int64), torch.tensor(areas, dtype=torch.int64), xy, corners,
        torch.stack(prompts) if prompts else probabilities[0].new_zeros(0, 1, *side),
        torch.tensor(rows, dtype=torch.int64), tuple(places), tuple(shapes), (h, w),
    )  # fmt: skip


def _half_labels(labels: Tensor, probabilities: Tensor | ClassMaps, threshold: float) -> np.ndarray:
    """Labels at half resolution, -1 where no class is certain enough."""
    size = max(1, labels.shape[0] // 2), max(1, labels.shape[1] // 2)
    grid = F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].long()
    if threshold > 0:
        most = reduce(torch.maximum, (_resized(probabilities[i], size) for i in range(len(probabilities))))
        grid = torch.where(most < threshold, UNKNOWN, grid)
    return grid.cpu().numpy()


def _best_point(values: np.ndarray, compat: Compat) -> tuple[int, int]:
    """Row and column of the point that prompts a region, from its probabilities; they are below 0 outside.

    That is the highest, as published. Softmax saturates, and then rounding decides which of a thousand pixels is: so
    by default it is the middle (the deepest pixel) of all that are within 1 % of the highest.
    """
    if compat is None:
        nearly = np.pad(values >= 0.99 * values.max(), 1)
        values = ndimage.distance_transform_cdt(nearly)[1:-1, 1:-1]
    row, column = np.unravel_index(values.argmax(), values.shape)
    return int(row), int(column)


def _mask_prompt(p: Tensor, size: Size, fed: Size, threshold: float, coefficient: float, compat: Compat) -> Tensor:
    """``(1, 256, 256)`` the probabilities of a class, where above the threshold, as weak logits."""
    if compat == "published":
        low = _sam_side(size[0], size, LOW_RESOLUTION), _sam_side(size[1], size, LOW_RESOLUTION)
        p = _resized(p, low)
    else:
        low = fed[0] * LOW_RESOLUTION // FRAME, fed[1] * LOW_RESOLUTION // FRAME
        p = F.interpolate(p[None, None], low, mode="bilinear", antialias=True)[0, 0]
    p = torch.where(p > threshold, p * coefficient, 0)
    return F.pad(p, (0, LOW_RESOLUTION - low[1], 0, LOW_RESOLUTION - low[0]))[None]


def _sam_side(side: int, size: Size, longest: int) -> int:
    """What SAM's own resizing makes of one side of an image whose longest side becomes ``longest``."""
    return int(side * longest / max(size) + 0.5)


def _resized(plane: Tensor, size: Size) -> Tensor:
    return plane if plane.shape == size else F.interpolate(plane[None, None], size, mode="bilinear")[0, 0]


def _at_size(logits: Tensor, fed: Size, size: Size) -> Tensor:
    """Logits ``(256, 256)`` of the frame at the pixels ``(H, W)`` of the image."""
    return _resized(_resized(logits, (FRAME, FRAME))[: fed[0], : fed[1]], size)


def _cover(regions: Regions, chosen: list[bool], size: Size) -> Tensor:
    """``(H, W)`` bool: pixels of the chosen regions."""
    covered = np.zeros(regions.size, bool)
    for place, shape, wanted in zip(regions.places, regions.shapes, chosen, strict=True):
        if wanted:
            covered[place] |= shape
    plane = torch.from_numpy(covered)
    if regions.size == size:
        return plane
    return F.interpolate(plane[None, None].float(), size, mode="nearest")[0, 0] > 0


def _own(labels: Tensor, probabilities: Tensor | ClassMaps) -> Tensor:
    """``(H, W)`` the probability of the label of each pixel, 0 where unknown."""
    own = torch.zeros_like(probabilities[0])
    for index in torch.bincount(labels.flatten() + 1)[1:].nonzero().flatten().tolist():
        own = torch.where(labels == index, probabilities[index], own)
    return own


def _check(labels: Tensor, probabilities: Tensor | ClassMaps, out: Tensor | None, compat: Compat) -> Size:
    check_compat(compat)
    size, count = tuple(labels.shape), len(probabilities)
    plane = tuple(probabilities[0].shape) if count else ()
    if len(size) != 2 or 0 in size or plane != size:
        got = f"labels {size}, {count} maps {plane}"
        raise InputError("Labels (H, W) come with probabilities (C, H, W), none of them 0", got=got)
    if labels.is_floating_point() or int(labels.min()) < UNKNOWN or int(labels.max()) >= count:
        got = f"{labels.dtype}, from {labels.min()} to {labels.max()}"
        raise InputError(f"Labels are {UNKNOWN} or the number of a class, below {count}", got=got)
    if probabilities[0].dtype not in (torch.float32, torch.float64):
        raise InputError("Probabilities are float32 or float64", got=probabilities[0].dtype)
    if out is not None and tuple(out.shape) != (count, *size):
        raise InputError("out has the shape of the probabilities", got=tuple(out.shape))
    return int(size[0]), int(size[1])
