"""Batches of two views with prompts, regions and soft masks. Batch ``n`` depends on the seed and ``n`` alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opsin.errors import InvalidDataset, OpsinError
from opsin.geometry import Size
from opsin.masks.maps import RegionMaps, regions_at, soft_masks
from opsin.masks.sources import Sample, Source
from opsin.training.views import Augmentation, draw_view, make_views

T = TypeVar("T")
ATTEMPTS = 100  # broken photographs in a row after which a data set is given up


@dataclass(frozen=True, eq=False)
class Batch:
    """``B`` photographs in two views: ``images (B, 2, 3, S, S)`` in [0, 1]; ``P`` prompts each: ``points (B, 2, P, 2)``
    (x, y) as fractions, ``ids`` and ``categories (B, 2, P)`` of the region, negative for none, ``masks
    (B, 2, P, h, w)`` its share of every patch. ``skipped`` lists photographs that could not be read, and why."""

    images: Tensor
    points: Tensor
    ids: Tensor
    categories: Tensor
    masks: Tensor
    skipped: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        names = ("images", "points", "ids", "categories", "masks")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


class Batches(Dataset[Batch]):
    """Batch ``n`` of process ``rank`` out of ``world``: drawn from ``seed``, ``n`` and the place of a photograph in the
    global batch, so a run can be continued anywhere, and processes share one sequence.

    Sources are drawn by weight, photographs within a source evenly, with replacement. A photograph that cannot be read
    is reported in the batch and replaced by another draw.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        size: int,
        grid: Size,
        batch_size: int,
        prompts: int,
        augmentation: Augmentation,
        weights: Sequence[float] = (),
        seed: int = 42,
        rank: int = 0,
        world: int = 1,
        cache_mb: int = 512,
        published: bool = False,
    ) -> None:
        if prompts > size * size:
            raise InvalidDataset(f"A view of {size} × {size} pixels has room for its prompts", got=prompts)
        self.sources, self.size, self.grid, self.batch_size, self.prompts = sources, size, grid, batch_size, prompts
        self.augmentation, self.seed, self.rank, self.world, self.published = augmentation, seed, rank, world, published
        shares = np.asarray(weights or [1.0] * len(sources), dtype=np.float64)
        self.shares = shares / shares.sum()
        names = sorted({c for s in sources for c in s.classes})
        number = {name: i for i, name in enumerate(names)}
        self.classes = tuple(names)
        # One more entry at the end, so that category -1 stays -1.
        self._category = [torch.tensor([*(number[c] for c in s.classes), -1]) for s in sources]
        self._memory = Memory(cache_mb * 2**20)

    def __len__(self) -> int:
        """Batches of one pass over all photographs."""
        return max(1, -(-sum(len(s) for s in self.sources) // (self.batch_size * self.world)))

    def __getitem__(self, number: int) -> Batch:
        """Batch ``number``, any whole number ≥ 0."""
        samples, views, pixels = [], [], []
        skipped: list[tuple[str, str]] = []
        for place in range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size):
            rng = np.random.default_rng([self.seed, number, place])
            samples.append(self._draw(rng, number, skipped))
            for _ in range(2):
                views.append(draw_view(rng, self.size, self.augmentation))
                pixels.append(torch.from_numpy(rng.choice(self.size**2, self.prompts, replace=False)))
        images = torch.stack([s.image for s in samples]).repeat_interleave(2, 0).float() / 255
        regions = [s.regions for s in samples for _ in range(2)]
        images, layers = make_views(images, [r.layers for r in regions], views, published=self.published)
        flat = torch.stack(pixels)
        ids, categories, masks = [], [], []
        for maps, moved, chosen in zip(regions, layers, pixels, strict=True):
            found = regions_at(moved, chosen, len(maps))
            ids.append(found)
            categories.append(torch.where(found >= 0, maps.categories[found.clamp(min=0)], -1))
            masks.append(soft_masks(moved, found, len(maps), self.grid))
        points = torch.stack([flat % self.size, flat // self.size], -1).float().add_(0.5).div_(self.size)
        pair = (self.batch_size, 2)
        return Batch(
            images.unflatten(0, pair),
            points.unflatten(0, pair),
            torch.stack(ids).unflatten(0, pair),
            torch.stack(categories).unflatten(0, pair),
            torch.stack(masks).unflatten(0, pair),
            tuple(skipped),
        )

    def _draw(self, rng: np.random.Generator, number: int, skipped: list[tuple[str, str]]) -> Sample:
        for _ in range(ATTEMPTS):
            which = int(rng.choice(len(self.sources), p=self.shares))
            source = self.sources[which]
            index = int(rng.integers(len(source)))
            try:
                return self._read(which, index, rng, np.random.default_rng([self.seed, number]))
            except OpsinError as error:
                skipped.append((source.label(index), str(error)))
        raise InvalidDataset(f"One photograph in {ATTEMPTS} can be read", got=f"the last error was: {skipped[-1][1]}")

    def _read(self, which: int, index: int, rng: np.random.Generator, shared: np.random.Generator) -> Sample:
        source = self.sources[which]
        known = self._memory.get((which, index)) if source.fixed else None
        if known is not None:
            return known
        sample = source.read(index, self.size, rng, shared)
        categories = self._category[which][sample.regions.categories]
        sample = Sample(sample.image, RegionMaps(sample.regions.layers, categories))
        if source.fixed:
            self._memory.put((which, index), sample)
        return sample


class Memory:
    """The last samples read, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.samples: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The sample, now the most recently used."""
        if key in self.samples:
            self.samples.move_to_end(key)
        return self.samples.get(key)

    def put(self, key: Hashable, sample: Sample | np.ndarray) -> None:
        """Keep a sample or an array, letting go of the oldest ones beyond the limit."""
        self.samples[key] = sample
        self.used += self._bytes(sample)
        while self.used > self.limit and self.samples:
            self.used -= self._bytes(self.samples.popitem(last=False)[1])

    @staticmethod
    def _bytes(sample: Sample | np.ndarray) -> int:
        return sample.nbytes if isinstance(sample, np.ndarray) else sample.image.nbytes + sample.regions.layers.nbytes


def loader(batches: Dataset[T], start: int, stop: int, workers: int) -> DataLoader[T]:
    """Batches ``start`` to ``stop`` in order, prepared by ``workers`` spawned processes (0: by this one)."""
    options = {"multiprocessing_context": "spawn", "prefetch_factor": 2} if workers else {}
    # batch_size None: the data set already makes whole batches.
    return DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers, **options)  # type: ignore[arg-type]

