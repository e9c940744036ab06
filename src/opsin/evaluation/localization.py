"""Visual queries on real videos: ``opsin.locate`` against template matching, by the measures of ``vq2d``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opsin import images, report, runtime
from opsin.errors import InputError
from opsin.evaluation import template
from opsin.evaluation.datasets import Episode
from opsin.geometry import check_box
from opsin.types import Track
from opsin.vq2d.metrics import BoxTrack, TrackScores, recovered_frames, spatiotemporal_iou, temporal_iou

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


def evaluate(
    model: RegionModel,
    episodes: Sequence[Episode],
    *,
    context: bool = False,
    baseline: bool = True,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Answer every episode with ``locate(frames, image=crop, **options)`` and, as ``baseline``, with template matching.

    ``context`` hands over the whole query frame and the box of the object in it, instead of the crop alone.
    Intervals come from drawing whole source videos again: the episodes of one video are not independent.
    """
    from opsin.localization import locate

    if not episodes:
        raise InputError("There is at least one episode", got=0)
    truths = [BoxTrack.of(e.response) for e in episodes]
    answers: dict[str, list[BoxTrack]] = {"opsin locate": []}
    started = time.perf_counter()
    for episode in runtime.progress(episodes, total=len(episodes), description="locating", unit="episode"):
        asked: dict[str, Any] = {"image": query_crop(episode)}
        if context:
            asked = {"image": episode.query_frame, "box": episode.query_box}
        found = locate([str(f) for f in episode.frames], model=model, **asked, **options)
        answers["opsin locate"].append(as_boxes(found))
    seconds = time.perf_counter() - started
    rules: list[template.Rule] = []
    if baseline:
        matched = [
            match_episode(e)
            for e in runtime.progress(episodes, total=len(episodes), description="matching", unit="episode")
        ]
        rules = template.choose_rules(matched, truths, [e.group for e in episodes])
        answers["template matching"] = [template.last_occurrence(m, r) for m, r in zip(matched, rules, strict=True)]
        # What the baseline could reach if it knew these very episodes: an upper bound, not a result.
        oracle = max(template.RULES, key=lambda r: template.quality(matched, truths, r))
        answers["template matching, threshold chosen on the same episodes"] = [
            template.last_occurrence(m, oracle) for m in matched
        ]
    groups = [e.group for e in episodes]
    return {
        "episodes": len(episodes),
        "videos": len(set(groups)),
        "frames": sum(len(e.frames) for e in episodes),
        "query": "frame and box" if context else "crop",
        "options": options,
        "seconds_locating": seconds,
        "methods": {name: summarise(tracks, truths, groups, seed=seed) for name, tracks in answers.items()},
        "template_rules": {e.id: vars(r) for e, r in zip(episodes, rules, strict=True)} if rules else {},
        "per_episode": {
            e.id: {"frames": len(e.frames), "truth": _span(truth)}
            | {name: _answer(tracks[i], truth) for name, tracks in answers.items()}
            for i, (e, truth) in enumerate(zip(episodes, truths, strict=True))
        },
    }


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
