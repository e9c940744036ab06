"""Clips of Ego4D made small: from full-scale videos or canonical clips to 5 frames a second without black bars.

A clip becomes an H.264 file of some megabytes and, beside it, a small JSON (:class:`ClipRecord`) that says what was cut
off and how it was scaled, so that boxes go both ways. Frames are numbered as in the annotations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin import runtime
from opsin.clip import ClipWriter
from opsin.errors import InvalidConfig, InvalidDataset, InvalidVideo, MissingFile, OpsinError
from opsin.geometry import Size
from opsin.hub import atomic_path
from opsin.video import VideoReader, open_video
from opsin.vq2d.annotations import Clip, read_json

FORMAT = 1
DARK = 32  # a line is black when no value of any frame reaches this (REN, prepare.py)
MOST_TRIMMED = 0.2  # of the height or width, per side
SHORT_SIDE, LONG_SIDE = 288, 512


@dataclass(frozen=True)
class ClipRecord:
    """How a clip was made; sizes are ``(H, W)``.

    ``frames`` are there of ``expected``; ``repeated`` of them repeat the one before, because theirs could not be
    decoded. Of a source picture of ``source_size`` the part of size ``kept``, from ``offset`` ``(x, y)`` on, was scaled
    to ``size``.
    """

    name: str
    video_uid: str
    source: str
    fps: float
    expected: int
    frames: int
    repeated: int
    source_size: Size
    offset: tuple[int, int]
    kept: Size
    size: Size
    trimmed: bool
    format: int = FORMAT

    @classmethod
    def load(cls, path: str | Path) -> ClipRecord:
        """Read the JSON of a prepared clip. Raises ``MissingFile`` or ``InvalidDataset``."""
        data = read_json(path)
        try:
            pairs = ("source_size", "offset", "kept", "size")
            values: dict[str, Any] = {k: (int(v[0]), int(v[1])) if k in pairs else v for k, v in data.items()}
            return cls(**values)
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise InvalidDataset("The JSON beside a clip says how it was made", got=f"{path}: {error}") from error

    def to_clip(self, boxes: Tensor, picture: Size) -> Tensor:
        """Boxes ``(..., 4)`` in the source picture, given at the size ``picture``, → pixels of the clip."""
        scale = boxes.new_tensor(self._scale(picture))
        return (boxes - boxes.new_tensor(self._origin(picture))) * scale

    def to_picture(self, boxes: Tensor, picture: Size) -> Tensor:
        """Boxes ``(..., 4)`` in pixels of the clip → the source picture at the size ``picture``."""
        scale = boxes.new_tensor(self._scale(picture))
        return boxes / scale + boxes.new_tensor(self._origin(picture))

    def _scale(self, picture: Size) -> list[float]:
        """Clip pixels per pixel of the picture, x y x y."""
        (height, width), (kept_height, kept_width) = self.size, self.kept
        x = width / kept_width * self.source_size[1] / picture[1]
        y = height / kept_height * self.source_size[0] / picture[0]
        return [x, y, x, y]

    def _origin(self, picture: Size) -> list[float]:
        x = self.offset[0] * picture[1] / self.source_size[1]
        y = self.offset[1] * picture[0] / self.source_size[0]
        return [x, y, x, y]


@dataclass
class Prepared:
    """What :func:`prepare` did: clips ``made``, found ``done``, ``missing`` (no video), and ``failed`` with why."""

    made: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def prepare(
    clips: Sequence[Clip],
    out: str | Path,
    *,
    videos: str | Path | None = None,
    canonical: str | Path | None = None,
    shard: tuple[int, int] = (1, 1),
    trim: bool = True,
) -> Prepared:
    """Make every clip small: ``out/<name>.mp4`` and ``out/<name>.json``. What is there is not made again.

    ``videos`` holds full-scale videos ``<video_uid>.mp4``, ``canonical`` clips ``<clip_uid>.mp4``, which are taken
    first. ``shard``: number, from 1, and count. A video that is missing or cannot be read is reported and does not stop
    the others; files appear whole or not at all.
    """
    if videos is None and canonical is None:
        raise InvalidConfig("Clips come from a folder of videos or of canonical clips", got="neither")
    for folder in (videos, canonical):
        if folder is not None and not Path(folder).is_dir():
            raise MissingFile("The folder of videos must exist", got=str(folder))
    out = Path(out)
    report = Prepared()
    chosen = part(clips, shard)
    for clip in runtime.progress(chosen, total=len(chosen), description="preparing", unit="clip"):
        if _is_done(out, clip, trim):
            report.done.append(clip.name)
            continue
        source, start = _source(clip, videos, canonical)
        if source is None:
            report.missing.append(clip.name)
            continue
        try:
            prepare_clip(clip, source, out, start=start, trim=trim)
            report.made.append(clip.name)
        except OpsinError as error:
            report.failed[clip.name] = str(error)
    return report


def part(clips: Sequence[Clip], shard: tuple[int, int]) -> list[Clip]:
    """The clips of one shard: number, from 1, and count."""
    number, count = shard
    if not 1 <= number <= count:
        raise InvalidConfig("Shards are numbered from 1 to their count", got=f"{number}/{count}")
    return list(clips[number - 1 :: count])


def prepare_clip(clip: Clip, source: str | Path, out: str | Path, *, start: float, trim: bool = True) -> ClipRecord:
    """Make one clip from the video ``source``, in which it begins at ``start`` seconds."""
    out = Path(out)
    with open_video(source) as reader:
        expected = max(1, math.ceil((clip.end - max(0.0, clip.start)) * clip.fps - 1e-6))
        box = _bright(reader, clip, start) if trim else (0, 0, reader.size[1], reader.size[0])
        left, top, right, bottom = box
        kept = bottom - top, right - left
        size = reduced(kept)
        frames = repeated = 0
        with ClipWriter(out / f"{clip.name}.mp4", clip.fps, size) as writer:
            last: Tensor | None = None
            for number, image in _sampled(reader, clip, start, expected):
                picture = _resized(image[:, top:bottom, left:right], size)
                while frames <= number:  # the frame itself, and before it those that could not be decoded
                    held = picture if frames == number or last is None else last
                    repeated += frames < number
                    writer.write(held, frames / clip.fps)
                    frames += 1
                last = picture
            if last is None:
                raise InvalidVideo("There is a readable frame between the times of a clip", got=clip.name)
        record = ClipRecord(
            clip.name, clip.video_uid, reader.name, clip.fps, expected, frames, repeated, reader.size, (left, top),
            kept, size, trim,
        )  # fmt: skip
    with atomic_path(out / f"{clip.name}.json") as temporary:  # last: it says that the clip is whole
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
    return record


def reduced(size: Size) -> Size:
    """``(H, W)`` with a short side of 288 pixels, or less so that the long one has 512; smaller pictures stay."""
    short, long = sorted(size)
    if short <= SHORT_SIDE:
        return size
    over, under = (SHORT_SIDE, short) if SHORT_SIDE * long <= LONG_SIDE * short else (LONG_SIDE, long)
    return max(1, size[0] * over // under), max(1, size[1] * over // under)


def bars(rows: np.ndarray, columns: np.ndarray) -> tuple[int, int, int, int]:
    """The part ``(left, top, right, bottom)`` that is left when black bars are trimmed, at most a fifth per side.

    ``rows (H,)`` and ``columns (W,)``: the highest value in each line over the whole clip and all channels.
    """
    (top, bottom), (left, right) = (_lines(line >= DARK) for line in (rows, columns))
    return left, top, right, bottom


def _lines(bright: np.ndarray) -> tuple[int, int]:
    most = int(MOST_TRIMMED * len(bright))
    first = int(bright.argmax()) if bright.any() else most
    behind = int(bright[::-1].argmax()) if bright.any() else most
    return min(first, most), len(bright) - min(behind, most)


def _bright(reader: VideoReader, clip: Clip, start: float) -> tuple[int, int, int, int]:
    """What is not black bar; reading stops as soon as no side is black any more, mostly at the first frame."""
    rows, columns = np.zeros(reader.size[0], dtype=np.uint8), np.zeros(reader.size[1], dtype=np.uint8)
    for image in (_fitted(frame.image, reader.size) for frame in _frames(reader, clip, start)):
        rows = np.maximum(rows, image.amax((0, 2)).numpy())
        columns = np.maximum(columns, image.amax((0, 1)).numpy())
        if min(rows[0], rows[-1], columns[0], columns[-1]) >= DARK:
            break
    return bars(rows, columns)


def _frames(reader: VideoReader, clip: Clip, start: float) -> Iterator[Any]:
    """The frame nearest to each tick of the clip."""
    half = 0.5 / reader.fps  # the one nearest to the start may lie before it
    length = clip.end - max(0.0, clip.start)
    return reader.frames(rate=clip.fps, start=max(0.0, start - half), stop=start + length + half, origin=start)


def _sampled(reader: VideoReader, clip: Clip, start: float, expected: int) -> Iterator[tuple[int, Tensor]]:
    """Frame numbers of the clip, ascending, and their pictures ``(3, H, W)`` uint8; damaged frames leave holes."""
    before = -1
    for frame in _frames(reader, clip, start):
        number = round((frame.time - start) * clip.fps)
        if before < number < expected:
            yield number, _fitted(frame.image, reader.size)
            before = number


def _fitted(image: Tensor, size: Size) -> Tensor:
    """A frame of another size than the first is scaled onto it."""
    return image if tuple(image.shape[1:]) == size else _resized(image, size)


def _resized(image: Tensor, size: Size) -> Tensor:
    """``(3, H, W)`` uint8 → ``(3, *size)``, bicubic as Pillow does it."""
    if tuple(image.shape[1:]) == size:
        return image
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    scaled = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return torch.from_numpy(scaled.copy()).permute(2, 0, 1)


def _source(clip: Clip, videos: str | Path | None, canonical: str | Path | None) -> tuple[Path | None, float]:
    """The file that holds a clip and the second at which it begins there."""
    if canonical is not None and clip.uid is not None:
        path = Path(canonical) / f"{clip.uid}.mp4"
        if path.is_file():
            return path, 0.0
    if videos is not None:
        path = Path(videos) / f"{clip.video_uid}.mp4"
        if path.is_file():
            return path, max(0.0, clip.start)
    return None, 0.0


def _is_done(out: Path, clip: Clip, trim: bool) -> bool:
    if not ((out / f"{clip.name}.json").is_file() and (out / f"{clip.name}.mp4").is_file()):
        return False
    try:
        record = ClipRecord.load(out / f"{clip.name}.json")
    except OpsinError:
        return False
    return (record.format, record.trimmed) == (FORMAT, trim)
