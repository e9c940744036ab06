"""Regions of an image as a few label maps: disjoint masks share a map, so that a warp or a count costs one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.errors import InvalidDataset
from opsin.geometry import Size

MOST = int(np.iinfo(np.int16).max)


def nearest(labels: np.ndarray, size: Size) -> np.ndarray:
    """A label map ``(H, W)`` at another size, by the nearest pixel."""
    rows, cols = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return np.ascontiguousarray(labels[rows[:, None], cols])


def distinct(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a label map ``(H, W)``, ascending, and the place of each pixel's value among them ``(H, W)``."""
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= 2**16:
        values, places = np.unique(labels, return_inverse=True)
        return values, places.reshape(labels.shape)
    present = np.bincount(labels.ravel()) > 0  # small numbers need no sorting
    return np.flatnonzero(present), (np.cumsum(present) - 1)[labels]


@dataclass(frozen=True, eq=False)
class RegionMaps:
    """``R`` regions of an image: ``layers (L, H, W)`` int16, the region at each pixel or -1; every region lies in
    exactly one layer. ``categories (R,)`` int64, -1 where a region has none."""

    layers: Tensor
    categories: Tensor

    @property
    def size(self) -> Size:
        """``(H, W)``."""
        return int(self.layers.shape[1]), int(self.layers.shape[2])

    def __len__(self) -> int:
        """Number of regions ``R``."""
        return len(self.categories)

    @classmethod
    def from_masks(cls, masks: Iterable[np.ndarray], categories: Sequence[int] | None = None) -> RegionMaps:
        """From masks ``(H, W)`` that may overlap, in order; empty ones keep their number and cover nothing."""
        layers: list[np.ndarray] = []
        count = 0
        for number, given in enumerate(masks):
            mask = np.asarray(given, dtype=bool)
            home = next((layer for layer in layers if not (layer[mask] >= 0).any()), None)
            if home is None:
                home = np.full(mask.shape, -1, np.int16)
                layers.append(home)
            home[mask] = number
            count = number + 1
        return cls.build(layers, count, categories)

    @classmethod
    def from_labels(cls, maps: Iterable[np.ndarray], ignore: int = 0) -> RegionMaps:
        """From label maps ``(H, W)`` of whole numbers, each value other than ``ignore`` being one region."""
        layers, count = [], 0
        for labels in maps:
            values, places = distinct(labels)
            table = np.full(len(values), -1, np.int16)
            kept = values != ignore
            if count + int(kept.sum()) > MOST:
                raise InvalidDataset(f"An image has at most {MOST} regions", got=count + int(kept.sum()))
            table[kept] = count + np.arange(int(kept.sum()))
            layers.append(table[places])
            count += int(kept.sum())
        return cls.build(layers, count, None)

    @classmethod
    def build(cls, layers: Sequence[np.ndarray], count: int, categories: Sequence[int] | None) -> RegionMaps:
        """From finished int16 layers that hold regions 0 to ``count - 1``; ``InvalidDataset`` when there is none."""
        if not count:
            raise InvalidDataset("An image to train on has at least one region", got="none")
        if count > MOST:
            raise InvalidDataset(f"An image has at most {MOST} regions", got=count)
        if len({layer.shape for layer in layers}) > 1:
            raise InvalidDataset("The masks of an image have one size", got=[layer.shape for layer in layers])
        names = [-1] * count if categories is None else list(categories)
        return cls(torch.from_numpy(np.stack(layers)), torch.tensor(names, dtype=torch.int64))

    def masks(self) -> Tensor:
        """Boolean masks ``(R, H, W)``."""
        found = torch.zeros((len(self), *self.size), dtype=torch.bool)
        for layer in self.layers:
            inside = layer >= 0
            rows, cols = inside.nonzero(as_tuple=True)
            found[layer[inside].long(), rows, cols] = True
        return found

    def resize(self, size: Size) -> RegionMaps:
        """The same regions at another size, by the nearest pixel."""
        layers = [torch.from_numpy(nearest(layer.numpy(), size)) for layer in self.layers]
        return RegionMaps(torch.stack(layers), self.categories)


def regions_at(layers: Tensor, pixels: Tensor, count: int) -> Tensor:
    """The region of each prompt: among those covering it, by area, the one at position ``covering // 2``.

    ``layers (L, H, W)`` of ``count`` regions, ``pixels (P,)`` flat positions. Returns ``(P,)`` int64, -1 where no
    region is. (REN's data loader: the upper median.)
    """
    areas = torch.bincount(layers.flatten().long() + 1, minlength=count + 1)[1:]
    covering = layers.flatten(1)[:, pixels].mT.long()  # (P, L)
    area = torch.where(covering >= 0, areas[covering.clamp(min=0)], torch.iinfo(torch.int64).max)
    # Equal areas go by region number, as a stable sort of the list of masks does.
    order = covering.argsort(dim=-1, stable=True)
    order = order.gather(-1, area.gather(-1, order).argsort(dim=-1, stable=True))
    middle = (covering >= 0).sum(-1, keepdim=True) // 2
    picked = order.gather(-1, middle.clamp(max=layers.shape[0] - 1))
    return covering.gather(-1, picked)[:, 0]


def soft_masks(layers: Tensor, regions: Tensor, count: int, grid: Size) -> Tensor:
    """Area-averaged masks ``(P, h, w)`` in [0, 1] of ``regions (P,)`` on a patch grid; zeros for region -1.

    ``layers (L, H, W)`` of ``count`` regions; ``H, W`` are multiples of the grid.
    """
    (height, width), cells = layers.shape[1:], grid[0] * grid[1]
    rows = torch.arange(height) // (height // grid[0])
    cols = torch.arange(width) // (width // grid[1])
    cell = (rows[:, None] * grid[1] + cols).flatten()
    keys = (layers.flatten(1).long() + 1) * cells + cell
    counts = torch.bincount(keys.flatten(), minlength=(count + 1) * cells).view(count + 1, *grid)
    counts[0] = 0
    return counts[regions + 1].float() / (height * width / cells)
