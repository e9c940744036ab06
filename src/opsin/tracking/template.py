"""Tracking and masks with the tokens of a region model or backbone, without further weights.

They stand in where SAM 2 is absent: a track by the template that found the object, masks by growing a region of cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig
from opsin.geometry import check_box, check_points
from opsin.images import unfit
from opsin.tracking.base import Step, pairs
from opsin.tracking.descriptors import DenseTokens
from opsin.tracking.follow import backwards, check_seed, follow, forwards, glance, join, size_at
from opsin.tracking.masks import component_at, largest_component
from opsin.tracking.matching import Found, Template
from opsin.video import VideoFrame, VideoReader

KEEP = 0.4  # share of the seed's score at which the object counts as still there
SHARES = (0.4, 0.6, 0.8)  # cosines to the token of a point, from the whole thing to a part of it
CORE = 0.5  # share of a box's sides, around its centre, that surely is the object
RING = 0.3  # width of what surrounds a box, in its sides
BATCH = 4

T = TypeVar("T")
Encode = Callable[[Sequence[Tensor]], list[DenseTokens]]


class TemplateTracker:
    """``opsin.tracking.base.Tracker`` by a template of the object, slid over the dense tokens of every frame.

    Args:
        template: what was learned of the object; made for one query in one video.
        encode: pictures → dense tokens of the kind that the template was learned from.
        keep: share of the seed's score, in (0, 1], below which the object counts as gone.
    """

    name = "template"

    def __init__(self, template: Template, encode: Encode, keep: float = KEEP) -> None:
        if not 0 < keep <= 1:
            raise InvalidConfig("keep lies in (0, 1]", got=keep)
        self.template, self.encode, self.keep = template, encode, keep

    def track(self, reader: VideoReader, seed: Step, *, start: float = 0.0, stop: float | None = None) -> list[Step]:
        """As ``Tracker.track``. The seed's score is that of the template; its box is kept as given.

        A few frames in a row without the object are needed to end the track. A box stays within a factor of 2 of the
        seed's sides. A seed with a score that is not above 0 is not to be told from the background, and stays alone.
        """
        check_seed(seed, size_at(reader, seed), start, stop)
        if not seed.score > 0:
            return [seed]
        keep, natural = self.keep * seed.score, seed.box[2:] - seed.box[:2]
        template = replace(self.template, size=natural)

        def measure(chunk: Sequence[VideoFrame]) -> list[Callable[[Tensor, Tensor | None], Found]]:
            return [partial(template.best, dense) for dense in self.encode([f.image for f in chunk])]

        seen = next((glance(f.image) for f in reader.frames(indices=[seed.frame])), None)
        after = follow(forwards(reader, seed.time, stop), measure, seed, keep, natural, seen)
        before = follow(backwards(reader, seed.time, start), measure, seed, keep, natural, seen)
        return join(before, seed, after)


class TokenMasks:
    """``opsin.tracking.base.ObjectMasks`` by growing a region of like cells; as coarse as the grid of tokens.

    Tokens are compared by their cosine after the mean of their picture was taken from them.

    Args:
        encode: pictures → dense tokens.
        shares: least cosines to a point's token, one candidate mask for each.
    """

    name = "tokens"

    def __init__(self, encode: Encode, shares: Sequence[float] = SHARES) -> None:
        if not shares or not all(-1 < share < 1 for share in shares):
            raise InvalidConfig("shares are cosines between -1 and 1", got=shares)
        self.encode, self.shares = encode, tuple(shares)

    @torch.inference_mode()
    def from_boxes(self, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """``boxes (N_i, 4)`` → ``(N_i, H, W)``: pixels of a box more like its core than like what surrounds it."""
        checked = [[check_box(box, size) for box in some] for size, some in pairs(pictures, boxes)]
        results = []
        for dense, some in self._encoded(pictures, checked):
            masks = torch.zeros((len(some), *dense.transform.size), dtype=torch.bool)
            for mask, box in zip(masks, some, strict=True):
                x1, y1, x2, y2 = int(box[0]), int(box[1]), math.ceil(box[2]), math.ceil(box[3])
                mask[y1:y2, x1:x2] = _more_like_core(dense, torch.tensor(box))[y1:y2, x1:x2]
                mask.copy_(largest_component(mask))
            results.append(masks)
        return results

    @torch.inference_mode()
    def from_points(self, pictures: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor]:
        """``points (N_i, 2)`` → ``(N_i, K, H, W)``: for each share, the piece around the point that is like it."""
        checked = [check_points(some.float().cpu(), size) for size, some in pairs(pictures, points)]
        results = []
        for dense, some in self._encoded(pictures, checked):
            masks = torch.zeros((len(some), len(self.shares), *dense.transform.size), dtype=torch.bool)
            for candidates, point in zip(masks, some, strict=True):
                likeness = _likeness(dense, _cells(dense, point.repeat(2)))
                for mask, share in zip(candidates, self.shares, strict=True):
                    mask.copy_(component_at(likeness >= share, point))
            results.append(masks)
        return results

    def _encoded(self, pictures: Sequence[Tensor], prompts: Sequence[T]) -> Iterator[tuple[DenseTokens, T]]:
        for first in range(0, len(pictures), BATCH):
            group = slice(first, first + BATCH)
            yield from zip(self.encode(pictures[group]), prompts[group], strict=True)


def _cells(dense: DenseTokens, box: Tensor) -> Tensor:
    """Which cells ``(h, w)`` have their centre in a box of pixels, or at least the one that its centre is in."""
    height, width = dense.tokens.shape[1:]
    x1, y1, x2, y2 = dense.to_cells(box.float()).tolist()
    xs, ys = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    cells = ((ys >= y1) & (ys < y2))[:, None] & (xs >= x1) & (xs < x2)
    cells[min(int((y1 + y2) / 2), height - 1), min(int((x1 + x2) / 2), width - 1)] = True
    return cells


def _likeness(dense: DenseTokens, cells: Tensor) -> Tensor:
    """Cosine of every pixel ``(H, W)`` to the mean token of some ``cells (h, w)``."""
    tokens = F.normalize(dense.tokens - dense.tokens.mean((1, 2), keepdim=True), dim=0)
    token = F.normalize(tokens[:, cells].mean(1), dim=0)
    return unfit(torch.einsum("d,dhw->hw", token, tokens)[None], dense.transform)[0]


def _more_like_core(dense: DenseTokens, box: Tensor) -> Tensor:
    """Pixels ``(H, W)`` more like the middle of a box than like the ring around it; without a ring, like the middle."""
    centre, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    core = _likeness(dense, _cells(dense, torch.cat([centre - side * CORE / 2, centre + side * CORE / 2])))
    ring = _cells(dense, torch.cat([box[:2] - RING * side, box[2:] + RING * side])) & ~_cells(dense, box)
    return core > (_likeness(dense, ring) if bool(ring.any()) else 0)
