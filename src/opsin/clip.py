"""Video out: an H.264 clip, written frame by frame (``opsin.video`` hands the class out)."""

from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from opsin.errors import InvalidConfig, UnsupportedSize
from opsin.hub import atomic_path

MAX_PIXELS = 1 << 26  # per frame; 8K is 2^25
CLOCK = 90_000  # ticks per second: fine enough for any frame rate


class ClipWriter:
    """Writes an H.264 mp4 (yuv420p, plays everywhere): ``with ClipWriter(path, fps, size) as clip: clip.write(image)``.

    ``size`` is the ``(H, W)`` of the frames; an odd side is padded by one repeated line, which H.264 needs. The file
    appears under its name when it is complete; after an exception nothing is left.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int]) -> None:
        if not 0 < fps <= 1000:
            raise InvalidConfig("fps is in (0, 1000]", got=fps)
        if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
            raise UnsupportedSize(f"A clip has 1 to {MAX_PIXELS} pixels", got=f"{size[1]}×{size[0]}")
        self.path, self.fps, self.size = Path(path), float(fps), (int(size[0]), int(size[1]))
        self._last = -1
        self._stack = ExitStack()

    def __enter__(self) -> ClipWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._container = self._stack.enter_context(av.open(str(temporary), "w", format="mp4"))
        rate = Fraction(self.fps).limit_denominator(1001)
        options = {"crf": "20", "preset": "veryfast"} if "libx264" in av.codecs_available else {}
        self._stream = self._container.add_stream("libx264" if options else "mpeg4", rate=rate, options=options)
        self._stream.height, self._stream.width = (side + side % 2 for side in self.size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, CLOCK)
        return self

    def write(self, image: Tensor, time: float | None = None) -> None:
        """Append ``image (3, H, W)``, uint8 or float in [0, 1], shown from ``time`` seconds (None: one frame later)."""
        if tuple(image.shape) != (3, *self.size):
            raise UnsupportedSize(
                f"Every frame of this clip is (3, {self.size[0]}, {self.size[1]})", got=tuple(image.shape)
            )
        if image.is_floating_point():
            image = (image * 255).round().clamp(0, 255).to(torch.uint8)
        height, width = self.size
        array = np.pad(image.permute(1, 2, 0).cpu().numpy(), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
        step = round(CLOCK / self.fps)
        at = round(time * CLOCK) if time is not None else self._last + step if self._last >= 0 else 0
        self._last = max(at, self._last + 1)  # equal or backward times cannot be written
        frame.pts, frame.time_base = self._last, Fraction(1, CLOCK)
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._stack.__exit__(*error)
