"""Where photographs with regions come from: label maps, mosaics of classified photographs, mask caches."""

from __future__ import annotations

import io
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.errors import InvalidDataset, MissingFile
from opsin.geometry import Size
from opsin.images import list_images, read_image, resize
from opsin.masks.maps import RegionMaps, nearest
from opsin.masks.store import MaskStore

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class Sample:
    """A square photograph ``image (3, S, S)`` uint8 and its regions at the same size."""

    image: Tensor
    regions: RegionMaps


class Source(ABC):
    """A list of photographs with regions. ``classes`` names the categories that its regions carry.

    ``skipped`` maps what cannot be used (no masks, known before anything is read) to the reason. A photograph or mask
    file that turns out to be broken raises an ``OpsinError`` when it is read.
    """

    classes: tuple[str, ...] = ()
    fixed: bool = True  # the same sample at every reading, so that it may be kept in memory

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of photographs."""

    @abstractmethod
    def label(self, index: int) -> str:
        """What to call a photograph in a report."""

    @abstractmethod
    def read(self, index: int, size: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        """A photograph at ``size`` × ``size``. ``rng`` is the sample's, ``shared`` draws alike in a whole batch."""

    def _usable(self) -> None:
        if not len(self):
            few = dict(list(self.skipped.items())[:3])
            raise InvalidDataset(f"The source {self.name} holds photographs with regions", got=f"none; skipped: {few}")


def square(image: Tensor, size: int) -> Tensor:
    """``image (3, H, W)`` in [0, 1] stretched to ``(3, size, size)`` uint8."""
    return (resize(image, (size, size)) * 255).round().clamp(0, 255).to(torch.uint8)


def need_folder(path: Path) -> Path:
    """``path``, or ``MissingFile`` when it is no folder."""
    if not path.is_dir():
        raise MissingFile("A folder must exist", got=path)
    return path


def read_labels(path: Path) -> np.ndarray:
    """A label map ``(H, W)`` of whole numbers from a PNG: 8 or 16 bit, palette, or id = R + 256 G + 65536 B."""
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidDataset("A label map is a readable picture", got=f"{path}: {error}") from error
    if pixels.ndim == 3:
        pixels = pixels[..., :3].astype(np.int64) @ np.array([1, 256, 65536])
    return pixels.astype(np.int64)


