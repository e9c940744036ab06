"""The training photographs of opsin-tiny, read into memory once: single objects, and scenes with region maps."""

from __future__ import annotations

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OBJECT_SIDE, PHOTO_SIDE = 80, 320  # sides at which the two kinds of photographs are kept in memory
SLOTS = 256  # at most this many labelled regions per photograph; a region's key is photograph * SLOTS + region


@dataclass
class Data:
    """All training photographs in memory as uint8; `-1` marks an unknown class."""

    objects: Tensor  # (N, 3, OBJECT_SIDE, OBJECT_SIDE)
    object_class: Tensor  # (N,)
    photos: Tensor  # (M, 3, PHOTO_SIDE, PHOTO_SIDE)
    regions: Tensor  # (V, PHOTO_SIDE, PHOTO_SIDE) uint8 region of each pixel, 0 = not labelled
    region_photo: Tensor  # (V,) photograph of each region map: one photograph may have several annotators
    region_class: Tensor  # (V, SLOTS)
    val: Tensor  # held-out object photographs and their classes
    val_class: Tensor
    object_names: list[str]
    scene_names: list[str]


def decode(raw: bytes, side: int) -> Tensor:
    image = Image.open(io.BytesIO(raw)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def label_map(pixels: np.ndarray) -> Tensor:
    image = Image.fromarray(pixels.astype(np.uint8)).resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(image).copy())


def load_objects(root: Path, workers: ThreadPoolExecutor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Photographs of one object each: tiny ImageNet (its val split is held out) and Caltech-101 (train list)."""
    tiny, caltech = zipfile.ZipFile(root / "tiny_imagenet_17k.zip"), zipfile.ZipFile(root / "caltech101_112.zip")
    named = sorted(json.loads(tiny.read("names.json")).items())
    names = [name if isinstance(name, str) else name[0] for _, name in named]
    index = {wnid: i for i, (wnid, _) in enumerate(named)}
    stored = set(tiny.namelist())
    members = sorted(m for m in stored if m.startswith("train/") and m.endswith(".JPEG"))
    train = [(tiny.read(m), index[m.split("/")[1]]) for m in members]
    lines = [line.split("\t") for line in tiny.read("val_annotations.txt").decode().splitlines()]
    val = [(tiny.read(f"val/{line[0]}"), index[line[1]]) for line in lines if f"val/{line[0]}" in stored]
    listed = [line.strip() for line in caltech.read("train.txt").decode().splitlines() if line.strip()]
    folders = sorted({line.split("/")[0] for line in listed} - {"BACKGROUND_Google"})
    index = {folder: len(names) + i for i, folder in enumerate(folders)}
    names += [folder.replace("_", " ") for folder in folders]
    stored = set(caltech.namelist())
    train += [(caltech.read(m), index.get(m.split("/")[0], -1)) for m in listed if m in stored]
    images = [torch.stack(list(workers.map(lambda r: decode(r[0], OBJECT_SIDE), part))) for part in (train, val)]
    labels = [torch.tensor([r[1] for r in part]) for part in (train, val)]
    return images[0], labels[0], images[1], labels[1], names


def load_photos(root: Path, hold_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Whole scenes with region maps: COCO panoptic train (with classes), BSDS500 train (several annotators, none)."""
    photos: list[Tensor] = []
    maps: list[Tensor] = []
    owner: list[int] = []
    classes: list[Tensor] = []
    coco = root / "coco128_panoptic"
    categories = {c["id"]: i for i, c in enumerate(json.loads((coco / "classes.json").read_text()))}
    names = [c["name"] for c in json.loads((coco / "classes.json").read_text())]
    base = coco / "panoptic_segmentation" / "annotations"
    notes = json.loads((base / "panoptic_train2017.json").read_text())["annotations"]
    for note in sorted(notes, key=lambda n: n["file_name"])[hold_out:]:
        file = coco / "images" / "train2017" / f"{Path(note['file_name']).stem}.jpg"
        rgb = np.asarray(Image.open(base / "panoptic_train2017" / note["file_name"]).convert("RGB")).astype(np.int64)
        ids = rgb @ np.array([1, 256, 65536])
        pixels, table = np.zeros(ids.shape), torch.full((SLOTS,), -1)
        for slot, segment in enumerate(note["segments_info"][: SLOTS - 1], start=1):
            pixels[ids == segment["id"]] = slot
            table[slot] = categories[segment["category_id"]]
        photos.append(decode(file.read_bytes(), PHOTO_SIDE))
        maps.append(label_map(pixels))
        owner.append(len(photos) - 1)
        classes.append(table)
    for file in sorted((root / "bsds500" / "images" / "train").glob("*.jpg")):
        photos.append(decode(file.read_bytes(), PHOTO_SIDE))
        for segments in sorted((root / "bsds500" / "segments" / "train").glob(f"{file.stem}_*.png")):
            maps.append(label_map(np.minimum(np.asarray(Image.open(segments)), SLOTS - 1)))
            owner.append(len(photos) - 1)
            classes.append(torch.full((SLOTS,), -1))
    return torch.stack(photos), torch.stack(maps), torch.tensor(owner), torch.stack(classes), names


def load_data(root: Path, threads: int = 2, hold_out: int = 0) -> Data:
    """Read everything; `hold_out` leaves the first COCO scenes out, to measure on."""
    with ThreadPoolExecutor(threads) as workers:
        objects, object_class, val, val_class, object_names = load_objects(root, workers)
    photos, regions, region_photo, region_class, scene_names = load_photos(root, hold_out)
    return Data(
        objects, object_class, photos, regions, region_photo, region_class, val, val_class, object_names, scene_names
    )
