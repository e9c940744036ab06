"""``locate``: the whole way from a video and a query to a box track. Every stage is a function of its own module."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from opsin import runtime
from opsin.errors import InvalidConfig, InvalidVideo
from opsin.geometry import check_box
from opsin.hub import atomic_path
from opsin.images import read_image
from opsin.localization import query as q
from opsin.localization import timeline as tl
from opsin.localization.recording import recorded
from opsin.tracking import follow as tr
from opsin.tracking.descriptors import DenseTokens, Kind, dense_tokens
from opsin.tracking.matching import Example, Found, Template, TokenSpace
from opsin.types import Track
from opsin.video import VideoFrame, VideoReader, open_video

if TYPE_CHECKING:
    from opsin.regions import RegionModel

CALIBRATION_FRAMES = 8  # spread over the video: what its background looks like
# What a cell is described by. On the same episodes, at its best threshold, stAP@0.25: features .107, region tokens 0,
# both .050. A region token says what kind of thing is there; which one of them the features know better.
TOKENS: Kind = "features"
SEARCH_SCALES = (0.5, 0.63, 0.8, 1.0, 1.26, 1.6, 2.0)
BATCH = 4
# Measured with opsin-tiny on 18 episodes cut from 6 tracking videos (a crop as query, 5 frames a second), and on the
# same films without the frames of the object's own video. Threshold: found with the object there; stAP@0.25; "found"
# without the object. 0.25: 17, .098; 9. 0.3: 11, .098; 7. 0.4: 8, .098; 5. 0.45: 5, .107; 3. 0.5: 3, .074; 0. Chosen on
# these very films, so expect somewhat worse elsewhere.
THRESHOLD = 0.45
SHARE = 0.55  # of the best score that a later occurrence needs to be preferred
KEEP = 0.4  # share of the peak's score at which the object counts as still there

Encode = Callable[[Sequence[Tensor]], list[DenseTokens]]


def locate(
    video: Any, *, image: Any = None, frame: int | None = None, box: Sequence[float] | None = None,
    point: Sequence[float] | None = None, model: str | Path | RegionModel = "opsin-tiny", rate: float | None = 5.0,
    threshold: float = THRESHOLD, search: str = "before", duration: float | None = None, size: int | None = None,
    tokens: Kind = TOKENS, device: Any = None, dtype: Any = None,
) -> Track:  # fmt: skip
    """The last time that an object was seen in a video, as one box per frame.

    The video is streamed twice: once at ``rate`` to score it, once at full rate around the last confident moment to
    follow the object both ways until it is gone. Memory does not grow with its length.

    Args:
        video: what ``opsin.open_video`` takes: a file, a folder or list of frames, a URL, a camera.
        image: a picture of the object (anything ``opsin.read_image`` takes); with ``box`` or ``point``, a picture that
            contains it, which tells the object from its surroundings and so works better.
        frame: instead of ``image``, the number of a frame of the video; needs ``box`` or ``point``.
        box, point: ``(x1, y1, x2, y2)`` or ``(x, y)``, pixels of the query's picture.
        model: a ``RegionModel``, or a reference to load one, on ``device`` in ``dtype``.
        rate: frames searched per second; None searches every frame. The track has every frame in either case.
        threshold: least score of the best occurrence; raise it for fewer false alarms.
        search: with ``frame``, ``"before"`` searches the frames before it (VQ2D: where was this last seen?), ``"all"``
            the whole video, in which the query's own moment usually is the answer.
        duration: only the first so many seconds are searched. Needed for a live source (a camera, a stream without an
            end), which is recorded that long to a temporary clip; frames and times are those of the recording.
        tokens: what a place is compared by: ``"features"`` of the backbone, ``"pred"`` or ``"proj"`` region tokens of a
            dense grid of prompts, or ``"both"``, features and pred. docs/benchmarks.md compares them.
        size: side of the square model input; None is 1.5 times the model's own, because objects may be small.

    Returns:
        Track: ``score`` about 1 for the query itself and 0 for the video's usual background; ``found`` False with the
        best score when nothing reaches the threshold.

    Raises:
        InvalidVideo, MissingFile, InvalidImage, InvalidPrompt, InvalidConfig, and what loading a model raises.

    Source: the task and its stages follow REN-VQL (arXiv 2505.18153, after RELOCATE, 2412.01826) with one round of
    search; the template is an exemplar discriminant (Hariharan et al., 2012).
    """
    if search not in ("before", "all"):
        raise InvalidConfig('search is "before" or "all"', got=search)
    if tokens not in get_args(Kind):
        raise InvalidConfig(f"tokens is one of {', '.join(get_args(Kind))}", got=tokens)
    from opsin.regions import RegionModel

    with recorded(video, duration) as reader:
        if isinstance(model, (str, Path)):
            model = RegionModel.from_pretrained(model, device=device, dtype=dtype)
        wanted = q.read_query(reader, model, image=image, frame=frame, box=box, point=point)
        until = wanted.time if search == "before" else None
        until = earlier(until, duration)
        encode = partial(dense_tokens, model, size=size or search_size(model), kind=tokens)
        template = learn(reader, wanted, encode, until)
        rows, template = search_pass(reader, wanted, template, encode, rate, until)
        at = tl.last_confident(rows.scores, threshold, SHARE)
        steps = [] if at is None else extend(reader, template, encode, rows, at, until)
        return as_track(reader, model, rows, at, steps)


def search_size(model: RegionModel) -> int:
    """1.5 times the side the model was made for, in whole patches; models with one fixed input keep theirs."""
    patch, side = model.backbone.patch_size, model.card.image_size
    return side if model.backbone.card.family == "openclip" else max(1, round(1.5 * side / patch)) * patch


def earlier(*times: float | None) -> float | None:
    """The least of those times that are known."""
    return min((t for t in times if t is not None), default=None)


def calibration_frames(reader: VideoReader, until: float | None) -> list[VideoFrame]:
    """A few frames spread over the video, by seeking; where the header does not tell its length, by reading it."""
    end = earlier(until, reader.duration) or 0.0
    found: dict[int, VideoFrame] = {}
    for i in range(CALIBRATION_FRAMES if end else 0):
        for f in reader.frames(start=end * (i + 0.5) / CALIBRATION_FRAMES):
            found[f.index] = f
            break
    if len(found) < CALIBRATION_FRAMES / 2:
        found |= {f.index: f for f in tl.thinned(reader.frames(1.0, stop=until), CALIBRATION_FRAMES)}
    return [found[n] for n in sorted(found)]


def learn(reader: VideoReader, wanted: q.Wanted, encode: Encode, until: float | None) -> Template:
    """The template of the object against the background of this video."""
    pictures = [f.image.float() / 255 for f in calibration_frames(reader, until)]
    if not pictures:
        pictures = [torch.full((3, *reader.size), 0.5)]
    background = encode(pictures)
    drawn = q.composites(wanted, pictures)
    scenes = encode([p for p, _ in drawn])
    examples = [Example(d, b) for d, (_, b) in zip(scenes, drawn, strict=True)]
    if wanted.scene is not None and wanted.box is not None:
        scene = encode([wanted.scene])[0]
        examples += [Example(scene, torch.tensor(wanted.box))] * max(1, len(examples) // 2)
    space = TokenSpace.fit([*background, *(e.dense for e in examples)])
    return Template.fit(space, examples, background)


def search_pass(
    reader: VideoReader, wanted: q.Wanted, template: Template, encode: Encode, rate: float | None, until: float | None
) -> tuple[tl.Timeline, Template]:
    """The best window of every sampled frame, scores smoothed in time; a scored frame is forgotten.

    Scores are counted from what this video usually gives to windows that are not the object, and so is what the
    template answers from then on. That level differs much: small and plain objects resemble many places.
    """
    sides = torch.tensor(wanted.size)[None] * torch.tensor(SEARCH_SCALES)[:, None]
    end = earlier(until, reader.duration)
    total = int(end * (rate or reader.fps)) if end else None
    rows: list[tuple[int, float, Tensor, float]] = []
    rivals: list[float] = []
    frames = runtime.progress(reader.frames(rate, stop=until), total=total, description="searching", unit="frame")
    for chunk in tl.in_chunks(frames, BATCH):
        for frame, dense in zip(chunk, encode([c.image for c in chunk]), strict=True):
            found, rival = template.best_and_rival(dense, sides)
            rows.append((frame.index, frame.time, found.box, found.score))
            rivals.append(rival)
    if not rows:
        raise InvalidVideo("There is at least one frame to search", got=f"{reader.name}: none before {wanted.source}")
    table = tl.Timeline.of(rows)
    level = torch.tensor(rivals).nanmedian().nan_to_num(0).clamp(0, 0.9).item()
    scores = (tl.median_filter(table.scores) - level) / (1 - level)
    return replace(table, scores=scores), replace(template, usual=level)


def extend(
    reader: VideoReader, template: Template, encode: Encode, rows: tl.Timeline, at: int, until: float | None
) -> list[tr.Step]:
    """Follow the object both ways from row ``at``, on every frame of the video."""

    start = tr.Step(int(rows.frames[at]), float(rows.times[at]), rows.boxes[at], float(rows.scores[at]))
    keep, natural = KEEP * start.score, start.box[2:] - start.box[:2]
    template = replace(template, size=natural)

    def measure(chunk: Sequence[VideoFrame]) -> list[Callable[[Tensor, Tensor | None], Found]]:
        return [partial(template.best, dense) for dense in encode([f.image for f in chunk])]

    after = tr.follow(tr.forwards(reader, start.time, until), measure, start, keep, natural)
    before = tr.follow(tr.backwards(reader, start.time), measure, start, keep, natural)
    return tr.join(before, start, after)


def as_track(
    reader: VideoReader, model: RegionModel, rows: tl.Timeline, at: int | None, steps: Sequence[tr.Step]
) -> Track:
    """The public result."""
    return Track(
        found=bool(steps),
        score=float(rows.scores.max() if at is None else rows.scores[at]),
        frames=torch.tensor([s.frame for s in steps], dtype=torch.long),
        times=torch.tensor([s.time for s in steps], dtype=torch.float64),
        boxes=tr.smooth(steps) if steps else torch.zeros((0, 4)),
        scores=torch.tensor([s.score for s in steps], dtype=torch.float32),
        timeline=torch.stack([rows.times, rows.scores.double()], -1),
        video=reader.name,
        model=model.name,
        skipped=reader.skipped,
        size=reader.size,
    )


def query_picture(
    video: Any, *, image: Any = None, frame: int | None = None, box: Sequence[float] | None = None
) -> Tensor:
    """The picture ``(3, h, w)`` of what was looked for, as a contact sheet shows it."""
    if frame is not None:
        with open_video(video) as reader:
            picture = reader.read_frame(frame).image.float() / 255
    else:
        picture = read_image(image)
    if box is None:
        return picture
    x1, y1, x2, y2 = check_box(list(box), (int(picture.shape[1]), int(picture.shape[2])))
    return picture[:, int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]


def save_track(track: Track, path: str | Path) -> Path:
    """Write a track as JSON: what ``Track.to_json`` gives, and the timeline."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    timeline = [[round(t, 4), round(s, 4)] for t, s in track.timeline.tolist()]
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(track.to_json() | {"timeline": timeline}, allow_nan=False) + "\n")
    return path
