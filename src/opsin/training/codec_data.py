"""Photographs as training batches of a codec. Batch ``n`` depends on the seed and ``n`` alone."""

from __future__ import annotations

import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from opsin.errors import InvalidDataset, InvalidImage, MissingExtra, MissingFile, ModelUnavailable, OpsinError
from opsin.geometry import Size
from opsin.images import SUFFIXES, read_image, to_pil
from opsin.masks.sources import Archive
from opsin.training.data import ATTEMPTS, Memory

IMAGENET = "ILSVRC/imagenet-1k"
TINY = Path("data/tiny-imagenet-200")
SHUFFLED = 10_000  # photographs of a stream that are shuffled together


class Photographs(ABC):
    """A list of photographs. ``panorama``: equirectangular ones, whose left and right edges meet."""

    panorama = False

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def label(self, index: int) -> str:
        """What to call a photograph in a report; does not depend on where the data lies."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded photograph."""


class Files(Photographs):
    """All photographs below a folder or in a zip file; ``part`` keeps a sub-folder, or what a text file in it lists."""

    def __init__(self, name: str, path: Path, part: str = "", panorama: bool = False) -> None:
        super().__init__(name)
        self.archive, self.panorama = Archive(path), panorama
        members = [m for m in self.archive.names() if not PurePosixPath(m).name.startswith(".")]
        if part.endswith(".txt"):
            wanted = {line.strip() for line in self.archive.read(part).decode().splitlines()}
            members = [m for m in members if m in wanted]
        elif part:
            members = [m for m in members if m.startswith(part.rstrip("/") + "/")]
        self.members = [m for m in members if PurePosixPath(m).suffix.lower() in SUFFIXES]
        if not self.members:
            raise InvalidDataset("A source holds photographs", got=f"none in {name}")

    def __len__(self) -> int:
        return len(self.members)

    def label(self, index: int) -> str:
        return self.members[index]

    def read(self, index: int) -> bytes:
        return self.archive.read(self.members[index])


class HubImages(Photographs):
    """Rows of a Hugging Face data set: the column that holds its photographs, encoded."""

    def __init__(self, name: str, rows: Any, column: str) -> None:
        super().__init__(name)
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> str:
        return f"{self.name} {index}"

    def read(self, index: int) -> bytes:
        return encoded(self.rows[index][self.column])


