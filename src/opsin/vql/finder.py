"""The published way to know an object: tokens of it at several magnifications, compared with every token of a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsin.geometry import mask_boxes
from opsin.tracking.base import ObjectMasks, Step, Tracker
from opsin.video import VideoReader
from opsin.vql.crops import Crop, crop_around, cropping_factor, views, zoom
from opsin.vql.expansion import expand, worth_learning
from opsin.vql.preset import Preset
from opsin.vql.query_tokens import choose
from opsin.vql.sources import PointTokens, TokenSource, matching, similarity
from opsin.vql.store import Encode, Shot
from opsin.vql.timeline import Timeline, in_chunks

BATCH = 4  # frames whose candidates are refined together
MOST_ADDED = 64  # tokens that join a query: every one is compared with the whole video


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of an object: ``tokens (Q, D)`` to be found by; mean features inside its mask to tell masks apart
    by, ``whole (K, D')`` in full frames and ``close (K, D')`` in crops. ``others (M, D)``: what it is not, with the
    ``scale`` of a softmax over both; without them a score is a plain cosine."""

    tokens: Tensor
    whole: Tensor
    close: Tensor
    others: Tensor | None = None
    scale: float = 1.0

    def scores(self, tokens: Tensor) -> Tensor:
        """``(N,)`` of ``tokens (N, D)``: the best cosine to the object; or, against others, the least probability of
        the object beside any one of them."""
        best = similarity(tokens, self.tokens).amax(-1)
        if self.others is None:
            return best
        return ((best - similarity(tokens, self.others).amax(-1)) * self.scale).sigmoid()


class TokenFinder:
    """Finds an object by its ``known`` tokens from ``source``; ``masks`` turns points and boxes into masks.

    ``follower`` is a tracker that needs no further weights.
    """

    def __init__(
        self, source: TokenSource, masks: ObjectMasks, preset: Preset, known: Known, follower: Tracker
    ) -> None:
        self.source, self.masks, self.preset, self.known, self.follower = source, masks, preset, known, follower

    def score(self, shot: Shot) -> tuple[float, Tensor]:
        """Stage 2, and the maximum of stage 3: the token most like the object; its point as a box without area."""
        scores = self.known.scores(shot.tensors["tokens"].float())
        top = int(scores.argmax())
        point = shot.tensors["points"][top].float()
        return float(scores[top]), torch.cat([point, point])

    def settled(self, timeline: Timeline) -> tuple[Timeline, TokenFinder]:
        """As it is: cosines compare between videos as far as the model makes them."""
        return timeline, self

    def refine(self, reader: VideoReader, moments: Sequence[Step]) -> list[Step]:
        """Stage 4: the box around each point, crops around that box, the best token in them, and the box around it.

        Frames are decoded once, candidates of ``BATCH`` frames are handed to the models together.
        """
        table = {m.frame: m for m in moments}
        refined: list[Step] = []
        for frames in in_chunks(reader.frames(indices=list(table)), BATCH):
            here = [table[f.index] for f in frames]
            pictures = [f.image.float() / 255 for f in frames]  # the same objects throughout: sources know them again
            rough = self._boxes(pictures, [centre(m.box) for m in here], self.known.whole)
            crops, owners = [], []
            for i, (picture, box) in enumerate(zip(pictures, rough, strict=True)):
                found = [] if box is None else zoom(picture, box, self.preset.query_factors)
                crops += found
                owners += [i] * len(found)
            best: dict[int, tuple[float, Crop, Tensor]] = {}
            for i, crop, tokens in zip(owners, crops, self.source.tokens([c.picture for c in crops]), strict=True):
                scores = self.known.scores(tokens.tokens)
                top = int(scores.argmax())
                if i not in best or float(scores[top]) > best[i][0]:
                    best[i] = float(scores[top]), crop, tokens.points[top]
            chosen = list(best.items())
            points = [point for _, (_, _, point) in chosen]
            fine = self._boxes([crop.picture for _, (_, crop, _) in chosen], points, self.known.close)
            for (i, (score, crop, _)), box in zip(chosen, fine, strict=True):
                whole = crop.to_whole(box) if box is not None else rough[i]
                if whole is not None:
                    refined.append(Step(here[i].frame, here[i].time, whole, score))
        return refined

    def expanded(self, reader: VideoReader, track: Sequence[Step]) -> TokenFinder:
        """Stage 6: tokens of the track that are like the object, from sharp frames that show it large enough.

        Frames are spread over the track, and each has one mask, which serves all magnifications.
        """
        spots = torch.linspace(0, len(track) - 1, min(len(track), self.preset.expansion_frames)).round().long()
        table = {track[i].frame: track[i] for i in spots.tolist()}
        tokens, moments, usable = [], [], []
        for frames in in_chunks(reader.frames(indices=list(table)), BATCH):
            for frame in frames:
                box = table[frame.index].box
                usable.append(worth_learning(frame.image, box, self.preset))
                if usable[-1]:
                    picture = frame.image.float() / 255
                    seen = magnified(self.source, self.masks, [picture], [box], self.preset, once=True)
                    tokens.append(seen)
                    moments += [len(usable) - 1] * len(seen)
        if not moments:
            return self
        added = expand(self.known.tokens, torch.cat(tokens), torch.tensor(moments), torch.tensor(usable),
                       preset=self.preset, most=MOST_ADDED).tokens  # fmt: skip
        known = replace(self.known, tokens=torch.cat([self.known.tokens, added]))
        return TokenFinder(self.source, self.masks, self.preset, known, self.follower)

    def tracker(self) -> Tracker:
        """The one that was handed over."""
        return self.follower

    def _boxes(self, pictures: Sequence[Tensor], points: Sequence[Tensor], like: Tensor) -> list[Tensor | None]:
        """The box of the object at each point: of the candidate masks the one whose mean feature is most like it."""
        if not pictures:
            return []
        masks = [m[0] for m in self.masks.from_points(pictures, [p[None] for p in points])]
        means = self.source.object_tokens(pictures, masks)
        boxes: list[Tensor | None] = []
        for candidates, mean in zip(masks, means, strict=True):
            usable = candidates.flatten(1).any(1)
            scores = similarity(mean, like).amax(-1).masked_fill(~usable, -float("inf"))
            boxes.append(mask_boxes(candidates[scores.argmax()][None])[0].float() if bool(usable.any()) else None)
        return boxes


