"""COCO's formats: instances (polygons and run lengths, also LVIS) and panoptic (JSON beside PNGs)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from opsin.errors import InvalidDataset, MissingFile
from opsin.geometry import Size
from opsin.images import read_image
from opsin.masks.maps import RegionMaps, distinct, nearest
from opsin.masks.sources import Sample, Source, need_folder, read_labels, square


def decode_segmentation(segmentation: Any, size: Size) -> np.ndarray:
    """A COCO segmentation as a boolean mask ``(H, W)``: polygons, or run lengths (list or string) in column order."""
    try:
        if isinstance(segmentation, list):
            canvas = Image.new("1", (size[1], size[0]))
            for polygon in segmentation:
                # Vertices are pixel corners; the drawing fills pixels whose number lies inside: half a pixel apart.
                corners = [(x - 0.5, y - 0.5) for x, y in zip(polygon[::2], polygon[1::2], strict=True)]
                ImageDraw.Draw(canvas).polygon(corners, fill=1)
            return np.asarray(canvas, dtype=bool)
        height, width = segmentation["size"]
        counts = segmentation["counts"]
        runs = np.asarray(decode_counts(counts) if isinstance(counts, (str, bytes)) else counts)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidDataset("A segmentation is polygons or run lengths", got=f"{error!r}") from error


def decode_counts(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character; from the third on, differences to two before."""
    data = text.encode() if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFile("An annotation file must exist", got=path)
    try:
        content = json.loads(path.read_bytes())
        return {"images": content["images"], "annotations": content["annotations"], "categories": content["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidDataset(
            "A COCO file is JSON with images, annotations and categories", got=f"{path}: {error!r}"
        ) from error


class _Coco(Source):
    """What both formats share: the table of photographs and categories."""

    def __init__(self, name: str, annotations: Path, images: Path) -> None:
        super().__init__(name)
        content = _load(annotations)
        self.images = need_folder(images)
        self.classes = tuple(c["name"] for c in content["categories"])
        self._category = {c["id"]: i for i, c in enumerate(content["categories"])}
        # LVIS gives only a URL, whose end is the folder and the name of the file.
        self._info = {
            i["id"]: i.get("file_name") or "/".join(i["coco_url"].split("/")[-2:]) for i in content["images"]
        }
        self._size = {i["id"]: (int(i["height"]), int(i["width"])) for i in content["images"]}
        self.entries: list[tuple[int, list[dict[str, Any]]]] = []
        self._collect(content["annotations"])
        used = {image for image, _ in self.entries}
        self.skipped = {str(self.images / f): "no masks" for image, f in self._info.items() if image not in used}
        self._usable()

    def _collect(self, annotations: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.entries)

    def label(self, index: int) -> str:
        return str(self._path(index))

    def _path(self, index: int) -> Path:
        name = Path(self._info[self.entries[index][0]])
        return self.images / (name if (self.images / name).exists() else name.name)


class CocoInstances(_Coco):
    """``coco:instances.json@images``: one mask per object, crowds left out; LVIS files have the same form."""

    def _collect(self, annotations: list[dict[str, Any]]) -> None:
        found: dict[int, list[dict[str, Any]]] = {}
        for note in annotations:
            if not note.get("iscrowd") and note.get("segmentation") and note["image_id"] in self._info:
                found.setdefault(note["image_id"], []).append(note)
        self.entries = sorted(found.items())

    def read(self, index: int, size: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        image, notes = self.entries[index]
        masks = [decode_segmentation(n["segmentation"], self._size[image]) for n in notes]
        regions = RegionMaps.from_masks(masks, [self._category[n["category_id"]] for n in notes])
        return Sample(square(read_image(self._path(index)), size), regions.resize((size, size)))


class CocoPanoptic(_Coco):
    """``coco-panoptic``: PNGs whose pixels hold a segment's id, in the folder named like the JSON file beside them."""

    def __init__(self, name: str, annotations: Path, images: Path) -> None:
        self.labels = need_folder(annotations.with_suffix(""))
        super().__init__(name, annotations, images)

    def _collect(self, annotations: list[dict[str, Any]]) -> None:
        for note in annotations:
            segments = [s for s in note["segments_info"] if not s.get("iscrowd")]
            if segments and note["image_id"] in self._info:
                self.entries.append((note["image_id"], [{**note, "segments_info": segments}]))
        self.entries.sort(key=lambda entry: entry[0])

    def read(self, index: int, size: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        note = self.entries[index][1][0]
        ids = nearest(read_labels(self.labels / note["file_name"]), (size, size))
        number = {s["id"]: i for i, s in enumerate(note["segments_info"])}
        values, places = distinct(ids)
        table = np.array([number.get(int(v), -1) for v in values], np.int16)
        categories = [self._category[s["category_id"]] for s in note["segments_info"]]
        regions = RegionMaps.build([table[places]], len(number), categories)
        return Sample(square(read_image(self._path(index)), size), regions)
