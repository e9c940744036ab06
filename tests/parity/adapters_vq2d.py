"""The VQ2D measures and the check of prediction files, as plain lists in and numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.vq2d.metrics import BoxTrack, TrackScores
from opsin.vq2d.prediction_file import validate


def track_scores(
    queries: Sequence[Mapping[str, Any]], searched: Sequence[tuple[int, int]] | None = None
) -> TrackScores:
    scores = TrackScores()
    for i, query in enumerate(queries):
        scores.update(
            [BoxTrack.from_rows(p["bboxes"], p["score"]) for p in query["predictions"]],
            BoxTrack.from_rows(query["gt"]),
            crop=query["visual_crop"][1:],
            searched=searched[i] if searched else None,
        )
    return scores


def vq2d_metrics(queries: Sequence[Mapping[str, Any]], order: Sequence[int] | None = None) -> dict[str, float]:
    return track_scores(queries).paired().measures(order).labelled()


def vq2d_validate(annotations: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    validate(annotations, predictions)
