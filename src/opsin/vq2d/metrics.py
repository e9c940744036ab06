"""Measures of visual query localization: how well box tracks answer "where was it last seen?".

Definitions of the Ego4D VQ2D benchmark (episodic-memory, VQ2D): one true track per query and any number of answers,
frames counted inclusively, box areas without "+1". No answer and an empty answer are legal and earn nothing; a missing
score counts as 0. For the order among equal scores see :mod:`opsin.vq2d.ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opsin.errors import InputError
from opsin.vq2d.ranking import TieRange, average_precision, check_order, precision_range, processing_order

__all__ = ["BoxTrack", "Measures", "TrackScores", "average_precision", "spatiotemporal_iou", "temporal_iou"]

AP_THRESHOLDS = (0.25, 0.5, 0.75, 0.95)
SUCCESS_THRESHOLDS = (0.05, 0.1, 0.2)
RECOVERY_THRESHOLDS = (0.5, 0.75, 0.95)
AREAS = {"all": (0.0, 1e10), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}  # square pixels, half-open
ALL = {"all": ("all", "all")}
BY_SIZE = ALL | {f"{crop}-{track}": (crop, track) for crop in ("medium", "large") for track in ("medium", "large")}


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
        if math.isnan(self.score):
            raise InputError("The score of a track is a number", got=self.score, remedy="No confidence is 0.")
        if not bool(torch.isfinite(self.boxes).all()):
            raise InputError("The boxes of a track are finite numbers", got=self.boxes.tolist())

    @classmethod
    def empty(cls, score: float = 0.0) -> BoxTrack:
        """No answer."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros((0, 4)), score)

    @classmethod
    def of(cls, boxes: Mapping[int, Sequence[float]], score: float = 0.0) -> BoxTrack:
        """From frame number → box."""
        return cls.from_rows([(frame, *box) for frame, box in boxes.items()], score)

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[float]], score: float | None = 0.0) -> BoxTrack:
        """From rows ``(frame, x1, y1, x2, y2)`` in any order; a score that is None counts as 0."""
        table = sorted(rows, key=lambda row: row[0])
        frames = torch.tensor([int(row[0]) for row in table], dtype=torch.int64)
        boxes = torch.tensor([[float(v) for v in row[1:]] for row in table], dtype=torch.float64)
        return cls(frames, boxes if table else boxes.reshape(0, 4), 0.0 if score is None else float(score))

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    @property
    def volume(self) -> float:
        """Sum of the box areas."""
        return float(_areas(self.boxes.double()).sum())

    @property
    def area(self) -> float:
        """Area of the largest box, whichever way its corners are given; 0 for the empty track."""
        return float(_areas(self.boxes.double()).abs().max()) if len(self) else 0.0


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


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


def frame_ious(a: BoxTrack, b: BoxTrack) -> Tensor:
    """Box IoU ``(T,)``, float64, at the frames that both tracks have; 0 where neither box has an area."""
    rows, others = _shared(a, b)
    inter = _frame_overlap(rows, others)
    union = _areas(rows) + _areas(others) - inter
    return torch.where(union > 0, inter / union.where(union > 0, 1.0), 0.0)


def recovered_frames(prediction: BoxTrack, truth: BoxTrack, threshold: float = 0.5) -> int:
    """Frames of ``truth`` whose predicted box has an IoU of at least ``threshold``."""
    return int((frame_ious(prediction, truth) >= threshold).sum())


