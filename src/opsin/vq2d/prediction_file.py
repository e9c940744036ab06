"""Files of predictions in the format of the Ego4D VQ2D challenge: written per clip, collated, checked, submitted.

A file per clip says in which picture size its boxes are (``frame_height``, ``frame_width``); a submission has them in
whole pixels of the annotated pictures. "No answer" is ``{"bboxes": [], "score": 0.0}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opsin.errors import InputError, InvalidDataset, check_compat
from opsin.geometry import Size
from opsin.vq2d.annotations import clip_name, listing, mapping
from opsin.vq2d.metrics import BoxTrack

CHALLENGE = "ego4d_vq2d_challenge"
VERSION = "1.0.5"
FIELDS = ("fno", "x1", "y1", "x2", "y2")


@dataclass(frozen=True, eq=False)
class Filed:
    """An answer and where it belongs: video, clip, number of the annotation in the clip, and query set.

    Boxes of ``track``, and of ``truth`` where it is known, are in a picture of ``size`` ``(H, W)``.
    """

    video_uid: str
    clip_uid: str
    query_set: str
    track: BoxTrack
    size: Size
    annotation: int | None = None
    truth: BoxTrack | None = None
    annotation_uid: str | None = None


def format_answers(answers: Iterable[Filed], *, compat: str | None = None) -> dict[str, Any]:
    """The answers as a file of predictions, filed under their annotations; boxes keep two decimals.

    ``compat="published"`` does as the code of REN: whole pixels by truncation, and where the number of the annotation
    is missing it is guessed, by counting how often the id of the query set came before in its clip. The guess is wrong
    when an annotation lacks an id that a later one has; without ``compat`` the number has to be given.
    """
    published = check_compat(compat)
    videos: dict[str, dict[str, Any]] = {}
    clips: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for answer in answers:
        video = videos.setdefault(answer.video_uid, {"video_uid": answer.video_uid, "clips": []})
        video |= {"frame_height": answer.size[0], "frame_width": answer.size[1]}
        key = (answer.video_uid, answer.clip_uid)
        if key not in clips:
            clips[key] = []
            video["clips"].append({"clip_uid": answer.clip_uid, "predictions": clips[key]})
        entries = clips[key]
        index = answer.annotation
        if index is None and published:
            index = sum(answer.query_set in entry["query_sets"] for entry in entries)
        if index is None:
            raise InvalidDataset("An answer names its annotation", got=f"{answer.clip_uid}, set {answer.query_set}")
        while len(entries) <= index:
            entries.append({"query_sets": {}})
        if answer.annotation_uid is not None:
            entries[index]["annotation_uid"] = answer.annotation_uid
        sets = entries[index]["query_sets"]
        sets[answer.query_set] = _entry(answer.track, answer.track.score, published)
        if answer.truth is not None:
            sets[f"{answer.query_set}-gt"] = _entry(answer.truth, None, published)
    return {"version": VERSION, "challenge": CHALLENGE, "results": {"videos": list(videos.values())}}


def submission(
    annotations: Mapping[str, Any], files: Iterable[Mapping[str, Any]], *, compat: str | None = None
) -> dict[str, Any]:
    """One file for all of ``annotations`` (the JSON tree), from files of predictions per clip, in the order it wants.

    Boxes are scaled to the annotated pictures and truncated to whole pixels. What has no prediction gets "no answer".
    ``compat="published"``: as the code of REN, a box of no size at frame 0 instead, in a clip without any predictions
    for the invalid query sets too. Raises ``InvalidDataset`` for a clip that is there twice or not in the annotations.
    """
    published = check_compat(compat)
    found = _collate(files)
    nothing = {"bboxes": [dict.fromkeys(FIELDS, 0)] if published else [], "score": 0.0}
    videos = []
    for v, video in enumerate(listing(annotations, "videos", "the annotation file")):
        clips = []
        for c, clip in enumerate(listing(video, "clips", f"video {v}")):
            entries, size = found.pop((video["video_uid"], _name(video, clip)), (None, None))
            predictions = []
            for a, annotation in enumerate(listing(clip, "annotations", f"video {v}, clip {c}")):
                sets = {}
                given = _of_annotation(entries or [], annotation, a)
                for q, query in annotation["query_sets"].items():
                    if not query.get("is_valid", True) and not (published and entries is None):
                        continue
                    place = f'video {v}, clip {c}, annotation {a}, query set "{q}"'
                    sets[q] = _scaled(given[q], size, query, place) if q in given else nothing
                uid = annotation.get("annotation_uid")
                predictions.append({"query_sets": sets} | ({"annotation_uid": uid} if uid is not None else {}))
            clips.append({"clip_uid": clip["clip_uid"], "predictions": predictions})
        videos.append({"video_uid": video["video_uid"], "clips": clips})
    if found:
        names = [name for _, name in found]
        raise InvalidDataset("Every predicted clip is in the annotations", got=", ".join(names[:5]))
    version = annotations.get("version", VERSION)
    return {"version": version, "challenge": CHALLENGE, "results": {"videos": videos}}


def validate(annotations: Mapping[str, Any], predictions: Any, *, strict: bool = False) -> None:
    """``InvalidDataset`` unless ``predictions`` has the form that the benchmark takes for ``annotations``.

    Checks what ``validate`` of the published ``evaluate_vq.py`` checks: version (that of the annotations), challenge,
    the same videos, clips and annotations in the same order, an answer with ``bboxes`` and ``score`` for exactly the
    valid query sets. ``strict`` checks also what would fail or count wrong later: uids of annotations, numbers in
    boxes, contiguous frames before the query frame, a score. The message names the first few places.
    """
    found = problems(annotations, predictions, strict=strict)
    if found:
        rest = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise InvalidDataset("A prediction file follows its annotation file", got="; ".join(found[:5]) + rest)


def problems(annotations: Mapping[str, Any], predictions: Any, *, strict: bool = False) -> list[str]:
    """What is wrong with a file of predictions, place by place; see :func:`validate`."""
    check = _Check(strict)
    check.file(annotations, predictions)
    return check.found


class _Check:
    """Walks through a file of predictions beside the annotations and notes what is wrong."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.found: list[str] = []

    def file(self, annotations: Mapping[str, Any], predictions: Any) -> None:
        if not self._has(predictions, ("version", "challenge", "results"), "the file"):
            return
        if predictions["version"] != annotations.get("version"):
            self._note("the file", f'version is "{predictions["version"]}", not "{annotations.get("version")}"')
        if predictions["challenge"] != CHALLENGE:
            self._note("the file", f'challenge is "{predictions["challenge"]}", not "{CHALLENGE}"')
        videos = listing(annotations, "videos", "the annotation file")
        for v, (video, true_video) in enumerate(self._members(predictions["results"], "videos", videos, "results")):
            place = f"video {v}"
            self._same(video, true_video, "video_uid", place)
            clips = listing(true_video, "clips", place)
            for c, (clip, true_clip) in enumerate(self._members(video, "clips", clips, place)):
                inner = f"{place}, clip {c}"
                self._same(clip, true_clip, "clip_uid", inner)
                wanted = listing(true_clip, "annotations", inner)
                for a, (entry, annotation) in enumerate(self._members(clip, "predictions", wanted, inner)):
                    self._query_sets(entry, annotation, f"{inner}, annotation {a}")

    def _note(self, place: str, what: str) -> None:
        self.found.append(f"{place}: {what}")

    def _has(self, value: Any, keys: Sequence[str], place: str) -> bool:
        if not isinstance(value, Mapping):
            self._note(place, f"a {type(value).__name__} in place of an object")
            return False
        missing = [key for key in keys if key not in value]
        if missing:
            self._note(place, f"no {' and no '.join(missing)}")
        return not missing

    def _members(self, holder: Any, key: str, wanted: Sequence[Any], place: str) -> list[tuple[Any, Any]]:
        """Members of the list ``holder[key]`` with what they answer, by position."""
        if not self._has(holder, (key,), place):
            return []
        members = holder[key]
        if not isinstance(members, list):
            self._note(place, f"{key} is a {type(members).__name__} in place of a list")
            return []
        if len(members) != len(wanted):
            self._note(place, f"{len(members)} {key} in place of {len(wanted)}")
        return list(zip(members, wanted, strict=False))

    def _same(self, value: Any, truth: Mapping[str, Any], key: str, place: str) -> None:
        if self._has(value, (key,), place) and value[key] != truth.get(key):
            self._note(place, f'{key} is "{value[key]}", not "{truth.get(key)}"')

    def _query_sets(self, entry: Any, annotation: Mapping[str, Any], place: str) -> None:
        if not self._has(entry, ("query_sets",), place):
            return
        uid = annotation.get("annotation_uid")
        if self.strict and entry.get("annotation_uid", uid) != uid:
            self._note(place, f'annotation_uid is "{entry["annotation_uid"]}", not "{uid}"')
        sets, wanted = entry["query_sets"], annotation["query_sets"]
        valid = [q for q, query in wanted.items() if query.get("is_valid", True)]
        if not self._has(sets, valid, f"{place}, query_sets"):
            return
        for q, answer in sets.items():
            where = f'{place}, query set "{q}"'
            if q not in wanted:
                self._note(where, "not in the annotations")
            elif self._has(answer, ("bboxes", "score"), where) and self.strict:
                self._answer(answer, wanted[q], where)

    def _answer(self, answer: Mapping[str, Any], query: Mapping[str, Any], place: str) -> None:
        if not _is_number(answer["score"]):
            self._note(place, f"score is {answer['score']}, not a number")
        boxes = answer["bboxes"]
        if not isinstance(boxes, list):
            self._note(place, f"bboxes is a {type(boxes).__name__} in place of a list")
            return
        for i, box in enumerate(boxes):
            if not (isinstance(box, Mapping) and all(_is_number(box.get(field)) for field in FIELDS)):
                self._note(place, f"box {i} has not the numbers {', '.join(FIELDS)}")
                return
            if box["x2"] < box["x1"] or box["y2"] < box["y1"]:
                self._note(place, f"box {i} ends before it starts")
        frames = sorted(box["fno"] for box in boxes)
        if any(after - before != 1 for before, after in pairwise(frames)):
            self._note(place, "the frames are not contiguous")
        last = query.get("query_frame")
        if frames and (frames[0] < 0 or (last is not None and frames[-1] >= last)):
            self._note(place, f"frames {frames[0]} to {frames[-1]} are not before the query frame {last}")


