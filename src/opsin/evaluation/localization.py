"""Visual queries on real videos: ``opsin.locate`` against template matching, by the measures of ``vq2d``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opsin import images, report, runtime
from opsin.errors import InputError
from opsin.evaluation import template
from opsin.evaluation.datasets import Episode
from opsin.geometry import check_box
from opsin.tracking.base import Tracker
from opsin.types import Track
from opsin.vq2d.metrics import BoxTrack, TrackScores, recovered_frames, spatiotemporal_iou, temporal_iou
from opsin.vql.preset import Preset
from opsin.vql.preset import preset as preset_of

if TYPE_CHECKING:
    from opsin.regions import RegionModel

TEMPLATE_SIDE = 320  # template matching sees frames of at most this side: five sizes a frame at full size take minutes


def query_crop(episode: Episode) -> Tensor:
    """The picture of the object ``(3, h, w)``, cut out of its query frame at whole pixels."""
    frame = images.read_image(episode.query_frame)
    box = check_box(episode.query_box, (int(frame.shape[1]), int(frame.shape[2])))
    x1, y1, x2, y2 = (round(v) for v in box)
    return frame[:, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]


def as_boxes(track: Track) -> BoxTrack:
    """A located track as the measures take it; not found is the empty answer."""
    return BoxTrack(track.frames.cpu(), track.boxes.cpu(), track.score if track.found else 0.0)


def stages(whole: Preset) -> dict[str, Preset]:
    """A preset built up: every row adds one stage to the row before. What it leaves out, such as refinement in
    ``"template"``, comes last, after the row that is the preset itself."""
    steps: dict[str, dict[str, Any]] = {"selection alone": {"refine": False, "first": "best", "rounds": 1}}
    if whole.first == "last":
        steps["+ the last candidate, not the best"] = {"first": "last"}
    more: dict[str, dict[str, Any]] = {
        "+ refinement": {"refine": True}, "+ further rounds": {"rounds": max(2, whole.rounds)},
    }  # fmt: skip
    steps |= more if whole.refine else dict(reversed(more.items()))
    rows: dict[str, Preset] = {}
    for name, values in steps.items():
        rows[name] = whole = preset_of(whole, **values)
    return rows


def evaluate(
    model: RegionModel,
    episodes: Sequence[Episode],
    *,
    context: bool = False,
    baseline: bool = True,
    ablation: bool = False,
    preset: str | Preset | None = None,
    tracker: str | Path | Tracker = "auto",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Answer every episode as ``VideoSearch(frames, preset=..., tracker=..., **options).locate(image=crop)`` does and,
    as ``baseline``, with template matching.

    ``context`` hands over the whole query frame and the box of the object in it, instead of the crop alone.
    ``ablation`` measures every row of :func:`stages`, on frames that are encoded once per episode; ``as_given`` names
    the row that is the preset itself. Intervals come from drawing whole source videos again: the episodes of one video
    are not independent.
    """
    from opsin.localization.search import default_preset, tracker_of

    if not episodes:
        raise InputError("There is at least one episode", got=0)
    whole = preset_of(preset or default_preset(model))
    ways = stages(whole) if ablation else {"opsin locate": whole}
    weights = next(model.parameters())
    follower = tracker_of(tracker, device=weights.device, dtype=weights.dtype, window=whole.window)
    truths, groups = [BoxTrack.of(e.response) for e in episodes], [e.group for e in episodes]
    matched, rules = _baseline(episodes, truths, groups) if baseline else ({}, [])
    answers: dict[str, list[BoxTrack]] = {name: [] for name in ways}
    spent = dict.fromkeys((*(["encoding"] if ablation else []), *ways), 0.0)
    for episode in runtime.progress(episodes, total=len(episodes), description="locating", unit="episode"):
        asked: dict[str, Any] = {"image": query_crop(episode)}
        if context:
            asked = {"image": episode.query_frame, "box": episode.query_box}
        for name, track, seconds in _answers(episode, asked, ways, model, follower or "template", options):
            spent[name] += seconds
            if track is not None:
                answers[name].append(as_boxes(track))
    answers |= matched
    given = next((name for name, way in ways.items() if way == whole), None)
    return {
        "episodes": len(episodes),
        "videos": len(set(groups)),
        "frames": sum(len(e.frames) for e in episodes),
        "query": "frame and box" if context else "crop",
        "options": options,
        "preset": whole.name,
        "tracker": follower.name if follower is not None else "template",
        "seconds_locating": sum(spent.values()),
        "seconds": spent,
        "methods": {name: summarise(tracks, truths, groups, seed=seed) for name, tracks in answers.items()},
        **({"stages": {n: asdict(w) for n, w in ways.items()}, "as_given": given} if ablation else {}),
        "template_rules": {e.id: vars(r) for e, r in zip(episodes, rules, strict=True)} if rules else {},
        "per_episode": {
            e.id: {"frames": len(e.frames), "truth": _span(truth)}
            | {name: _answer(tracks[i], truth) for name, tracks in answers.items()}
            for i, (e, truth) in enumerate(zip(episodes, truths, strict=True))
        },
    }


