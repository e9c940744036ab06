"""Annotated images for semantic segmentation, read from the folder layouts in which the data sets are handed around.

A label picture holds one number per pixel; every data set has its own numbers and its own way to say "do not count
this pixel". Here they become class indices 0 … C-1 and ``IGNORED``. Names of the classes are data, in ``classes.toml``.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin import images
from opsin.errors import InvalidConfig, InvalidDataset, MissingFile, near_misses
from opsin.evaluation.datasets import read_labels

IGNORED = -1
_UNKNOWN = -2  # a value that the data set does not define
SPELLINGS = ("english", "published")
NAME_FILES = ("names.txt", "names.json", "classes.txt", "classes.json")
LABEL_FOLDERS = ("labels", "annotations", "masks", "semantic_segmentation/masks")

# Cityscapes labelIds, COCO ids that are not used; both as their authors number them.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
_COCO_IDS = tuple(i for i in range(1, 183) if i not in _COCO_UNUSED)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image. ``table`` translates a pixel value of the label picture to a class index."""

    id: str
    image_path: Path
    label_path: Path
    table: np.ndarray

    def image(self) -> Tensor:
        """RGB ``(3, H, W)`` in [0, 1]."""
        return images.read_image(self.image_path)

    def labels(self) -> Tensor:
        """Class indices ``(H, W)`` int64, ``IGNORED`` where the pixel does not count."""
        raw = read_labels(self.label_path)
        if raw.ndim != 2 or raw.dtype.kind not in "uib":
            raise InvalidDataset("A label picture has one number per pixel", got=f"{self.label_path}: {raw.shape}")
        values = raw.astype(np.int64)
        inside = (values >= 0) & (values < len(self.table))
        mapped = np.where(inside, self.table[np.where(inside, values, 0)], _UNKNOWN)
        if (mapped == _UNKNOWN).any():
            strange = np.unique(values[mapped == _UNKNOWN])[:5].tolist()
            raise InvalidDataset("Label pictures hold only values of the data set", got=f"{self.label_path}: {strange}")
        return torch.from_numpy(mapped)


@dataclass(frozen=True, eq=False)
class SegmentationData:
    """A split of a data set: ``classes`` in its own spelling, ``phrases`` that are asked for (one or more per class).

    ``expected`` is the number of images of the published split, 0 where there is none.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]
    spelling: str
    samples: tuple[Sample, ...]
    expected: int = 0

    def query(self) -> dict[str, list[str]]:
        """What the segmenter is asked: the phrases of every class."""
        return {name: list(phrases) for name, phrases in zip(self.classes, self.phrases, strict=True)}


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "classes.toml").read_text(encoding="utf-8"))


def class_names(dataset: str, spelling: str = "english") -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Own names of the classes of ``dataset``, and the phrases to ask for in that ``spelling`` (``classes.toml``)."""
    if spelling not in SPELLINGS:
        raise InvalidConfig(f"The spelling of names is {' or '.join(SPELLINGS)}", got=spelling)
    facts = _facts()[dataset]
    if "of" in facts:
        own, phrases = class_names(facts["of"], spelling)
        count = facts.get("count", len(own))
        return ("background", *own[:count]), (tuple(facts["background"]), *phrases[:count])
    own = tuple(facts["names"])
    table = facts.get(spelling, {})
    joined = {name: name.replace(" ", "") for name in own} if spelling == "published" else {}
    return own, tuple((table.get(name, joined.get(name, name)),) for name in own)


def read(
    dataset: str,
    root: str | Path,
    *,
    names: str = "english",
    split: str | None = None,
    classes: str | Path | None = None,
    ignore: int | None = None,
) -> SegmentationData:
    """The validation split of ``dataset`` below ``root``, in order of image name.

    Args:
        dataset: one of ``DATASETS``.
        root: the folder of the data set, or the folder that holds it under its usual name.
        names: "english" or "published" spelling of the classes. In a "folder", "published" is the file's own spelling
            and "english" undoes the additions of COCO ("tree-merged").
        split: another split than the usual one; for a "folder" the sub-folder of images and labels.
        classes: "folder" only: the file that names the label values.
        ignore: "folder" only: a value of pixels that do not count, beside 255 and 0 where these have no name.

    Raises ``MissingFile`` where the layout is not found and ``InvalidDataset`` where it is empty or contradictory.
    """
    if dataset not in DATASETS:
        remedy = f"{near_misses(dataset, DATASETS)} They are {', '.join(DATASETS)}."
        raise InvalidConfig("The data set must be known", got=dataset, remedy=remedy.strip())
    if dataset == "folder":
        return _folder(Path(root), names, split, classes, ignore)
    if classes is not None or ignore is not None:
        raise InvalidConfig("Only a folder takes a file of class names and an ignored value", got=dataset)
    own, phrases = class_names(dataset, names)
    usual, reader = _READERS[dataset]
    split = split or usual
    samples = tuple(reader(Path(root), split, len(own)))
    _require_some(samples, root)
    facts = _facts()[dataset]
    expected = _facts()[facts["of"]].get("images", 0) if "of" in facts else facts.get("images", 0)
    return SegmentationData(dataset, split, own, phrases, names, samples, expected if split == usual else 0)


