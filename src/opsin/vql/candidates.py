"""Stage 3: from the scores of all places of a video to the few moments worth a closer look. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opsin.errors import InvalidConfig, InvalidPrompt
from opsin.vql.preset import Preset

Compat = Literal["published"] | None
Values = Tensor | Sequence[float]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Some of the places that scores were given for: ``rows (K,)``, ``frames (K,)`` ascending, ``scores (K,)``."""

    rows: Tensor
    frames: Tensor
    scores: Tensor

    def __len__(self) -> int:
        """Number of candidates ``K``."""
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Selection:
    """What is left after each step: ``frame_max`` one place per frame, scores near the query suppressed; ``peaks`` the
    local maxima in time; ``top_k`` the best of them; ``top_p`` those above the threshold: the result."""

    frame_max: Candidates
    peaks: Candidates
    top_k: Candidates
    top_p: Candidates


def select(
    frames: Values,
    scores: Values,
    *,
    preset: Preset,
    query_frame: int | None = None,
    mask: Tensor | None = None,
    compat: Compat = None,
) -> Tensor:
    """Rows ``(K,)`` of the candidates, by ascending frame; none when nothing is left. See :func:`selection`."""
    return selection(frames, scores, preset=preset, query_frame=query_frame, mask=mask, compat=compat).top_p.rows


def selection(
    frames: Values,
    scores: Values,
    *,
    preset: Preset,
    query_frame: int | None = None,
    mask: Tensor | None = None,
    compat: Compat = None,
) -> Selection:
    """All steps of stage 3, with the thresholds of ``preset``.

    Args:
        frames: ``(N,)`` frame number of each place, in any order, several places per frame or one.
        scores: ``(N,)`` best cosine of each place to the query.
        query_frame: frame that the query was cut from. When the places reach that far, the moment of the query itself,
            from the last frame up to it backwards while frames score ``preset.suppression``, is left out.
        mask: ``(N,)`` places to look at; all by default.
        compat: ``"published"``: tied places of a frame are all kept, and shift the positions at which the published
            code looks for the query's frame; so do missing frames. Masked and suppressed places stay, with score 0.
            Ties at the k-th score are all kept (by default the later ones are, up to k).

    Raises:
        InvalidPrompt: arrays of different lengths, scores that are not finite; with ``compat`` nothing left to select
            (where the published code fails).
    """
    if compat not in (None, "published"):
        raise InvalidConfig('compat is "published" or None', got=compat)
    numbers, values = np.asarray(torch.as_tensor(frames).cpu()), torch.as_tensor(scores).detach().cpu()
    floats = values.numpy() if values.dtype in (torch.float32, torch.float64) else values.float().numpy()
    if numbers.ndim != 1 or numbers.shape != floats.shape:
        raise InvalidPrompt("frames and scores have shape (N,)", got=f"{numbers.shape} and {floats.shape}")
    chosen = np.ones(len(floats), dtype=bool) if mask is None else np.asarray(torch.as_tensor(mask).cpu()) > 0
    if chosen.shape != floats.shape:
        raise InvalidPrompt("mask has shape (N,)", got=chosen.shape)
    if not np.isfinite(floats[chosen]).all():
        raise InvalidPrompt("Scores are finite numbers", got=f"{(~np.isfinite(floats[chosen])).sum()} that are not")
    published = compat == "published"
    rows = np.arange(len(floats)) if published else chosen.nonzero()[0]
    floats = np.where(chosen, floats, floats.dtype.type(0))

    rows = frame_maxima(numbers, floats, rows, ties=published)
    numbers, floats = numbers[rows], floats[rows]
    suppressed = near_query(numbers, floats, query_frame, preset.suppression, by_position=published)
    if published:
        floats = np.where(suppressed, floats.dtype.type(0), floats)
        suppressed = np.zeros_like(suppressed)
    per_frame = ~suppressed
    kept = local_maxima(floats, per_frame, preset.nms, nonzero=published)
    best = largest(floats, kept, preset.top_k, ties=published)
    if published and not len(best):
        raise InvalidPrompt("There is at least one score above 0", got="none", remedy='Leave out compat="published".')
    above = best[floats[best] >= min(preset.top_p, floats[best].max())] if len(best) else best

    def table(index: np.ndarray) -> Candidates:
        return Candidates(*(torch.from_numpy(np.ascontiguousarray(a[index])) for a in (rows, numbers, floats)))

    return Selection(table(per_frame.nonzero()[0]), table(kept), table(best), table(above))


def frame_maxima(frames: np.ndarray, scores: np.ndarray, rows: np.ndarray, *, ties: bool = False) -> np.ndarray:
    """Those of ``rows`` with the best score of their frame, by ascending frame; the first on ties, or all ``ties``."""
    if not len(rows):
        return rows
    order = rows[np.lexsort((rows, -scores[rows], frames[rows]))]
    first = np.flatnonzero(np.diff(frames[order], prepend=frames[order[0]] - 1))
    if not ties:
        return order[first]
    best = np.repeat(scores[order[first]], np.diff(np.append(first, len(order))))
    return order[scores[order] == best]


def near_query(
    frames: np.ndarray, scores: np.ndarray, query_frame: int | None, level: float, *, by_position: bool = False
) -> np.ndarray:
    """Which of the ``frames`` (ascending) show the moment that the query was cut from, ``(F,)`` boolean.

    Backwards from the last frame not after ``query_frame`` while scores reach ``level``; nothing where the frames end
    before it. ``by_position`` starts at position ``query_frame - frames[0]`` of the list instead, as published.
    """
    found = np.zeros(len(frames), dtype=bool)
    if query_frame is None or not len(frames):
        return found
    at = query_frame - int(frames[0]) if by_position else int(np.searchsorted(frames, query_frame, side="right")) - 1
    if 0 <= at < len(frames) and (by_position or query_frame <= frames[-1]):
        low = np.flatnonzero(scores[: at + 1] < level)
        found[(low[-1] + 1 if len(low) else 0) : at + 1] = True
    return found


def local_maxima(scores: np.ndarray, alive: np.ndarray, share: float, *, nonzero: bool = False) -> np.ndarray:
    """Ascending positions of the peaks of ``scores (F,)`` among the ``alive``: the best one, without its neighbours on
    both sides for as long as they score above ``share`` of it, then the best of the rest, the first on ties.

    It ends when no score above 0 is left; the first peak alone may be lower, or 0 unless it must be ``nonzero``.
    """
    alive = alive.copy()
    peaks: list[int] = []
    for at in np.argsort(-scores, kind="stable").tolist():
        if not alive[at] or (scores[at] <= 0 and (peaks or (nonzero and scores[at] == 0))):
            continue
        peaks.append(at)
        for step in (-1, 1):
            beside = at + step
            while 0 <= beside < len(scores) and alive[beside] and scores[beside] > share * scores[at]:
                alive[beside] = False
                beside += step
        alive[at] = False
    return np.array(sorted(peaks), dtype=np.int64)


def largest(scores: np.ndarray, rows: np.ndarray, count: int, *, ties: bool = False) -> np.ndarray:
    """Those ``count`` of ``rows`` with the largest scores, ascending; the later on ties, or all that tie."""
    if len(rows) <= count:
        return rows
    order = rows[np.lexsort((-rows, -scores[rows]))]
    if ties:
        return rows[scores[rows] >= scores[order[count - 1]]]
    return np.sort(order[:count])