@dataclass(frozen=True)
class Measures:
    """The measures of ``queries`` queries, as shares in [0, 1]; the dictionaries are by threshold.

    ``tap`` and ``stap``: average precision by overlap in time, and in space and time. ``success``: queries whose answer
    of highest score overlaps. ``recovery``: true frames with such a box, of all true frames together. ``efficiency``:
    mean share of frames that were not looked at, None where no counts were given.
    """

    queries: int
    tap: dict[float, float]
    stap: dict[float, float]
    success: dict[float, float]
    recovery: dict[float, float]
    efficiency: float | None = None

    def summary(self) -> dict[str, float]:
        """The six numbers that are reported, in [0, 1]."""
        return {
            "success": self.success[SUCCESS_THRESHOLDS[0]],
            "recovery": self.recovery[RECOVERY_THRESHOLDS[0]],
            "tAP@0.25": self.tap[AP_THRESHOLDS[0]],
            "tAP": sum(self.tap.values()) / len(self.tap),
            "stAP@0.25": self.stap[AP_THRESHOLDS[0]],
            "stAP": sum(self.stap.values()) / len(self.stap),
        }

    def labelled(self) -> dict[str, float]:
        """The same under the benchmark's labels and in its units: AP in [0, 1], the others in per cent."""
        short = self.summary()
        rows = {
            "Temporal AP @ IoU=0.25:0.95": short["tAP"],
            "Temporal AP @ IoU=0.25": short["tAP@0.25"],
            "SpatioTemporal AP @ IoU=0.25:0.95": short["stAP"],
            "SpatioTemporal AP @ IoU=0.25": short["stAP@0.25"],
            "Tracking % recovery (max scr) @ IoU=0.50": 100 * short["recovery"],
            "Success (max scr) @ IoU=0.05": 100 * short["success"],
        }
        return rows if self.efficiency is None else rows | {"Search efficiency (%)": 100 * self.efficiency}


@dataclass(frozen=True)
class _Answer:
    place: int  # among all answers of all queries
    score: float
    tiou: float
    stiou: float
    recovered: tuple[int, ...]


@dataclass(frozen=True)
class _Query:
    answers: tuple[_Answer, ...]
    length: int
    truth_area: float
    crop_area: float
    unseen: float | None

    def best(self, rank: Mapping[int, int]) -> _Answer | None:
        """The answer of highest score; of several, the first in processing order."""
        return max(self.answers, key=lambda a: (a.score, -rank[a.place])) if self.answers else None

    def tied(self) -> list[_Answer]:
        """All answers of the highest score."""
        top = max((a.score for a in self.answers), default=0.0)
        return [a for a in self.answers if a.score == top]


@dataclass(frozen=True)
class _Columns:
    """The answers in the order in which they are taken."""

    scores: list[float]
    tiou: list[float]
    stiou: list[float]
    owners: list[int]
    truths: int

    def curve(self, overlaps: list[float]) -> dict[float, float]:
        taken, owners = range(len(overlaps)), self.owners
        return {
            t: average_precision(self.scores, overlaps, t, self.truths, owners=owners, order=taken)
            for t in AP_THRESHOLDS
        }

    def ranges(self, overlaps: list[float], draws: int, seed: int) -> list[TieRange]:
        return [
            precision_range(self.scores, overlaps, t, self.truths, owners=self.owners, draws=draws, seed=seed)
            for t in AP_THRESHOLDS
        ]


