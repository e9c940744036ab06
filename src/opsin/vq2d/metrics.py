"""Measures of visual query localization: how well a box track answers "where was it last seen?".

Definitions of the Ego4D VQ2D benchmark (episodic-memory, VQ2D): one true track and at most one answer per query, frames
counted inclusively, box areas without "+1". An empty answer is legal and scores nothing. Equal scores are ranked in the
order of the queries, so the result does not depend on a sorting routine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsin.errors import InputError

AP_THRESHOLDS = (0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class BoxTrack:
    """Boxes ``(T, 4)`` xyxy at contiguous ascending frame numbers ``frames (T,)``, and the confidence of the whole."""

    frames: Tensor
    boxes: Tensor
    score: float = 0.0

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.frames), 4):
            raise InputError(f"A track has boxes of shape ({len(self.frames)}, 4)", got=tuple(self.boxes.shape))
        if len(self.frames) and not bool((self.frames.diff() == 1).all()):
            raise InputError("The frames of a track are contiguous and ascending", got=self.frames.tolist())

    @classmethod
    def empty(cls, score: float = 0.0) -> BoxTrack:
        """No answer."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros((0, 4)), score)

    @classmethod
    def of(cls, boxes: dict[int, tuple[float, float, float, float]], score: float = 0.0) -> BoxTrack:
        """From frame number → box."""
        frames = sorted(boxes)
        table = torch.tensor([boxes[f] for f in frames], dtype=torch.float64).reshape(-1, 4)
        return cls(torch.tensor(frames, dtype=torch.int64), table, score)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    @property
    def volume(self) -> float:
        """Sum of the box areas."""
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).double()
        return float(sides.prod(-1).sum())


def temporal_iou(a: BoxTrack, b: BoxTrack) -> float:
    """Overlap of two time spans in frames, in [0, 1]."""
    if not len(a) or not len(b):
        return 0.0
    first, last = max(int(a.frames[0]), int(b.frames[0])), min(int(a.frames[-1]), int(b.frames[-1]))
    inter = max(0, last - first + 1)
    return inter / (len(a) + len(b) - inter)


def _shared(a: BoxTrack, b: BoxTrack) -> tuple[Tensor, Tensor]:
    """The boxes of both tracks at the frames that both have, float64."""
    if not len(a) or not len(b):
        return torch.zeros((0, 4), dtype=torch.float64), torch.zeros((0, 4), dtype=torch.float64)
    first, last = max(int(a.frames[0]), int(b.frames[0])), min(int(a.frames[-1]), int(b.frames[-1]))
    count = max(0, last - first + 1)
    i, j = first - int(a.frames[0]), first - int(b.frames[0])
    return a.boxes[i : i + count].double(), b.boxes[j : j + count].double()


def _frame_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection area ``(T,)`` of box rows ``(T, 4)`` taken pairwise."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    return (high - low).clamp(min=0).prod(-1)


def spatiotemporal_iou(a: BoxTrack, b: BoxTrack) -> float:
    """Shared volume over joint volume of two box tracks, in [0, 1]; 0 when neither has a volume."""
    inter = float(_frame_overlap(*_shared(a, b)).sum())
    union = a.volume + b.volume - inter
    return inter / union if union > 0 else 0.0


def recovered_frames(prediction: BoxTrack, truth: BoxTrack, threshold: float = 0.5) -> int:
    """Frames of ``truth`` whose predicted box has an IoU of at least ``threshold``."""
    a, b = _shared(prediction, truth)
    inter = _frame_overlap(a, b)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - inter
    return int(((inter >= threshold * union) & (union > 0)).sum())


def average_precision(scores: Sequence[float], overlaps: Sequence[float], threshold: float, truths: int) -> float:
    """Pascal VOC all-point average precision, in [0, 1].

    ``scores`` and ``overlaps`` of every answer given, each the only one of its query; an answer is right when its
    overlap is at least ``threshold``. ``truths`` queries have a true track.
    """
    if truths < 1:
        raise InputError("There is at least one true track", got=truths)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: ties keep the order of the queries
    right = torch.tensor([overlaps[i] >= threshold for i in order], dtype=torch.float64)
    if not len(right):
        return 0.0
    hits = right.cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * right).sum() / truths)


@dataclass
class TrackScores:
    """Accumulates answers and their truths, one pair per query; ``compute`` gives the measures."""

    predictions: list[BoxTrack] = field(default_factory=list)
    truths: list[BoxTrack] = field(default_factory=list)

    def update(self, prediction: BoxTrack, truth: BoxTrack) -> None:
        """Add one query."""
        if not len(truth):
            raise InputError("A true track has at least one frame", got=0)
        self.predictions.append(prediction)
        self.truths.append(truth)

    def compute(self) -> dict[str, float]:
        """Success (stIoU ≥ 0.05) and recovery (box IoU ≥ 0.5, pooled frames) as shares in [0, 1]; the four APs."""
        pairs = list(zip(self.predictions, self.truths, strict=True))
        scores = [p.score for p in self.predictions]
        overlaps = {
            "tAP": [temporal_iou(p, t) for p, t in pairs],
            "stAP": [spatiotemporal_iou(p, t) for p, t in pairs],
        }
        result = {
            "success": sum(v >= 0.05 for v in overlaps["stAP"]) / len(pairs),
            "recovery": sum(recovered_frames(p, t) for p, t in pairs) / sum(len(t) for t in self.truths),
        }
        for name, values in overlaps.items():
            curve = [average_precision(scores, values, threshold, len(pairs)) for threshold in AP_THRESHOLDS]
            result[f"{name}@0.25"] = curve[0]
            result[name] = sum(curve) / len(curve)
        return result
