"""Template matching on a drawn video: the baseline of the visual queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.errors import InputError
from opsin.evaluation import template
from opsin.vq2d.metrics import BoxTrack


def track(rows: list, score: float = 0.0) -> BoxTrack:
    return BoxTrack.of({int(r[0]): tuple(r[1:]) for r in rows}, score)


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
