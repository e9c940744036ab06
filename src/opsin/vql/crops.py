"""Pictures looked at more closely: crops around a box, and tiles of a whole frame, enlarged to the frame's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig
from opsin.geometry import ImageTransform, Size, check_box

Box = Sequence[float] | Tensor
Window = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a picture: ``picture (3, H, W)`` float in [0, 1], as large as the whole; its ``window`` in whole pixels
    ``(x1, y1, x2, y2)``; ``transform`` from the pixels of the whole to those of the crop."""

    picture: Tensor
    window: Window
    transform: ImageTransform

    def to_crop(self, places: Tensor) -> Tensor:
        """Points ``(..., 2)`` or boxes ``(..., 4)`` of the whole → pixels of the crop, possibly outside of it."""
        return self.transform.to_canvas(places.unflatten(-1, (-1, 2))).flatten(-2)

    def cut(self, mask: Tensor) -> Tensor:
        """The part of a mask ``(H, W)`` of the whole that the crop shows, as large as the crop, by nearest pixel."""
        x1, y1, x2, y2 = self.window
        part = mask[None, None, y1:y2, x1:x2].float()
        return F.interpolate(part, self.transform.canvas, mode="nearest")[0, 0].bool()

    def to_whole(self, places: Tensor) -> Tensor:
        """Points ``(..., 2)`` or boxes ``(..., 4)`` of the crop → pixels of the whole."""
        return self.transform.to_original(places.unflatten(-1, (-1, 2))).flatten(-2)


def crop_around(picture: Tensor, box: Box, factor: float) -> Crop:
    """The part of ``picture (3, H, W)``, uint8 or float, that shows ``box`` (xyxy) ``factor`` times as large.

    It is centred on the box, moved inside the picture where it reaches beyond, and holds the box, which may make the
    magnification less than ``factor``; it has the picture's aspect. Both up to a pixel, as sides are rounded down.
    Enlarged bicubically (published: OpenCV's Lanczos; the geometry is the same).

    Raises:
        InvalidPrompt: a box that is malformed, empty, or outside the picture. InvalidConfig: a factor below 1.
    """
    return _cut(picture, crop_window(_size(picture), box, factor))


def zoom(
    picture: Tensor, box: Box, factors: Sequence[float], *, compat: Literal["published"] | None = None
) -> list[Crop]:
    """``crop_around`` at several magnifications. A window that is the same as another one, because the box allows no
    smaller one, comes once; ``compat="published"`` repeats it for every factor."""
    windows = [crop_window(_size(picture), box, factor) for factor in factors]
    return [_cut(picture, window) for window in (windows if compat == "published" else dict.fromkeys(windows))]


def sliding(
    picture: Tensor, factor: float, overlap: float = 0.0, *, compat: Literal["published"] | None = None
) -> list[Crop]:
    """Tiles of ``1 / factor`` of the sides of ``picture (3, H, W)``, row by row; factor 1 is the picture itself.

    Neighbours share at least ``overlap`` of their side where whole pixels allow it; the last ones end at the border.
    ``compat="published"``: fixed strides from the top left corner, which may leave the right and lower border out.
    """
    height, width = _size(picture)
    size = _tile((height, width), factor)
    starts = window_starts((height, width), factor, overlap, compat=compat)
    return [_cut(picture, (x, y, x + size[1], y + size[0])) for y, x in starts]


def views(
    picture: Tensor, factors: Sequence[float], overlap: float = 0.0, *, compat: Literal["published"] | None = None
) -> list[Crop]:
    """``sliding`` at several magnifications: with (1, 2) the frame and its quarters, five pictures."""
    return [crop for factor in factors for crop in sliding(picture, factor, overlap, compat=compat)]


def crop_window(size: Size, box: Box, factor: float) -> Window:
    """The window of :func:`crop_around` in a picture of ``size (H, W)``."""
    _check_factor(factor)
    height, width = size
    x1, y1, x2, y2 = check_box(list(box), size)
    # The order of operations is that of the published code: floors of quotients depend on it.
    factor = min(factor, width / (x2 - x1), height / (y2 - y1))
    crop_width, crop_height = max(1, int(width // factor)), max(1, int(height // factor))
    left = math.floor(x1 + (x2 - x1) // 2 - crop_width // 2)
    top = math.floor(y1 + (y2 - y1) // 2 - crop_height // 2)
    left, top = max(0, min(left, width - crop_width)), max(0, min(top, height - crop_height))
    return left, top, left + crop_width, top + crop_height


def window_starts(
    size: Size, factor: float, overlap: float = 0.0, *, compat: Literal["published"] | None = None
) -> list[tuple[int, int]]:
    """``(top, left)`` of the tiles of :func:`sliding` in a picture of ``size (H, W)``."""
    if not 0 <= overlap < 1:
        raise InvalidConfig("overlap lies in [0, 1)", got=overlap)
    axes = []
    for length, tile in zip(size, _tile(size, factor), strict=True):
        stride = max(1, int(tile * (1 - overlap)))
        starts = list(range(0, length - tile + 1, stride))
        left_out = length - tile - starts[-1]
        if compat is None and left_out:
            count = len(starts) + (left_out > length % tile)  # one more, unless whole pixels are all that is missing
            starts = [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]
        axes.append(starts)
    return [(y, x) for y in axes[0] for x in axes[1]]


def cropping_factor(box: Box, size: Size, margin: float = 1.5, limits: tuple[float, float] = (1.0, 2.0)) -> float:
    """The magnification, in ``limits``, at which ``box`` and a margin (``margin`` times its sides) fill the picture."""
    x1, y1, x2, y2 = check_box(list(box), size)
    return min(max(min(size[1] / ((x2 - x1) * margin), size[0] / ((y2 - y1) * margin)), limits[0]), limits[1])


def _cut(picture: Tensor, window: Window) -> Crop:
    x1, y1, x2, y2 = window
    size = _size(picture)
    part = picture if window == (0, 0, *size[::-1]) else picture[:, y1:y2, x1:x2]  # itself: known to who knows it
    part = part.float() / 255 if not part.is_floating_point() else part
    scale = size[1] / (x2 - x1), size[0] / (y2 - y1)
    if part.shape[1:] != picture.shape[1:]:
        part = F.interpolate(part[None], size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return Crop(part, window, ImageTransform(size, size, scale, (-x1 * scale[0], -y1 * scale[1])))


def _tile(size: Size, factor: float) -> Size:
    _check_factor(factor)
    return max(1, int(size[0] / factor)), max(1, int(size[1] / factor))


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise InvalidConfig("A magnification is a finite number of at least 1", got=factor)


def _size(picture: Tensor) -> Size:
    return int(picture.shape[1]), int(picture.shape[2])
