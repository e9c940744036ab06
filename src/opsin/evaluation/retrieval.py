"""Retrieval of image segments: does the nearest segment of another image show the same kind of thing?

Queries and gallery are annotated segments of different images; a query is right at ``k`` when one of its ``k`` nearest
gallery rows (cosine) has its category. Intervals come from drawing query *images* again, because the segments of one
image are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from opsin import report, runtime
from opsin.errors import InputError, InvalidConfig
from opsin.evaluation import descriptors
from opsin.evaluation.datasets import SegmentedImage

if TYPE_CHECKING:
    from opsin.regions import RegionModel

RANKS = (1, 5)
REGION = "region token"
PATCHES = "mean patch feature"
COLOUR = "colour histogram"

Describe = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def nearest(queries: Tensor, gallery: Tensor, k: int, *, chunk: int = 4096) -> Tensor:
    """Rows ``(Q, k)`` of ``gallery (G, D)`` with the largest cosine to ``queries (Q, D)``, best first."""
    if not 1 <= k <= len(gallery):
        raise InvalidConfig(f"k lies between 1 and the {len(gallery)} rows of the gallery", got=k)
    reference = F.normalize(gallery.float(), dim=-1).T
    parts = [(F.normalize(q.float(), dim=-1) @ reference).topk(k).indices for q in queries.split(chunk)]
    return torch.cat(parts) if parts else torch.zeros((0, k), dtype=torch.long)


@dataclass
class Segments:
    """Accumulates described segments: one row per segment, one table per way of describing it."""

    tables: dict[str, list[Tensor]] = field(default_factory=dict)
    categories: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    things: list[bool] = field(default_factory=list)

    def update(self, described: Mapping[str, Tensor], segments: Sequence[Any], image: int) -> None:
        """Add the ``segments`` of one image with their descriptor tables ``(R, D)``."""
        for name, rows in described.items():
            if len(rows) != len(segments):
                raise InputError(f"{len(segments)} segments need as many rows", got=f"{len(rows)} rows of {name}")
            self.tables.setdefault(name, []).append(rows.float().cpu())
        self.categories += [s.category for s in segments]
        self.things += [s.is_thing for s in segments]
        self.images += [image] * len(segments)

    def table(self, name: str) -> Tensor:
        """All rows of one descriptor ``(R, D)``."""
        return torch.cat(self.tables[name])


def describe(model: RegionModel, size: int | None = None) -> Describe:
    """Every descriptor of the masks of an image: region tokens, mean patch features of the same map, colours.

    ``size`` is the model's input side; tokens and patch means share one feature map, so neither sees more pixels.
    """

    def rows(image: Tensor, masks: Tensor) -> dict[str, Tensor]:
        maps = model.features([image], size=size)
        asked: dict[str, Any] = {"masks": [masks]}
        return {
            REGION: model.encode_features(maps, **asked).tokens,
            f"{REGION}, projected": model.encode_features(maps, token="proj", **asked).tokens,
            PATCHES: descriptors.patch_means(maps[0], masks),
            **colours(image, masks),
        }

    return rows


def colours(image: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The colour baselines: 8³ bins by Hellinger affinity, and 4³ bins by cosine of counts."""
    return {
        COLOUR: descriptors.colour_histograms(image, masks),
        f"{COLOUR}, 64 bins": descriptors.colour_histograms(image, masks, bins=4, root=False),
    }


def collect(records: Sequence[SegmentedImage], rows: Describe, *, min_area: int = 1) -> Segments:
    """Describe every segment of at least ``min_area`` pixels of the images."""
    found = Segments()
    for i, record in enumerate(runtime.progress(records, total=len(records), description="images", unit="image")):
        masks = record.masks()
        kept = (masks.flatten(1).sum(1) >= max(1, min_area)).nonzero()[:, 0].tolist()
        if kept:
            found.update(rows(record.image(), masks[kept]), [record.segments[j] for j in kept], i)
    return found


def score(
    queries: Segments, gallery: Segments, *, seed: int = 0, names: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Top-1 and top-5 of every descriptor, with intervals, split by things and stuff, per category, and the
    differences.

    Queries whose category the gallery lacks can never be right; they count as wrong and ``answerable`` says how many
    are not.
    """
    truth, offered = torch.tensor(queries.categories), torch.tensor(gallery.categories)
    images, things = np.array(queries.images), np.array(queries.things)
    right: dict[str, dict[int, np.ndarray]] = {}
    for name in queries.tables:
        ranked = nearest(queries.table(name), gallery.table(name), min(max(RANKS), len(offered)))
        match = offered[ranked] == truth[:, None]
        right[name] = {k: match[:, :k].any(1).numpy().astype(float) for k in RANKS}
    subsets = {"all": np.ones(len(images), dtype=bool), "things": things, "stuff": ~things}
    results: dict[str, dict[str, Any]] = {
        name: {
            f"top{k}": {s: report.clustered_mean(hit[k][rows], images[rows], seed=seed) for s, rows in subsets.items()}
            for k in RANKS
        }
        for name, hit in right.items()
    }
    for name, hit in right.items():
        results[name]["class_mean_top1"] = float(np.mean([hit[1][truth == c].mean() for c in np.unique(truth)]))
    against = [name for name in right if name != REGION]
    differences = {
        name: {f"top{k}": report.clustered_mean(right[REGION][k] - right[name][k], images, seed=seed) for k in RANKS}
        for name in (against if REGION in right else ())
    }
    per_class = {
        (names or {}).get(c, str(c)): {"queries": int((truth == c).sum()), "gallery": int((offered == c).sum())}
        | {name: float(hit[1][truth == c].mean()) for name, hit in right.items()}
        for c in truth.unique().tolist()
    }
    return {
        "queries": len(truth),
        "gallery": len(offered),
        "answerable": int(torch.isin(truth, offered).sum()),
        "descriptors": results,
        "region_token_minus": differences,
        "top1_per_class": per_class,
    }


def evaluate(
    model: RegionModel,
    queries: Sequence[SegmentedImage],
    gallery: Sequence[SegmentedImage],
    *,
    min_area: int = 1,
    size: int | None = None,
    seed: int = 0,
    names: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Measure ``model`` on annotated images: ``queries`` are looked up in ``gallery``; ``min_area`` pixels, ``size`` as
    in ``describe``.
    """
    if not queries or not gallery:
        raise InputError("Retrieval needs query images and gallery images", got=(len(queries), len(gallery)))
    rows = describe(model, size)
    found = score(
        collect(queries, rows, min_area=min_area), collect(gallery, rows, min_area=min_area), seed=seed, names=names
    )
    return {"min_area": min_area, "size": size or model.card.image_size, **found}
