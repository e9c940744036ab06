"""Annotation files of Ego4D VQ2D: ``vq_{train,val,test_unannotated}.json``, and the ``*_annot.json.gz`` lists.

Only valid query sets are handed out. Frames are numbered in the clip, at its own rate (5 a second); boxes are xyxy in
pixels of the annotated picture, whose size goes with them.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.errors import InputError, InvalidDataset, MissingFile
from opsin.geometry import Size
from opsin.vq2d.metrics import BoxTrack

LISTED_VERSION = "1.0.5"  # lists carry none
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class FrameBox:
    """A box xyxy in frame ``frame`` of a clip, in pixels of a picture of ``size`` ``(H, W)``."""

    frame: int
    box: tuple[float, float, float, float]
    size: Size


@dataclass(frozen=True)
class QuerySet:
    """One question: where was the object of ``crop`` last seen before ``query_frame``?

    ``response``: the true boxes, None where they are withheld. ``place`` says where in the file it stands.
    """

    id: str
    query_frame: int
    title: str
    crop: FrameBox
    response: tuple[FrameBox, ...] | None
    place: str

    def truth(self) -> BoxTrack | None:
        """The true track, in pixels of the annotated picture; None where there is none."""
        if not self.response:
            return None
        try:
            return BoxTrack.from_rows([(b.frame, *b.box) for b in self.response])
        except InputError as error:
            raise InvalidDataset(f"The response track of {self.place} is contiguous", got=error.got) from error


@dataclass(frozen=True)
class Annotation:
    """The valid query sets of one annotator's pass over a clip."""

    uid: str | None
    queries: tuple[QuerySet, ...]


@dataclass(frozen=True)
class Clip:
    """A stretch of a video, ``start`` to ``end`` seconds, sampled ``fps`` times a second."""

    uid: str | None
    video_uid: str
    start: float
    end: float
    fps: float
    annotations: tuple[Annotation, ...]

    @property
    def name(self) -> str:
        """``uid``, or the video and the times where there is none; fit for a file name."""
        return clip_name(self.video_uid, self.uid, self.start, self.end)

    def queries(self) -> Iterator[tuple[int, QuerySet]]:
        """Every query with the number of its annotation."""
        for index, annotation in enumerate(self.annotations):
            for query in annotation.queries:
                yield index, query


@dataclass(frozen=True)
class Annotations:
    """A file: its ``clips`` in order, and ``tree``, the JSON of videos, clips and annotations that they come from.

    ``listed``: the file was a flat list, which does not say what belonged to one annotation; each of its entries then
    is an annotation of its own, good for predicting and measuring, not for the challenge.
    """

    version: str
    clips: tuple[Clip, ...]
    tree: Mapping[str, Any]
    listed: bool = False

    @classmethod
    def load(cls, path: str | Path) -> Annotations:
        """Read either form. Raises ``MissingFile``, or ``InvalidDataset`` that names the place."""
        return cls.parse(read_json(path))

    @classmethod
    def parse(cls, data: Any) -> Annotations:
        """From the JSON of either form."""
        tree = _tree(data) if isinstance(data, list) else mapping(data, "the file")
        return cls(str(tree.get("version", "")), tuple(_clips(tree)), tree, isinstance(data, list))

    def require_tree(self) -> Mapping[str, Any]:
        """``tree`` where it is that of the file, which files for the challenge follow; else ``InvalidDataset``."""
        if self.listed:
            raise InvalidDataset(
                "A file for the challenge follows the tree of videos, clips and annotations", got="the flat list form",
                remedy="Give vq_train.json, vq_val.json or vq_test_unannotated.json.",
            )  # fmt: skip
        return self.tree


def clip_name(video_uid: str, uid: str | None, start: float, end: float) -> str:
    """What a clip is called: its uid, or its video and times."""
    for name in (video_uid, uid):
        if name is not None and not _NAME.fullmatch(str(name)):
            raise InvalidDataset("The uids of videos and clips are fit for file names", got=f'"{name}"')
    return uid if uid is not None else f"{video_uid}-{start:g}-{end:g}"


