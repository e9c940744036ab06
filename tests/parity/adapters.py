"""From plain numpy to calls of the product and back: no mathematics, nothing that a user could not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.geometry import ImageTransform
from opsin.regions import RegionEncoder, aggregate
from opsin.regions.encoder import fourier_positions, grid_centres, pixel_prompts
from opsin.regions.extent import mask_weights
from opsin.regions.transfer import attention_pool
from opsin.training.losses import contrastive_loss, feature_loss, region_targets
from tests.parity.adapters_codec import codec_decode, codec_encode, codec_full, codec_losses
from tests.parity.adapters_radio import radseg_align
from tests.parity.adapters_radseg import (
    radseg_features,
    radseg_predict,
    radseg_refine,
    radseg_scga,
    radseg_scra,
)
from tests.parity.adapters_vq2d import vq2d_metrics, vq2d_validate

__all__ = [
    "codec_decode",
    "codec_encode",
    "codec_full",
    "codec_losses",
    "radseg_align",
    "radseg_features",
    "radseg_predict",
    "radseg_refine",
    "radseg_scga",
    "radseg_scra",
    "vq2d_metrics",
    "vq2d_validate",
]

Array = np.ndarray


def _tensors(weights: dict[str, Array]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}


def _leaf(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array)).requires_grad_()


def ren_encoder(
    weights: dict[str, Array], *, heads: int, resolution: int, patch: int, features: Array, prompts: Array
) -> dict[str, Array]:
    encoder = RegionEncoder.from_state_dict(_tensors(weights), heads=heads)
    with torch.no_grad():
        output = encoder(torch.from_numpy(features), pixel_prompts(torch.from_numpy(prompts), resolution))
    return {"pred_tokens": output.pred_tokens.numpy(), "proj_tokens": output.proj_tokens.numpy()}


def ren_attention(
    weights: dict[str, Array],
    *,
    heads: int,
    resolution: int,
    patch: int,
    features: Array,
    prompts: Array,
    layer: int = -1,
) -> Array:
    encoder = RegionEncoder.from_state_dict(_tensors(weights), heads=heads)
    with torch.no_grad():
        memory = encoder.memory(torch.from_numpy(features))
        return encoder.attention(memory, pixel_prompts(torch.from_numpy(prompts), resolution), layer).numpy()


def ren_positions(dim: int, size: tuple[int, int]) -> Array:
    return fourier_positions(grid_centres(tuple(size)), dim).T.reshape(dim, *size).numpy()


def ren_aggregate(pred: Array, proj: Array, prompts: Array, *, threshold: float, min_size: int) -> dict[str, Any]:
    tokens = torch.from_numpy(pred)
    # The published rule for the default size; other sizes are the product's own min_size.
    compat = "published" if min_size == aggregate.PUBLISHED_MIN_SIZE else None
    groups = aggregate.group(tokens, threshold=threshold, min_size=min_size, compat=compat)
    points = torch.from_numpy(prompts)
    labels = groups.labels.numpy()
    return {
        "groups": [np.flatnonzero(labels == region).tolist() for region in range(len(groups))],
        "pred": groups.mean(tokens).numpy(),
        "proj": groups.mean(torch.from_numpy(proj)).numpy(),
        "points": points[groups.representatives(points)].numpy(),
    }


def ren_contrastive_loss(
    tokens_1: Array,
    tokens_2: Array,
    ids_1: Array,
    ids_2: Array,
    *,
    temperature: float = 0.1,
    compat: str | None = "published",
) -> dict[str, Any]:
    first, second = _leaf(tokens_1), _leaf(tokens_2)
    ids = torch.from_numpy(ids_1), torch.from_numpy(ids_2)
    loss = contrastive_loss(first, second, *ids, temperature=temperature, compat=compat)
    grad_1, grad_2 = torch.autograd.grad(loss, (first, second))
    return {"loss": loss.item(), "grad_1": grad_1.numpy(), "grad_2": grad_2.numpy()}


def ren_feature_loss(
    tokens_1: Array, tokens_2: Array, targets_1: Array, targets_2: Array, mask_1: Array, mask_2: Array
) -> dict[str, Any]:
    first, second = _leaf(tokens_1), _leaf(tokens_2)
    loss = feature_loss(first, second, *(torch.from_numpy(a) for a in (targets_1, targets_2, mask_1, mask_2)))
    grad_1, grad_2 = torch.autograd.grad(loss, (first, second))
    return {"loss": loss.item(), "grad_1": grad_1.numpy(), "grad_2": grad_2.numpy()}


def ren_region_targets(features: Array, masks: Array) -> Array:
    return region_targets(torch.from_numpy(features), torch.from_numpy(masks)).numpy()


def xren_pool(
    siglip_weights: dict[str, Array], siglip_config: dict[str, Any], image_features: Array, masks: Array
) -> Array:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = SiglipVisionConfig(**siglip_config)
    features = torch.from_numpy(image_features)
    head = SiglipMultiheadAttentionPoolingHead(config).to(features.dtype).eval()
    state = {key.split("head.", 1)[1]: value for key, value in _tensors(siglip_weights).items() if "head." in key}
    head.load_state_dict(state)
    size, side = tuple(masks.shape[1:]), config.image_size // config.patch_size
    weights = mask_weights(torch.from_numpy(masks), ImageTransform(size, size), (side, side), compat="published")
    with torch.no_grad():
        return attention_pool(head, features, weights.to(features.dtype)).numpy()


def probe_decode(weights: dict[str, Array], feature_map: Array) -> Array:
    from opsin.evaluation.linear_probe import LinearProbe

    with torch.no_grad():
        return LinearProbe.from_state(_tensors(weights))(torch.from_numpy(feature_map)).numpy()
