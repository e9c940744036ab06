"""Pictures of a result: an annotated clip, and a contact sheet with the query, the timeline and frames of the track."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opsin import runtime
from opsin.hub import atomic_path
from opsin.types import Track
from opsin.video import ClipWriter, open_video

BOX, CURVE, SPAN, INK, PAPER = (255, 196, 0), (31, 119, 180), (255, 236, 179), (40, 40, 40), (255, 255, 255)
MARGIN = 12


def annotated_clip(video: Any, track: Track, path: str | Path, *, around: float | None = 2.0) -> Path:
    """Write an mp4 of ``video`` with the box drawn where the object was found.

    ``around``: seconds shown before and after the track; None shows the whole video. Frames of other sizes than the
    first are scaled onto it. A track that was not found gives the whole video with its score written on it.
    """
    path = Path(path)
    with open_video(video) as reader:
        start, stop = 0.0, None
        if track.found and around is not None:
            start = max(0.0, float(track.times[0]) - around)
            stop = float(track.times[-1]) + around + 1e-6
        boxes = dict(zip(track.frames.tolist(), track.boxes.tolist(), strict=True))
        with ClipWriter(path, min(reader.fps, 240.0), reader.size) as clip:
            frames = reader.frames(start=start, stop=stop)
            first: float | None = None
            for frame in runtime.progress(frames, description="drawing", unit="frame"):
                first = frame.time if first is None else first
                picture = Image.fromarray(frame.image.permute(1, 2, 0).numpy())
                caption = f"{frame.time:.2f} s" if track.found else f"not found (best score {track.score:.2f})"
                draw_box(picture, boxes.get(frame.index), caption)
                if (picture.height, picture.width) != reader.size:
                    picture = picture.resize((reader.size[1], reader.size[0]), Image.Resampling.BILINEAR)
                clip.write(to_tensor(picture), frame.time - first)
    return path


def contact_sheet(video: Any, track: Track, path: str | Path, *, query: Tensor | None = None, count: int = 8) -> Path:
    """Write a PNG: ``query (3, h, w)`` in [0, 1], the score over time with the answer marked, and ``count`` frames
    of the track (of the best-scoring moments when it was not found)."""
    path, side, columns = Path(path), 240, 4
    numbers = shown_frames(track, count)
    cells = []
    with open_video(video) as reader:
        boxes = dict(zip(track.frames.tolist(), track.boxes.tolist(), strict=True))
        shots = list(reader.frames(indices=numbers)) if track.found else _nearest(reader, track, count)
        for frame in shots:
            picture = Image.fromarray(frame.image.permute(1, 2, 0).numpy())
            draw_box(picture, boxes.get(frame.index), "")
            picture.thumbnail((side, side))
            cells.append((picture, f"frame {frame.index}   {frame.time:.2f} s"))
    width = columns * (side + MARGIN) + MARGIN
    row_height = max((p.height for p, _ in cells), default=0) + 22
    rows = -(-len(cells) // columns)
    top = 150
    sheet = Image.new("RGB", (width, MARGIN + top + rows * (row_height + MARGIN) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    left = MARGIN
    if query is not None:
        picture = to_picture(query)
        picture.thumbnail((top - 24, top - 24))
        picture = picture if max(picture.size) >= top - 24 else _enlarge(picture, top - 24)
        sheet.paste(picture, (MARGIN, MARGIN + 18))
        pen.text((MARGIN, MARGIN), "looked for", fill=INK, font=font(12))
        left += top
    draw_timeline(pen, track, (left, MARGIN, width - MARGIN, MARGIN + top - 8))
    for i, (picture, caption) in enumerate(cells):
        x = MARGIN + (i % columns) * (side + MARGIN)
        y = MARGIN + top + (i // columns) * (row_height + MARGIN)
        sheet.paste(picture, (x, y))
        pen.text((x, y + picture.height + 3), caption, fill=INK, font=font(12))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def shown_frames(track: Track, count: int) -> list[int]:
    """``count`` frame numbers spread evenly over the track, its first and last among them."""
    if not track.found:
        return []
    spots = torch.linspace(0, len(track) - 1, min(count, len(track))).round().long()
    return track.frames[spots].tolist()


def _nearest(reader: Any, track: Track, count: int) -> list[Any]:
    """The frames at the best-scoring moments of a search that found nothing, in time order."""
    best = track.timeline[track.timeline[:, 1].argsort(descending=True)[:count], 0].sort().values.tolist()
    found = []
    for time in best:
        for frame in reader.frames(start=max(0.0, time - 1e-6)):
            found.append(frame)
            break
    return found


def draw_box(picture: Image.Image, box: Sequence[float] | None, caption: str) -> None:
    """Draw the box and the caption into ``picture``."""
    pen = ImageDraw.Draw(picture)
    line = max(2, min(picture.size) // 120)
    if box is not None:
        x1, y1, x2, y2 = box
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=BOX, width=line)
    if caption:
        face = font(max(12, min(picture.size) // 24))
        area = pen.textbbox((6, 4), caption, font=face)
        pen.rectangle((area[0] - 4, area[1] - 3, area[2] + 4, area[3] + 3), fill=INK)
        pen.text((6, 4), caption, fill=PAPER, font=face)


def draw_timeline(pen: ImageDraw.ImageDraw, track: Track, area: tuple[int, int, int, int]) -> None:
    """Score over time; the track's span is shaded."""
    x1, y1, x2, y2 = area
    y1, y2 = y1 + 18, y2 - 16
    word = "last seen" if track.found else "not found; best"
    span = f" {float(track.times[0]):.2f} to {float(track.times[-1]):.2f} s," if track.found else ""
    pen.text((x1, area[1]), f"{word}{span} score {track.score:.2f}", fill=INK, font=font(12))
    pen.rectangle((x1, y1, x2, y2), outline=(200, 200, 200))
    times, scores = track.timeline[:, 0].tolist(), track.timeline[:, 1].tolist()
    if not times:
        return
    end = max(times[-1], float(track.times[-1]) if track.found else 0.0, 1e-6)
    low, high = min(0.0, *scores), max(1.0, *scores)

    def place(time: float, score: float) -> tuple[float, float]:
        return x1 + time / end * (x2 - x1), y2 - (score - low) / (high - low) * (y2 - y1)

    if track.found:
        pen.rectangle(
            (place(float(track.times[0]), 0)[0], y1 + 1, place(float(track.times[-1]), 0)[0] + 1, y2 - 1), fill=SPAN
        )
    step = max(1, len(times) // (x2 - x1))  # a long video has more samples than the picture has columns
    curve = [place(t, max(scores[i : i + step])) for i, t in enumerate(times[::step]) for i in [bisect_left(times, t)]]
    if len(curve) > 1:
        pen.line(curve, fill=CURVE, width=2)
    pen.text((x1, y2 + 2), "0 s", fill=INK, font=font(11))
    pen.text((x2 - 48, y2 + 2), f"{end:.1f} s", fill=INK, font=font(11))


def font(size: int) -> Any:
    """Pillow's own font, at ``size`` pixels."""
    return ImageFont.load_default(size)


def to_picture(image: Tensor) -> Image.Image:
    """``(3, H, W)`` in [0, 1] → picture."""
    return Image.fromarray((image.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    """Picture → ``(3, H, W)`` uint8."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.reshape(picture.height, picture.width, 3).permute(2, 0, 1)


def _enlarge(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    return picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), Image.Resampling.BICUBIC
    )