@dataclass
class TrackScores:
    """Accumulates the answers to queries and their truths; ``measures`` and ``ties`` measure them."""

    rows: list[_Query] = field(default_factory=list)
    count: int = 0  # answers so far

    def update(
        self,
        prediction: BoxTrack | Sequence[BoxTrack],
        truth: BoxTrack,
        *,
        crop: Sequence[float] | None = None,
        searched: tuple[int, int] | None = None,
    ) -> None:
        """Add one query: its answer or answers, in the order of the file, and the true track.

        ``crop``: the box that shows the object, for the pairings by size. ``searched``: frames looked at, and frames
        there are, for the search efficiency.
        """
        if not len(truth):
            raise InputError("A true track has at least one frame", got=0)
        unseen = None
        if searched is not None:
            if searched[1] < 1:
                raise InputError("There is at least one frame to search", got=searched[1])
            unseen = 1 - searched[0] / searched[1]
        tracks = [prediction] if isinstance(prediction, BoxTrack) else list(prediction)
        answers = [self._answer(i, track, truth) for i, track in enumerate(tracks)]
        crop_area = abs((crop[2] - crop[0]) * (crop[3] - crop[1])) if crop is not None else 0.0
        self.rows.append(_Query(tuple(answers), len(truth), truth.area, crop_area, unseen))
        self.count += len(answers)

    def _answer(self, index: int, track: BoxTrack, truth: BoxTrack) -> _Answer:
        ious = frame_ious(track, truth)
        recovered = tuple(int((ious >= threshold).sum()) for threshold in RECOVERY_THRESHOLDS)
        overlaps = temporal_iou(track, truth), spatiotemporal_iou(track, truth)
        return _Answer(self.count + index, track.score, *overlaps, recovered)

    def paired(self, crop: str = "all", truth: str = "all") -> TrackScores:
        """The queries whose crop and whose largest true box have an area in these ranges of :data:`AREAS`."""
        (low, high), (least, most) = AREAS[crop], AREAS[truth]
        kept = [q for q in self.rows if low <= q.crop_area < high and least <= q.truth_area < most]
        return replace(self, rows=kept)

    def compute(self) -> dict[str, float]:
        """Success (stIoU ≥ 0.05) and recovery (box IoU ≥ 0.5, pooled frames) as shares in [0, 1]; the four APs."""
        return self.measures().summary()

    def measures(self, order: Sequence[int] | None = None) -> Measures:
        """All measures. ``order``: the answers of all queries in the order in which they are to be taken."""
        if not self.rows:
            raise InputError("There is at least one query", got=0)
        rank = self._rank(order)
        columns = self._columns(rank)
        best = [q.best(rank) for q in self.rows]
        frames = sum(q.length for q in self.rows)
        unseen = [q.unseen for q in self.rows if q.unseen is not None]
        return Measures(
            queries=len(best),
            tap=columns.curve(columns.tiou),
            stap=columns.curve(columns.stiou),
            success={t: sum(a is not None and a.stiou >= t for a in best) / len(best) for t in SUCCESS_THRESHOLDS},
            recovery={
                t: sum(a.recovered[i] for a in best if a is not None) / frames
                for i, t in enumerate(RECOVERY_THRESHOLDS)
            },
            efficiency=sum(unseen) / len(unseen) if len(unseen) == len(best) else None,
        )

    def ties(self, *, draws: int = 200, seed: int = 0) -> dict[str, TieRange]:
        """The names of ``summary`` → what each can be when answers of equal score change places.

        The ends are exact at every threshold. Those of a mean over thresholds are means of the ends: reached when each
        query has one answer, else bounds.
        """
        if not self.rows:
            raise InputError("There is at least one query", got=0)
        columns = self._columns(self._rank(None))
        chances = [[float(a.stiou >= SUCCESS_THRESHOLDS[0]) for a in q.tied()] for q in self.rows]
        frames = [[float(a.recovered[0]) for a in q.tied()] for q in self.rows]
        result = {
            "success": _range(chances, len(self.rows)),
            "recovery": _range(frames, sum(q.length for q in self.rows)),
        }
        for name, overlaps in (("tAP", columns.tiou), ("stAP", columns.stiou)):
            curve = columns.ranges(overlaps, draws, seed)
            result[f"{name}@0.25"] = curve[0]
            result[name] = TieRange(
                *(sum(getattr(r, end) for r in curve) / len(curve) for end in ("lowest", "highest", "expected"))
            )
        return result

    def _rank(self, order: Sequence[int] | None) -> dict[int, int]:
        """Answer → when it is taken."""
        answers = [a for q in self.rows for a in q.answers]
        if order is None:
            ranked = [answers[i].place for i in processing_order([a.score for a in answers])]
        else:
            ranked = check_order(order, self.count)
        return {place: rank for rank, place in enumerate(ranked)}

    def _columns(self, rank: Mapping[int, int]) -> _Columns:
        """Scores, overlaps and queries of all answers, in the order in which they are taken."""
        rows = [(owner, answer) for owner, q in enumerate(self.rows) for answer in q.answers]
        rows.sort(key=lambda row: rank[row[1].place])
        answers = [answer for _, answer in rows]
        return _Columns(
            [a.score for a in answers], [a.tiou for a in answers], [a.stiou for a in answers],
            [owner for owner, _ in rows], len(self.rows),
        )  # fmt: skip


def _range(values: Sequence[Sequence[float]], total: float) -> TieRange:
    """Sums over ``total`` when one of the values of every query is drawn; a query without any adds nothing."""
    given = [v for v in values if v]
    expected = sum(sum(v) / len(v) for v in given)
    return TieRange(sum(map(min, given)) / total, sum(map(max, given)) / total, expected / total)
