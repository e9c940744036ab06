"""Answering the queries of many clips: in shards, safe to kill at any moment, nothing lost and nothing twice.

Each clip gets a file of its own, ``clips/<name>.json``, that appears when all its queries are answered. A run that is
started again does what is left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opsin import runtime
from opsin.errors import (
    InputError,
    InvalidConfig,
    InvalidDataset,
    InvalidPrompt,
    MissingExtra,
    MissingFile,
    ModelError,
)
from opsin.geometry import check_box
from opsin.hub import atomic_path
from opsin.types import Track
from opsin.vq2d.annotations import Annotations, Clip, QuerySet, read_json
from opsin.vq2d.clips import ClipRecord, part
from opsin.vq2d.metrics import BoxTrack
from opsin.vq2d.prediction_file import Filed, format_answers, submission


@dataclass(frozen=True)
class ClipQuery:
    """One query in pixels of its prepared clip: the object is ``box`` xyxy in frame ``frame``; only frames before
    ``query_frame`` are searched. ``annotation``, ``id``: where the answer belongs."""

    annotation: int
    id: str
    frame: int
    box: tuple[float, float, float, float]
    query_frame: int
    title: str


@dataclass(frozen=True)
class ClipTask:
    """The ``queries`` of one clip, to be answered together on the prepared clip ``path``."""

    clip: Clip
    path: Path
    record: ClipRecord
    queries: tuple[ClipQuery, ...]
    refused: Mapping[str, str]


LocateClip = Callable[[ClipTask], Sequence[BoxTrack | None]]


@dataclass
class Predicted:
    """What :func:`predict` did: names of clips ``made``, found ``done``, and ``failed`` with why."""

    made: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def predict(
    clips: Sequence[Clip],
    locate_clip: LocateClip,
    out: str | Path,
    *,
    prepared: str | Path,
    shard: tuple[int, int] = (1, 1),
    details: Mapping[str, Any] | None = None,
) -> Predicted:
    """Answer the queries of the clips of one shard; what ``out`` has already is not done again.

    ``locate_clip`` answers all queries of a :class:`ClipTask`, in order, in pixels and frames of the prepared clip;
    None is "not found". ``prepared``: the folder that ``prepare`` wrote. ``shard``: number, from 1, and count.
    ``details``: what has to be equal for answers to belong together, such as the model; kept in ``out/run.json``. A
    clip that fails is reported, does not stop the run, and is tried again by the next one.

    Raises ``InvalidConfig`` when ``out`` holds answers of other ``details``, ``MissingFile`` without ``prepared``, and
    what is wrong with the model or its options, since that is no matter of one clip.
    """
    if not Path(prepared).is_dir():
        raise MissingFile("The folder of prepared clips must exist", got=str(prepared))
    chosen = [clip for clip in part(clips, shard) if any(True for _ in clip.queries())]
    out = Path(out)
    _same_run(out, details or {})
    report = Predicted()
    for clip in runtime.progress(chosen, total=len(chosen), description="predicting", unit="clip"):
        target = out / "clips" / f"{clip.name}.json"
        if target.is_file():
            report.done.append(clip.name)
            continue
        try:
            made = answer(task_of(clip, prepared), locate_clip)
            with atomic_path(target) as temporary:
                temporary.write_text(json.dumps(made) + "\n")
            report.made.append(clip.name)
        except (ModelError, MissingExtra, InvalidConfig):
            raise
        except Exception as error:  # whatever is wrong with one clip, the others are still to be answered
            report.failed[clip.name] = f"{type(error).__name__}: {error}"
    return report


def task_of(clip: Clip, prepared: str | Path) -> ClipTask:
    """The queries of ``clip`` on its prepared file; those that cannot be asked are ``refused``, with the reason."""
    path = Path(prepared) / f"{clip.name}.mp4"
    if not path.is_file():
        raise MissingFile("The prepared clip must exist", got=str(path), remedy='"opsin eval vq2d prepare" makes it.')
    record = ClipRecord.load(path.with_suffix(".json"))
    queries, refused = [], {}
    for annotation, query in clip.queries():
        try:
            queries.append(_query(annotation, query, record))
        except InvalidPrompt as error:
            refused[query.place] = str(error)
    return ClipTask(clip, path, record, tuple(queries), refused)


def _query(annotation: int, query: QuerySet, record: ClipRecord) -> ClipQuery:
    if not 0 <= query.crop.frame < record.frames:
        raise InvalidPrompt(f"The crop lies in a frame of the clip, 0 to {record.frames - 1}", got=query.crop.frame)
    if query.query_frame < 1:
        raise InvalidPrompt("There are frames before the query frame", got=query.query_frame)
    box = record.to_clip(torch.tensor(query.crop.box, dtype=torch.float64), query.crop.size)
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    half = torch.where(half > 0, half.clamp(min=1), half)  # small things stay something when the clip is small
    # Crops reach over the picture by a pixel, or into a bar that was trimmed.
    inside = check_box(torch.cat([middle - half, middle + half]), record.size)
    return ClipQuery(annotation, query.id, query.crop.frame, inside, query.query_frame, query.title)


def answer(task: ClipTask, locate_clip: LocateClip) -> dict[str, Any]:
    """The file of predictions of one clip: boxes in pixels of the source picture."""
    started = time.perf_counter()
    tracks = list(locate_clip(task)) if task.queries else []
    if len(tracks) != len(task.queries):
        raise InvalidDataset(f"{len(task.queries)} queries have as many answers", got=len(tracks))
    given = {(q.annotation, q.id): (q, track) for q, track in zip(task.queries, tracks, strict=True)}
    answers = []
    for index, query in task.clip.queries():
        asked, track = given.get((index, query.id), (None, None))
        found = BoxTrack.empty() if asked is None or track is None else _in_picture(track, asked, task.record)
        size, uid = task.record.source_size, task.clip.annotations[index].uid
        answers.append(Filed(task.clip.video_uid, task.clip.name, query.id, found, size, index, annotation_uid=uid))
    made = format_answers(answers)
    made["details"] = {"seconds": round(time.perf_counter() - started, 3), "refused": dict(task.refused)}
    return made


def searcher(
    *, model: Any = "opsin-tiny", preset: Any = None, tracker: Any = "auto", threshold: float | None = None,
    cache: str | Path | None = None, device: Any = None, dtype: Any = None,
) -> LocateClip:  # fmt: skip
    """What answers queries with :class:`opsin.localization.VideoSearch`; the model and the tracker are loaded once.

    ``cache`` keeps what clips were encoded to, for another run on them. A query that cannot be asked gets no answer.
    """
    from opsin import models
    from opsin.localization import VideoSearch

    loaded: Any = models.load(model, device=device, dtype=dtype) if isinstance(model, (str, Path)) else model
    trackers = [tracker]

    def locate_clip(task: ClipTask) -> list[BoxTrack | None]:
        asked = [{"frame": q.frame, "box": q.box, "before": q.query_frame} for q in task.queries]
        with VideoSearch(
            task.path, model=loaded, preset=preset, tracker=trackers[0], rate=task.record.fps, cache=cache,
            device=device, dtype=dtype,
        ) as search:  # fmt: skip
            trackers[0] = search.tracker if search.tracker is not None else "template"
            found: list[Track | None]
            try:
                found = [*search.locate_all(asked, threshold=threshold)]
            except InputError:  # one bad question must not cost the others theirs
                found = [_alone(search, question, threshold) for question in asked]
        return [None if track is None or not track.found else _as_boxes(track) for track in found]

    return locate_clip


def load_folder(folder: str | Path, annotations: Annotations) -> dict[str, Any]:
    """The answers that :func:`predict` wrote to ``folder``, as one file for all of ``annotations``."""
    paths = sorted((Path(folder) / "clips").glob("*.json"))
    if not paths:
        raise MissingFile("The folder holds answers of clips", got=str(folder))
    return submission(annotations.tree, [read_json(path) for path in paths])


def _alone(search: Any, question: Mapping[str, Any], threshold: float | None) -> Track | None:
    try:
        return search.locate(**question, threshold=threshold)
    except InputError:
        return None


def _as_boxes(track: Track) -> BoxTrack:
    return BoxTrack(track.frames.cpu(), track.boxes.cpu(), track.score)


def _in_picture(track: BoxTrack, query: ClipQuery, record: ClipRecord) -> BoxTrack:
    """The part of an answer before the query frame, cut to the clip, in pixels of the source picture."""
    early = track.frames < query.query_frame
    height, width = record.size
    boxes = track.boxes[early].double()
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    return replace(track, frames=track.frames[early], boxes=record.to_picture(boxes, record.source_size))


def _same_run(out: Path, details: Mapping[str, Any]) -> None:
    """``out/run.json`` says how its answers came about; answers of two ways do not mix."""
    path = out / "run.json"
    wanted = json.loads(json.dumps(dict(details)))
    if path.is_file():
        known = read_json(path)
        if known != wanted:
            raise InvalidConfig(
                "A folder holds the answers of one way of answering", got=f"{wanted}, while {path} says {known}",
                remedy="Name another folder.",
            )  # fmt: skip
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=1) + "\n")
