"""What is looked for: a picture of the object, its size in pixels, and examples of it in this video's surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidPrompt
from opsin.geometry import check_box
from opsin.images import read_image
from opsin.video import VideoFrame, VideoReader

if TYPE_CHECKING:
    from opsin.regions import RegionModel

PASTE_SCALES = (1.0, 0.75, 1.33)
LARGEST_SHARE = 0.8  # of a frame's side that a pasted crop may fill


@dataclass(frozen=True, eq=False)
class Wanted:
    """``crop (3, h, w)`` in [0, 1] of the object; ``scene (3, H, W)`` and ``box`` where a whole picture was given;
    ``frame`` and ``time`` when that picture is a frame of the video itself; ``source`` says so in words."""

    crop: Tensor
    scene: Tensor | None
    box: tuple[float, float, float, float] | None
    frame: int | None
    time: float | None
    source: str

    @property
    def size(self) -> tuple[float, float]:
        """``(width, height)`` in pixels."""
        if self.box is not None:
            return self.box[2] - self.box[0], self.box[3] - self.box[1]
        return float(self.crop.shape[2]), float(self.crop.shape[1])


def read_query(
    reader: VideoReader, model: RegionModel, *, image: Any = None, frame: int | None = None,
    box: Sequence[float] | None = None, point: Sequence[float] | None = None,
) -> Wanted:  # fmt: skip
    """Exactly one of ``image`` and ``frame``; ``box`` or ``point`` inside it; an ``image`` alone is the object itself.

    Raises ``InvalidPrompt`` for a contradiction, for an empty or outside box, and for a crop under 2 pixels a side.
    """
    if (image is None) == (frame is None):
        raise InvalidPrompt(
            "The object is given by an image or by a frame of the video", got="both" if frame is not None else "neither"
        )
    if box is not None and point is not None:
        raise InvalidPrompt("The object is given by a box or by a point", got="both")
    if frame is not None and box is None and point is None:
        raise InvalidPrompt("A frame needs a box or a point that says where the object is", got=f"frame {frame} alone")
    shot: VideoFrame | None = None if frame is None else reader.read_frame(frame)
    scene = read_image(image) if shot is None else shot.image.float() / 255
    size = (int(scene.shape[1]), int(scene.shape[2]))
    if point is not None:
        box = model.encode(scene, points=torch.tensor([list(point)], dtype=torch.float32)).boxes[0].tolist()
    if min(size) < 2:
        raise InvalidPrompt("A picture of the object has at least 2 pixels a side", got=f"{size[1]}×{size[0]}")
    source = f"frame {frame}" if frame is not None else "image"
    if box is None:
        return Wanted(scene, None, None, None, None, source)
    x1, y1, x2, y2 = checked = check_box(list(box), size)
    crop = scene[:, int(y1) : max(int(y1) + 2, round(y2)), int(x1) : max(int(x1) + 2, round(x2))]
    return Wanted(crop, scene, checked, frame, None if shot is None else shot.time, source)


def paste(crop: Tensor, picture: Tensor, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``picture (3, H, W)`` with ``crop`` drawn into it at ``scale`` and a random place, and its box ``(4,)``.

    The crop keeps its aspect and fills at most ``LARGEST_SHARE`` of a side.
    """
    height, width = picture.shape[1:]
    scale = min(scale, LARGEST_SHARE * width / crop.shape[2], LARGEST_SHARE * height / crop.shape[1])
    w, h = max(2, round(crop.shape[2] * scale)), max(2, round(crop.shape[1] * scale))
    w, h = min(w, width), min(h, height)
    small = F.interpolate(crop[None], size=(h, w), mode="bilinear", antialias=True)[0]
    x = int(torch.randint(0, width - w + 1, (1,), generator=generator))
    y = int(torch.randint(0, height - h + 1, (1,), generator=generator))
    drawn = picture.clone()
    drawn[:, y : y + h, x : x + w] = small
    return drawn, torch.tensor([x, y, x + w, y + h], dtype=torch.float32)


def composites(wanted: Wanted, pictures: Sequence[Tensor], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The object pasted into frames of the video at several scales, and its boxes: examples of many backgrounds."""
    generator = torch.Generator().manual_seed(seed)
    return [
        paste(wanted.crop, picture, PASTE_SCALES[i % len(PASTE_SCALES)], generator)
        for i, picture in enumerate(pictures)
    ]
