"""Dense hierarchical networks behind ``AutoBackbone``: several stages on the grid of the first one asked for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.backbones.base import Backbone, BackboneOutput
from opsin.backbones.vit import pair
from opsin.cards import ModelCard
from opsin.errors import UnsupportedSize
from opsin.geometry import Size

MODEL_TYPES = (
    "resnet", "convnext", "convnextv2", "dinov3_convnext", "swin", "swinv2", "hiera", "pvt_v2", "focalnet", "bit",
)  # fmt: skip
FIXED_SIZE = ("hiera",)  # its windows and positions are laid out for one canvas


class ConvBackbone(Backbone):
    """The ``out_features`` of the config, resized bilinearly to the first one's grid and concatenated.

    Any canvas of whole first-stage cells will do: deeper stages see it extended to their own stride by repeating the
    edge, and their maps are cut back, so that every cell stays where its pixels are.
    """

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        super().__init__(model.to(memory_format=torch.channels_last), card)  # type: ignore[call-overload]
        self._strides, self._deepest = strides(model.config)

    def _check_size(self, size: Size) -> None:
        super()._check_size(size)
        if self.model.config.model_type in FIXED_SIZE and size != (self.image_size, self.image_size):
            raise UnsupportedSize(
                f"{self.name} takes {self.image_size}×{self.image_size} only", got=f"{size[0]}×{size[1]}",
                remedy='encode(fit="stretch") or fit="pad" brings any image to that size.',
            )

    def _features(self, pixels: Tensor) -> BackboneOutput:
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % self._deepest, 0, -height % self._deepest), mode="replicate")
        maps = feature_maps(self.model, pixels)
        grid = maps[0].shape[-2:]
        maps[1:] = [F.interpolate(m, size=grid, mode="bilinear", align_corners=False) for m in maps[1:]]
        features = torch.cat(maps, 1)[..., : height // self.patch_size, : width // self.patch_size]
        return BackboneOutput(features)


def model_class(config: Any) -> Any:
    """The class of ``transformers`` that gives the stages of a config."""
    from transformers import DINOv3ConvNextModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    return DINOv3ConvNextModel if config.model_type == "dinov3_convnext" else MODEL_FOR_BACKBONE_MAPPING[type(config)]


def feature_maps(model: Any, pixels: Tensor) -> list[Tensor]:
    """The stages that ``out_features`` names."""
    config = model.config
    if config.model_type != "dinov3_convnext":
        return list(model(pixels).feature_maps)
    # its AutoBackbone class leaves out the final LayerNorm, which the published features of the last stage have
    states = model.model(pixels, output_hidden_states=True).hidden_states
    stages = dict(zip(config.stage_names, states, strict=True))
    last = config.stage_names[-1]
    stages[last] = model.layer_norm(stages[last].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return [stages[name] for name in config.out_features]


def _probe(config: Any) -> tuple[int, list[torch.Size]]:
    """Side of a test canvas and the shapes of the feature maps on it, found on the meta device."""
    side = native_size(config) or 256
    with torch.device("meta"):
        model = model_class(config)(config).eval()
        with torch.no_grad():
            return side, [m.shape for m in feature_maps(model, torch.zeros(1, 3, side, side))]


def native_size(config: Any) -> int:
    """The square side that a config names, 0 when it names none."""
    value = getattr(config, "image_size", None)
    return min(pair(value)) if value else 0


def strides(config: Any) -> tuple[list[int], int]:
    """Pixels per cell of every feature map, and of the last stage of the network, asked for or not."""
    last = copy.deepcopy(config)
    last.out_features = last.stage_names[-1:]
    (side, shapes), (_, (deepest,)) = _probe(config), _probe(last)
    return [round(side / shape[-1]) for shape in shapes], round(side / deepest[-1])


def facts(config: Any) -> dict[str, int]:
    """``dim``, ``patch_size`` (stride of the first feature map) and ``image_size`` (0: not stated) of a config."""
    side, shapes = _probe(config)
    stride = round(side / shapes[0][-1])
    return {
        "dim": sum(shape[1] for shape in shapes),
        "patch_size": stride,
        "image_size": native_size(config) // stride * stride,
    }
