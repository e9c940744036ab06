"""XREN (REN, section 5): one encoder finds the regions, another supplies the tokens, with no training.

SigLIP's own attention-pooling head is run over the patches of each region, so the tokens stay comparable with its
text; features without such a head are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin import backbones, hub
from opsin.backbones import Backbone
from opsin.cards import ModelCard
from opsin.errors import InvalidConfig, check_compat
from opsin.images import ImageSource, read_images
from opsin.regions.extent import mask_weights
from opsin.regions.model import RegionModel, stack
from opsin.types import FeatureMap, RegionTokens


def mean_pool(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean ``(R, D)`` of patch features ``(N, D)`` under ``weights (R, N)``; zeros without a patch."""
    return weights.to(features.dtype) @ features / weights.sum(-1, keepdim=True).clamp(min=1e-6).to(features.dtype)


def attention_pool(head: Any, features: Tensor, weights: Tensor) -> Tensor:
    """SigLIP's pooling head over part of an image: ``features (N, D)`` and ``weights (R, N)`` → ``(R, D)``.

    The learned query is the same for every region, so logits and values are computed once; a weight enters as its
    logarithm, and a weight of one or zero is the published masking. A region without a patch gets what the head says
    of nothing: its bias.
    """
    attention, probe = head.attention, head.probe[0]
    dim, heads = attention.embed_dim, attention.num_heads
    projected = F.linear(torch.cat([probe, features]), attention.in_proj_weight, attention.in_proj_bias)
    query = projected[:1, :dim].view(heads, -1)
    keys = projected[1:, dim : 2 * dim].view(len(features), heads, -1)
    values = projected[1:, 2 * dim :].view(len(features), heads, -1)
    logits = torch.einsum("hc,nhc->hn", query, keys) * query.shape[-1] ** -0.5
    masked = logits + weights.to(logits.dtype).log()[:, None]
    mixed = torch.einsum("rhn,nhc->rhc", masked.softmax(-1).nan_to_num(0.0), values).flatten(1)
    pooled = attention.out_proj(mixed)
    return pooled + head.mlp(head.layernorm(pooled))


def pooling_head(model: nn.Module) -> Any:
    """The attention-pooling head of a SigLIP vision model of ``transformers``, or None for one without."""
    head = getattr(getattr(model, "vision_model", model), "head", None)
    return head if hasattr(head, "probe") else None


class TransferModel(nn.Module):
    """Regions from one model, tokens from another backbone.

    >>> model = opsin.load("xren-siglip2-g16")
    >>> tokens = model.encode("street.jpg").tokens      # comparable with SigLIP 2's text embeddings
    """

    def __init__(self, regions: RegionModel, target: Backbone, card: ModelCard) -> None:
        super().__init__()
        self.regions, self.target, self.card = regions, target, card

    @classmethod
    def from_pretrained(
        cls, name: str, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> TransferModel:
        """A catalogue entry that names ``regions`` and ``tokens``, or ``"REGIONS+BACKBONE"`` for any two references."""
        if "+" in name:
            regions, tokens = name.split("+", 1)
            card = None
        else:
            card = hub.card_of(name)
            if card is None or not (card.regions and card.tokens):
                raise InvalidConfig("A transfer model names its regions and its tokens", got=f'"{name}"')
            regions, tokens = card.regions, card.tokens
        model = RegionModel.from_pretrained(regions, device=device, dtype=dtype)
        target = backbones.load(tokens, device=device, dtype=dtype)
        return cls(model, target, card or replace(model.card, name=name, regions=regions, tokens=tokens))

    @property
    def name(self) -> str:
        """Name that tokens of this model carry."""
        return self.card.name

    @property
    def dim(self) -> int:
        """Width ``D`` of a token."""
        return int(self.target.dim)

    @torch.inference_mode()
    def encode(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        compat: str | None = None,
        with_masks: bool = False,
        batch_size: int = 8,
        **options: Any,
    ) -> RegionTokens:
        """As ``RegionModel.encode``, with the target's tokens; ``compat="published"`` for REN's own rules."""
        pictures = read_images(images)
        options = {"grid_size": self.card.grid_size, "threshold": self.card.threshold, "compat": compat} | options
        found = self.regions.encode(pictures, with_masks=True, batch_size=batch_size, **options)
        features = self.target.encode(pictures, batch_size=batch_size)
        tables = []
        for table, feature in zip(found.images(), features, strict=True):
            tokens = self.pool(feature, table.dense_masks(), compat=compat)
            tables.append(replace(table, tokens=tokens, model=self.name, masks=table.masks if with_masks else None))
        return stack(tables, self.name, self.dim)

    def pool(self, features: FeatureMap, masks: Tensor, *, compat: str | None = None) -> Tensor:
        """Tokens ``(R, D)`` of regions ``masks (R, H, W)``: by the target's pooling head, or the mean without one."""
        if check_compat(compat):  # its masks live on the square canvas
            scaled = F.interpolate(masks[:, None].float(), size=features.transform.canvas, mode="nearest")[:, 0]
            weights = mask_weights(scaled, features.transform, features.grid, compat=compat)
        else:
            weights = mask_weights(masks, features.transform, features.grid)
        patches = features.features.flatten(1).T
        weights = weights.to(patches.device)
        head = pooling_head(self.target.model)
        return mean_pool(patches, weights) if head is None else attention_pool(head, patches, weights)
