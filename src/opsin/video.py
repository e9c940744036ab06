"""Video in and out, one frame at a time: files, folders of frames, lists, URLs and cameras behind one reader.

Memory does not grow with the length of a video. Times are the container's own: variable frame rates stay true, and the
first frame is at 0 s. Rotation is applied; damaged frames are skipped and counted. A frame's number is its rank in
presentation order, so a damaged frame leaves a hole and never renumbers the ones after it.
"""

from __future__ import annotations

import heapq
import math
import re
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import torch
from torch import Tensor

from opsin.clip import MAX_PIXELS, ClipWriter
from opsin.errors import InvalidConfig, InvalidImage, InvalidPrompt, InvalidVideo, MissingFile
from opsin.images import list_images, read_image

__all__ = ["ClipWriter", "VideoFrame", "VideoReader", "open_video"]

MAX_CONSECUTIVE_ERRORS = 256  # unreadable packets in a row before the rest of a file counts as lost
NOT_VIDEO = {"ansi", "bintext", "xbin", "idf"}  # FFmpeg decodes text files into pictures with these

Decoded = tuple[int, float, Any]  # number, seconds, and what the reader can turn into an image


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame: its number from 0, its time in seconds, and ``image (3, H, W)`` uint8 RGB, upright."""

    index: int
    time: float
    image: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


class VideoReader(ABC):
    """A video that can be streamed any number of times, unless it is ``live``: once. Made by :func:`open_video`.

    ``name``; ``fps`` nominal frames per second; ``duration`` seconds as the header claims, None where unknown; ``size``
    ``(H, W)`` of the first frame, upright (later frames may differ); ``skipped`` damaged frames met by the worst pass.
    """

    name: str = ""
    fps: float = 30.0
    duration: float | None = None
    size: tuple[int, int] = (0, 0)
    skipped: int = 0
    live: bool = False

    @abstractmethod
    def _decode(self, start: float, index: int) -> Iterator[Decoded]:
        """Frames in presentation order, from somewhere at or before both ``start`` seconds and frame ``index``."""

    @abstractmethod
    def _image(self, raw: Any) -> Tensor | None:
        """What ``_decode`` handed out as ``(3, H, W)`` uint8; None when it turns out to be damaged."""

    def frames(
        self, rate: float | None = None, start: float = 0.0, stop: float | None = None,
        indices: Collection[int] | None = None, origin: float = 0.0,
    ) -> Iterator[VideoFrame]:  # fmt: skip
        """Stream the frames with ``start <= time < stop`` (seconds), in order.

        ``rate`` picks the frame nearest to each tick of ``1 / rate`` seconds, counted from ``origin``, each frame at
        most once: no drift and no bias, also at variable frame rate; None gives every frame. ``indices`` keeps only
        these frame numbers.
        Only the frames handed out are converted to RGB. Raises ``InvalidConfig`` for a rate that is not positive.
        """
        if rate is not None and not rate > 0:
            raise InvalidConfig("rate is a positive number of frames per second", got=rate)
        wanted = None if indices is None else set(indices)
        if wanted is not None and not wanted:
            return
        first, last = (0, None) if wanted is None else (min(wanted), max(wanted))
        picked = self._range(self._decode(start, first), start, stop, last)
        if rate is not None:
            picked = _nearest_to_ticks(picked, rate, origin)
        for index, time, raw in picked:
            if wanted is not None and index not in wanted:
                continue
            image = self._image(raw)
            if image is not None:
                yield VideoFrame(index, time, image)

    @staticmethod
    def _range(decoded: Iterator[Decoded], start: float, stop: float | None, last: int | None) -> Iterator[Decoded]:
        for index, time, raw in decoded:
            if (stop is not None and time >= stop) or (last is not None and index > last):
                return
            if time >= start:
                yield index, time, raw

    def read_frame(self, index: int) -> VideoFrame:
        """Exactly frame ``index``, by seeking where the container allows it. ``InvalidPrompt`` when there is none."""
        for frame in self.frames(indices=[index]) if index >= 0 else ():
            return frame
        raise InvalidPrompt(
            "The frame number must be that of a readable frame of the video",
            got=f"frame {index} of {self.name}",
            remedy="Frames are numbered from 0; the number may lie beyond the end, or the frame may be damaged.",
        )

    def close(self) -> None:  # noqa: B027 - only a live source holds anything
        """Release a live source; files are open only while they are read."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def open_video(source: Any, *, fps: float = 30.0) -> VideoReader:
    """Open a video for streaming; use it as a context manager.

    ``source`` is a video file, a folder of frames (natural order: 2 before 10), a list of frame paths or arrays, a URL,
    or ``"camera:0"``. ``fps`` is the frame rate that still images are played at; videos have their own.
    Raises ``MissingFile``, or ``InvalidVideo`` for what is empty, holds no video stream, or has no readable frame.
    """
    if isinstance(source, VideoReader):
        return source
    if isinstance(source, (str, Path)):
        text = str(source)
        if text.startswith("camera:") or "://" in text:
            return _StreamReader(text)
        path = Path(text)
        if not path.exists():
            raise MissingFile("The video must exist", got=str(path))
        if not path.is_dir():
            return _StreamReader(path)
        paths = sorted(list_images(path), key=lambda p: _natural(p.relative_to(path).as_posix()))
        return _FrameReader(paths, path.name or str(path), fps)
    if isinstance(source, (np.ndarray, Tensor, Sequence)):
        return _FrameReader(source, "frames", fps)
    raise InvalidVideo("A video is a path, a folder, a list of frames, a URL or camera:N", got=type(source).__name__)


