"""Images of any size onto the one size that a codec takes, and back."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig
from opsin.geometry import ImageTransform, Size

CodecFit = Literal["stretch", "pad", "crop"]


def layout(size: Size, canvas: Size, fit: CodecFit) -> ImageTransform:
    """How an image of ``size (H, W)`` lies on a ``canvas (H, W)``.

    ``"stretch"`` ignores the aspect, as published; ``"pad"`` keeps it and shows all, with black bars; ``"crop"`` keeps
    it and fills the canvas, so that the sides beyond it (negative offsets) are lost.
    """
    if fit not in ("stretch", "pad", "crop"):
        raise InvalidConfig('fit is "stretch", "pad" or "crop"', got=fit)
    (height, width), (ch, cw) = size, canvas
    if fit == "stretch":
        return ImageTransform(size, canvas, (cw / width, ch / height))
    ratio = (min if fit == "pad" else max)(ch / height, cw / width)
    inner = max(1, round(height * ratio)), max(1, round(width * ratio))
    offset = float((cw - inner[1]) // 2), float((ch - inner[0]) // 2)
    return ImageTransform(size, canvas, (inner[1] / width, inner[0] / height), offset)


def lay(image: Tensor, canvas: Size, fit: CodecFit) -> Tensor:
    """``(3, H, W)`` in [0, 1] onto a canvas ``(3, *canvas)``, bicubic with antialiasing."""
    size = int(image.shape[1]), int(image.shape[2])
    left, top, inner = _placed(layout(size, canvas, fit))
    found = _resize(image, inner)
    return F.pad(found, (left, canvas[1] - inner[1] - left, top, canvas[0] - inner[0] - top))  # negative: cut away


def restore(picture: Tensor, size: Size, fit: CodecFit) -> Tensor:
    """A canvas ``(3, H, W)`` back to the original ``size``; after ``"crop"`` only the part that was seen, at its scale.

    Padding is dropped, the aspect restored.
    """
    canvas = int(picture.shape[1]), int(picture.shape[2])
    transform = layout(size, canvas, fit)
    left, top, inner = _placed(transform)
    y, x = max(0, top), max(0, left)
    seen = picture[:, y : min(canvas[0], top + inner[0]), x : min(canvas[1], left + inner[1])]
    (sx, sy), whole = transform.scale, size
    if fit == "crop":
        whole = min(size[0], max(1, round(canvas[0] / sy))), min(size[1], max(1, round(canvas[1] / sx)))
    return _resize(seen, whole)


def _placed(transform: ImageTransform) -> tuple[int, int, Size]:
    (height, width), (sx, sy), (left, top) = transform.size, transform.scale, transform.offset
    return int(left), int(top), (round(height * sy), round(width * sx))


def _resize(image: Tensor, size: Size) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image
    found = F.interpolate(image[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    return found.clamp(0, 1)
