"""What is looked for: pictures of the object, its size in pixels, and examples of it in this video's surroundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig, InvalidPrompt, near_misses
from opsin.geometry import check_box, check_points
from opsin.images import read_image
from opsin.video import VideoFrame, VideoReader

PASTE_SCALES = (1.0, 0.75, 1.33)
LARGEST_SHARE = 0.8  # of a frame's side that a pasted crop may fill
NAMES = ("image", "frame", "box", "point", "words", "search", "before")

BoxAt = Callable[[Tensor, Tensor], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Wanted:
    """``crop (3, h, w)`` in [0, 1] of the object; ``scene (3, H, W)`` and ``box`` where a whole picture was given."""

    crop: Tensor
    scene: Tensor | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def size(self) -> tuple[float, float]:
        """``(width, height)`` in pixels."""
        if self.box is not None:
            return self.box[2] - self.box[0], self.box[3] - self.box[1]
        return float(self.crop.shape[2]), float(self.crop.shape[1])

    @property
    def picture(self) -> Tensor:
        """The whole picture, which is the crop where nothing else was given."""
        return self.crop if self.scene is None else self.scene

    @property
    def area(self) -> Tensor:
        """Where the object is in ``picture``: ``(4,)``."""
        return torch.tensor(self.box or (0.0, 0.0, float(self.crop.shape[2]), float(self.crop.shape[1])))


@dataclass(frozen=True, eq=False)
class Asked:
    """A question: ``pictures`` of the object or ``words`` for it; ``own`` the frame of the video that the picture is,
    when it lies in what is searched; ``stop`` seconds at which the search ends; ``source`` in words."""

    pictures: tuple[Wanted, ...] = ()
    words: tuple[str, ...] = ()
    own: int | None = None
    stop: float | None = None
    source: str = ""


def read_query(
    reader: VideoReader, box_at: BoxAt, *, image: Any = None, frame: int | None = None, box: Any = None,
    point: Any = None, words: str | Sequence[str] | None = None, search: Literal["before", "all"] = "before",
    before: int | None = None, **unknown: Any,
) -> Asked:  # fmt: skip
    """Exactly one of ``image``, ``frame`` and ``words``; ``box`` or ``point`` inside the picture; an ``image`` alone is
    the object itself. A list of images shows one object several times, each with its own box where there are boxes.

    Raises:
        InvalidPrompt: a contradiction, an empty or outside box, a crop under 2 pixels a side, blank words.
        InvalidConfig: an option that does not exist.
    """
    for name in unknown:
        raise InvalidConfig(f"A question has {', '.join(NAMES)}", got=f'"{name}"', remedy=near_misses(name, NAMES))
    if search not in ("before", "all"):
        raise InvalidConfig('search is "before" or "all"', got=search)
    given = [n for n, v in (("image", image), ("frame", frame), ("words", words)) if v is not None]
    if len(given) != 1:
        raise InvalidPrompt(
            "The object is given by an image, by a frame of the video, or by words", got=" and ".join(given) or "none"
        )
    if box is not None and point is not None:
        raise InvalidPrompt("The object is given by a box or by a point", got="both")
    if frame is not None and box is None and point is None:
        raise InvalidPrompt("A frame needs a box or a point that says where the object is", got=f"frame {frame} alone")
    shot = None if frame is None else reader.read_frame(frame)
    stop = _stop(reader, shot, search, before)
    if words is not None:
        return Asked(words=_phrases(words, box, point), stop=stop, source="words")
    if shot is not None:
        own = frame if stop is None or shot.time < stop else None
        return Asked((_wanted(shot.image.float() / 255, box, point, box_at),), (), own, stop, f"frame {frame}")
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise InvalidPrompt("There is at least one image of the object", got="an empty list")
    several = isinstance(image, (list, tuple)) and (box is not None or point is not None)
    boxes, points = ([v] * len(images) if not several or v is None else list(v) for v in (box, point))
    if len(boxes) != len(images) or len(points) != len(images):
        raise InvalidPrompt("Several images have a box or a point each", got=f"{len(images)} images")
    found = [_wanted(read_image(i), b, p, box_at) for i, b, p in zip(images, boxes, points, strict=True)]
    return Asked(tuple(found), (), None, stop, "image" if len(found) == 1 else f"{len(found)} images")


def check_names(query: Mapping[str, Any]) -> dict[str, Any]:
    """A question as keyword arguments."""
    if not isinstance(query, Mapping):
        raise InvalidPrompt(f"A question is a mapping with {', '.join(NAMES)}", got=type(query).__name__)
    return dict(query)


def _stop(reader: VideoReader, shot: VideoFrame | None, search: str, before: int | None) -> float | None:
    """Seconds at which the search ends."""
    if before is not None:
        if before < 1:
            raise InvalidPrompt("There is at least one frame to search: before is at least 1", got=before)
        return next((f.time for f in reader.frames(indices=[before])), None)  # beyond the end: all of it
    return shot.time if shot is not None and search == "before" else None


def _phrases(words: str | Sequence[str], box: Any, point: Any) -> tuple[str, ...]:
    if box is not None or point is not None:
        raise InvalidPrompt("Words name the object; a box or a point belongs to a picture", got="both")
    phrases = tuple(w.strip() for w in ([words] if isinstance(words, str) else words))
    if not phrases or not all(phrases):
        raise InvalidPrompt("Words are not blank", got=repr(words))
    return phrases


def _wanted(scene: Tensor, box: Any, point: Any, box_at: BoxAt) -> Wanted:
    size = (int(scene.shape[1]), int(scene.shape[2]))
    if min(size) < 2:
        raise InvalidPrompt("A picture of the object has at least 2 pixels a side", got=f"{size[1]}×{size[0]}")
    if point is not None:
        box = box_at(scene, check_points(torch.tensor([list(point)], dtype=torch.float32), size)[0])
    if box is None:
        return Wanted(scene)
    x1, y1, x2, y2 = checked = check_box(list(box), size)
    crop = scene[:, int(y1) : max(int(y1) + 2, round(y2)), int(x1) : max(int(x1) + 2, round(x2))]
    return Wanted(crop, scene, checked)


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
