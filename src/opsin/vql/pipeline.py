"""The stages in a row: score every shot, select, refine, track, then once more with what the track has taught.

What the object looks like is a ``Finder``'s business, what follows it a ``Tracker``'s; this module only decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from opsin.tracking.base import Step, Tracker
from opsin.video import VideoReader
from opsin.vql.candidates import select
from opsin.vql.preset import Preset
from opsin.vql.store import Shot
from opsin.vql.timeline import Timeline


class Finder(Protocol):
    """Knows one object and finds it in pictures. Boxes are pixels of the frame; one without area is a point."""

    def score(self, shot: Shot) -> tuple[float, Tensor]:
        """The best place of a shot: its score, and its box ``(4,)``."""
        ...

    def settled(self, timeline: Timeline) -> tuple[Timeline, Finder]:
        """Scores of a whole search made comparable between videos, and the finder that answers with such scores."""
        ...

    def refine(self, reader: VideoReader, moments: Sequence[Step]) -> list[Step]:
        """The moments looked at closely: better boxes, new scores, same order. A moment may be dropped."""
        ...

    def expanded(self, reader: VideoReader, track: Sequence[Step]) -> Finder:
        """A finder that also knows how the object looks in ``track``; itself when that teaches nothing."""
        ...

    def tracker(self) -> Tracker:
        """A tracker that needs no further weights."""
        ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a search found: ``steps`` of the track, empty when nothing was confident enough; its ``score``, or the best
    there was; the ``timeline`` of scores; ``candidates`` as refined, in time order; ``rounds`` of search it took."""

    steps: list[Step]
    score: float
    timeline: Timeline
    candidates: list[Step] = field(default_factory=list)
    rounds: int = 1


def scan(shots: Iterable[Shot], finders: Sequence[Finder], stops: Sequence[float | None]) -> list[Timeline]:
    """The best place of every shot for each finder, whose search ends before its ``stop`` in seconds.

    One pass answers all: a shot is read, or encoded, once.
    """
    rows: list[list[tuple[int, float, Tensor, float]]] = [[] for _ in finders]
    for shot in shots:
        for finder, stop, table in zip(finders, stops, rows, strict=True):
            if stop is None or shot.time < stop:
                score, box = finder.score(shot)
                table.append((shot.frame, shot.time, box, score))
    return [Timeline.of(table) for table in rows]


def search(
    reader: VideoReader, timeline: Timeline, finder: Finder, preset: Preset, *,
    shots: Callable[[float], Iterable[Shot]],
    tracker: Tracker | None = None, stop: float | None = None, own: int | None = None,
) -> Outcome:  # fmt: skip
    """The last occurrence, from the scores of a scan.

    ``shots(start)`` are the shots from ``start`` seconds on, for the second round; ``own`` the frame that the query
    itself is taken from, when it lies inside the search: it is not an answer. ``tracker`` None is the finder's own.
    """
    settled, finder = finder.settled(timeline)
    moments = candidates(reader, settled, finder, preset, own)
    best = max((m.score for m in moments), default=float(settled.scores.max()) if len(settled) else 0.0)
    if not moments or best < preset.threshold:
        return Outcome([], best, settled, moments)
    level = max(preset.threshold, preset.top_share * best)
    confident = [m for m in moments if m.score >= level]
    chosen = confident[-1] if preset.first == "last" else max(confident, key=lambda m: m.score)
    seed = with_area(reader, chosen, finder)
    if seed is None:
        return Outcome([], best, settled, moments)
    first, track = seed.score, (tracker or finder.tracker()).track(reader, seed, stop=stop)
    answer = Outcome(without_own(track, own), seed.score, settled, moments)
    for number in range(2, preset.rounds + 1):
        finder = finder.expanded(reader, track)
        rest = scan((s for s in shots(track[-1].time) if s.frame > track[-1].frame), [finder], [stop])[0]
        least = max(preset.second_threshold, preset.second_share * first)
        later = [m for m in candidates(reader, rest, finder, preset, own) if m.score >= least]
        seed = with_area(reader, later[-1], finder) if later else None
        if seed is None:
            break
        track = (tracker or finder.tracker()).track(reader, seed, stop=stop)
        if without_own(track, own):
            answer = Outcome(without_own(track, own), seed.score, settled, moments, number)
    return answer


def candidates(
    reader: VideoReader, timeline: Timeline, finder: Finder, preset: Preset, own: int | None
) -> list[Step]:
    """Stages 3 and 4: the moments worth a closer look, refined, and those that stay worth it; in time order."""
    if not len(timeline):
        return []
    rows = select(timeline.frames, timeline.scores, preset=preset, query_frame=own)
    moments = [timeline.row(i) for i in rows.tolist()]
    best = max((m.score for m in moments), default=0.0)
    moments = [m for m in moments if m.score >= preset.top_share * best]
    if not preset.refine or not moments:
        return moments
    refined = finder.refine(reader, moments)
    least = min(preset.refinement_top_p, max((m.score for m in refined), default=0.0))
    return [m for m in refined if m.score >= least]


def with_area(reader: VideoReader, moment: Step, finder: Finder) -> Step | None:
    """A moment that can be tracked: where it is only a point, as without refinement, a closer look gives it a box, not
    another score; None when there is nothing."""
    if bool((moment.box[2:] > moment.box[:2]).all()):
        return moment
    return next((replace(moment, box=looked.box) for looked in finder.refine(reader, [moment])), None)


def without_own(track: Sequence[Step], own: int | None) -> list[Step]:
    """The track without the moment that the query was taken from: what comes after it, nothing when it ends there."""
    frames = [s.frame for s in track]
    if own is None or own not in frames:
        return list(track)
    return list(track[frames.index(own) + 1 :])
