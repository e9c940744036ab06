"""Is the object in this picture, and where: a small linear template, learned from the query, slid over dense tokens.

``TokenSpace`` removes what all pictures of this video share; ``Template`` is a linear discriminant (Hariharan, Malik
and Ramanan, 2012) between the query and the video's background, so that scoring every window of a picture costs a 1×1
convolution and a few running sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.geometry import box_iou
from opsin.tracking.descriptors import DenseTokens

PARTS = 2  # a window is described by PARTS × PARTS cells and by what surrounds it
AROUND = 0.3
FINE = 96  # windows move on a grid at least this fine
SPACE_DIM = 96
AXIS_SHRINKAGE = 0.1
SHRINKAGE = 1.0
NEGATIVE_SCALES = (0.6, 1.0, 1.6)  # smaller and larger windows are wrong answers too
BACKGROUND_WINDOWS = 300  # per picture
SIZE_PRIOR = 0.1  # what a window of half or twice the object's size loses: small ones vary more and would win by chance


@dataclass(frozen=True, eq=False)
class TokenSpace:
    """Centred, decorrelated, shorter tokens: ``basis (K, D)`` applied to ``token - mean (D,)``."""

    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, maps: Sequence[DenseTokens]) -> TokenSpace:
        """From the tokens of some pictures of the video: principal axes, variances shrunk towards their mean."""
        tokens = torch.cat([m.tokens.flatten(1) for m in maps], 1)
        mean = tokens.mean(1)
        values, vectors = torch.linalg.eigh(torch.cov(tokens.double()))
        kept = slice(max(0, len(values) - SPACE_DIM), None)
        scale = (values[kept].clamp(min=0) + AXIS_SHRINKAGE * values.mean()).rsqrt()
        return cls(mean, (vectors[:, kept] * scale).T.float())

    def __call__(self, tokens: Tensor) -> Tensor:
        """``(D, h, w)`` → ``(K, h, w)``."""
        return F.normalize(torch.einsum("kd,dhw->khw", self.basis, tokens - self.mean[:, None, None]), dim=0)


def refine_grid(maps: Tensor) -> tuple[Tensor, int]:
    """``maps (C, h, w)`` refined by the least whole factor that gives ``FINE`` cells a side, and the factor."""
    factor = max(1, -(-FINE // max(maps.shape[1:])))
    if factor == 1:
        return maps, 1
    return F.interpolate(maps[None], scale_factor=factor, mode="bilinear")[0], factor


def running_sum(maps: Tensor) -> Tensor:
    """``(C, h, w)`` → ``(C, h + 1, w + 1)`` integral image."""
    return F.pad(maps.double().cumsum(1).cumsum(2), (1, 0, 1, 0))


def cuts(length: int) -> list[int]:
    """Where a side of ``length`` cells is cut into ``PARTS``: ``PARTS + 1`` offsets."""
    return [round(length * i / PARTS) for i in range(PARTS + 1)]


def part_means(sums: Tensor, boxes: Tensor) -> Tensor:
    """Mean token of every part of whole-cell ``boxes (N, 4)``: and of its surroundings: ``(N, PARTS² + 1, C)``."""
    x1, y1, x2, y2 = boxes.long().T
    means = []
    for row in range(PARTS):
        top = y1 + ((y2 - y1) * row).div(PARTS, rounding_mode="floor")
        bottom = torch.maximum(y1 - (-(y2 - y1) * (row + 1)).div(PARTS, rounding_mode="floor"), top + 1)
        for col in range(PARTS):
            left = x1 + ((x2 - x1) * col).div(PARTS, rounding_mode="floor")
            right = torch.maximum(x1 - (-(x2 - x1) * (col + 1)).div(PARTS, rounding_mode="floor"), left + 1)
            total = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
            means.append((total / ((right - left) * (bottom - top))).T)
    return torch.stack([*means, around_mean(sums, x1, y1, x2, y2)], 1).float()


def around_mean(sums: Tensor, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    """Mean token ``(N, C)`` of the frame around a window, ``AROUND`` of a side wide; beyond the picture tokens are 0.

    It tells a window that is too small, with more of the object around it, from one that fits.
    """
    dx, dy = ((x2 - x1) * AROUND).round().long().clamp(min=1), ((y2 - y1) * AROUND).round().long().clamp(min=1)
    height, width = sums.shape[1] - 1, sums.shape[2] - 1

    def total(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
        left, right, top, bottom = left.clamp(min=0), right.clamp(max=width), top.clamp(min=0), bottom.clamp(max=height)
        return sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]

    area = (x2 - x1 + 2 * dx) * (y2 - y1 + 2 * dy) - (x2 - x1) * (y2 - y1)
    return ((total(x1 - dx, y1 - dy, x2 + dx, y2 + dy) - total(x1, y1, x2, y2)) / area).T


def window_grid(extent: tuple[int, int], sides: Sequence[tuple[int, int]], step: float = 0.25) -> Tensor:
    """Whole-cell windows ``(N, 4)`` of the ``sides`` (width, height), every ``step`` of a side, inside ``(h, w)``."""
    boxes = []
    for width, height in sides:
        xs = torch.arange(0, extent[1] - width + 1, max(1, round(width * step)))
        ys = torch.arange(0, extent[0] - height + 1, max(1, round(height * step)))
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        boxes.append(torch.stack([x, y, x + width, y + height], -1).reshape(-1, 4))
    return torch.cat(boxes)


def clamp_side(side: float, limit: int) -> int:
    """A window side in whole cells, between 2 and the picture."""
    return max(min(2, limit), min(limit, round(side)))


@dataclass(frozen=True, eq=False)
class Example:
    """A picture's dense tokens and the object's box in original pixels ``(4,)``."""

    dense: DenseTokens
    box: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """A window of a picture: ``box (4,)`` pixels, ``response`` of the template (1 like the query, 0 like the
    background), ``similarity`` cosine of its mean token to the query in the video's token space, and the ``usual``
    mean of the two that this video gives to windows that are not the object."""

    box: Tensor
    response: float
    similarity: float
    usual: float = 0.0

    @property
    def score(self) -> float:
        """Mean of the two: the template knows the layout, the cosine is not fooled by strong tokens. ``usual`` is 0."""
        return ((min(self.response, 1.5) + self.similarity) / 2 - self.usual) / (1 - self.usual)


@dataclass(frozen=True, eq=False)
class Scan:
    """The response of every window of a picture, less for odd sizes: ``(width, height, map of top-left corners)``.

    In cells of a grid ``factor`` times finer than that of the projected ``tokens (K, h, w)``.
    """

    tokens: Tensor
    factor: int
    maps: list[tuple[int, int, Tensor]]

    def top(self) -> tuple[float, Tensor] | None:
        """Highest response and its window ``(4,)``; None where no window is left."""
        best: tuple[float, Tensor] | None = None
        for width, height, scores in self.maps:
            value, place = scores.flatten().max(0)
            if value.item() > (best[0] if best else -float("inf")):
                y, x = divmod(int(place), scores.shape[1])
                best = value.item(), torch.tensor([x, y, x + width, y + height], dtype=torch.float32)
        return best

    def centred(self, area: Tensor) -> Scan:
        """Only the windows whose centre is in ``area (4,)``."""
        return self._only(area, 0.5, 0.5, keep=True)

    def apart(self, area: Tensor) -> Scan:
        """Only the windows that do not touch ``area (4,)``."""
        return self._only(area, 0.0, 1.0, keep=False)

    def _only(self, area: Tensor, low: float, high: float, keep: bool) -> Scan:
        """Windows that reach into ``area`` from the share ``high`` of their sides, up to the share ``low``."""
        x1, y1, x2, y2 = area.tolist()
        maps = []
        for width, height, scores in self.maps:
            rows, cols = torch.arange(scores.shape[0]), torch.arange(scores.shape[1])
            inside_rows = (rows + high * height >= y1) & (rows + low * height <= y2)
            inside = inside_rows[:, None] & (cols + high * width >= x1) & (cols + low * width <= x2)
            maps.append((width, height, scores.masked_fill(inside != keep, -float("inf"))))
        return Scan(self.tokens, self.factor, maps)


@dataclass(frozen=True, eq=False)
class Template:
    """``weights (PARTS² + 1, K)`` and ``bias`` over the parts of a window; ``token (K,)`` the object's mean token;
    ``size (2,)`` its usual width and height in pixels; ``usual`` as in ``Found``, known once a video was searched."""

    space: TokenSpace
    weights: Tensor
    bias: float
    token: Tensor
    size: Tensor
    usual: float = 0.0

    @classmethod
    def fit(
        cls, space: TokenSpace, examples: Sequence[Example], background: Sequence[DenseTokens], seed: int = 0
    ) -> Template:
        """Learn the object of ``examples`` against the rest of their pictures and against ``background`` pictures."""
        generator = torch.Generator().manual_seed(seed)
        objects, others, wholes = [], [], []
        for example in examples:
            fine, factor = refine_grid(space(example.dense.tokens))
            sums = running_sum(fine)
            box = whole_cells(example.dense.to_cells(example.box) * factor, fine.shape[1:])
            sides = [
                (
                    clamp_side(float(box[2] - box[0]) * f, fine.shape[2]),
                    clamp_side(float(box[3] - box[1]) * f, fine.shape[1]),
                )
                for f in NEGATIVE_SCALES
            ]
            windows = torch.cat([box[None], window_grid((fine.shape[1], fine.shape[2]), sides)])
            overlap = box_iou(windows.float(), box[None].float())[:, 0]
            objects.append(part_means(sums, windows[overlap > 0.7]).mean(0))
            far = windows[overlap < 0.4]
            others.append(part_means(sums, far[torch.randperm(len(far), generator=generator)[:BACKGROUND_WINDOWS]]))
            wholes.append(F.normalize(part_means(sums, box[None])[0, :-1].mean(0), dim=0))
            for dense in background:
                if dense is not example.dense and dense.tokens.shape == example.dense.tokens.shape:
                    picked = windows[
                        torch.randperm(len(windows), generator=generator)[: BACKGROUND_WINDOWS // len(examples)]
                    ]
                    others.append(part_means(running_sum(refine_grid(space(dense.tokens))[0]), picked))
        negative = torch.cat(others).flatten(1).double()
        mean = negative.mean(0)
        positive = torch.stack(objects).flatten(1).double().mean(0) - mean
        spread = (negative - mean).T @ (negative - mean) / max(len(negative), 1)
        spread += (SHRINKAGE * spread.diagonal().mean() + 1e-8) * torch.eye(len(spread), dtype=spread.dtype)
        weights = torch.linalg.solve(spread, positive)
        weights = weights / (weights @ positive).clamp(min=1e-12)
        token = F.normalize(torch.stack(wholes).mean(0), dim=0)
        size = torch.stack([e.box[2:] - e.box[:2] for e in examples]).float().median(0).values
        return cls(space, weights.float().reshape(PARTS**2 + 1, -1), -float(weights @ mean), token, size)

    def scan(self, dense: DenseTokens, sides: Tensor) -> Scan:
        """Every window of ``sides (S, 2)``, (width, height) in original pixels."""
        tokens = self.space(dense.tokens)
        maps, factor = refine_grid(torch.einsum("pk,khw->phw", self.weights, tokens))
        sums = running_sum(maps)
        height, width = maps.shape[1:]
        asked = torch.cat([self.size[None], sides])
        cells = dense.to_cells(torch.cat([torch.zeros_like(asked), asked], -1)) * factor
        (natural_w, natural_h), *extents = (cells[:, 2:] - cells[:, :2]).tolist()
        scored = []
        for w, h in dict.fromkeys((clamp_side(w, width), clamp_side(h, height)) for w, h in extents):
            octaves = abs(math.log2(w * h / (natural_w * natural_h))) / 2
            scored.append((w, h, self._slide(sums, w, h) - SIZE_PRIOR * octaves))
        return Scan(tokens, factor, scored)

    def best(self, dense: DenseTokens, sides: Tensor, near: Tensor | None = None) -> Found:
        """The best window over ``sides``; ``near (4,)`` pixels limits centres."""
        scan = self.scan(dense, sides)
        if near is not None:
            scan = scan.centred(dense.to_cells(near) * scan.factor)
        return self._found(dense, scan, *(scan.top() or (-float("inf"), torch.zeros(4))))

    def best_and_rival(self, dense: DenseTokens, sides: Tensor) -> tuple[Found, float]:
        """The best window, and the score of the best that does not touch it: what is not the object reaches that.

        The rival is NaN where the best window leaves no room for another.
        """
        scan = self.scan(dense, sides)
        best = scan.top() or (-float("inf"), torch.zeros(4))
        rival = scan.apart(best[1]).top()
        score = float("nan") if rival is None else self._found(dense, scan, *rival).score
        return self._found(dense, scan, *best), score

    def _found(self, dense: DenseTokens, scan: Scan, response: float, window: Tensor) -> Found:
        cells = window / scan.factor
        similarity = self.similarity(scan.tokens, cells)
        return Found(dense.to_pixels(cells), response + self.bias, similarity, self.usual)

    def similarity(self, tokens: Tensor, box: Tensor) -> float:
        """Cosine of the mean token of ``box`` (cells) of projected ``tokens (K, h, w)`` to the object's."""
        fine, factor = refine_grid(tokens)
        mean = part_means(running_sum(fine), whole_cells(box * factor, fine.shape[1:])[None])[0, :-1].mean(0)
        return float(F.normalize(mean, dim=0) @ self.token)

    def _slide(self, sums: Tensor, width: int, height: int) -> Tensor:
        """Response ``(rows, cols)`` of every window of one size, before the bias."""
        rows, cols = sums.shape[1] - height, sums.shape[2] - width
        xs, ys = cuts(width), cuts(height)
        total = torch.zeros((rows, cols), dtype=sums.dtype)
        for i in range(PARTS):
            for j in range(PARTS):
                plane = sums[i * PARTS + j]
                top, bottom = ys[i], max(ys[i + 1], ys[i] + 1)
                left, right = xs[j], max(xs[j + 1], xs[j] + 1)

                def corner(y: int, x: int, plane: Tensor = plane) -> Tensor:
                    return plane[y : y + rows, x : x + cols]

                part = corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)
                total += part / ((bottom - top) * (right - left))
        plane = sums[-1]
        dx, dy = max(1, round(width * AROUND)), max(1, round(height * AROUND))

        def clamped(top: int, bottom: int, left: int, right: int) -> Tensor:
            low, high = ((torch.arange(rows) + y).clamp(0, plane.shape[0] - 1) for y in (top, bottom))
            near, far = ((torch.arange(cols) + x).clamp(0, plane.shape[1] - 1) for x in (left, right))
            return plane[high][:, far] - plane[low][:, far] - plane[high][:, near] + plane[low][:, near]

        outer = clamped(-dy, height + dy, -dx, width + dx) - clamped(0, height, 0, width)
        return total + outer / ((width + 2 * dx) * (height + 2 * dy) - width * height)


def whole_cells(box: Tensor, extent: Sequence[int]) -> Tensor:
    """A box in cells rounded to whole cells, at least 2 a side where the grid allows, inside ``(h, w)``."""
    height, width = int(extent[0]), int(extent[1])
    w, h = clamp_side(float(box[2] - box[0]), width), clamp_side(float(box[3] - box[1]), height)
    x = min(max(round(float(box[0] + box[2] - w) / 2), 0), width - w)
    y = min(max(round(float(box[1] + box[3] - h) / 2), 0), height - h)
    return torch.tensor([x, y, x + w, y + h])
