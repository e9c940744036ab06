"""A finder that learns a small template of the object against the background of this very video.

It needs one model and no masks, and compares dense features rather than region tokens: on the episodes it was measured
on (docs/benchmarks.md) it is ahead of the region tokens of the embedded model, which say what kind of thing is there,
not which one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsin.geometry import ImageTransform
from opsin.localization.query import Wanted, composites
from opsin.tracking.base import Step, Tracker
from opsin.tracking.descriptors import DenseTokens
from opsin.tracking.matching import Example, Template, TokenSpace
from opsin.tracking.template import TemplateTracker
from opsin.video import VideoFrame, VideoReader
from opsin.vql.crops import crop_around
from opsin.vql.store import Shot
from opsin.vql.timeline import Timeline, median_filter, thinned

CALIBRATION_FRAMES = 8  # spread over the video: what its background looks like
SEARCH_SCALES = (0.5, 0.63, 0.8, 1.0, 1.26, 1.6, 2.0)
CLOSE_SCALES = (0.7, 0.85, 1.0, 1.2, 1.4)
ZOOM = 2.0  # magnification of a second look
KEEP = 0.4  # share of the peak's score at which the object counts as still there
VIEWS = 6  # frames of a track that a second round learns from

Encode = Callable[[Sequence[Tensor]], list[DenseTokens]]


@dataclass(eq=False)
class TemplateFinder:
    """``template`` slid over dense tokens; ``size (2,)`` width and height of the object as it was asked for, pixels;
    ``examples`` and ``background`` it was learned from."""

    template: Template
    encode: Encode
    size: Tensor
    examples: list[Example]
    background: list[DenseTokens]
    rivals: list[float]

    def score(self, shot: Shot) -> tuple[float, Tensor]:
        """The best window, its score still counted from nothing; what the rest of the picture reaches is noted."""
        sides = self.size[None] * torch.tensor(SEARCH_SCALES)[:, None]
        found, rival = self.template.best_and_rival(as_dense(shot), sides)
        self.rivals.append(rival)
        return found.score, found.box

    def settled(self, timeline: Timeline) -> tuple[Timeline, TemplateFinder]:
        """Smoothed, and counted from what this video usually gives to windows that are not the object.

        That level differs much: small and plain objects resemble many places.
        """
        level = torch.tensor(self.rivals).nanmedian().nan_to_num(0).clamp(0, 0.9).item() if self.rivals else 0.0
        scores = (median_filter(timeline.scores) - level) / (1 - level)
        return replace(timeline, scores=scores), replace(self, template=replace(self.template, usual=level), rivals=[])

    def refine(self, reader: VideoReader, moments: Sequence[Step]) -> list[Step]:
        """Boxes from the part of the frame around each moment's box, enlarged: a window there is a finer one.

        The score is the mean of what the moment had and of what the close-up gives, so that a moment has to stand both.
        """
        refined = []
        frames = {m.frame: m for m in moments}
        for frame in reader.frames(indices=list(frames)):
            moment = frames[frame.index]
            crop = crop_around(frame.image, moment.box, ZOOM)
            factor = torch.tensor(crop.transform.scale)
            near = replace(self.template, size=self.template.size * factor)
            sides = (moment.box[2:] - moment.box[:2]) * factor * torch.tensor(CLOSE_SCALES)[:, None]
            found = near.best(self.encode([crop.picture])[0], sides, crop.to_crop(moment.box))
            score = (moment.score + found.score) / 2
            refined.append(Step(moment.frame, moment.time, crop.to_whole(found.box), score))
        return refined

    def expanded(self, reader: VideoReader, track: Sequence[Step]) -> TemplateFinder:
        """Learned again, with some frames of the track as further examples."""
        measured = [s for s in track if s.score == s.score]
        chosen = {s.frame: s for s in measured[:: max(1, len(measured) // VIEWS)][:VIEWS]}
        if not chosen:
            return self
        pictures = list(reader.frames(indices=list(chosen)))
        dense = self.encode([f.image for f in pictures])
        more = [Example(d, chosen[f.index].box) for f, d in zip(pictures, dense, strict=True)]
        template = Template.fit(self.template.space, [*self.examples, *more], self.background)
        return replace(self, template=replace(template, usual=self.template.usual), rivals=[])

    def tracker(self) -> Tracker:
        """The template itself, followed from frame to frame."""
        return TemplateTracker(self.template, self.encode, keep=KEEP)


def learn(reader: VideoReader, asked: Sequence[Wanted], encode: Encode, until: float | None) -> TemplateFinder:
    """The object in one or several pictures, against the background of this video up to ``until`` seconds."""
    pictures = [f.image.float() / 255 for f in calibration_frames(reader, until)]
    if not pictures:
        pictures = [torch.full((3, *reader.size), 0.5)]
    background = encode(pictures)
    drawn = [p for wanted in asked for p in composites(wanted, pictures)]
    scenes = encode([p for p, _ in drawn])
    examples = [Example(d, b) for d, (_, b) in zip(scenes, drawn, strict=True)]
    for wanted in asked:
        if wanted.scene is not None and wanted.box is not None:
            scene = encode([wanted.scene])[0]
            examples += [Example(scene, torch.tensor(wanted.box))] * max(1, len(pictures) // 2)
    space = TokenSpace.fit([*background, *(e.dense for e in examples)])
    size = torch.tensor([wanted.size for wanted in asked]).median(0).values
    return TemplateFinder(Template.fit(space, examples, background), encode, size, examples, background, [])


def calibration_frames(reader: VideoReader, until: float | None) -> list[VideoFrame]:
    """A few frames spread over the video, by seeking; where the header does not tell its length, by reading it."""
    end = min((t for t in (until, reader.duration) if t is not None), default=0.0)
    found: dict[int, VideoFrame] = {}
    for i in range(CALIBRATION_FRAMES if end else 0):
        for f in reader.frames(start=end * (i + 0.5) / CALIBRATION_FRAMES):
            found[f.index] = f
            break
    if len(found) < CALIBRATION_FRAMES / 2:
        found |= {f.index: f for f in thinned(reader.frames(1.0, stop=until), CALIBRATION_FRAMES)}
    return [found[n] for n in sorted(found)]


def as_tensors(dense: Sequence[DenseTokens]) -> list[dict[str, Tensor]]:
    """Dense tokens in the form that a token store keeps, half as large."""
    return [{"tokens": d.tokens.half(), "transform": torch.tensor([*d.transform.size, *d.transform.canvas,
             *d.transform.scale, *d.transform.offset], dtype=torch.float64)} for d in dense]  # fmt: skip


def as_dense(shot: Shot) -> DenseTokens:
    """What ``as_tensors`` made."""
    height, width, rows, columns, sx, sy, ox, oy = shot.tensors["transform"].tolist()
    transform = ImageTransform((int(height), int(width)), (int(rows), int(columns)), (sx, sy), (ox, oy))
    return DenseTokens(shot.tensors["tokens"].float(), transform)
