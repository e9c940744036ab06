"""Pictures → dense tokens: what the region encoder answers on a regular grid of prompts, one map per picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin import runtime
from opsin.geometry import ImageTransform
from opsin.regions.encoder import grid_centres

if TYPE_CHECKING:
    from opsin.regions import RegionModel

Kind = Literal["pred", "proj", "features", "both"]
PROMPT_STEP = 2  # cells from one prompt to the next: a token speaks for a region, and every second costs a quarter


@dataclass(frozen=True, eq=False)
class DenseTokens:
    """Unit tokens ``(D, h, w)`` float32 of one picture, one per cell. ``transform``: pixels → canvas."""

    tokens: Tensor
    transform: ImageTransform

    def to_cells(self, boxes: Tensor) -> Tensor:
        """Boxes ``(..., 4)`` in original pixels → grid cells."""
        return self.transform.normalise(boxes.unflatten(-1, (2, 2))).flatten(-2) * self._extent(boxes)

    def to_pixels(self, boxes: Tensor) -> Tensor:
        """Boxes ``(..., 4)`` in grid cells → original pixels, cut to the picture."""
        pixels = self.transform.denormalise((boxes / self._extent(boxes)).unflatten(-1, (2, 2))).flatten(-2)
        limit = pixels.new_tensor((self.transform.size[1], self.transform.size[0])).repeat(2)
        return torch.minimum(pixels.clamp(min=0), limit)

    def _extent(self, like: Tensor) -> Tensor:
        return like.new_tensor((self.tokens.shape[2], self.tokens.shape[1])).repeat(2)


@torch.inference_mode()
def dense_tokens(
    model: RegionModel, pictures: Sequence[Tensor], *, size: int | None = None, kind: Kind = "features"
) -> list[DenseTokens]:
    """One token per cell of the backbone's grid for each of ``pictures (3, H, W)`` uint8 or float in [0, 1].

    Region tokens are asked at every second cell and interpolated between.

    ``kind``: ``"pred"`` or ``"proj"`` region tokens, the backbone's ``"features"``, or ``"both"``: features and pred.
    """
    maps = model.features([p.float() / 255 if p.dtype == torch.uint8 else p for p in pictures], size=size)
    results = []
    for feature_map in maps:
        features = runtime.to_model(feature_map.features, model.encoder)[None]
        parts = [] if kind in ("pred", "proj") else [features]
        if kind != "features":
            h, w = feature_map.grid
            asked = max(1, h // PROMPT_STEP), max(1, w // PROMPT_STEP)
            output = model.encoder(features, grid_centres(asked, features.device)[None])
            chosen = output.proj_tokens if kind == "proj" else output.pred_tokens
            tokens = chosen.transpose(1, 2).unflatten(-1, asked)
            parts.append(F.interpolate(tokens, feature_map.grid, mode="bilinear"))
        unit = torch.cat([F.normalize(p.float(), dim=1) for p in parts], 1)[0].cpu()
        results.append(DenseTokens(unit / len(parts) ** 0.5, feature_map.transform))
    return results