def _listed(year: str, lists: str, labels: str, zero: bool) -> Callable[[Path, str, int], Iterable[Sample]]:
    """Pascal VOC and Pascal Context: a list of image names beside ``JPEGImages`` and a folder of label pictures.

    ``zero``: whether 0 is a class (background); otherwise it is ignored and classes count from 1.
    """

    def reader(root: Path, split: str, count: int) -> Iterable[Sample]:
        base = _base(root, f"ImageSets/{lists}", "", year, f"VOCdevkit/{year}")
        listing = base / "ImageSets" / lists / f"{split}.txt"
        if not listing.is_file():
            raise MissingFile("The list of images of the split must exist", got=listing)
        table = _table(range(count) if zero else range(1, count + 1), ignored=(255,) if zero else (0, 255))
        for name in dict.fromkeys(listing.read_text(encoding="utf-8").split()):
            yield Sample(name, base / "JPEGImages" / f"{name}.jpg", base / labels / f"{name}.png", table)

    return reader


def _ade20k(root: Path, split: str, count: int) -> Iterable[Sample]:
    base = _base(root, f"images/{split}", "", "ADEChallengeData2016", "ade/ADEChallengeData2016")
    table = _table(range(1, count + 1), ignored=(0, 255))
    for path in images.list_images(base / "images" / split):
        yield Sample(path.stem, path, base / "annotations" / split / f"{path.stem}.png", table)


