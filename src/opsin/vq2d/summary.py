"""The report of a VQ2D run: the measures with their intervals, by size and over ties, beside published baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from opsin import report
from opsin.errors import InvalidConfig, InvalidDataset
from opsin.hub import atomic_path
from opsin.vq2d.annotations import Annotations
from opsin.vq2d.metrics import BY_SIZE, Measures, TrackScores
from opsin.vq2d.prediction_file import track_of, validate

COLUMNS = ("stAP@0.25", "stAP", "tAP@0.25", "tAP", "recovery", "success")
# On the validation split, as the README of EGO4D/episodic-memory (VQ2D) gives them; recovery and success as shares.
PUBLISHED = {
    "SiamRCNN": (0.153, 0.058, 0.225, 0.134, 0.32919, 0.43244),
    "Improved Baselines": (0.195, 0.078, 0.258, 0.157, 0.37882, 0.47903),
    "Negative Frames Matter": (0.189, 0.075, 0.255, 0.154, 0.37666, 0.47681),
}


def measure(annotations: Mapping[str, Any] | Annotations, predictions: Mapping[str, Any]) -> TrackScores:
    """The answers of a whole file of predictions beside the truths; a query without an answer earns nothing.

    ``predictions`` in the format of the challenge, boxes in the annotated pictures. Queries whose truth is withheld are
    left out. Raises ``InvalidDataset`` when the files do not fit, or when no truth is there at all.
    """
    return _measure(annotations, predictions)[0]


def _measure(
    annotations: Mapping[str, Any] | Annotations, predictions: Mapping[str, Any]
) -> tuple[TrackScores, list[dict[str, Any]]]:
    """The scores, and who asked each of their queries."""
    known = annotations if isinstance(annotations, Annotations) else Annotations.parse(annotations)
    validate(known.tree, predictions)
    scores, asked = TrackScores(), []
    answered = (clip for video in predictions["results"]["videos"] for clip in video["clips"])
    for clip, answers in zip(known.clips, answered, strict=True):  # in the same order, as validated
        for index, query in clip.queries():
            truth = query.truth()
            if truth is None:
                continue
            track = track_of(answers["predictions"][index]["query_sets"][query.id], query.place)
            scores.update(track, truth, crop=query.crop.box)
            asked.append(
                {"video": clip.video_uid, "clip": clip.name, "annotation": index, "query_set": query.id}
                | {"title": query.title, "answered": len(track) > 0}
            )
    if not asked:
        raise InvalidDataset(
            "Measuring needs response tracks", got="annotations without any",
            remedy="Those of the test split are withheld: write a submission for the challenge server instead.",
        )  # fmt: skip
    return scores, asked


def summarise(
    annotations: Annotations,
    predictions: Mapping[str, Any],
    *,
    intervals: int = 200,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything there is to say about a file of predictions, ready for JSON.

    ``intervals``: how often whole videos are drawn again for the 95 % intervals (0: none); ``draws``: random orders of
    equal scores for the expected AP. All measures are shares in [0, 1].
    """
    if intervals < 0 or draws < 1:
        raise InvalidConfig("intervals is at least 0 and draws at least 1", got=(intervals, draws))
    scores, asked = _measure(annotations, predictions)
    everything = scores.paired()
    if not everything.rows:
        raise InvalidDataset("There is a query with boxes below 10^10 square pixels", got=len(scores.rows))
    measures = everything.measures()
    pairings = {name: scores.paired(*ranges) for name, ranges in BY_SIZE.items()}
    return {
        "measure": "vq2d",
        "queries": len(asked),
        "videos": len({row["video"] for row in asked}),
        "answered": sum(row["answered"] for row in asked),
        "without_truth": sum(1 for clip in annotations.clips for _ in clip.queries()) - len(asked),
        "environment": report.environment(seed),
        "measures": measures.summary(),
        "intervals": _intervals(scores, [row["video"] for row in asked], intervals, seed),
        "by_threshold": {key: getattr(measures, key) for key in ("tap", "stap", "success", "recovery")},
        "order": "score descending; of equal scores the later one first",
        "over_orders_of_equal_scores": {
            "draws": draws,
            **{name: asdict(found) for name, found in everything.ties(draws=draws, seed=seed).items()},
        },
        "by_size": {
            name: {"queries": len(part.rows), **(part.measures().summary() if part.rows else {})}
            for name, part in pairings.items()
        },
        "published_validation": {name: dict(zip(COLUMNS, row, strict=True)) for name, row in PUBLISHED.items()},
        "per_query": [row | _query_row(scores, i) for i, row in enumerate(asked)],
    }


def _query_row(scores: TrackScores, index: int) -> dict[str, Any]:
    found = scores.rows[index].answers[0]
    recovered = found.recovered[0] / scores.rows[index].length
    return {"score": found.score, "tiou": found.tiou, "stiou": found.stiou, "recovered": recovered}


def _intervals(scores: TrackScores, videos: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """95 % percentile intervals when whole videos are drawn again: the queries of one are not independent."""
    names = sorted(set(videos))
    if not resamples or len(names) < 2:
        return {}
    members: dict[str, list[int]] = {name: [] for name in names}
    for i, name in enumerate(videos):
        members[name].append(i)
    generator = np.random.default_rng(seed)
    drawn: list[Measures] = []
    for _ in range(resamples):
        chosen = generator.integers(0, len(names), len(names))
        part = TrackScores([scores.rows[i] for v in chosen for i in members[names[v]]], scores.count).paired()
        if part.rows:
            drawn.append(part.measures())
    table = {key: [found.summary()[key] for found in drawn] for key in COLUMNS}
    return {key: [float(v) for v in np.quantile(values, (0.025, 0.975))] for key, values in table.items()}


def write(full: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report as JSON and, beside it, as Markdown; the path of the JSON file."""
    path = Path(path)
    if path.suffix != ".json":
        raise InvalidConfig("A report is a .json file", got=path.name)
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(full))
    return report.write(path, dict(full))


def markdown(full: Mapping[str, Any], *, title: str = "Opsin") -> str:
    """The main numbers for people."""
    own, intervals, ties = full["measures"], full["intervals"], full["over_orders_of_equal_scores"]
    lines = [
        "# Ego4D VQ2D",
        "",
        f"{full['queries']} queries of {full['videos']} videos, {full['answered']} answered.",
        f"Commit {full['environment']['commit']}, {full['environment']['date']}.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        f"| **{title}** | {' | '.join(f'{own[c]:.3f}' for c in COLUMNS)} |",
    ]
    if intervals:
        cells = [f"{intervals[c][0]:.3f}–{intervals[c][1]:.3f}" for c in COLUMNS]
        lines.append(f"| 95 % interval over videos | {' | '.join(cells)} |")
    cells = [f"{ties[c]['lowest']:.3f}–{ties[c]['highest']:.3f} ({ties[c]['expected']:.3f})" for c in COLUMNS]
    lines.append(f"| over the orders of equal scores (expected) | {' | '.join(cells)} |")
    lines += [
        f"| {name} (published, validation split) | {' | '.join(f'{row[c]:.3f}' for c in COLUMNS)} |"
        for name, row in full["published_validation"].items()
    ]
    lines += ["", "By area of the crop and of the largest true box:", "", f"| | queries | {' | '.join(COLUMNS)} |"]
    lines.append(f"|---|---|{'---|' * len(COLUMNS)}")
    for name, row in full["by_size"].items():
        cells = [f"{row[c]:.3f}" if c in row else "–" for c in COLUMNS]
        lines.append(f"| {name} | {row['queries']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
