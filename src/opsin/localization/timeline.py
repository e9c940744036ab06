"""The search pass: one best window per sampled frame, kept as a small table; then which moment is the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Timeline:
    """One row per searched frame, in time order: ``frames (S,)``, ``times (S,)``, ``boxes (S, 4)``, ``scores (S,)``."""

    frames: Tensor
    times: Tensor
    boxes: Tensor
    scores: Tensor

    @classmethod
    def of(cls, rows: Iterable[tuple[int, float, Tensor, float]]) -> Timeline:
        """From ``(frame, seconds, box, score)`` rows."""
        table = list(rows)
        boxes = torch.stack([r[2] for r in table]) if table else torch.zeros((0, 4))
        return cls(
            torch.tensor([r[0] for r in table], dtype=torch.long),
            torch.tensor([r[1] for r in table], dtype=torch.float64),
            boxes, torch.tensor([r[3] for r in table], dtype=torch.float32),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.frames)


def median_filter(scores: Tensor, width: int = 3) -> Tensor:
    """Running median ``(S,)`` over an odd ``width``; the ends repeat."""
    if len(scores) < width:
        return scores
    half = width // 2
    padded = torch.cat([scores[:1].expand(half), scores, scores[-1:].expand(half)])
    return padded.unfold(0, width, 1).median(-1).values


def peaks(scores: Tensor, relative: float = 0.8) -> Tensor:
    """Peaks of a curve, ascending positions: non-maximum suppression between frames (REN-VQL, stage 3).

    The highest score stands and silences its neighbours on both sides while they stay above ``relative`` times it.
    """
    left = scores.clone()
    found: list[int] = []
    while len(left) and float(left.max()) > 0:
        top = int(left.argmax())
        level = relative * float(left[top])
        found.append(top)
        for step in (-1, 1):
            at = top + step
            while 0 <= at < len(left) and float(left[at]) > level:
                left[at] = 0
                at += step
        left[top] = 0
    return torch.tensor(sorted(found), dtype=torch.long)


def last_confident(scores: Tensor, threshold: float, share: float) -> int | None:
    """Position of the last peak with at least ``share`` of the best score; None when that is under ``threshold``."""
    best = float(scores.max()) if len(scores) else 0.0
    confident = [p for p in peaks(scores).tolist() if float(scores[p]) >= share * best]
    return confident[-1] if confident and best >= threshold else None


def in_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def thinned(items: Iterable[T], most: int) -> list[T]:
    """At most ``most`` of ``items``, evenly spread, never holding more than twice as many."""
    kept: list[T] = []
    step = 1
    for i, item in enumerate(items):
        if i % step == 0:
            kept.append(item)
        if len(kept) == 2 * most:
            kept, step = kept[::2], 2 * step
    return kept[:: -(-len(kept) // most) or 1]