def track_of(answer: Mapping[str, Any], place: str) -> BoxTrack:
    """``{"bboxes": [...], "score": ...}`` as a track. Raises ``InvalidDataset`` naming ``place``."""
    try:
        return BoxTrack.from_rows([[box[field] for field in FIELDS] for box in answer["bboxes"]], answer["score"])
    except InputError as error:
        raise InvalidDataset(f"The answer of {place} is a track: {error.rule}", got=error.got) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidDataset(f"The answer of {place} has boxes and a score", got=repr(error)) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _entry(track: BoxTrack, score: float | None, whole: bool) -> dict[str, Any]:
    rows = zip(track.frames.tolist(), track.boxes.tolist(), strict=True)
    return {
        "bboxes": [
            {"fno": frame} | {side: int(v) if whole else round(v, 2) for side, v in zip(FIELDS[1:], box, strict=True)}
            for frame, box in rows
        ],
        "score": score,
    }


def _name(video: Mapping[str, Any], clip: Mapping[str, Any]) -> str:
    uid = clip.get("clip_uid")
    return clip_name(video["video_uid"], uid, clip.get("video_start_sec", 0.0), clip.get("video_end_sec", 0.0))


def _collate(files: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[list[Any] | None, Size | None]]:
    """(video, clip) → predictions per annotation and the size of the picture that their boxes are in."""
    found: dict[tuple[str, str], tuple[list[Any] | None, Size | None]] = {}
    for file in files:
        results = mapping(mapping(file, "a file of predictions").get("results"), "results")
        for video in listing(results, "videos", "results"):
            for clip in listing(video, "clips", f"video {video.get('video_uid')}"):
                key = (video["video_uid"], clip["clip_uid"])
                if key in found:
                    raise InvalidDataset("The predictions of a clip are there once", got=f"clip {key[1]} twice")
                if not (_is_number(video.get("frame_height")) and _is_number(video.get("frame_width"))):
                    raise InvalidDataset("Predictions per clip give frame_height and frame_width", got=f"clip {key[1]}")
                found[key] = (clip["predictions"], (video["frame_height"], video["frame_width"]))
    return found


def _of_annotation(
    entries: Sequence[Mapping[str, Any]], annotation: Mapping[str, Any], index: int
) -> Mapping[str, Any]:
    """The query sets predicted for an annotation: by its uid where the entries give one, else by position."""
    uid = annotation.get("annotation_uid")
    for entry in entries if uid is not None else ():
        if entry.get("annotation_uid") == uid:
            return mapping(entry["query_sets"], "query_sets")
    if index < len(entries) and entries[index].get("annotation_uid") in (None, uid):
        return mapping(entries[index]["query_sets"], "query_sets")
    return {}


def _scaled(answer: Mapping[str, Any], size: Size | None, query: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An answer in whole pixels of the annotated picture."""
    track, crop = track_of(answer, place), query.get("visual_crop") or {}
    if size is None or not (_is_number(crop.get("original_width")) and _is_number(crop.get("original_height"))):
        raise InvalidDataset(f"The visual crop of {place} gives original_width and original_height", got=crop)
    x, y = crop["original_width"] / size[1], crop["original_height"] / size[0]
    scaled = track.boxes * track.boxes.new_tensor([x, y, x, y])
    return _entry(BoxTrack(track.frames, scaled, track.score), track.score, whole=True)
