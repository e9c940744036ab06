"""What a maker of masks and a tracker are. ``sam2``, ``sam2_video``: SAM 2; ``template``: without further weights.

Boxes are half-open ``(x1, y1, x2, y2)`` and points ``(x, y)`` in pixels of the picture, pixel centres at +0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

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

    Every mask is boolean, on the CPU, of its picture's size, and holds its largest 8-connected component only; it is
    empty where no object was seen. Prompts that are malformed or outside raise ``InvalidPrompt``.
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

        Raises ``InvalidPrompt`` when the seed's frame cannot be read, lies outside ``start`` and ``stop``, or its box
        does not cover a pixel of it.
        """
        ...
