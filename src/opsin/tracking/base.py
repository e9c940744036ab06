"""What a maker of masks and a tracker are. ``sam2``, ``sam2_video``: SAM 2; ``template``: without further weights.

Boxes are half-open ``(x1, y1, x2, y2)`` and points ``(x, y)`` in pixels of the picture, pixel centres at +0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from opsin.errors import InvalidImage, InvalidPrompt
from opsin.geometry import Size
from opsin.video import VideoReader


@dataclass(frozen=True, eq=False)
class Step:
    """The object on one frame: its number in the video, ``time`` in seconds, ``box (4,)``, ``score``.

    The score is NaN where the box was not measured but interpolated.
    """

    frame: int
    time: float
    box: Tensor
    score: float


@runtime_checkable
class ObjectMasks(Protocol):
    """Masks of objects in still pictures ``(3, H, W)``, float in [0, 1] or uint8, from boxes or points.

    Every mask is boolean, on the CPU, of its picture's size, and holds one 8-connected component, the largest or the
    one at the prompt; it is empty where no object was seen. Malformed or outside prompts raise ``InvalidPrompt``.
    """

    name: str

    def from_boxes(self, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """One mask for each box: ``boxes (N_i, 4)`` of picture i → ``(N_i, H, W)``."""
        ...

    def from_points(self, pictures: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor]:
        """Candidate masks for each point inside an object: ``points (N_i, 2)`` → ``(N_i, K, H, W)``."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Follows one object through a video, from a moment where it is known, until it is gone."""

    name: str

    def track(self, reader: VideoReader, seed: Step, *, start: float = 0.0, stop: float | None = None) -> list[Step]:
        """The object on consecutive frames around ``seed``, both ways, within ``start <= time < stop`` seconds.

        One step per frame number, the seed among them, ending at the first frame without the object on each side;
        frames that cannot be decoded are interpolated. Memory does not grow with the video.

        Raises ``InvalidPrompt`` when the seed lies outside ``start`` and ``stop``, its box covers no pixel of the
        picture, or its frame is needed and cannot be read.
        """
        ...


def pairs(pictures: Sequence[Tensor], prompts: Sequence[Tensor]) -> Iterator[tuple[Size, Tensor]]:
    """Size and prompts of each picture; ``InvalidPrompt`` unless there are as many of one as of the other."""
    if len(pictures) != len(prompts):
        raise InvalidPrompt("Each picture has its own prompts", got=f"{len(pictures)} pictures, {len(prompts)} prompts")
    return zip(map(size_of, pictures), prompts, strict=True)


def size_of(picture: Tensor) -> Size:
    """``(H, W)`` of a picture; ``InvalidImage`` unless it is ``(3, H, W)``."""
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise InvalidImage("A picture has shape (3, H, W)", got=tuple(picture.shape))
    return int(picture.shape[1]), int(picture.shape[2])