def read_json(path: str | Path) -> Any:
    """A JSON file, gzipped when its name ends in ``.gz``."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile("The JSON file must exist", got=str(path))
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise InvalidDataset("The file must be whole JSON", got=f"{path.name}: {error}") from error


def mapping(value: Any, place: str) -> Mapping[str, Any]:
    """``value``, which has to be a JSON object."""
    if not isinstance(value, Mapping):
        raise InvalidDataset(f"{place} is an object", got=type(value).__name__)
    return value


def listing(value: Any, key: str, place: str) -> Sequence[Any]:
    """The list ``value[key]``."""
    found = mapping(value, place).get(key)
    if not isinstance(found, list):
        raise InvalidDataset(f'{place} has a list "{key}"', got=type(found).__name__)
    return found


def _clips(data: Any) -> Iterator[Clip]:
    seen: set[str] = set()
    for v, video in enumerate(listing(data, "videos", "the file")):
        for c, clip in enumerate(listing(video, "clips", f"video {v}")):
            place = f"video {v}, clip {c}"
            annotations = []
            for a, annotation in enumerate(listing(clip, "annotations", place)):
                inner = f"{place}, annotation {a}"
                sets = mapping(mapping(annotation, inner).get("query_sets"), f"{inner}: query_sets")
                queries = [
                    _query(str(q), entry, f'{inner}, query set "{q}"')
                    for q, entry in sets.items()
                    if mapping(entry, f'{inner}, query set "{q}"').get("is_valid", True)
                ]
                annotations.append(Annotation(annotation.get("annotation_uid"), tuple(queries)))
            made = _clip(clip, video, tuple(annotations), place)
            if made.name in seen:
                raise InvalidDataset("Every clip is there once", got=f"{made.name} again at {place}")
            seen.add(made.name)
            yield made


def _tree(entries: Sequence[Any]) -> dict[str, Any]:
    """The list form as a tree, every entry an annotation of its own."""
    videos: dict[str, dict[str, Any]] = {}
    clips: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, entry in enumerate(entries):
        place = f"entry {i}"
        known = mapping(_key(entry, "metadata", place), f"{place}, metadata")
        uid = _key(known, "video_uid", place)
        video = videos.setdefault(str(uid), {"video_uid": uid, "clips": []})
        times = {key: known.get(key) for key in ("video_start_sec", "video_end_sec", "clip_fps")}
        key = (uid, entry.get("clip_uid"), *times.values())
        if key not in clips:
            clips[key] = {"clip_uid": entry.get("clip_uid"), **times, "annotations": []}
            video["clips"].append(clips[key])
        sets = {str(_key(entry, "query_set", place)): entry}
        clips[key]["annotations"].append({"annotation_uid": entry.get("dataset_uid"), "query_sets": sets})
    return {"version": LISTED_VERSION, "videos": list(videos.values())}


def _clip(clip: Mapping[str, Any], video: Any, annotations: tuple[Annotation, ...], place: str) -> Clip:
    start, end, fps = (
        _number(_key(clip, key, place), key, place) for key in ("video_start_sec", "video_end_sec", "clip_fps")
    )
    if not (end > start and fps > 0):
        raise InvalidDataset(f"{place} ends after it starts, at a positive rate", got=(start, end, fps))
    return Clip(clip.get("clip_uid"), str(_key(video, "video_uid", place)), start, end, fps, annotations)


def _query(name: str, entry: Any, place: str) -> QuerySet:
    response = entry.get("response_track")
    if response is not None and not isinstance(response, list):
        raise InvalidDataset(f"The response track of {place} is a list", got=type(response).__name__)
    return QuerySet(
        id=name,
        query_frame=int(_number(_key(entry, "query_frame", place), "query_frame", place)),
        title=str(entry.get("object_title") or ""),
        crop=_box(_key(entry, "visual_crop", place), f"{place}, visual crop"),
        response=None if response is None else tuple(_box(b, f"{place}, response track") for b in response),
        place=place,
    )


def _box(entry: Any, place: str) -> FrameBox:
    def number(key: str) -> float:
        return _number(_key(entry, key, place), key, place)

    x, y = number("x"), number("y")
    size = int(number("original_height")), int(number("original_width"))
    if min(size) < 1:
        raise InvalidDataset(f"The picture of {place} has a positive size", got=size)
    return FrameBox(int(number("frame_number")), (x, y, x + number("width"), y + number("height")), size)


def _key(entry: Any, key: str, place: str) -> Any:
    found = mapping(entry, place).get(key)
    if found is None:
        raise InvalidDataset(f'{place} has a "{key}"', got=f"the keys {', '.join(map(str, entry))}")
    return found


def _number(value: Any, key: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
        raise InvalidDataset(f'"{key}" of {place} is a number', got=value)
    return float(value)
