"""Vision transformers of ``transformers``: which hidden state, which tokens come first, how positions are resized."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.backbones.base import Backbone, BackboneOutput
from opsin.cards import ModelCard


@dataclass(frozen=True)
class Family:
    """How one family is run: its class in ``transformers``, tokens before the patches, and options of load and call."""

    model: str
    class_token: bool = True
    load: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


_INTERPOLATE = {"interpolate_pos_encoding": True}
_NO_POOLER = {"add_pooling_layer": False}

# The last hidden state is after the final LayerNorm, but for CLIP, whose own applies to the pooled class token alone:
# exactly the choice that REN's published features make for DINO, DINOv2 and OpenCLIP.
FAMILIES = {
    "vit": Family("ViTModel", load=_NO_POOLER, call=_INTERPOLATE),
    "deit": Family("DeiTModel", load=_NO_POOLER, call=_INTERPOLATE),
    "vit_msn": Family("ViTMSNModel", call=_INTERPOLATE),
    "ijepa": Family("IJepaModel", class_token=False, load=_NO_POOLER, call=_INTERPOLATE),
    "dinov2": Family("Dinov2Model"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel"),
    "dinov3_vit": Family("DINOv3ViTModel"),
    "clip": Family("CLIPVisionModel", call=_INTERPOLATE),
    "siglip": Family("SiglipVisionModel", class_token=False, call=_INTERPOLATE),
    "tipsv2": Family("Tipsv2VisionModel"),  # its one register is a second class token, trained on other captions
}
MODEL_TYPES = {name: name for name in FAMILIES} | {
    f"{name}_vision_model": name for name in ("clip", "siglip", "tipsv2")
}


def pair(value: int | Iterable[int]) -> tuple[int, int]:
    """``(height, width)`` of a size that configs give as a number or as a pair."""
    if isinstance(value, Iterable):
        height, width = value
        return int(height), int(width)
    return int(value), int(value)


def interpolate_positions(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A learned position table ``(1, h·w, D)`` of ``native (h, w)`` cells, resampled to ``grid``, as DINO does.

    Bicubic, with a tenth of a cell added to the target size when the scale is computed (DINO's published code adds it
    against rounding, and so shifts every sample a little). Computed in at least float32.
    """
    if native == grid:
        return table
    dtype = table.dtype if table.dtype == torch.float64 else torch.float32
    cells = table.to(dtype).reshape(1, *native, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
    cells = F.interpolate(cells, scale_factor=scale, mode="bicubic", align_corners=False)
    return cells.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(table.dtype)


def _vit_positions(self: nn.Module, embeddings: Tensor, height: int, width: int) -> Tensor:
    """Takes the place of ``ViTEmbeddings.interpolate_pos_encoding``, which leaves DINO's tenth of a cell out."""
    (patch_h, patch_w), (full_h, full_w) = pair(self.patch_size), pair(self.image_size)  # type: ignore[arg-type]
    positions: Tensor = self.position_embeddings  # type: ignore[assignment]
    native, grid = (full_h // patch_h, full_w // patch_w), (height // patch_h, width // patch_w)
    return torch.cat([positions[:, :1], interpolate_positions(positions[:, 1:], native, grid)], 1)


class VitBackbone(Backbone):
    """A transformer over patches. Class and register (or distillation) tokens are split off the patch grid."""

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        super().__init__(model, card)
        self._family = FAMILIES[card.family]
        if card.family == "vit":
            embeddings: Any = model.embeddings
            embeddings.interpolate_pos_encoding = types.MethodType(_vit_positions, embeddings)

    def _features(self, pixels: Tensor) -> BackboneOutput:
        h, w = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        tokens = self.model(pixels, **self._family.call).last_hidden_state
        prefix, patches = tokens.split([tokens.shape[1] - h * w, h * w], 1)
        features = patches.transpose(1, 2).reshape(len(tokens), -1, h, w)
        first = int(self._family.class_token)
        return BackboneOutput(
            features,
            prefix[:, 0] if first else None,
            prefix[:, first:] if prefix.shape[1] > first else None,
        )


def facts(config: Any) -> dict[str, int]:
    """``dim``, ``patch_size`` and ``image_size`` (whole patches) that a vision config states."""
    patch = pair(config.patch_size)[0]
    return {
        "dim": int(config.hidden_size),
        "patch_size": patch,
        "image_size": max(1, min(pair(config.image_size)) // patch) * patch,
    }