def load_hub(repo: str, split: str, *, streaming: bool) -> tuple[Any, str]:
    """The split and the name of its image column; photographs stay encoded until they are used."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra.of("datasets", "data", "read data sets from the Hugging Face hub") from error
    try:
        rows = datasets.load_dataset(repo, split=split, streaming=streaming)
    except Exception as error:  # it passes on exceptions of a dozen libraries
        raise ModelUnavailable(
            f"The data set {repo} ({split}) must be in the cache or readable",
            got=(str(error) or type(error).__name__).splitlines()[0],
            remedy=f'Accept its terms on https://huggingface.co/datasets/{repo}, then run "hf auth login".',
        ) from error
    columns = [n for n, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise InvalidDataset("A data set has a column of images", got=f"{list(rows.features or {})} in {repo}")
    return rows.cast_column(columns[0], datasets.Image(decode=False)), columns[0]


def encoded(cell: dict[str, Any] | None) -> bytes:
    """The bytes of an undecoded image cell. ``InvalidImage`` for an empty one, and when its file cannot be read."""
    content, path = (cell["bytes"], cell["path"]) if cell else (None, None)
    try:
        return content if content is not None else Path(path or "").read_bytes()
    except OSError as error:
        raise InvalidImage("A row of the data set has a photograph", got=f"{path} ({error})") from error


def hub_source(spec: str) -> tuple[str, str] | None:
    """``(repository, split)`` of ``imagenet-1k[@split]`` or ``hf:org/name[@split]``; None for anything else."""
    name, _, split = spec.partition("@")
    if name == "imagenet-1k":
        name = f"hf:{IMAGENET}"
    return (name.removeprefix("hf:"), split or "train") if name.startswith("hf:") else None


def open_photographs(spec: str) -> Photographs:
    """The photographs that ``spec`` names; see ``opsin train codec --help``. Reads no pixel.

    Raises ``MissingFile``, ``InvalidDataset``, ``MissingExtra`` and ``ModelUnavailable``.
    """
    hub = hub_source(spec)
    if hub:
        return HubImages(spec, *load_hub(*hub, streaming=False))
    panorama = spec.startswith("panorama:")
    place = spec.removeprefix("panorama:")
    if place.partition("@")[0] == TINY.name and not Path(place).exists():
        place = f"{TINY}/{place.partition('@')[2] or 'train'}"
    path, _, part = place.rpartition("@") if "@" in place and not Path(place).exists() else (place, "", "")
    root = Path(path).expanduser()
    if not root.exists():
        raise MissingFile("The photographs must exist", got=spec)
    notes = root / "dataset_config.json"  # of the published code: only the type counts
    if root.is_dir() and notes.is_file():
        try:
            panorama |= json.loads(notes.read_text()).get("dataset_type") == "panorama"
        except (ValueError, AttributeError) as error:
            raise InvalidDataset("dataset_config.json is a JSON object", got=f"{notes}: {error}") from error
    return Files(spec, root, part, panorama)


@dataclass(frozen=True)
class Crops:
    """How a photograph becomes the model's input of ``size (H, W)``.

    ``area``: smallest share of it that a crop shows, 1 for all of it; ``flip``: probability of a mirrored one.
    Panoramas are never cropped: they are turned by a random angle, unless ``published``, and stretched.
    """

    size: Size
    area: float = 0.2
    flip: float = 0.5
    published: bool = False

    def draw(self, picture: Image.Image, rng: np.random.Generator, panorama: bool = False) -> np.ndarray:
        """One random view, ``(H, W, 3)`` uint8. Bicubic with antialiasing; aspects within 3:4 and 4:3 of ``size``."""
        height, width = self.size
        if panorama:
            view = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
            if self.published:
                return view
            view = np.roll(view, int(rng.integers(width)), axis=1)
        else:
            box = self._box(picture.width, picture.height, rng)
            view = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
        return view[:, ::-1] if rng.random() < self.flip else view

    def whole(self, picture: Image.Image, panorama: bool = False) -> np.ndarray:
        """The largest centred view of the aspect of ``size`` (of a panorama all), ``(H, W, 3)`` uint8."""
        box = None if panorama else self._centre(picture.width, picture.height)
        return np.asarray(picture.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box))

    def _box(self, width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
        if self.area == 1:
            return self._centre(width, height)
        aspect = self.size[1] / self.size[0]
        for _ in range(10):
            area = width * height * rng.uniform(self.area, 1)
            ratio = aspect * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return x, y, x + w, y + h
        return self._centre(width, height)

    def _centre(self, width: int, height: int) -> tuple[float, float, float, float]:
        scale = min(width / self.size[1], height / self.size[0])
        w, h = min(self.size[1] * scale, width), min(self.size[0] * scale, height)
        x, y = (width - w) / 2, (height - h) / 2
        return x, y, x + w, y + h


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """``images (B, 3, H, W)`` in [0, 1]; ``skipped`` lists photographs that could not be read, and why."""

    images: Tensor
    skipped: tuple[tuple[str, str], ...] = ()


def stack(views: Sequence[np.ndarray]) -> Tensor:
    """Views ``(H, W, 3)`` uint8 as ``(B, 3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float().div_(255)


class PhotoBatches(Dataset[ImageBatch]):
    """Batch ``n`` of process ``rank`` out of ``world``: the passes over all photographs, each in its own order, laid
    end to end and cut into global batches. So nothing is left out at the end of a pass, processes share one sequence,
    and a run can be continued anywhere. A photograph that cannot be read is reported, and another one takes its place.
    """

    def __init__(
        self, sources: Sequence[Photographs], crops: Crops, *, batch_size: int, seed: int = 42, rank: int = 0,
        world: int = 1, cache_mb: int = 512, chosen: Sequence[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        self.sources, self.crops, self.batch_size, self.seed = list(sources), crops, batch_size, seed
        self.rank, self.world, self.memory = rank, world, Memory(cache_mb * 2**20)
        everything = [(s, i) for s, source in enumerate(self.sources) for i in range(len(source))]
        self.chosen = list(chosen) if chosen is not None else everything
        if not self.chosen:
            raise InvalidDataset("There are photographs to train on", got="none")

    @property
    def per_pass(self) -> float:
        """Global batches of one pass over all photographs; need not be whole."""
        return len(self.chosen) / (self.batch_size * self.world)

    def __getitem__(self, number: int) -> ImageBatch:
        """Batch ``number``, any whole number ≥ 0."""
        whole = self.batch_size * self.world
        views: list[np.ndarray] = []
        skipped: list[tuple[str, str]] = []
        for place in range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size):
            position = number * whole + place
            turn, index = divmod(position, len(self.chosen))
            rng = np.random.default_rng([self.seed, 1, position])
            picture, panorama = self._read(int(self._order(turn)[index]), rng, skipped)
            views.append(self.crops.draw(picture, rng, panorama))
        return ImageBatch(stack(views), tuple(skipped))

    def whole(self, index: int) -> np.ndarray:
        """Photograph ``index`` without chance, ``(H, W, 3)`` uint8. ``InvalidImage`` when it cannot be read."""
        picture, panorama = self._picture(index)
        return self.crops.whole(picture, panorama)

    def label(self, index: int) -> str:
        """What to call photograph ``index``."""
        source, number = self.chosen[index]
        return self.sources[source].label(number)

    def _order(self, turn: int) -> np.ndarray:
        return _permutation(self.seed, turn, len(self.chosen))

    def _read(self, index: int, rng: np.random.Generator, skipped: list[tuple[str, str]]) -> tuple[Image.Image, bool]:
        for _ in range(ATTEMPTS):
            try:
                return self._picture(index)
            except OpsinError as error:
                skipped.append((self.label(index), str(error)))
                index = int(rng.integers(len(self.chosen)))
        raise InvalidDataset(f"One photograph in {ATTEMPTS} can be read", got=f"the last error was: {skipped[-1][1]}")

    def _picture(self, index: int) -> tuple[Image.Image, bool]:
        source, number = self.chosen[index]
        pixels = self.memory.get(index)
        if pixels is None:
            pixels = np.asarray(to_pil(read_image(self.sources[source].read(number))))
            self.memory.put(index, pixels)
        return Image.fromarray(pixels), self.sources[source].panorama


@lru_cache(maxsize=2)
def _permutation(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, turn]).permutation(count)


class StreamBatches(IterableDataset[ImageBatch]):
    """The same from a stream: its photographs in the order in which they come, shuffled ``SHUFFLED`` at a time.

    To go on at batch ``start``, what comes before it in the pass is read and thrown away without being decoded.
    ``opened(turn)`` gives pass ``turn`` as encoded photographs; ``count`` is the length of a pass.
    """

    def __init__(
        self, opened: Callable[[int], Iterator[bytes]], count: int, crops: Crops, *, batch_size: int, seed: int = 42,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.opened, self.count, self.crops, self.batch_size, self.seed = opened, count, crops, batch_size, seed
        self.rank, self.world, self.start = rank, world, 0

    @property
    def per_pass(self) -> float:
        """Global batches of one pass."""
        return self.count / (self.batch_size * self.world)

    def __iter__(self) -> Iterator[ImageBatch]:
        whole = self.batch_size * self.world
        number, spare = self.start, None
        views: list[np.ndarray] = []
        skipped: list[tuple[str, str]] = []
        for position, data in self._photographs(number * whole):
            place = position - number * whole
            if place // self.batch_size == self.rank:
                try:
                    spare = to_pil(read_image(data))
                except OpsinError as error:
                    skipped.append((f"photograph {position} of the stream", str(error)))
                if spare is not None:  # a broken photograph is replaced by another crop of the one before it
                    rng = np.random.default_rng([self.seed, 1, position])
                    views.append(self.crops.draw(spare, rng))
            if place == whole - 1:
                missing = self.batch_size - len(views)
                if not views:
                    raise InvalidDataset("A batch holds a readable photograph", got=skipped[-1][1])
                yield ImageBatch(stack([*views, *views[-1:] * missing]), tuple(skipped))
                number, views, skipped = number + 1, [], []

    def _photographs(self, position: int) -> Iterator[tuple[int, bytes]]:
        turn, skip = divmod(position, self.count)
        while True:
            taken = 0
            for taken, data in enumerate(self.opened(turn), start=1):
                if taken > self.count:
                    break
                if taken > skip:
                    yield position, data
                    position += 1
            if taken < self.count:
                raise InvalidDataset(f"A pass of the stream has {self.count} photographs", got=taken)
            turn, skip = turn + 1, 0


def _stream(spec: str) -> tuple[Any, str, str]:
    """Rows, image column and split of a Hugging Face data set that is read while it is downloaded."""
    named = hub_source(spec)
    if named is None:
        raise InvalidDataset("Only data sets of the Hugging Face hub are streamed", got=spec, remedy="streaming=false")
    return *load_hub(*named, streaming=True), named[1]


def first_of_stream(spec: str, count: int) -> HubImages:
    """The first ``count`` photographs of a Hugging Face data set."""
    rows, column, _ = _stream(spec)
    return HubImages(spec, list(rows.take(count)), column)


def open_stream(spec: str, crops: Crops, *, seed: int, **options: Any) -> StreamBatches:
    """Batches from a Hugging Face data set while it is downloaded."""
    rows, column, split = _stream(spec)
    splits = getattr(rows.info, "splits", None) or {}
    if split not in splits:
        raise InvalidDataset("A stream says how many photographs it has", got=spec, remedy="streaming=false")
    return StreamBatches(_Passes(rows, column, seed), splits[split].num_examples, crops, seed=seed, **options)


@dataclass(frozen=True)
class _Passes:
    """The encoded photographs of a stream, in another order at every pass."""

    rows: Any
    column: str
    seed: int

    def __call__(self, turn: int) -> Iterator[bytes]:
        rows = self.rows.shuffle(seed=self.seed + turn, buffer_size=SHUFFLED)
        for part in rows.iter(batch_size=1):  # iter(rows) would take another order in a process that makes batches
            try:
                yield encoded(part[self.column][0])
            except OpsinError:
                yield b""  # no photograph, and skipped as such


def hold_out(sources: Sequence[Photographs], share: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """``(source, index)`` of the photographs to train on and of the held-out ones: at least one when ``share`` > 0.

    A photograph's name alone decides, so it stays where it is when others come, go or move.
    """
    rated = [(zlib.crc32(s.label(i).encode()), (n, i)) for n, s in enumerate(sources) for i in range(len(s))]
    if not share:
        return [place for _, place in rated], []
    limit = max(share * 2**32, min(rated)[0] + 1)
    train = [place for rate, place in rated if rate >= limit]
    return train, [place for rate, place in rated if rate < limit]
