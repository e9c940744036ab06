"""Measures of visual queries, by hand: overlaps, ranking, ties, and what is legal."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opsin.errors import InputError
from opsin.vq2d.metrics import (
    BY_SIZE,
    BoxTrack,
    TrackScores,
    average_precision,
    recovered_frames,
    spatiotemporal_iou,
    temporal_iou,
)
from opsin.vq2d.ranking import precision_range, processing_order


def track(rows: list, score: float | None = 0.0) -> BoxTrack:
    return BoxTrack.from_rows(rows, score)


def still(first: int, last: int, box: tuple = (0, 0, 10, 10), score: float = 0.0) -> BoxTrack:
    return BoxTrack.of(dict.fromkeys(range(first, last + 1), box), score)


def test_a_track_half_covered_in_time_and_space() -> None:
    truth, late = still(10, 19), still(15, 24, (5, 0, 15, 10))
    assert temporal_iou(late, truth) == pytest.approx(5 / 15)
    assert spatiotemporal_iou(late, truth) == pytest.approx(250 / 1750)
    assert recovered_frames(late, truth) == 0
    assert recovered_frames(truth, truth) == 10


def test_precision_is_ranked_by_score_and_of_equal_scores_the_later_comes_first() -> None:
    assert processing_order([0.1, 0.5, 0.5, 0.9]) == [3, 2, 1, 0]
    assert average_precision([0.9, 0.8], [0.0, 1.0], 0.25, 2) == pytest.approx(0.25)
    assert average_precision([0.8, 0.9], [0.0, 1.0], 0.25, 2) == pytest.approx(0.5)
    assert average_precision([0.5, 0.5], [1.0, 0.0], 0.25, 2) == pytest.approx(0.25)
    assert average_precision([0.5, 0.5], [1.0, 0.0], 0.25, 2, order=[0, 1]) == pytest.approx(0.5)
    assert average_precision([], [], 0.25, 3) == 0.0
    with pytest.raises(InputError, match="once"):
        average_precision([0.5, 0.5], [1.0, 0.0], 0.25, 2, order=[0, 0])
    with pytest.raises(InputError, match="true track"):
        average_precision([], [], 0.25, 0)


def test_a_second_right_answer_of_a_query_is_wrong() -> None:
    scores, overlaps = [0.9, 0.8, 0.7], [1.0, 1.0, 1.0]
    assert average_precision(scores, overlaps, 0.5, 2, owners=[0, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("seed", range(12))
def test_the_range_over_ties_is_that_of_all_orders(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    count = 6
    scores = (torch.randint(0, 2, (count,), generator=draw) / 2).tolist()
    overlaps = torch.rand(count, generator=draw).tolist()
    owners = torch.randint(0, 3, (count,), generator=draw).tolist()
    every = [
        average_precision(scores, overlaps, 0.4, 3, owners=owners, order=order)
        for order in itertools.permutations(range(count))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    found = precision_range(scores, overlaps, 0.4, 3, owners=owners, draws=1500)
    assert found.lowest == pytest.approx(min(every))
    assert found.highest == pytest.approx(max(every))
    assert found.expected == pytest.approx(sum(every) / len(every), abs=0.02)


def test_ties_within_a_query_move_success_and_recovery() -> None:
    scores = TrackScores()
    scores.update([still(0, 9, score=0.5), still(40, 49, score=0.5)], still(0, 9))
    scores.update(still(0, 4, score=0.5), still(0, 9))
    ties = scores.ties()
    assert (ties["success"].lowest, ties["success"].highest, ties["success"].expected) == (0.5, 1.0, 0.75)
    assert (ties["recovery"].lowest, ties["recovery"].highest) == (0.25, 0.75)
    assert scores.compute()["success"] == 0.5  # the later of the two


def test_no_answer_is_legal_and_earns_nothing() -> None:
    scores = TrackScores()
    scores.update(BoxTrack.empty(), still(0, 9))
    scores.update([], still(0, 9))
    scores.update(track([], None), still(0, 9))
    assert set(scores.compute().values()) == {0.0}
    assert all(found.highest == 0 for found in scores.ties().values())
    assert track([[3, 0, 0, 1, 1]], None).score == 0.0


def test_pairings_by_size_and_efficiency() -> None:
    scores = TrackScores()
    scores.update(still(0, 3, score=1.0), still(0, 3, (0, 0, 50, 50)), crop=(0, 0, 40, 40), searched=(25, 100))
    scores.update(still(0, 3, score=1.0), still(0, 3, (0, 0, 200, 200)), crop=(40, 0, 0, 40), searched=(75, 100))
    counts = {name: len(scores.paired(*ranges).rows) for name, ranges in BY_SIZE.items()}
    assert counts == {"all": 2, "medium-medium": 1, "medium-large": 1, "large-medium": 0, "large-large": 0}
    assert scores.measures().labelled()["Search efficiency (%)"] == pytest.approx(50)
    assert scores.paired("medium", "large").measures(order=[1, 0]).queries == 1


def test_malformed_tracks_are_refused() -> None:
    for rows in ([[1, 0, 0, 1, 1], [3, 0, 0, 1, 1]], [[1, 0, 0, 1, 1], [1, 0, 0, 1, 1]]):
        with pytest.raises(InputError, match="contiguous"):
            track(rows)
    with pytest.raises(InputError, match="shape"):
        BoxTrack(torch.arange(2), torch.zeros((3, 4)))
    with pytest.raises(InputError, match="at least one frame"):
        TrackScores().update(BoxTrack.empty(), BoxTrack.empty())
    with pytest.raises(InputError, match="a number"):
        track([[0, 0, 0, 1, 1]], math.nan)
    with pytest.raises(InputError, match="finite"):
        track([[0, 0, 0, math.nan, 1]])
    with pytest.raises(InputError, match="to search"):
        TrackScores().update(BoxTrack.empty(), still(0, 1), searched=(0, 0))
    with pytest.raises(InputError, match="one query"):
        TrackScores().ties()


def test_rows_come_in_any_order() -> None:
    assert track([[5, 0, 0, 1, 1], [4, 0, 0, 2, 2]]).frames.tolist() == [4, 5]
    assert track([[5, 0, 0, 1, 1], [4, 0, 0, 2, 2]]).area == 4.0
