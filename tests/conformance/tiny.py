"""Tiny random configurations, one per family of backbone."""

from __future__ import annotations

from typing import Any

import torch

from opsin import backbones
from opsin.backbones import Backbone

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage4"]}
_SWIN = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4, "image_size": 64}
_HIERA = {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1], "num_heads": [1, 2, 4], "query_stride": [2, 2]}
_MASK_UNITS = {"masked_unit_size": [4, 4], "masked_unit_attention": [True, False, False], "num_query_pool": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {**_VIT, "image_size": 32, "patch_size": 8},
    "deit": {**_VIT, "image_size": 32, "patch_size": 8},
    "vit_msn": {**_VIT, "image_size": 32, "patch_size": 8},
    "ijepa": {**_VIT, "image_size": 32, "patch_size": 8},
    "dinov2": {**_DINOV2, "image_size": 42, "patch_size": 14},
    "dinov2_with_registers": {**_DINOV2, "image_size": 42, "patch_size": 14, "num_register_tokens": 4},
    "dinov3_vit": {**_VIT, "image_size": 32, "patch_size": 8, "num_register_tokens": 3},
    "tipsv2_vision_model": {**_DINOV2, "image_size": 42, "patch_size": 14},
    "radio": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0, "patch_size": 8,
        "max_img_size": 64, "num_cls_tokens": 2, "num_registers": 3,
    },
    "clip_vision_model": {**_VIT, "image_size": 42, "patch_size": 14},
    "siglip_vision_model": {**_VIT, "image_size": 32, "patch_size": 8},
    "resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "dinov3_convnext": _STAGES,
    "swin": {**_SWIN, "out_features": ["stage1", "stage3"]},
    "swinv2": {**_SWIN, "out_features": ["stage1", "stage3"]},
    "hiera": {**_HIERA, **_MASK_UNITS, "out_features": ["stage1", "stage3"]},
    "pvt_v2": {**_STAGES, "num_attention_heads": [1, 1, 2, 2]},
    "focalnet": {
        "embed_dim": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "image_size": 64,
        "focal_levels": [1, 1, 1], "focal_windows": [3, 3, 3], "out_features": ["stage1", "stage3"],
    },
    "bit": {**_STAGES, "embedding_size": 8, "hidden_sizes": [32, 64, 96, 128], "num_groups": 8},
}  # fmt: skip

CLASS_TOKEN = {
    "vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model",
    "tipsv2_vision_model", "radio",
}  # fmt: skip
# DeiT: its distillation token
REGISTERS = {"deit": 1, "dinov2_with_registers": 4, "dinov3_vit": 3, "tipsv2_vision_model": 1, "radio": 4}
FIXED_SIZE = {"hiera"}


def make(kind: str, **options: Any) -> Backbone:
    """A seeded tiny backbone whose weights differ enough for features to differ."""
    torch.manual_seed(0)
    size = {} if kind in FIXED_SIZE else {"image_size": 56}
    backbone = backbones.from_config({"model_type": kind, **CONFIGS[kind]}, **{"device": "cpu", **size, **options})
    if backbone.model.device.type != "meta":
        with torch.no_grad():
            for parameter in backbone.model.parameters():
                parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype) * 0.05)
    return backbone
