"""Grouping of prompts against human segmentations: are two prompts put together, or apart, as people do?

For one image and one annotator every pair of prompts is either in one human region or in two. *Together* is the share
of the former that the grouping joins, *apart* the share of the latter that it separates, *balanced* their mean, and
*rand* the share of all pairs (most pairs are in two regions, so leaving everything apart already has a high rand).
Shares are averaged over annotators, then over images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opsin import report, runtime
from opsin.errors import InputError, InvalidConfig
from opsin.evaluation.datasets import HumanSegmentation, fit_labels
from opsin.regions import aggregate, prompts

if TYPE_CHECKING:
    from opsin.regions import RegionModel

MEASURES = ("balanced", "rand", "together", "apart")
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)


@dataclass(frozen=True)
class PairShares:
    """How one labelling of prompts agrees with one human labelling; shares in [0, 1], NaN where no such pair exists."""

    together: float
    apart: float
    rand: float

    @property
    def balanced(self) -> float:
        """Mean of ``together`` and ``apart``; the defined one where only one is."""
        defined = [v for v in (self.together, self.apart) if v == v]
        return sum(defined) / len(defined) if defined else float("nan")


def pair_shares(labels: Tensor, truth: Tensor) -> PairShares:
    """Agreement of integer labels ``(P,)`` with human region numbers ``(P,)`` over all pairs of prompts.

    Prompts whose human label is 0 (unlabelled) do not count; a negative label is a region of its own (a prompt that the
    grouping dropped). Counted from the contingency table, so nothing of size P × P is made.
    """
    if labels.shape != truth.shape or labels.ndim != 1:
        raise InputError("Both labellings have shape (P,)", got=(tuple(labels.shape), tuple(truth.shape)))
    known = truth > 0
    labels, truth = labels[known].long(), truth[known].long()
    alone = labels < 0
    top = int(labels.max()) + 1 if len(labels) else 0
    labels = torch.where(alone, top + alone.cumsum(0), labels)

    def pairs(values: Tensor) -> float:
        counts = values.unique(return_counts=True)[1].double()
        return float((counts * (counts - 1)).sum() / 2)

    joint = labels * (int(truth.max()) + 1 if len(truth) else 1) + truth
    total = len(labels) * (len(labels) - 1) / 2
    same, joined, agreed = pairs(truth), pairs(labels), pairs(joint)
    different = total - same
    return PairShares(
        together=agreed / same if same else float("nan"),
        apart=1 - (joined - agreed) / different if different else float("nan"),
        rand=1 - (same + joined - 2 * agreed) / total if total else float("nan"),
    )


@dataclass
class GroupingScores:
    """Accumulates images for any number of labellings; ``compute`` averages over annotators, then images."""

    rows: dict[str, list[list[float]]] = field(default_factory=dict)

    def update(self, name: str, labels: Tensor, truths: Sequence[Tensor]) -> None:
        """Add one image: ``labels (P,)`` and the human region ``(P,)`` of every annotator; groups are counted too."""
        shares = [pair_shares(labels, t) for t in truths]
        mean = [float(np.nanmean([getattr(s, m) for s in shares])) for m in MEASURES]
        self.rows.setdefault(name, []).append([*mean, float(len(labels[labels >= 0].unique()))])

    def values(self, name: str, measure: str = "balanced") -> np.ndarray:
        """One number per image."""
        return np.array(self.rows[name])[:, MEASURES.index(measure)]

    def compute(self, *, seed: int = 0) -> dict[str, Any]:
        """Every measure of every labelling with its interval over images, and the mean number of groups."""
        return {
            name: {m: report.clustered_mean(self.values(name, m), range(len(rows)), seed=seed) for m in MEASURES}
            | {"groups": float(np.mean([r[-1] for r in rows]))}
            for name, rows in self.rows.items()
        }


def at_points(labels: Tensor, points: Tensor) -> Tensor:
    """The label ``(P,)`` of the pixel under each point ``(P, 2)`` of a map ``(H, W)``."""
    x = points[:, 0].long().clamp(0, labels.shape[1] - 1)
    y = points[:, 1].long().clamp(0, labels.shape[0] - 1)
    return labels[y, x]


def humans_against_each_other(truths: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Each annotator's labelling beside those of the others: what agreement is possible."""
    return [(t, [o for j, o in enumerate(truths) if j != i]) for i, t in enumerate(truths)] if len(truths) > 1 else []


def group(tokens: Tensor, method: str, threshold: float) -> Tensor:
    """Group number ``(P,)`` of each token by one of the library's methods."""
    return aggregate.group(tokens, threshold=threshold, method=method).labels  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Asked:
    """One image with its prompts: ``points (P, 2)``, ``tokens (P, D)``, mean colours ``(P, 3)``, human labels at the
    points.
    """

    image: Tensor
    points: Tensor
    tokens: Tensor
    colours: Tensor
    truths: list[Tensor]


def ask(model: RegionModel, record: HumanSegmentation, *, size: int | None = None) -> _Asked:
    """Tokens of the model's own prompts on one image, ungrouped, with what people say about the same points."""
    image = record.image()
    shape = (int(image.shape[1]), int(image.shape[2]))
    found = prompts.slic(image, model.card.grid_size**2)
    tokens = model.encode(image, points=found.points, size=size).tokens.float().cpu()
    count = torch.bincount(found.labels.flatten()).float()
    totals = [torch.bincount(found.labels.flatten(), channel.flatten().double()) for channel in _lab(image)]
    colours = (torch.stack(totals, -1) / count[:, None]).float()
    truths = [at_points(fit_labels(labels, shape), found.points) for labels in record.labels()]
    return _Asked(image, found.points, tokens, colours, truths)