def _natural(text: str) -> list[Any]:
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in re.split(r"(\d+)", text)]


def _nearest_to_ticks(frames: Iterator[Decoded], rate: float, origin: float) -> Iterator[Decoded]:
    best: tuple[int, float, Decoded] | None = None  # tick, distance to it, frame
    for frame in frames:
        position = (frame[1] - origin) * rate  # not from where reading starts: a later start meets the same frames
        tick = math.floor(position + 0.5 + 1e-9)
        distance = abs(position - tick)
        if best is not None and best[0] != tick:
            yield best[2]
            best = None
        if best is None or distance < best[1] - 1e-9:
            best = (tick, distance, frame)
    if best is not None:
        yield best[2]


class _FrameReader(VideoReader):
    """Still images played at a fixed rate; sizes may differ from frame to frame."""

    def __init__(self, sources: Any, name: str, fps: float) -> None:
        if not fps > 0:
            raise InvalidConfig("fps is a positive number of frames per second", got=fps)
        if len(sources) == 0:
            raise InvalidVideo("A video has at least one frame", got=f"no image in {name}")
        self._sources, self.name, self.fps, self.duration = sources, name, float(fps), len(sources) / fps
        self._bad: set[int] = set()
        for _, _, raw in self._decode(0.0, 0):
            image = self._image(raw)
            if image is not None:
                self.size = (int(image.shape[-2]), int(image.shape[-1]))
                return
        raise InvalidVideo("A video has at least one readable frame", got=f"{len(sources)} unreadable images in {name}")

    def _decode(self, start: float, index: int) -> Iterator[Decoded]:
        for i in range(max(index, int(start * self.fps) - 1, 0), len(self._sources)):
            yield i, i / self.fps, i

    def _image(self, raw: int) -> Tensor | None:
        try:
            image = read_image(self._sources[raw])
        except (InvalidImage, MissingFile):
            self._bad.add(raw)
            self.skipped = len(self._bad)
            return None
        return (image * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class _PacketTable:
    """Presentation times of all packets, sorted, and the keyframes as ``(pts, dts)``, sorted."""

    pts: list[int]
    keys: list[tuple[int, int]]


class _StreamReader(VideoReader):
    """Anything FFmpeg opens. Every pass over a file opens it anew, so passes may overlap; a live source has one."""

    def __init__(self, source: str | Path) -> None:
        self._source = source
        self.name = source.name if isinstance(source, Path) else source
        if isinstance(source, Path) and source.stat().st_size == 0:
            raise InvalidVideo("A video file must not be empty", got=f"{self.name}: 0 bytes")
        self._table: _PacketTable | None = None
        self._open_live = ExitStack()
        container, stream = self._open(self._open_live)
        self.live = isinstance(source, str) and (container.size < 0 or container.duration is None)  # no known end
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate and 0 < rate <= 1000 else 30.0
        if stream.duration and stream.time_base:
            self.duration = float(stream.duration * stream.time_base)
        elif container.duration:
            self.duration = container.duration / 1e6
        decoded = self._read(container, stream, 0, None)
        for frame in decoded:
            image = self._image(frame[2])
            if image is not None:
                self.size = (int(image.shape[-2]), int(image.shape[-1]))
                break
        else:
            self.close()
            raise InvalidVideo("A video has at least one readable frame", got=f"{self.name}: nothing could be decoded")
        if self.live:
            self._live = chain([frame], decoded)
        else:
            self.close()

    def close(self) -> None:
        self._open_live.close()

    def _open(self, stack: ExitStack) -> tuple[Any, Any]:
        target, options = _ffmpeg_target(self._source)
        try:
            container = stack.enter_context(av.open(target, metadata_errors="replace", **options))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "It may be cut off, of another kind, or in use; ffprobe shows what it is."
            raise InvalidVideo("A video must be readable", got=f"{self.name}: {reason}", remedy=remedy) from error
        streams = [
            s for s in container.streams.video
            if s.codec_context is not None and s.codec_context.name not in NOT_VIDEO
            and not s.disposition & av.stream.Disposition.attached_pic
        ]  # fmt: skip
        if not streams:
            kinds = {"text or a cover picture" if s.type == "video" else s.type for s in container.streams}
            raise InvalidVideo("A file must hold a video stream", got=f"{self.name}: {', '.join(kinds) or 'nothing'}")
        stream = streams[0]
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            got = f"{self.name}: {stream.codec_context.width}×{stream.codec_context.height}"
            raise InvalidVideo(f"A frame has at most {MAX_PIXELS} pixels", got=got, remedy="Scale it down first.")
        stream.thread_type = "AUTO"
        return container, stream

    def _decode(self, start: float, index: int) -> Iterator[Decoded]:
        if self.live:
            yield from self._live
            return
        with ExitStack() as stack:
            container, stream = self._open(stack)
            far = start > 1 or index > self.fps
            base, key = self._seek(container, stream, start, index) if far else (0, None)
            yield from self._read(container, stream, base, key)

    def _seek(self, container: Any, stream: Any, start: float, index: int) -> tuple[int, int | None]:
        """Go to the last keyframe at or before ``start`` and ``index``: its frame number and pts, or ``(0, None)``."""
        table = self._packets()
        if not table.pts or index >= len(table.pts):
            return 0, None
        origin = stream.start_time or 0
        target = max(table.pts[index], origin + int(start / stream.time_base))
        at = bisect_right(table.keys, (target, sys.maxsize)) - 1
        if at <= 0:
            return 0, None
        pts, dts = table.keys[at]
        try:
            container.seek(dts, stream=stream, backward=True)
        except (av.error.FFmpegError, OSError):
            return 0, None
        return bisect_left(table.pts, pts), pts

    def _packets(self) -> _PacketTable:
        if self._table is None:
            pts: list[int] = []
            keys: list[tuple[int, int]] = []
            with ExitStack() as stack:
                container, stream = self._open(stack)
                for packet in _packets(container, stream):
                    if packet is None or packet.is_discard or packet.size == 0:
                        continue
                    if packet.pts is None:
                        pts, keys = [], []
                        break
                    pts.append(packet.pts)
                    if packet.is_keyframe and packet.dts is not None:
                        keys.append((packet.pts, packet.dts))
            self._table = _PacketTable(sorted(pts), sorted(keys))
        return self._table

    def _read(self, container: Any, stream: Any, base: int, key: int | None) -> Iterator[Decoded]:
        """Decode from where the container stands: frame numbers from ``base``, nothing before the pts ``key``.

        Frames come out in presentation order. So every packet that went in with an earlier time than the frame that
        comes out is a frame that was lost; the heap holds the times still owed, a handful.
        """
        unit, origin = stream.time_base, stream.start_time or 0
        owed: list[int] = []
        index, lost, damaged = base, 0, False
        for packet in _packets(container, stream):
            if packet is None:
                continue
            real = packet.size > 0 and not packet.is_discard
            if real and packet.pts is not None and (key is None or packet.pts >= key):
                heapq.heappush(owed, packet.pts)
            try:
                frames = stream.decode(packet if packet.size > 0 else None)
            except (av.error.FFmpegError, OSError, ValueError):
                frames, damaged = [], True  # what it owed is found missing when the next frame comes
            for frame in frames:
                if frame.pts is None:
                    yield index, index / self.fps, frame
                    index += 1
                    continue
                if key is not None and frame.pts < key:
                    continue
                while owed and owed[0] < frame.pts:
                    heapq.heappop(owed)
                    index, lost = index + 1, lost + 1
                if owed and owed[0] == frame.pts:
                    heapq.heappop(owed)
                elif damaged:
                    continue  # made up by the decoder
                if frame.is_corrupt or frame.width * frame.height > MAX_PIXELS:
                    lost += 1
                else:
                    yield index, float((frame.pts - origin) * unit), frame
                index += 1
                self.skipped = max(self.skipped, lost)
        self.skipped = max(self.skipped, lost + len(owed))

    def _image(self, raw: Any) -> Tensor | None:
        try:
            array = raw.to_ndarray(format="rgb24")
        except (av.error.FFmpegError, OSError, ValueError):
            return None
        turned = np.rot90(array, round(raw.rotation / 90) % 4)
        return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1)))


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of one stream, None for each that cannot be read, at the end the empty one that flushes the decoder."""
    errors = 0
    packets = container.demux(stream)
    while errors < MAX_CONSECUTIVE_ERRORS:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.EOFError, av.error.ExitError, av.error.TimeoutError, ValueError):
            break  # a stream that stalls for longer than the timeout has ended
        except (av.error.FFmpegError, OSError):
            errors += 1
            packets = container.demux(stream)  # a generator that raised is finished; the container reads on
            yield None
            continue
        errors = 0
        yield packet
    yield av.Packet()


def _ffmpeg_target(source: str | Path) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Path):
        return f"file:{source}", {}
    if not source.startswith("camera:"):
        return source, {"timeout": (10.0, 30.0)}
    number = source.removeprefix("camera:")
    if sys.platform == "darwin":
        return number, {"format": "avfoundation"}
    if sys.platform == "win32":
        return f"video={number}", {"format": "dshow"}
    return (f"/dev/video{number}" if number.isdecimal() else number), {"format": "v4l2"}
