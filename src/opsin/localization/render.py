"""Pictures of a result: an annotated clip, a plot of the score over time, and a contact sheet with the query, that plot
and frames of the track."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opsin import runtime
from opsin.errors import InvalidConfig
from opsin.hub import atomic_path
from opsin.types import Track
from opsin.video import ClipWriter, open_video

BOX, CURVE, SPAN, INK, PAPER = (255, 196, 0), (31, 119, 180), (255, 236, 179), (40, 40, 40), (255, 255, 255)
PEAK, LINE = (214, 39, 40), (215, 215, 215)
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
            picture.thumbnail((side, side))
            if frame.index in boxes:  # drawn around what is in it, as it may be few pixels large by now
                factor = picture.width / frame.size[1]
                draw_box(picture, [v * factor + s for v, s in zip(boxes[frame.index], (-2, -2, 2, 2), strict=True)], "")
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


def timeline_plot(track: Track, path: str | Path, *, size: tuple[int, int] = (960, 320)) -> Path:
    """Write a PNG, ``size`` ``(width, height)``: the score of every searched frame over time, the candidates, the peak
    that was chosen and the span of the track. Of a long video every column shows its best frame."""
    path = Path(path)
    width, height = size
    if width < 240 or height < 120:
        raise InvalidConfig("A plot has at least 240×120 pixels", got=f"{width}×{height}")
    sheet = Image.new("RGB", size, PAPER)
    draw_timeline(ImageDraw.Draw(sheet), track, (MARGIN, MARGIN, width - MARGIN, height - MARGIN), ticks=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def draw_timeline(
    pen: ImageDraw.ImageDraw, track: Track, area: tuple[int, int, int, int], *, ticks: bool = False
) -> None:
    """Score over time; the track's span is shaded, candidates are rings, the chosen peak is a disc.

    ``ticks``: round numbers along both axes, and what the marks mean.
    """
    x1, y1, x2, y2 = area
    word = "last seen" if track.found else "not found; best"
    span = f" {float(track.times[0]):.2f} to {float(track.times[-1]):.2f} s," if track.found else ""
    pen.text((x1, y1), f"{word}{span} score {track.score:.2f}", fill=INK, font=font(12))
    x1, y1, y2 = x1 + (34 if ticks else 0), y1 + 18, y2 - 16
    samples = [(t, s) for t, s in track.timeline.tolist() if math.isfinite(s)]
    moments = [(m["time"], m["score"]) for m in track.details.get("candidates", ()) if math.isfinite(m["score"])]
    peak = chosen_peak(track, samples, moments)
    drawn = [*samples, *moments, *([peak] if peak else [])]
    end = max([t for t, _ in drawn] + (track.times[-1:].tolist() if track.found else []), default=0.0) or 1.0
    low, high = min([0.0, *(s for _, s in drawn)]), max([1.0, *(s for _, s in drawn)])

    def place(time: float, score: float) -> tuple[float, float]:
        return x1 + time / end * (x2 - x1), y2 - (score - low) / (high - low) * (y2 - y1)

    if track.found:
        left, right = (place(float(track.times[i]), 0)[0] for i in (0, -1))
        pen.rectangle((left, y1 + 1, right + 1, y2 - 1), fill=SPAN)
    times = round_numbers(0.0, end, 8) if ticks else [0.0, end]
    for score in round_numbers(low, high, 5) if ticks else ():
        y = place(0, score)[1]
        pen.line((x1, y, x2, y), fill=LINE)
        pen.text((x1 - 5, y), f"{score:g}", fill=INK, font=font(11), anchor="rm")
    pen.rectangle((x1, y1, x2, y2), outline=LINE)
    for time in times:
        x = place(time, 0)[0]
        pen.line((x, y2, x, y2 + 3), fill=INK)
        label = f"{time:g} s" if ticks else f"{time:.1f} s"
        half = pen.textlength(label, font=font(11)) / 2
        pen.text((min(max(x, area[0] + half), x2 - half), y2 + 4), label, fill=INK, font=font(11), anchor="mt")
    step = max(1, len(samples) // max(1, x2 - x1))  # a long video has more samples than the picture has columns
    parts = [samples[i : i + step] for i in range(0, len(samples), step)]
    curve = [place(*max(part, key=lambda sample: sample[1])) for part in parts]
    if len(curve) > 1:
        pen.line(curve, fill=CURVE, width=2)
    for moment in moments:
        _mark(pen, place(*moment), 4, PAPER, CURVE)
    if peak is not None:
        _mark(pen, place(*peak), 5, PEAK, INK)
    if ticks:
        _legend(pen, track, (x2, area[1] + 6), bool(moments), peak is not None)


def chosen_peak(
    track: Track, samples: Sequence[tuple[float, float]], moments: Sequence[tuple[float, float]]
) -> tuple[float, float] | None:
    """Seconds and score of what was tracked: the best candidate inside the track; where a later round went beyond the
    candidates, the track's own score at the best frame that was searched in it. None when nothing was found."""
    if not track.found:
        return None
    first, last = float(track.times[0]), float(track.times[-1])
    inside = [m for m in moments if first - 1e-3 <= m[0] <= last + 1e-3]
    if inside:
        return max(inside, key=lambda m: m[1])
    best = max((s for s in samples if first <= s[0] <= last), key=lambda s: s[1], default=(first, 0.0))
    return best[0], track.score if math.isfinite(track.score) else best[1]


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _mark(pen: ImageDraw.ImageDraw, at: tuple[float, float], radius: int, fill: Any, outline: Any) -> None:
    x, y = at
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline, width=2)


def _legend(pen: ImageDraw.ImageDraw, track: Track, corner: tuple[float, float], moments: bool, peak: bool) -> None:
    """What the marks mean, from the right ``corner`` leftwards."""
    x, y = corner
    marks = [("track", SPAN, LINE, track.found), ("chosen", PEAK, INK, peak), ("candidate", PAPER, CURVE, moments)]
    for label, fill, outline, shown in marks:
        if not shown:
            continue
        x -= pen.textlength(label, font=font(11))
        pen.text((x, y), label, fill=INK, font=font(11), anchor="lm")
        if label == "track":
            pen.rectangle((x - 15, y - 5, x - 5, y + 5), fill=fill, outline=outline)
        else:
            _mark(pen, (x - 10, y), 5, fill, outline)
        x -= 30


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