def _cityscapes(root: Path, split: str, count: int) -> Iterable[Sample]:
    base = _base(root, f"leftImg8bit/{split}", "", "cityscapes")
    train, ids = _table(range(count), ignored=(255,)), _table(_CITYSCAPES_IDS, ignored=range(256))
    for path in sorted((base / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
        name = path.name.removesuffix("_leftImg8bit.png")
        stem = base / "gtFine" / split / path.parent.name / f"{name}_gtFine_"
        converted = stem.with_name(stem.name + "labelTrainIds.png")
        raw = stem.with_name(stem.name + "labelIds.png")
        yield Sample(name, path, *((raw, ids) if raw.is_file() and not converted.is_file() else (converted, train)))


def _coco(things_only: bool) -> Callable[[Path, str, int], Iterable[Sample]]:
    """COCO-Stuff 164k, and COCO-Object: its 80 things, everything else, unlabelled pixels too, being background.

    Converted label pictures (``*_labelTrainIds.png``, ``*_instanceTrainIds.png``) where they are there, else those of
    ``stuffthingmaps``, in which a pixel is the COCO id minus one and 255 unlabelled.
    """

    def reader(root: Path, split: str, count: int) -> Iterable[Sample]:
        base = _base(root, f"images/{split}", "", "coco_stuff164k", "coco")
        suffix = "_instanceTrainIds.png" if things_only else "_labelTrainIds.png"
        converted = _table(range(count), ignored=(255,))
        raw = _table([i - 1 for i in _COCO_IDS], ignored=(255,))
        if things_only:
            raw = np.where((raw >= 0) & (raw < count - 1), raw + 1, 0)
        folders = [base / name / split for name in ("annotations", "stuffthingmaps")]
        for path in images.list_images(base / "images" / split):
            candidates = [(folder / (path.stem + suffix), converted) for folder in folders]
            candidates += [(folder / f"{path.stem}.png", raw) for folder in folders]
            found = next((c for c in candidates if c[0].is_file()), candidates[0])
            yield Sample(path.stem, path, *found)

    return reader


_READERS: dict[str, tuple[str, Callable[[Path, str, int], Iterable[Sample]]]] = {
    "voc20": ("val", _listed("VOC2012", "Segmentation", "SegmentationClass", zero=False)),
    "voc21": ("val", _listed("VOC2012", "Segmentation", "SegmentationClass", zero=True)),
    "context59": ("val", _listed("VOC2010", "SegmentationContext", "SegmentationClassContext", zero=False)),
    "context60": ("val", _listed("VOC2010", "SegmentationContext", "SegmentationClassContext", zero=True)),
    "coco-object": ("val2017", _coco(things_only=True)),
    "coco-stuff": ("val2017", _coco(things_only=False)),
    "ade20k": ("validation", _ade20k),
    "cityscapes": ("val", _cityscapes),
}
DATASETS = (*_READERS, "folder")


def _folder(
    root: Path, names: str, split: str | None, classes: str | Path | None, ignore: int | None
) -> SegmentationData:
    """``images/`` and ``labels/`` with files of the same stem, and a file of names. Images without labels are left out.

    Names: a text file with one class per line (value 0 first, synonyms after ", "), a JSON list of names, a JSON object
    from value to name, or a JSON list of objects with ``id`` and ``name``.
    """
    if names not in SPELLINGS:
        raise InvalidConfig(f"The spelling of names is {' or '.join(SPELLINGS)}", got=names)
    photos = _base(root, "images", "") / "images"
    pictures = _base(root, "label pictures", *LABEL_FOLDERS, whole=True)
    if split:
        photos, pictures = _base(photos, split, "") / split, _base(pictures, split, "") / split
    named = _read_names(Path(classes) if classes else _first_file(root, NAME_FILES))
    values = sorted(set(named) - {ignore})
    table = _table(values, ignored={0, 255, 255 if ignore is None else ignore} - set(values))
    own = tuple(named[v][0] for v in values)
    phrases = tuple(named[v] if names == "published" else tuple(map(_plain, named[v])) for v in values)
    if len({p[0].casefold() for p in phrases}) < len(phrases) or not phrases:
        raise InvalidDataset("Every class has its own name", got=root, remedy="--names published keeps the file's.")
    found = {p.relative_to(photos).with_suffix("").as_posix(): p for p in images.list_images(photos)}
    labels = {p.relative_to(pictures).with_suffix("").as_posix(): p for p in sorted(pictures.rglob("*.png"))}
    samples = tuple(Sample(i, found.get(i, photos / f"{i}.jpg"), p, table) for i, p in labels.items())
    _require_some(samples, root)
    return SegmentationData(root.resolve().name, split or "all", own, phrases, names, samples)


def _plain(name: str) -> str:
    """COCO's names without what its authors added: "tree-merged" → "tree", "wall-brick" → "brick wall"."""
    name = name.removesuffix("-merged")
    return str(_facts()["coco-stuff"]["english"].get(name, name))


def _read_names(path: Path) -> dict[int, tuple[str, ...]]:
    """Pixel value → name and synonyms; empty names are left out."""
    if not path.is_file():
        raise MissingFile("The file of class names must exist", got=path)
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else [line.split(", ") for line in text.splitlines()]
        if isinstance(content, Mapping):
            pairs = [(int(value), name) for value, name in content.items()]
        elif all(isinstance(entry, Mapping) for entry in content):
            pairs = [(int(entry["id"]), entry["name"]) for entry in content]
        else:
            pairs = list(enumerate(content))
        lists = {value: [name] if isinstance(name, str) else list(name or ()) for value, name in pairs}
        named = {v: tuple(s.strip() for s in synonyms if s.strip()) for v, synonyms in lists.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidDataset(
            "A file of class names is a list of names, or an object from value to name", got=f"{path}: {error!r}"
        ) from error
    if any(not 0 <= v < 65536 for v in named):
        raise InvalidDataset("A label value lies in 0 … 65535", got=f"{path}: {sorted(named)}")
    return {v: synonyms for v, synonyms in named.items() if synonyms}


def _table(values: Iterable[int], *, ignored: Iterable[int]) -> np.ndarray:
    """Class index of every pixel value: ``values`` in order, ``IGNORED``, or ``_UNKNOWN``."""
    listed, void = list(values), list(ignored)
    table = np.full(max([255, *listed, *void]) + 1, _UNKNOWN, dtype=np.int64)
    table[void] = IGNORED
    table[listed] = np.arange(len(listed))
    return table


def _base(root: Path, what: str, *candidates: str, whole: bool = False) -> Path:
    """The first of the folders ``root/candidate`` that holds ``what``; with ``whole`` the first that exists."""
    for candidate in candidates:
        folder = root / candidate
        if folder.is_dir() if whole else (folder / what).is_dir():
            return folder
    wanted = ", ".join(str(root / c if whole else root / c / what) for c in candidates)
    raise MissingFile(f"The folder of {what} must exist", got=root, remedy=f"Looked for {wanted}.")


def _first_file(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    remedy = f"Looked for {', '.join(names)}; --classes names another."
    raise MissingFile("A file of class names must exist", got=root, remedy=remedy)


def _require_some(samples: tuple[Sample, ...], root: str | Path) -> None:
    if not samples:
        raise InvalidDataset("A split has at least one image", got=root)
