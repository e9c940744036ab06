"""From one token per prompt to one token per region: group the prompts whose tokens agree, and average each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig, InvalidPrompt, check_compat

Grouping = Literal["components", "average"]
GROUPINGS: tuple[Grouping, ...] = ("components", "average")
PUBLISHED_MIN_SIZE = 3


@dataclass(frozen=True, eq=False)
class Groups:
    """Which region each prompt belongs to: ``labels (P,)``, -1 for none; ``counts (R,)`` prompts in each region.

    Regions are numbered by their smallest prompt index.
    """

    labels: Tensor
    counts: Tensor

    def __len__(self) -> int:
        """Number of regions ``R``."""
        return len(self.counts)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over members: ``(P, ...)`` → ``(R, ...)``."""
        inside = self.labels >= 0
        total = values.new_zeros((len(self), *values.shape[1:]))
        total.index_add_(0, self.labels[inside], values[inside])
        return total / self.counts.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1)).clamp(min=1)

    def representatives(self, points: Tensor) -> Tensor:
        """Prompt index ``(R,)`` closest to the mean of its region's ``points (P, 2)``; the first on ties."""
        exact = points.double()
        inside = self.labels.clamp(min=0)
        distance = (exact - self.mean(exact)[inside]).square().sum(-1) if len(self) else exact.new_zeros(len(points))
        distance = distance.masked_fill(self.labels < 0, torch.inf)
        nearest = distance.new_full((len(self),), torch.inf)
        if len(self) == 0:
            return self.counts
        nearest = nearest.scatter_reduce(0, inside, distance, "amin")
        order = torch.arange(len(points), device=points.device)
        candidates = order.masked_fill(distance > nearest[inside], len(points))
        return order.new_full((len(self),), len(points)).scatter_reduce(0, inside, candidates, "amin")

    def keep(self, min_size: int) -> Groups:
        """Without the regions of fewer than ``min_size`` prompts."""
        kept = self.counts >= min_size
        renumbered = torch.where(kept, kept.cumsum(0) - 1, -1)
        labels = torch.cat([renumbered, renumbered.new_full((1,), -1)])[self.labels]
        return Groups(labels, self.counts[kept])


def numbered(labels: Tensor) -> Groups:
    """Groups from arbitrary non-negative labels ``(P,)``, renumbered by smallest member."""
    unique, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    position = torch.arange(len(labels), device=labels.device)
    first = position.new_full((len(unique),), len(labels)).scatter_reduce(0, inverse, position, "amin")
    order = first.argsort()
    return Groups(order.argsort()[inverse], counts[order])


def connected_components(tokens: Tensor, threshold: float) -> Tensor:
    """Component label ``(P,)`` of each token ``(P, D)``; an edge joins tokens of cosine ≥ ``threshold``.

    Single linkage, as published. Whatever touches the most central token is one component at once, and only the rest is
    compared with everything: an image of one large group costs almost nothing.
    """
    unit = F.normalize(tokens, dim=-1)
    hub = (unit @ unit.mean(0)).argmax()
    near = unit @ unit[hub] >= threshold
    near[hub] = True
    outside = unit[~near]
    edges = outside @ outside.T >= threshold
    touching = (outside @ unit[near].T >= threshold).any(1)
    # Node 0 stands for everything near the hub.
    edges = F.pad(edges, (1, 0, 1, 0))
    edges[0, 1:] = edges[1:, 0] = touching
    labels = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    labels[~near] = torch.arange(1, len(edges), device=tokens.device)
    return _components(edges)[labels]


def _components(edges: Tensor) -> Tensor:
    """Component label ``(N,)`` of each node of a symmetric adjacency ``(N, N)``.

    Every round each component takes the smallest label that it touches and labels are then followed to their root,
    so the number of rounds grows with the logarithm of the longest chain; all rounds are matrix work.
    """
    edges = edges.clone().fill_diagonal_(True)
    labels = torch.arange(len(edges), device=edges.device, dtype=torch.int32)
    nothing = labels.new_tensor(len(edges))
    while True:
        touched = torch.where(edges, labels, nothing).amin(1)
        roots = labels.scatter_reduce(0, labels.long(), touched, "amin")
        while not torch.equal(further := roots[roots.long()], roots):
            roots = further
        joined = roots[labels.long()]
        if torch.equal(joined, labels):
            return labels.long()
        labels = joined


def average_linkage(tokens: Tensor, threshold: float) -> Tensor:
    """Cluster label ``(P,)`` of each token: groups merge while their mean pairwise cosine is ≥ ``threshold``.

    Chains do not form, because a group is judged by all of its members and not by its closest two.
    """
    if len(tokens) < 2:
        return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    from scipy.cluster.hierarchy import fcluster, linkage

    unit = F.normalize(tokens.float(), dim=-1)
    distance = (1 - unit @ unit.T).clamp(min=0)
    rows, cols = torch.triu_indices(len(tokens), len(tokens), 1, device=tokens.device)
    tree = linkage(distance[rows, cols].cpu().numpy(), method="average")
    return torch.from_numpy(fcluster(tree, 1 - threshold, criterion="distance")).long().to(tokens.device)


def group(
    tokens: Tensor, *, threshold: float, method: Grouping = "components", min_size: int = 1, compat: str | None = None
) -> Groups:
    """Group prompts by their tokens ``(P, D)``.

    ``threshold``: cosine in [-1, 1]. ``method``: ``"components"`` (published, single linkage) or ``"average"`` linkage.
    Regions of fewer than ``min_size`` prompts are left out. ``compat="published"`` keeps only components of three
    prompts or more and raises ``InvalidPrompt`` when none is left; otherwise no region is an empty result. Source:
    REN §4.2 of the published code.
    """
    published = check_compat(compat)
    if not -1 <= threshold <= 1:
        raise InvalidConfig("threshold is a cosine in [-1, 1]", got=threshold)
    if method not in GROUPINGS:
        raise InvalidConfig(f"grouping is one of {', '.join(GROUPINGS)}", got=method)
    if len(tokens) == 0:
        empty = torch.zeros(0, dtype=torch.long, device=tokens.device)
        return Groups(empty, empty)
    linkage = connected_components if method == "components" or published else average_linkage
    groups = numbered(linkage(tokens, threshold)).keep(max(min_size, PUBLISHED_MIN_SIZE) if published else min_size)
    if published and len(groups) == 0:
        raise InvalidPrompt(
            "The published rule needs a group of at least three prompts",
            got=f"{len(tokens)} prompts, none alike at {threshold}",
            remedy='Without compat="published" small groups are kept.',
        )
    return groups
