"""Tiny random SAM 2 checkpoints, as they lie on the hub: one file for pictures and video."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers

SIDE = 64


def build(kind: Literal["Sam2", "Sam2Video"] = "Sam2Video", *, seed: int = 0) -> Any:
    """A seeded model that takes every object for visible, and whose LayerNorms are no identities."""
    hiera = transformers.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 24, 32], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 2], global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[32, 24, 16, 8], fpn_hidden_size=128,
        backbone_feature_sizes=[[SIDE // 4] * 2, [SIDE // 8] * 2, [SIDE // 16] * 2],
    )  # fmt: skip
    parts: dict[str, Any] = {
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": 128, "image_size": SIDE, "mask_input_channels": 8},
        "mask_decoder_config": {
            "hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    }  # fmt: skip
    if kind == "Sam2Video":
        parts |= {
            "image_size": SIDE, "memory_attention_hidden_size": 128, "memory_attention_num_layers": 1,
            "memory_attention_feed_forward_hidden_size": 32, "memory_attention_rope_feat_sizes": [SIDE // 16] * 2,
            "memory_encoder_hidden_size": 128, "mask_downsampler_embed_dim": 128, "memory_fuser_embed_dim": 128,
            "memory_fuser_intermediate_dim": 32, "memory_fuser_num_layers": 1,
        }  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**parts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.add_(8)
    return model


def save(folder: Path, kind: Literal["Sam2", "Sam2Video"] = "Sam2Video") -> Path:
    """Write such a model; its folder."""
    build(kind).save_pretrained(folder)
    return folder
