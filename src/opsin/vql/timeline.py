"""The search pass: one best window per sampled frame, kept as a small table; then which moment is the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from opsin.tracking.base import Step

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

    def row(self, i: int) -> Step:
        """Row ``i`` as a moment."""
        return Step(int(self.frames[i]), float(self.times[i]), self.boxes[i], float(self.scores[i]))


def median_filter(scores: Tensor, width: int = 3) -> Tensor:
    """Running median ``(S,)`` over an odd ``width``; the ends repeat."""
    if len(scores) < width:
        return scores
    half = width // 2
    padded = torch.cat([scores[:1].expand(half), scores, scores[-1:].expand(half)])
    return padded.unfold(0, width, 1).median(-1).values


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
