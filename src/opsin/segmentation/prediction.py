"""From unit vectors on a grid and vectors of phrases to a label for every pixel. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.errors import InvalidConfig, UnsupportedSize, check_compat
from opsin.geometry import Size
from opsin.segmentation.vocabulary import reduce_synonyms

_BAND_BYTES = 16 << 20  # of probabilities at full size that are alive at a time
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Prediction:
    """``labels (H, W)`` int64, -1 unknown; ``scores (H, W)`` probability of the label; ``kept (C,)`` bool: classes
    that denoising left in."""

    labels: Tensor
    scores: Tensor
    kept: Tensor


def class_probabilities(words: Tensor, text: Tensor, index: Tensor, classes: int, scale: float) -> Tensor:
    """Probabilities ``(C, h, w)`` at the locations of the grid: a softmax over classes of ``scale · cosine``.

    Args:
        words: ``(E, h, w)`` image features in the space of the words, of unit length.
        text: ``(S, E)`` one vector per phrase, of any length.
        index: ``(S,)`` the class of every phrase; a class is as near as its nearest phrase.
        classes: ``C``.
        scale: inverse temperature.
    """
    cosine = F.normalize(text, dim=1).to(words) @ words.flatten(1)
    cosine = reduce_synonyms(cosine, index, classes)
    return (cosine * scale).softmax(0).view(classes, *words.shape[1:])


def bands(grid: Tensor, size: Size) -> Iterator[tuple[slice, Tensor]]:
    """``(C, h, w)`` enlarged to ``size (H, W)``, bilinear (``align_corners=False``), some rows at a time."""
    count, h, _ = grid.shape
    height, width = size
    rows = max(1, _BAND_BYTES // max(1, count * width * grid.element_size()))
    y = ((torch.arange(height, device=grid.device, dtype=grid.dtype) + 0.5) * (h / height) - 0.5).clamp(min=0)
    above = y.long().clamp(max=h - 1)
    below, part = (above + 1).clamp(max=h - 1), (y - above)[:, None]
    for start in range(0, height, rows):
        band = slice(start, min(start + rows, height))
        lines = torch.lerp(grid[:, above[band]], grid[:, below[band]], part[band])
        yield band, F.interpolate(lines[None], size=(lines.shape[1], width), mode="bilinear")[0]


def maxima(grid: Tensor, size: Size) -> Tensor:
    """The largest value ``(C,)`` of every channel at ``size``."""
    best = grid.new_full((len(grid),), -torch.inf)
    for _, band in bands(grid, size):
        best = torch.maximum(best, band.flatten(1).amax(1))
    return best


def present(grid: Tensor, size: Size, denoise: float) -> Tensor:
    """``(C,)`` bool: classes whose probability reaches ``denoise`` at one pixel or more of the enlarged map.

    Interpolation never exceeds what it interpolates, so classes too weak on the grid are not enlarged at all.
    """
    kept = grid.flatten(1).amax(1) >= denoise
    if denoise > 0 and kept.any():
        kept[kept.clone()] = maxima(grid[kept], size) >= denoise
    return kept


def decide(
    grid: Tensor,
    size: Size,
    *,
    denoise: float = 0.0,
    threshold: float = 0.0,
    compat: Literal["published"] | None = None,
) -> Prediction:
    """The most probable class of every pixel.

    Args:
        grid: ``(C, h, w)`` probabilities.
        size: ``(H, W)`` of the result.
        denoise: a class that reaches this probability at no pixel is left out everywhere.
        threshold: a pixel whose best class is less probable than this is unknown.
        compat: where no class is left all pixels are unknown; ``"published"`` calls them the first class.
    """
    published = check_compat(compat)
    kept = present(grid, size, denoise)
    labels = torch.full(size, UNKNOWN, dtype=torch.long, device=grid.device)
    scores = grid.new_zeros(size)
    if kept.any():
        names = kept.nonzero()[:, 0]
        for band, values in bands(grid[kept], size):
            best, which = values.max(0)
            labels[band], scores[band] = names[which], best
    elif published:
        labels.zero_()
    if threshold > 0:
        labels[scores < threshold] = UNKNOWN
    return Prediction(labels, scores, kept)


def enlarge(grid: Tensor, size: Size, kept: Tensor | None = None) -> Tensor:
    """All of ``(C, H, W)`` at once, zero for the classes that are not ``kept``: C·H·W numbers, so mind the memory."""
    full = grid.new_zeros((len(grid), *size))
    chosen = torch.ones(len(grid), dtype=torch.bool, device=grid.device) if kept is None else kept
    if chosen.any():
        for band, values in bands(grid[chosen], size):
            full[chosen, band] = values
    return full


def check_options(
    *, size: Size | None = None, denoise: float | None = None, threshold: float = 0.0, coarse_threshold: float = 0.0,
    min_area: int = 0, iou_threshold: float = 0.0, compat: Literal["published"] | None = None,
) -> None:  # fmt: skip
    """Options of a question, each in its range: ``InvalidConfig`` or ``UnsupportedSize`` where one is not."""
    check_compat(compat)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UnsupportedSize("The result is (H, W), at least one pixel", got=size)
    for name, value in (("denoise", denoise), ("threshold", threshold), ("coarse_threshold", coarse_threshold)):
        if value is not None and not 0 <= value <= 1:
            raise InvalidConfig(f"{name} is a probability in [0, 1]", got=value)
    if not iou_threshold <= 1:
        raise InvalidConfig("iou_threshold is at most 1", got=iou_threshold)
    if not min_area >= 0:
        raise InvalidConfig("min_area is a number of pixels, not below 0", got=min_area)
