"""A source that can be read only once, a camera or a live stream, becomes a clip that can be searched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.nn import functional as F

from opsin import runtime
from opsin.errors import InvalidConfig
from opsin.video import ClipWriter, VideoReader, open_video


@contextmanager
def recorded(source: Any, duration: float | None = None) -> Iterator[VideoReader]:
    """A reader of ``source`` (what ``open_video`` takes) that can be read more than once.

    Of a live source the next ``duration`` seconds are written, frame by frame, to a clip in a temporary folder that is
    removed at the end of the block; frame numbers and times are then those of the recording, from 0. Raises
    ``InvalidConfig`` for a live source without a duration and for one that is not positive, and what opening raises.
    """
    if duration is not None and not 0 < duration < math.inf:
        raise InvalidConfig("duration is a positive number of seconds", got=duration)
    with open_video(source) as reader:
        if not reader.live:
            yield reader
            return
        if duration is None:
            raise InvalidConfig(
                "A live source needs a duration", got=reader.name,
                remedy="Say how many seconds to record and search, as in duration=60 or --duration 60.",
            )  # fmt: skip
        with TemporaryDirectory(prefix="opsin-") as folder:
            clip = record(reader, Path(folder) / "recording.mp4", duration)
            reader.close()  # a camera is free again while its recording is searched
            with open_video(clip) as recording:
                recording.name, recording.skipped = reader.name, reader.skipped
                yield recording


def record(reader: VideoReader, path: Path, duration: float) -> Path:
    """Write the frames of the next ``duration`` seconds to the clip ``path``; other sizes are scaled to the first."""
    first: float | None = None
    with ClipWriter(path, min(reader.fps, 240.0), reader.size) as clip:
        total = math.ceil(duration * reader.fps)
        for frame in runtime.progress(reader.frames(), total=total, description="recording", unit="frame"):
            first = frame.time if first is None else first
            if frame.time - first >= duration:
                break
            image = frame.image
            if frame.size != reader.size:
                image = F.interpolate(image[None].float(), reader.size, mode="bilinear", antialias=True)[0] / 255
            clip.write(image, frame.time - first)
    return path