def _answers(
    episode: Episode, asked: dict[str, Any], ways: dict[str, Preset], model: RegionModel, tracker: Any,
    options: dict[str, Any],
) -> Iterator[tuple[str, Track | None, float]]:  # fmt: skip
    """Row, track and seconds of every way; where there are several they share what the frames are encoded to, and the
    row ``"encoding"`` comes first."""
    from opsin.localization import VideoSearch

    frames = [str(f) for f in episode.frames]
    with TemporaryDirectory(prefix="opsin-") as folder:
        shared = {"cache": folder} if len(ways) > 1 else {"keep": False}
        for name, way in ways.items():
            started = time.perf_counter()
            with VideoSearch(frames, model=model, preset=way, tracker=tracker, **shared, **options) as search:
                if len(ways) > 1 and not len(search.store):
                    deque(search.store.shots(), 0)
                    yield "encoding", None, time.perf_counter() - started
                    started = time.perf_counter()
                track = search.locate(**asked)
            yield name, track, time.perf_counter() - started


def _baseline(
    episodes: Sequence[Episode], truths: Sequence[BoxTrack], groups: Sequence[str]
) -> tuple[dict[str, list[BoxTrack]], list[template.Rule]]:
    """Template matching: its answers, and the rule of every episode, chosen on the other videos."""
    shown = runtime.progress(episodes, total=len(episodes), description="matching", unit="episode")
    matched = [match_episode(e) for e in shown]
    rules = template.choose_rules(matched, truths, groups)
    # What it could reach if it knew these very episodes: an upper bound, not a result.
    oracle = max(template.RULES, key=lambda r: template.quality(matched, truths, r))
    return {
        "template matching": [template.last_occurrence(m, r) for m, r in zip(matched, rules, strict=True)],
        "template matching, threshold chosen on the same episodes": [
            template.last_occurrence(m, oracle) for m in matched
        ],
    }, rules


def match_episode(episode: Episode) -> template.Matches:
    """Template matching over the frames of an episode."""
    crop = query_crop(episode)
    full = images.read_image(episode.query_frame)
    reduction = min(1.0, TEMPLATE_SIDE / max(full.shape[1:]))
    return template.match([images.read_image(f) for f in episode.frames], crop, reduction=reduction)


def summarise(
    tracks: Sequence[BoxTrack], truths: Sequence[BoxTrack], groups: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """The measures of one way of answering, each with the interval over videos."""
    names = sorted(set(groups))
    members = [[i for i, g in enumerate(groups) if g == name] for name in names]

    def measure(rows: Sequence[int]) -> dict[str, float]:
        scores = TrackScores()
        for i in rows:
            scores.update(tracks[i], truths[i])
        return scores.compute()

    everything = measure(range(len(tracks)))
    result: dict[str, Any] = {}
    for name, value in everything.items():

        def resampled(videos: Any, name: str = name) -> float:
            return measure([i for v in videos for i in members[v]])[name]

        result[name] = {"mean": value, "interval": report.bootstrap(resampled, len(names), resamples=200, seed=seed)}
    result["answered"] = sum(len(t) > 0 for t in tracks) / len(tracks)
    return result


def _span(track: BoxTrack) -> list[int]:
    return [int(track.frames[0]), int(track.frames[-1])] if len(track) else []


def _answer(track: BoxTrack, truth: BoxTrack) -> dict[str, Any]:
    return {
        "span": _span(track),
        "score": track.score,
        "tiou": temporal_iou(track, truth),
        "stiou": spatiotemporal_iou(track, truth),
        "recovered": recovered_frames(track, truth) / len(truth),
    }
