"""How CLIP, SigLIP 2 and TIPSv2 lead from an image to words, applied to one patch at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opsin import hub
from opsin.backbones import Backbone
from opsin.backbones.base import read_json
from opsin.errors import IncompatibleModel
from opsin.remote_tensors import read_tensors

# the blocks of each family's encoder, and the self-attention inside a block
_ATTENTION = {
    "clip": ("layers", "self_attn"),
    "siglip": ("layers", "self_attn"),
    "tipsv2": ("layer", "attention"),
    "radio": ("layer", "attention"),
}
OWN_SPACE = ("clip", "siglip", "tipsv2")  # families that were trained with words themselves


class ClipHead(nn.Module):
    """What CLIP does to its class token, done to any token: LayerNorm, linear projection."""

    def __init__(self, norm: nn.Module, projection: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.projection = nn.Parameter(projection, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(tokens), self.projection)


class SiglipHead(nn.Module):
    """SigLIP's attention pooling with each token as its only key.

    The softmax of one key is 1, so that the probe plays no part: value and output projection, then the residual MLP.
    """

    def __init__(self, norm: nn.Module, pool: Any) -> None:
        super().__init__()
        self.norm = norm
        self.pool = pool

    def forward(self, tokens: Tensor) -> Tensor:
        attention, dim = self.pool.attention, tokens.shape[-1]
        values = F.linear(self.norm(tokens), attention.in_proj_weight[-dim:], attention.in_proj_bias[-dim:])
        pooled = F.linear(values, attention.out_proj.weight, attention.out_proj.bias)
        return pooled + self.pool.mlp(self.pool.layernorm(pooled))


class OwnValues(nn.Module):
    """A self-attention in which every token keeps its own value (MaskCLIP, arXiv:2112.01071, section 3.2)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> tuple[Tensor, None]:
        output = self.attention.o_proj if hasattr(self.attention, "o_proj") else self.attention.out_proj
        return output(self.attention.v_proj(hidden_states)), None


def take_head(backbone: Backbone, projection: Tensor | None = None) -> nn.Module:
    """The last step to words, moved out of a backbone of :data:`OWN_SPACE`, whose features are then raw tokens.

    Raises:
        IncompatibleModel: CLIP without its ``projection (E, D)``, SigLIP without its pooling head.
    """
    model: Any = backbone.model
    family = backbone.card.family
    if family == "tipsv2":
        return _take(model, "layernorm")  # trained so that its patches are in the space of words
    if family == "clip" and projection is not None:
        return ClipHead(_take(model, "post_layernorm"), projection.to(next(model.parameters())))
    if family == "siglip" and getattr(model, "use_head", False):
        model.use_head = False
        return SiglipHead(_take(model, "post_layernorm"), _take(model, "head"))
    missing = {"clip": "visual_projection.weight", "siglip": "a pooling head"}[family]
    raise IncompatibleModel(
        f"The image half of {family.upper()} leads to words through {missing}", got=f"{backbone.name} without it",
        remedy="Load the published repository, which has both halves.",
    )


def last_attention(backbone: Backbone) -> tuple[nn.Module, str]:
    """The last block of the encoder, and the name of its self-attention."""
    blocks, attention = _ATTENTION[backbone.card.family]
    model: Any = backbone.model
    return getattr(model.encoder, blocks)[-1], attention


def projection_and_scale(folder: Path) -> tuple[Tensor | None, float | None]:
    """What lies beside the two halves of an image-text checkpoint: CLIP's image projection, the scale of its logits.

    Reads these small tensors alone; None for what the checkpoint does not have.
    """
    tensors = _read(folder, ("visual_projection.weight", "logit_scale", "temperature"))
    scale = float(tensors["logit_scale"].double().exp()) if "logit_scale" in tensors else None
    temperature = tensors.get("temperature")
    if temperature is None and (folder / "config.json").is_file():
        temperature = read_json(folder / "config.json").get("temperature_init_value")
    if scale is None and temperature is not None:
        scale = 1 / float(temperature)
    return tensors.get("visual_projection.weight"), scale


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    for pattern in (*hub.SAFETENSORS[:2], *hub.PICKLES[:2]):
        found: dict[str, Tensor] = {}
        for path in (paths := sorted(folder.glob(pattern))):
            found |= read_tensors(path, names.__contains__)
        if paths:
            return found
    return {}


def _take(module: Any, name: str) -> nn.Module:
    """A part of a module, which is left with an identity in its place."""
    part = getattr(module, name)
    setattr(module, name, nn.Identity())
    return part