def object_tokens(
    source: TokenSource, masks: ObjectMasks, pictures: Sequence[Tensor], boxes: Sequence[Tensor], preset: Preset
) -> Known:
    """Stage 1: the object in ``boxes (4,)`` of ``pictures``."""
    near = [
        crop_around(p, b, cropping_factor(b, size_of(p), preset.crop_margin, preset.crop_limits))
        for p, b in zip(pictures, boxes, strict=True)
    ]
    inside = [c.to_crop(b) for c, b in zip(near, boxes, strict=True)]
    return Known(
        magnified(source, masks, pictures, boxes, preset),
        _pooled(source, masks, pictures, boxes),
        _pooled(source, masks, [c.picture for c in near], inside),
    )


def magnified(
    source: TokenSource, masks: ObjectMasks, pictures: Sequence[Tensor], boxes: Sequence[Tensor], preset: Preset, *,
    once: bool = False,
) -> Tensor:  # fmt: skip
    """Tokens ``(Q, D)`` of the object in ``boxes``, one for every magnification that differs.

    Every crop has a mask of its own, which is sharper for small objects, or ``once`` the part of one mask per picture.
    An object too small for any point of the grid has the token of the nearest one.
    """
    tokens: list[Tensor] = []
    for picture, box in zip(pictures, boxes, strict=True):
        crops = zoom(picture, box, preset.query_factors)
        inside = [c.to_crop(box) for c in crops]
        if once:
            whole = masks_in(masks, [picture], [box])[0]
            shapes = [c.cut(whole) for c in crops]
        else:
            shapes = masks_in(masks, [c.picture for c in crops], inside)
        answers = source.tokens([c.picture for c in crops])
        found = [choose(m, a.points, a.tokens) for a, m in zip(answers, shapes, strict=True)]
        tokens += [t for t in found if t is not None] or [nearest(answers[-1], centre(inside[-1]))]
    return torch.stack(tokens)


def encode_views(source: TokenSource, preset: Preset, known: Tensor | None = None) -> Encode:
    """What a token store keeps of a frame: tokens of the frame and of its tiles, at points of the frame.

    ``known (Q, D)``: only those that may be this object, as published, which are few, and of no use to other queries.
    """

    def encode(pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        tiles = [views(p, preset.video_factors, preset.video_overlap) for p in pictures]
        answers = iter(source.tokens([c.picture for found in tiles for c in found]))
        shots = []
        for found in tiles:
            parts = [(next(answers), crop) for crop in found]
            if known is not None:
                parts = [(t.select(matching(t.tokens, known, preset.match_threshold)), c) for t, c in parts]
            points = torch.cat([c.to_whole(t.points) for t, c in parts])
            shots.append({"tokens": torch.cat([t.tokens for t, _ in parts]).half(), "points": points.float()})
        return shots

    return encode


def centre(box: Tensor) -> Tensor:
    """``(2,)``."""
    return (box[:2] + box[2:]) / 2


def size_of(picture: Tensor) -> tuple[int, int]:
    """``(H, W)``."""
    return int(picture.shape[1]), int(picture.shape[2])


def nearest(found: PointTokens, point: Tensor) -> Tensor:
    """The token ``(D,)`` whose point is the closest."""
    return found.tokens[(found.points - point).norm(dim=-1).argmin()]


def masks_in(masks: ObjectMasks, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
    """The mask ``(H, W)`` of the object in one box ``(4,)`` of each picture; where none is found, the box itself."""
    found = [m[0] for m in masks.from_boxes(pictures, [b[None] for b in boxes])] if pictures else []
    filled = []
    for mask, box in zip(found, boxes, strict=True):
        if not bool(mask.any()):
            x1, y1, x2, y2 = (max(0, round(float(v))) for v in box)
            mask = mask.clone()
            mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
        filled.append(mask)
    return filled


def _pooled(source: TokenSource, masks: ObjectMasks, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
    shapes = masks_in(masks, pictures, boxes)
    means = source.object_tokens(pictures, [m[None] for m in shapes]) if pictures else []
    return torch.cat(means) if means else torch.zeros((0, source.dim))