class LabelMaps(Source):
    """Photographs with label PNGs: ``labels/<stem>.png``, or several, ``<stem>_<k>.png`` or ``<stem>/*.png``; 0: none.

    BSDS500 has this shape (``images/<split>``, ``segments/<split>``, up to five people per photograph), and so has any
    folder of masks (``images``, ``masks``), where several binary masks of one photograph may overlap.
    """

    def __init__(self, name: str, images: Path, labels: Path) -> None:
        super().__init__(name)
        single: dict[str, list[Path]] = {}
        several: dict[str, list[Path]] = {}
        for file in sorted(need_folder(labels).rglob("*.png")):
            stem = str(file.relative_to(labels).with_suffix(""))
            single[stem] = [file]
            owner, _, number = stem.rpartition("_")
            several.setdefault(owner if number.isdigit() else str(Path(stem).parent), []).append(file)
        self.files: list[tuple[Path, list[Path]]] = []
        for path in list_images(need_folder(images)):
            stem = str(path.relative_to(images).with_suffix(""))
            found = single.get(stem) or several.get(stem)
            if found:
                self.files.append((path, found))
            else:
                self.skipped[str(path)] = "no label map"
        self._usable()

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        return str(self.files[index][0])

    def read(self, index: int, size: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        path, labels = self.files[index]
        regions = RegionMaps.from_labels(nearest(read_labels(f), (size, size)) for f in labels)
        return Sample(square(read_image(path), size), regions)


class CachedMasks(Source):
    """Photographs, or frames of videos, whose masks a generator has put into a ``MaskStore``."""

    def __init__(self, name: str, frames: Sequence[Frame], store: MaskStore) -> None:
        super().__init__(name)
        self.store = store
        self.frames = [f for f in frames if f.name in store and store.count(f.name)]
        self.skipped = {f.name: "no masks" for f in frames if f.name not in store or not store.count(f.name)}
        self._usable()

    def __len__(self) -> int:
        return len(self.frames)

    def label(self, index: int) -> str:
        return self.frames[index].name

    def read(self, index: int, size: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        frame = self.frames[index]
        return Sample(square(frame.read(), size), self.store.get(frame.name).resize((size, size)))


@dataclass(frozen=True)
class Frame:
    """A photograph, or frame ``frame`` of a video, known to its mask cache as ``name``."""

    path: Path
    name: str
    frame: int | None = None

    def read(self) -> Tensor:
        """``(3, H, W)`` in [0, 1]."""
        if self.frame is None:
            return read_image(self.path)
        from opsin.video import open_video

        with open_video(self.path) as video:
            return video.read_frame(self.frame).image.float() / 255


class Mosaic(Source):
    """Classified photographs laid side by side on one canvas: each tile is a region, its class the category.

    The class is the folder that a photograph lies in (a folder whose name starts with BACKGROUND has no class).
    ``path`` is a folder or a zip file; ``part`` keeps a sub-folder of it, or the files that a text file in it lists.
    The tiles of one batch come from ``classes_per_batch`` classes, so that most have company in other canvases.
    """

    fixed = False

    def __init__(
        self, name: str, path: Path, part: str = "", *, tiles: tuple[int, int] = (4, 16), classes_per_batch: int = 32
    ) -> None:
        super().__init__(name)
        self.archive = Archive(path)
        members = self.archive.names()
        if part.endswith(".txt"):
            wanted = {line.strip() for line in self.archive.read(part).decode().splitlines()}
            members = [m for m in members if m in wanted]
        elif part:
            members = [m for m in members if m.startswith(part.rstrip("/") + "/")]
        members = [m for m in members if PurePosixPath(m).suffix.lower() in PICTURES]
        folders = sorted({PurePosixPath(m).parent.name for m in members})
        by_folder: dict[str, list[str]] = {folder: [] for folder in folders}
        for member in members:
            by_folder[PurePosixPath(member).parent.name].append(member)
        self.groups = list(by_folder.values())
        self.count = len(members)
        self.classes = tuple(f for f in folders if not f.upper().startswith("BACKGROUND"))
        self.category = [self.classes.index(f) if f in self.classes else -1 for f in folders]
        self.tiles, self.classes_per_batch = tiles, classes_per_batch
        self._usable()

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> str:
        return f"{self.name} canvas"

    def read(self, index: int, size: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        pool = shared.permutation(len(self.groups))[: self.classes_per_batch]
        boxes = split_canvas(rng, size, int(rng.integers(self.tiles[0], self.tiles[1] + 1)))
        canvas = np.zeros((size, size, 3), np.uint8)
        layer = np.full((1, size, size), -1, np.int16)
        categories = []
        for region, (x, y, width, height) in enumerate(boxes):
            group = int(rng.choice(pool))
            member = self.groups[group][int(rng.integers(len(self.groups[group])))]
            canvas[y : y + height, x : x + width] = self._tile(member, (height, width), rng)
            layer[0, y : y + height, x : x + width] = region
            categories.append(self.category[group])
        image = torch.from_numpy(canvas).permute(2, 0, 1).contiguous()
        return Sample(image, RegionMaps(torch.from_numpy(layer), torch.tensor(categories)))

    def _tile(self, member: str, size: Size, rng: np.random.Generator) -> np.ndarray:
        """A photograph cut to the tile's shape at a random place, and filling it."""
        try:
            picture = Image.open(io.BytesIO(self.archive.read(member))).convert("RGB")
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
            raise InvalidDataset("A photograph is readable", got=f"{member} of {self.archive.path}: {error}") from error
        scale = min(picture.width / size[1], picture.height / size[0])
        width, height = min(size[1] * scale, picture.width), min(size[0] * scale, picture.height)
        x, y = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        box = (x, y, min(x + width, picture.width), min(y + height, picture.height))
        return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


def split_canvas(rng: np.random.Generator, size: int, count: int) -> list[tuple[int, int, int, int]]:
    """``count`` rectangles (x, y, width, height) that fill a square: the largest is cut across its longer side."""
    boxes = [(0, 0, size, size)]
    while len(boxes) < count:
        boxes.sort(key=lambda b: b[2] * b[3])
        x, y, width, height = boxes.pop()
        if max(width, height) < 2:
            boxes.append((x, y, width, height))
            break
        cut = min(max(1, round(max(width, height) * rng.uniform(0.25, 0.75))), max(width, height) - 1)
        if width >= height:
            boxes += [(x, y, cut, height), (x + cut, y, width - cut, height)]
        else:
            boxes += [(x, y, width, cut), (x, y + cut, width, height - cut)]
    return boxes


class Archive:
    """The files of a folder or of a zip file, by relative name; each worker opens its own handle."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if not self.path.exists():
            raise MissingFile("A folder or zip file must exist", got=self.path)
        if self.path.is_file() and not zipfile.is_zipfile(self.path):
            raise InvalidDataset("A mosaic is made from a folder or a zip file", got=self.path)

    def names(self) -> list[str]:
        """All files, sorted."""
        if self.path.is_dir():
            return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        return sorted(n for n in self._open().namelist() if not n.endswith("/"))

    def read(self, name: str) -> bytes:
        """The content of one file; ``MissingFile`` when there is none of that name."""
        try:
            return (self.path / name).read_bytes() if self.path.is_dir() else self._open().read(name)
        except (KeyError, FileNotFoundError) as error:
            raise MissingFile("A file must exist", got=f"{name} in {self.path}") from error

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path)
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}
