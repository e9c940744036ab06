"""Baseline for visual queries: normalised cross-correlation of the query crop with every frame, at several sizes.

The frame score is the largest correlation; the answer is the last run of frames whose smoothed score reaches a
threshold, each with its best box. The threshold is chosen on the episodes of *other* videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin import images
from opsin.errors import InputError, MissingExtra
from opsin.vq2d.metrics import BoxTrack, TrackScores

SCALES = (0.5, 0.71, 1.0, 1.41, 2.0)
SMALLEST = 6  # pixels: a smaller template correlates with anything
ABSOLUTE = tuple(np.arange(0.3, 0.96, 0.025).round(3).tolist())
RELATIVE = tuple(np.arange(0.6, 1.0, 0.025).round(3).tolist())


@dataclass(frozen=True)
class Rule:
    """When a frame counts: smoothed score ≥ ``level``, or ≥ ``level`` times the largest one of the video
    (``relative``).
    """

    level: float
    relative: bool = False


RULES = tuple(Rule(v) for v in ABSOLUTE) + tuple(Rule(v, True) for v in RELATIVE)


@dataclass(frozen=True, eq=False)
class Matches:
    """Best correlation ``scores (T,)`` in [-1, 1] of every frame and where, ``boxes (T, 4)`` xyxy in that frame's
    pixels.
    """

    scores: np.ndarray
    boxes: np.ndarray


def grey(image: Tensor) -> np.ndarray:
    """Luma ``(H, W)`` in [0, 1] of RGB ``(3, H, W)``, Rec. 601."""
    return (image[:3].float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy()


def match_frame(
    frame: Tensor, crop: Tensor, *, scales: Sequence[float] = SCALES
) -> tuple[float, tuple[float, float, float, float]]:
    """Largest correlation of ``crop (3, h, w)``, resized by each of ``scales``, with ``frame (3, H, W)``, and its box.

    Scales at which the crop is smaller than 6 pixels or larger than the frame are left out; none left gives -1.
    """
    try:
        from skimage.feature import match_template
    except ImportError as error:
        raise MissingExtra.of("scikit-image", "regions", "match templates") from error
    field = grey(frame)
    best, box = -1.0, (0.0, 0.0, 0.0, 0.0)
    for scale in scales:
        height, width = (round(side * scale) for side in crop.shape[1:])
        if min(height, width) < SMALLEST or height > field.shape[0] or width > field.shape[1]:
            continue
        response = match_template(field, grey(images.resize(crop, (height, width))))
        y, x = np.unravel_index(int(response.argmax()), response.shape)
        if response[y, x] > best:
            best, box = float(response[y, x]), (float(x), float(y), float(x + width), float(y + height))
    return best, box


def match(
    frames: Sequence[Tensor], crop: Tensor, *, reduction: float = 1.0, scales: Sequence[float] = SCALES
) -> Matches:
    """``match_frame`` over a video; ``reduction`` ≤ 1 shrinks frames and crop alike first, to save time."""

    def shrink(image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        return images.resize(image, (max(1, round(height * reduction)), max(1, round(width * reduction))))

    small = shrink(crop)
    found = [match_frame(shrink(frame), small, scales=scales) for frame in frames]
    boxes = np.array([box for _, box in found], dtype=np.float64).reshape(-1, 4) / reduction
    return Matches(np.array([score for score, _ in found]), boxes)


def last_occurrence(matches: Matches, rule: Rule, *, window: int = 5) -> BoxTrack:
    """The last run of frames that ``rule`` accepts after a median filter of ``window`` frames; empty when there is
    none.
    """
    from scipy.ndimage import median_filter

    if not len(matches.scores):
        return BoxTrack.empty()
    smooth = median_filter(matches.scores, size=window, mode="nearest")
    level = rule.level * float(smooth.max()) if rule.relative else rule.level
    accepted = np.flatnonzero(smooth >= level)
    if not len(accepted):
        return BoxTrack.empty(float(smooth.max()))
    breaks = np.flatnonzero(np.diff(accepted) > 1)
    first = int(accepted[breaks[-1] + 1]) if len(breaks) else int(accepted[0])
    frames = torch.arange(first, int(accepted[-1]) + 1)
    return BoxTrack(
        frames, torch.from_numpy(matches.boxes[first : int(accepted[-1]) + 1]), float(smooth[frames.numpy()].max())
    )


def quality(matches: Sequence[Matches], truths: Sequence[BoxTrack], rule: Rule) -> float:
    """What a rule is chosen by: success plus stAP@0.25."""
    scores = TrackScores()
    for found, truth in zip(matches, truths, strict=True):
        scores.update(last_occurrence(found, rule), truth)
    measured = scores.compute()
    return measured["success"] + measured["stAP@0.25"]


def choose_rules(
    matches: Sequence[Matches], truths: Sequence[BoxTrack], groups: Sequence[str], rules: Sequence[Rule] = RULES
) -> list[Rule]:
    """For every episode the rule that is best on the episodes of the other ``groups`` (source videos)."""
    if len(set(groups)) < 2:
        raise InputError("A threshold is chosen on other videos, so there are at least two", got=sorted(set(groups)))
    chosen: dict[str, Rule] = {}
    for group in sorted(set(groups)):
        others = [i for i, g in enumerate(groups) if g != group]
        chosen[group] = max(rules, key=lambda r: quality([matches[i] for i in others], [truths[i] for i in others], r))
    return [chosen[g] for g in groups]
