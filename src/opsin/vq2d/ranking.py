"""Average precision over ranked answers, the order among equal scores, and what that order can change.

Order: score descending; among equal scores the answer that came later is ranked first. That is what the published code
does with up to 16 answers. With more it depends there on the sorting routine of the machine, so an AP of tied scores is
best reported with its range (:func:`precision_range`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from opsin.errors import InputError


@dataclass(frozen=True)
class TieRange:
    """What a measure can be when answers of equal score change places: ``lowest``, ``highest``, and ``expected`` over
    all orders, equally likely."""

    lowest: float
    highest: float
    expected: float


def processing_order(scores: Sequence[float]) -> list[int]:
    """Answers from the highest score to the lowest; among equal scores the later one first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)


def check_order(order: Sequence[int], count: int) -> list[int]:
    """``order`` as a list; ``InputError`` unless it holds each number below ``count`` once."""
    if sorted(order) != list(range(count)):
        raise InputError(f"An order holds each number from 0 to {count - 1} once", got=list(order)[:20])
    return list(order)


def average_precision(
    scores: Sequence[float],
    overlaps: Sequence[float],
    threshold: float,
    truths: int,
    *,
    owners: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> float:
    """Pascal VOC all-point average precision, in [0, 1].

    ``scores`` and ``overlaps`` of every answer given. ``owners`` says which query each belongs to; None: each is the
    only one of its query. An answer is right when its overlap is at least ``threshold`` and no earlier answer of its
    query was. ``truths`` queries have a true track. ``order``: a permutation in place of :func:`processing_order`.
    """
    if truths < 1:
        raise InputError("There is at least one true track", got=truths)
    ranked = processing_order(scores) if order is None else check_order(order, len(scores))
    return _precision(_hits(ranked, overlaps, threshold, owners), truths)


def precision_range(
    scores: Sequence[float],
    overlaps: Sequence[float],
    threshold: float,
    truths: int,
    *,
    owners: Sequence[int] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> TieRange:
    """The lowest, highest and expected average precision over the orders of equal scores.

    The ends are exact, whatever the number of answers a query has; the expectation is the mean over ``draws`` random
    orders (exact when nothing depends on the order).
    """
    if truths < 1:
        raise InputError("There is at least one true track", got=truths)
    taken: set[int] = set()
    lowest: list[bool] = []
    highest: list[bool] = []
    groups: list[list[int]] = []
    ranked = processing_order(scores)
    for _, tied in groupby(ranked, key=lambda i: scores[i]):
        group = list(tied)
        groups.append(group)
        # However they are ordered, the first fitting answer of each open query is right and all others are wrong.
        fitting: dict[int, int] = {}
        for i in group:
            owner = i if owners is None else owners[i]
            if overlaps[i] >= threshold and owner not in taken:
                fitting[owner] = fitting.get(owner, 0) + 1
        taken |= fitting.keys()
        wrong = len(group) - len(fitting)
        highest += [True] * len(fitting) + [False] * wrong
        # Latest possible: what never counts comes first, then the queries whose repeats push the others back most.
        lowest += [False] * (len(group) - sum(fitting.values()))
        for repeats in sorted(fitting.values(), reverse=True):
            lowest += [True] + [False] * (repeats - 1)
    low, high = _precision(np.array(lowest, dtype=bool), truths), _precision(np.array(highest, dtype=bool), truths)
    if low == high:
        return TieRange(low, high, low)
    generator = np.random.default_rng(seed)
    total = 0.0
    for _ in range(draws):
        drawn = [i for group in groups for i in (generator.permutation(group).tolist() if len(group) > 1 else group)]
        total += _precision(_hits(drawn, overlaps, threshold, owners), truths)
    return TieRange(low, high, total / draws)


def _hits(
    ranked: Sequence[int], overlaps: Sequence[float], threshold: float, owners: Sequence[int] | None
) -> np.ndarray:
    """Which of the ranked answers are right."""
    if owners is None:
        return np.asarray(overlaps, dtype=np.float64)[np.asarray(ranked, dtype=np.int64)] >= threshold
    taken: set[int] = set()
    hits = np.zeros(len(ranked), dtype=bool)
    for place, i in enumerate(ranked):
        if overlaps[i] >= threshold and owners[i] not in taken:
            taken.add(owners[i])
            hits[place] = True
    return hits


def _precision(hits: np.ndarray, truths: int) -> float:
    """Area under the precision envelope over recall."""
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / truths)
