"""The training losses of REN (arXiv 2505.18153, §3.3), and one term more that compares regions across images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.errors import check_compat


def contrastive_loss(
    tokens_1: Tensor,
    tokens_2: Tensor,
    ids_1: Tensor,
    ids_2: Tensor,
    *,
    temperature: float = 0.1,
    compat: str | None = None,
) -> Tensor:
    """Tokens of one region come together, tokens of other regions of the same image go apart.

    ``tokens_1, tokens_2 (B, P, D)`` of two views, ``ids_1, ids_2 (B, P)`` the region of each prompt, negative where no
    region covers it (a null prompt). Per token ``-log(Σ positives / Σ all others)`` of ``exp(cosine / temperature)``,
    positives being the other tokens of its region in either view; the mean over tokens that have one, then over images.
    Null prompts only serve as negatives; ``compat="published"`` makes those of one view positives of each other.
    """
    published = check_compat(compat)
    tokens = F.normalize(torch.cat([tokens_1, tokens_2], 1), dim=-1)
    ids = torch.cat([ids_1, ids_2], 1)
    logits = tokens @ tokens.mT / temperature
    itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    positives = (ids[:, :, None] == ids[:, None, :]) & ~itself
    if not published:
        positives &= (ids >= 0)[:, :, None]
    anchors = positives.any(-1)
    everything = logits.masked_fill(itself, -torch.inf).logsumexp(-1)
    # Rows without a positive would be log 0: give them one, so that their (discarded) gradient stays finite.
    same = logits.masked_fill(~(positives | ~anchors[..., None]), -torch.inf).logsumexp(-1)
    losses = torch.where(anchors, everything - same, torch.zeros_like(same))
    counts = anchors.sum(-1)
    return (losses.sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def feature_loss(
    tokens_1: Tensor, tokens_2: Tensor, targets_1: Tensor, targets_2: Tensor, mask_1: Tensor, mask_2: Tensor
) -> Tensor:
    """Tokens look like the backbone's own features of their region, and relate to each other as those do.

    ``tokens, targets (B, P, D)`` of two views, ``mask (B, P)`` 1 where a region covers the prompt. Half the sum of the
    cosine distances of both views and of the mean difference between the token and the target cosines over all
    pairs (view 1, view 2) of the whole batch. 0 where no prompt of a view is covered.
    """
    first, second = (F.normalize(t.flatten(0, 1), dim=-1) for t in (tokens_1, tokens_2))
    goal_1, goal_2 = (F.normalize(t.flatten(0, 1), dim=-1) for t in (targets_1, targets_2))
    weight_1, weight_2 = (m.flatten().to(first.dtype) for m in (mask_1, mask_2))
    count_1, count_2 = weight_1.sum().clamp(min=1), weight_2.sum().clamp(min=1)
    own = (weight_1 * (1 - (first * goal_1).sum(-1))).sum() / count_1
    own = own + (weight_2 * (1 - (second * goal_2).sum(-1))).sum() / count_2
    difference = (first @ second.mT - goal_1 @ goal_2.mT).abs()
    relation = weight_1 @ difference @ weight_2 / (count_1 * count_2)
    return (own + relation) / 2


def target_loss(tokens: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine distance of ``tokens (..., D)`` to ``targets (..., D)`` where ``mask (...)`` is 1; 0 if nowhere."""
    distance = 1 - F.cosine_similarity(tokens, targets, dim=-1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def region_targets(features: Tensor, masks: Tensor) -> Tensor:
    """The mean backbone feature of each region.

    ``features (..., D, h, w)``, ``masks (..., R, H, W)`` in [0, 1], area-averaged to the grid where they are larger.
    Returns ``(..., R, D)``: mask-weighted sums divided by the mask's sum, or by 1 when the region is below one patch.
    """
    if masks.shape[-2:] != features.shape[-2:]:
        flat = masks.flatten(0, -3)[:, None]
        masks = F.interpolate(flat.to(features.dtype), features.shape[-2:], mode="area").view(
            *masks.shape[:-2], *features.shape[-2:]
        )
    masks = masks.to(features.dtype).flatten(-2)
    return masks @ features.flatten(-2).mT / masks.sum(-1, keepdim=True).clamp(min=1)


def region_means(tokens: Tensor, ids: Tensor, categories: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean token of each region that has a category.

    ``tokens (B, P, D)``, ``ids, categories (B, P)``, negative for none. Returns ``(N, D)``, categories ``(N,)`` and
    images ``(N,)``.
    """
    chosen = (ids >= 0) & (categories >= 0)
    image = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[chosen]
    rows = torch.stack([image, ids[chosen], categories[chosen]], -1)
    regions, member = rows.unique(dim=0, return_inverse=True)
    sums = tokens.new_zeros(len(regions), tokens.shape[-1]).index_add(0, member, tokens[chosen])
    counts = torch.bincount(member, minlength=len(regions)).clamp(min=1)
    return sums / counts[:, None], regions[:, 2], regions[:, 0]


def semantic_loss(tokens: Tensor, categories: Tensor, images: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Regions of one category come together across images: supervised contrastive loss (arXiv 2004.11362, eq. 2).

    ``tokens (N, D)``, ``categories (N,)``, ``images (N,)``. Positives are of the same category in another image;
    regions of the same category in the same image are left out. 0 when nothing has a positive.
    """
    unit = F.normalize(tokens, dim=-1)
    same = categories[:, None] == categories[None, :]
    elsewhere = images[:, None] != images[None, :]
    positives = same & elsewhere
    logits = (unit @ unit.mT / temperature).masked_fill(same & ~elsewhere, -torch.inf)
    counts = positives.sum(-1)
    # A row of only -inf (a single region) has no softmax: such rows are no anchors, and are dropped beforehand.
    anchors = counts > 0
    log_p = logits[anchors].log_softmax(-1).masked_fill(~positives[anchors], 0)
    return -(log_p.sum(-1) / counts[anchors]).sum() / anchors.sum().clamp(min=1)
