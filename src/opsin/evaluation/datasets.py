"""Readers for the three annotated collections that the built-in measurements use.

Each yields small frozen records whose pictures and labels are read only when asked for, and raises ``InvalidDataset``
or ``MissingFile`` for a folder that does not follow its format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin import images
from opsin.errors import InvalidDataset, MissingFile
from opsin.geometry import Size


@dataclass(frozen=True)
class Segment:
    """One annotated segment: its id in the label picture, its category, and whether that is a thing or stuff."""

    id: int
    category: int
    is_thing: bool


@dataclass(frozen=True)
class SegmentedImage:
    """An image with labelled segments: ``segments`` in annotation order, ``masks()`` one row for each of them."""

    image_path: Path
    label_path: Path
    segments: tuple[Segment, ...]

    def image(self) -> Tensor:
        """RGB ``(3, H, W)`` in [0, 1]."""
        return images.read_image(self.image_path)

    def masks(self) -> Tensor:
        """Boolean masks ``(R, H, W)`` of the segments; COCO codes the id as R + 256 G + 65536 B."""
        rgb = read_labels(self.label_path)
        if rgb.ndim != 3 or rgb.shape[2] < 3:
            raise InvalidDataset("A panoptic label picture has three channels", got=f"{self.label_path}: {rgb.shape}")
        ids = rgb[..., :3].astype(np.int64) @ np.array([1, 256, 65536])
        wanted = np.array([s.id for s in self.segments], dtype=np.int64).reshape(-1, 1, 1)
        return torch.from_numpy(ids[None] == wanted)


@dataclass(frozen=True)
class HumanSegmentation:
    """An image and the label pictures that several people drew for it."""

    image_path: Path
    label_paths: tuple[Path, ...]

    def image(self) -> Tensor:
        """RGB ``(3, H, W)`` in [0, 1]."""
        return images.read_image(self.image_path)

    def labels(self) -> list[Tensor]:
        """One integer map ``(H, W)`` per annotator; 0 is unlabelled, regions count from 1."""
        return [torch.from_numpy(read_labels(p).astype(np.int64)) for p in self.label_paths]


@dataclass(frozen=True)
class Episode:
    """One visual query: where was the object last seen before ``frames`` ends?

    ``frames`` paths, ``query_frame`` and ``query_box`` (xyxy, pixels) the picture of the object, ``response`` the box
    (xyxy) at every frame number of the right answer, contiguous. ``group`` names the source video: episodes of one
    group share objects and must not be split between choosing a setting and judging it.
    """

    id: str
    group: str
    frames: tuple[Path, ...]
    query_frame: Path
    query_box: tuple[float, float, float, float]
    object: str
    response: dict[int, tuple[float, float, float, float]]


def coco_panoptic(root: str | Path, split: str) -> list[SegmentedImage]:
    """COCO panoptic annotations of ``split`` ("train2017", "val2017"), in order of file name.

    ``root`` holds ``annotations/`` (or ``panoptic_segmentation/annotations/``) with ``panoptic_<split>.json`` and the
    folder of label pictures, and the photographs in ``images/<split>`` or ``<split>``. Crowd segments are left out.
    """
    base = _first_existing(
        [Path(root) / "annotations", Path(root) / "panoptic_segmentation" / "annotations"],
        "a COCO panoptic folder",
        root,
    )
    photos = _first_existing([Path(root) / "images" / split, Path(root) / split], f"the photographs of {split}", root)
    table = _read_json(base / f"panoptic_{split}.json")
    try:
        things = {c["id"]: bool(c["isthing"]) for c in table["categories"]}
        records = []
        for note in sorted(table["annotations"], key=lambda note: note["file_name"]):
            segments = tuple(
                Segment(int(s["id"]), int(s["category_id"]), things[s["category_id"]])
                for s in note["segments_info"]
                if not s.get("iscrowd", 0)
            )
            photo = photos / (Path(note["file_name"]).stem + ".jpg")
            records.append(SegmentedImage(photo, base / f"panoptic_{split}" / note["file_name"], segments))
    except (KeyError, TypeError) as error:
        raise InvalidDataset(
            "A COCO panoptic file has categories and annotations with segments_info", got=f"{base}: {error!r}"
        ) from error
    return records


def category_names(root: str | Path, split: str) -> dict[int, str]:
    """Category id → English name, as the annotation file of ``split`` says."""
    base = _first_existing(
        [Path(root) / "annotations", Path(root) / "panoptic_segmentation" / "annotations"],
        "a COCO panoptic folder",
        root,
    )
    return {int(c["id"]): str(c["name"]) for c in _read_json(base / f"panoptic_{split}.json")["categories"]}


def human_segmentations(root: str | Path, split: str) -> list[HumanSegmentation]:
    """BSDS-like folder: ``images/<split>/<id>.jpg`` and ``segments/<split>/<id>_<k>.png``; images without labels go."""
    photos = _first_existing([Path(root) / "images" / split], f"the photographs of {split}", root)
    labels = _first_existing([Path(root) / "segments" / split], f"the human segmentations of {split}", root)
    by_image: dict[str, list[Path]] = {}
    for path in sorted(labels.glob("*.png")):
        by_image.setdefault(path.stem.rpartition("_")[0], []).append(path)
    records = [HumanSegmentation(p, tuple(by_image.get(p.stem, ()))) for p in images.list_images(photos)]
    records = [r for r in records if r.label_paths]
    if not records:
        raise InvalidDataset("Label pictures are named <image>_<k>.png", got=labels)
    return records


def episodes(root: str | Path) -> list[Episode]:
    """Visual-query episodes: ``episodes.json`` beside the frame folders that its paths name."""
    root = Path(root)
    table = _read_json(root / "episodes.json")
    try:
        return [_episode(root, entry) for entry in table]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidDataset(
            "Every episode has id, query (frame, box_xywh), frames and response", got=f"{root}: {error!r}"
        ) from error


def _episode(root: Path, entry: dict[str, Any]) -> Episode:
    response = {int(i): _xyxy(box) for i, box in sorted(entry["response"].items(), key=lambda item: int(item[0]))}
    query = root / entry["query"]["frame"]
    return Episode(
        id=str(entry["id"]),
        group=str(entry["query"]["frame"]).split("/")[0],
        frames=tuple(root / f for f in entry["frames"]),
        query_frame=query,
        query_box=_xyxy(entry["query"]["box_xywh"]),
        object=str(entry["query"].get("object", "")),
        response=response,
    )


def read_labels(path: Path) -> np.ndarray:
    """The raw values of a label picture: ``(H, W)`` or ``(H, W, C)``, never converted in colour."""
    if not path.is_file():
        raise MissingFile("A label picture must exist", got=path)
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except (OSError, SyntaxError) as error:
        raise InvalidDataset("A label picture must be readable", got=f"{path}: {error}") from error


def fit_labels(labels: Tensor, size: Size) -> Tensor:
    """A label map ``(H, W)`` at another ``size`` by nearest pixel; some collections store half-size labels."""
    if tuple(labels.shape) == tuple(size):
        return labels
    rows = ((torch.arange(size[0]) + 0.5) * labels.shape[0] / size[0]).long()
    cols = ((torch.arange(size[1]) + 0.5) * labels.shape[1] / size[1]).long()
    return labels[rows[:, None], cols[None, :]]


def _xyxy(box: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = (float(v) for v in box)
    return x, y, x + width, y + height


def _first_existing(candidates: list[Path], what: str, root: str | Path) -> Path:
    for path in candidates:
        if path.is_dir():
            return path
    wanted = " or ".join(str(p) for p in candidates)
    raise MissingFile(f"{what[0].upper()}{what[1:]} must exist", got=root, remedy=f"Looked for {wanted}.")


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise MissingFile("An annotation file must exist", got=path)
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidDataset("An annotation file is JSON", got=f"{path}: {error}") from error
