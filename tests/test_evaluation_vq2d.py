"""Measures of visual queries: against the published metric, by hand, and template matching on a drawn video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opsin.errors import InputError
from opsin.evaluation import template
from opsin.vq2d.metrics import (
    BoxTrack,
    TrackScores,
    average_precision,
    recovered_frames,
    spatiotemporal_iou,
    temporal_iou,
)

FOLDERS = (Path(__file__).parent / "golden/vq2d", Path(__file__).parents[2] / "shared/golden/vq2d")
LABELS = {
    "tAP": "Temporal AP @ IoU=0.25:0.95",
    "tAP@0.25": "Temporal AP @ IoU=0.25",
    "stAP": "SpatioTemporal AP @ IoU=0.25:0.95",
    "stAP@0.25": "SpatioTemporal AP @ IoU=0.25",
}


def golden_cases() -> list[Path]:
    """Cases with one answer per query and no ties, from wherever golden numbers are."""
    names = (
        "random_single",
        "empty_tracks_all",
        "perfect",
        "exact_thresholds",
        "no_temporal",
        "no_spatial",
        "single_frame",
    )
    found = {p.name: p for folder in reversed(FOLDERS) for p in folder.glob("[0-9]*.json")}
    chosen = [p for name, p in sorted(found.items()) if any(n in name for n in names)]
    return [p for p in chosen if all(len(q["predictions"]) == 1 for q in json.loads(p.read_text())["queries"])]


def track(rows: list, score: float = 0.0) -> BoxTrack:
    return BoxTrack.of({int(r[0]): tuple(r[1:]) for r in rows}, score)


@pytest.mark.parametrize("path", golden_cases(), ids=lambda p: p.stem)
def test_measures_are_those_of_the_published_code(path: Path) -> None:
    case = json.loads(path.read_text())
    scores = TrackScores()
    for query, pairs in zip(case["queries"], case["outputs"]["pairs"], strict=True):
        truth = track(query["gt"])
        answer = query["predictions"][0]
        predicted = track(answer["bboxes"], answer["score"])
        scores.update(predicted, truth)
        assert temporal_iou(predicted, truth) == pytest.approx(pairs[0]["tiou"], abs=1e-9)
        assert spatiotemporal_iou(predicted, truth) == pytest.approx(pairs[0]["stiou"], abs=1e-9)
        assert recovered_frames(predicted, truth) == pairs[0]["frame_iou_ge_0.5"]
    expected = case["outputs"]["compute_visual_query_metrics"]["all"]
    found = scores.compute()
    distinct = len({q["predictions"][0]["score"] for q in case["queries"]}) == len(case["queries"])
    for name, label in LABELS.items():
        if distinct:
            assert found[name] == pytest.approx(expected[label], abs=1e-9)
    assert 100 * found["success"] == pytest.approx(expected["Success (max scr) @ IoU=0.05"], abs=1e-9)
    assert 100 * found["recovery"] == pytest.approx(expected["Tracking % recovery (max scr) @ IoU=0.50"], abs=1e-9)


def test_there_are_golden_cases() -> None:
    assert len(golden_cases()) >= 6


def test_a_track_half_covered_in_time_and_space() -> None:
    truth = track([[f, 0, 0, 10, 10] for f in range(10, 20)])
    late = track([[f, 5, 0, 15, 10] for f in range(15, 25)])
    assert temporal_iou(late, truth) == pytest.approx(5 / 15)
    assert spatiotemporal_iou(late, truth) == pytest.approx(250 / 1750)
    assert recovered_frames(late, truth) == 0
    assert recovered_frames(truth, truth) == 10


def test_precision_is_ranked_by_score_and_ties_keep_the_order_of_queries() -> None:
    assert average_precision([0.9, 0.8], [0.0, 1.0], 0.25, 2) == pytest.approx(0.25)
    assert average_precision([0.8, 0.9], [0.0, 1.0], 0.25, 2) == pytest.approx(0.5)
    assert average_precision([0.5, 0.5], [1.0, 0.0], 0.25, 2) == pytest.approx(0.5)
    assert average_precision([], [], 0.25, 3) == 0.0


def test_malformed_tracks_are_refused() -> None:
    with pytest.raises(InputError, match="contiguous"):
        track([[1, 0, 0, 1, 1], [3, 0, 0, 1, 1]])
    with pytest.raises(InputError, match="shape"):
        BoxTrack(torch.arange(2), torch.zeros((3, 4)))
    with pytest.raises(InputError, match="at least one frame"):
        TrackScores().update(BoxTrack.empty(), BoxTrack.empty())


def film(frames: int = 20, seen: range = range(8, 15)) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Noise in which a patterned square wanders during ``seen``; and the picture of that square."""
    draw = torch.Generator().manual_seed(0)
    thing = torch.rand((3, 4, 4), generator=draw).repeat_interleave(4, 1).repeat_interleave(4, 2)
    video = []
    for i in range(frames):
        frame = 0.2 * torch.rand((3, 48, 64), generator=draw)
        if i in seen:
            frame[:, 10:26, 10 + i : 26 + i] = thing
        video.append(frame)
    return video, thing


def test_template_matching_finds_what_was_drawn() -> None:
    video, thing = film()
    found = template.match(video, thing, scales=(1.0,))
    assert found.scores.shape == (20,)
    assert found.scores[10] > 0.95
    assert found.scores[[0, 19]].max() < 0.6
    answer = template.last_occurrence(found, template.Rule(0.8))
    assert answer.frames.tolist() == list(range(8, 15))
    assert answer.boxes[0].tolist() == [18, 10, 34, 26]
    assert not len(template.last_occurrence(found, template.Rule(1.01)))


def test_template_matching_takes_the_last_run_and_relative_levels() -> None:
    scores = np.r_[np.full(6, 0.9), np.full(6, 0.1), np.full(6, 0.8), np.full(4, 0.1)]
    matches = template.Matches(scores, np.tile([0.0, 0, 5, 5], (22, 1)))
    assert template.last_occurrence(matches, template.Rule(0.5)).frames.tolist() == list(range(12, 18))
    assert template.last_occurrence(matches, template.Rule(0.85)).frames.tolist() == list(range(6))
    assert template.last_occurrence(matches, template.Rule(0.95, relative=True)).frames.tolist() == list(range(6))


def test_a_template_that_fits_nowhere_scores_lowest() -> None:
    score, _ = template.match_frame(torch.rand(3, 20, 20), torch.rand(3, 30, 30), scales=(1.0,))
    assert score == -1.0


def test_the_threshold_comes_from_other_videos() -> None:
    def matches(level: float) -> template.Matches:
        return template.Matches(np.r_[np.full(5, 0.1), np.full(5, level)], np.tile([0.0, 0, 5, 5], (10, 1)))

    truth = track([[f, 0, 0, 5, 5] for f in range(5, 10)])
    rules = [template.Rule(0.35), template.Rule(0.75)]
    chosen = template.choose_rules([matches(0.5), matches(0.9)], [truth, truth], ["a", "b"], rules)
    assert chosen[0] in rules
    assert chosen[1] == template.Rule(0.35)  # the higher level would miss the other video
    with pytest.raises(InputError, match="other videos"):
        template.choose_rules([matches(0.5)], [truth], ["a"], rules)