def group_colours(colours: Tensor, distance: float) -> Tensor:
    """Baseline: superpixels whose mean Lab colours ``(P, 3)`` chain within ``distance`` are one group (average
    linkage).
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(colours) < 2:
        return torch.zeros(len(colours), dtype=torch.long)
    return torch.from_numpy(fcluster(linkage(colours.numpy(), method="average"), distance, criterion="distance")).long()


def slic_labels(image: Tensor, points: Tensor, segments: int) -> Tensor:
    """Baseline: SLIC alone, asked for ``segments`` superpixels, at the points."""
    return at_points(prompts.slic(image, max(1, segments)).labels, points)


def sweep(
    model: RegionModel,
    records: Sequence[HumanSegmentation],
    *,
    methods: Sequence[str],
    thresholds: Sequence[float],
    size: int | None = None,
) -> GroupingScores:
    """Every method at every threshold, and the colour baseline at its own range of distances, on the same prompts."""
    scores = GroupingScores()
    for record in runtime.progress(records, total=len(records), description="choosing", unit="image"):
        asked = ask(model, record, size=size)
        for method in methods:
            for t in thresholds:
                scores.update(f"{method} @ {t:g}", group(asked.tokens, method, t), asked.truths)
        for d in COLOUR_DISTANCES:
            scores.update(f"colour @ {d:g}", group_colours(asked.colours, d), asked.truths)
    return scores


COLOUR_DISTANCES = (2.5, 5, 7.5, 10, 15, 20, 30, 40)


def best(scores: GroupingScores, method: str) -> tuple[float, float]:
    """The setting of ``method`` with the largest balanced share, and that share."""
    means = {
        float(n.rpartition("@")[2]): float(scores.values(n).mean()) for n in scores.rows if n.startswith(f"{method} @")
    }
    chosen = max(means, key=lambda t: means[t])
    return chosen, means[chosen]


def evaluate(
    model: RegionModel,
    judged: Sequence[HumanSegmentation],
    chosen_on: Sequence[HumanSegmentation],
    *,
    methods: Sequence[str] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    size: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure grouping on ``judged`` with thresholds chosen on ``chosen_on`` (other images), against SLIC and colour
    alone.

    Prompts are the model's own superpixel centres, the same for every row. SLIC alone: its superpixels as they are
    (every prompt apart), as many segments as people drew in that image, and as many as the best grouping made.
    """
    methods = tuple(methods or aggregate.GROUPINGS)
    unknown = [m for m in methods if m not in aggregate.GROUPINGS]
    if unknown:
        raise InvalidConfig(f"grouping is one of {', '.join(aggregate.GROUPINGS)}", got=unknown[0])
    if not judged or not chosen_on:
        raise InputError("Grouping needs images to judge and images to choose on", got=(len(judged), len(chosen_on)))
    chosen = sweep(model, chosen_on, methods=methods, thresholds=thresholds, size=size)
    settings = {m: best(chosen, m) for m in (*methods, "colour")}
    winner = max(methods, key=lambda m: settings[m][1])
    scores = GroupingScores()
    people: list[list[float]] = []
    counts: list[int] = []
    for record in runtime.progress(judged, total=len(judged), description="judging", unit="image"):
        asked = ask(model, record, size=size)
        counts.append(len(asked.points))
        labels = {f"regions: {m}": group(asked.tokens, m, settings[m][0]) for m in methods}
        drawn = round(float(np.mean([len(t[t > 0].unique()) for t in asked.truths])))
        labels["colour of superpixels"] = group_colours(asked.colours, settings["colour"][0])
        labels["SLIC superpixels"] = torch.arange(len(asked.points))
        labels["SLIC, as many as people drew"] = slic_labels(asked.image, asked.points, drawn)
        made = len(labels[f"regions: {winner}"].unique())
        labels["SLIC, as many as the regions"] = slic_labels(asked.image, asked.points, made)
        labels["all together"] = torch.zeros(len(asked.points), dtype=torch.long)
        for name, values in labels.items():
            scores.update(name, values, asked.truths)
        pairs = [pair_shares(a, o) for a, others in humans_against_each_other(asked.truths) for o in others]
        if pairs:
            people.append([float(np.nanmean([getattr(p, m) for p in pairs])) for m in MEASURES])
    results = scores.compute(seed=seed)
    if people:
        table = np.array(people)
        results["people against each other"] = {
            m: report.clustered_mean(table[:, i], range(len(table)), seed=seed) for i, m in enumerate(MEASURES)
        }
    reference = scores.values(f"regions: {winner}")
    return {
        "images": len(judged),
        "images_chosen_on": len(chosen_on),
        "prompts": float(np.mean(counts)),
        "size": size or model.card.image_size,
        "best_method": winner,
        "settings": {m: {"setting": s, "balanced_when_chosen": v} for m, (s, v) in settings.items()},
        "groupings": results,
        "best_minus": {
            n: report.clustered_mean(reference - scores.values(n), range(len(reference)), seed=seed)
            for n in scores.rows
            if n != f"regions: {winner}"
        },
        "sweep": {n: {m: float(np.nanmean(chosen.values(n, m))) for m in MEASURES} for n in chosen.rows},
    }


def _lab(image: Tensor) -> Tensor:
    """CIE Lab ``(3, H, W)`` of an sRGB image in [0, 1], white D65."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055).clamp(min=0) ** 2.4, image / 12.92)
    matrix = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = torch.einsum("ij,jhw->ihw", matrix, linear.float()) / torch.tensor([0.95047, 1.0, 1.08883])[:, None, None]
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
