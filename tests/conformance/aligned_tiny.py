"""Tiny random image-text checkpoints, as they lie on the hub, and a RADIO with adaptors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from opsin.backbones.adaptors import Adaptor
from opsin.backbones.radio import RadioBackbone
from opsin.cards import ModelCard

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
SIZES = {"clip": {"intermediate_size": 64, "projection_dim": 20}, "siglip": {"intermediate_size": 64}}
KINDS = ("clip", "siglip", "tipsv2")
PREFIX = {"clip": 1, "siglip": 0, "tipsv2": 2}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def joint(kind: str) -> Any:
    """A seeded image-text model whose LayerNorms are no identities."""
    torch.manual_seed(3)
    vision = {**VISION, **SIZES.get(kind, {"mlp_ratio": 2})}
    name = {"clip": "CLIP", "siglip": "Siglip", "tipsv2": "Tipsv2"}[kind]
    extra = {"projection_dim": 20} if kind == "clip" else {}
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=vision, **extra)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key not in ("logit_scale", "logit_bias", "temperature"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(kind: str, folder: Path) -> Any:
    """Write such a model with its preprocessing; the model."""
    model = joint(kind)
    model.save_pretrained(folder)
    values = {"do_normalize": False} if kind == "tipsv2" else {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


def normalised(kind: str, pixels: Tensor) -> Tensor:
    return pixels if kind == "tipsv2" else (pixels - 0.5) / 0.25


def raw_tokens(kind: str, model: Any, pixels: Tensor) -> Tensor:
    """All tokens as the last block of the original model leaves them."""
    seen = []
    handle = model.vision_model.encoder.register_forward_hook(lambda _, inputs, output: seen.append(output))
    options = {} if kind == "tipsv2" else {"interpolate_pos_encoding": True}
    model.vision_model(normalised(kind, pixels), **options)
    handle.remove()
    return seen[0].last_hidden_state


def mlp(inputs: int, outputs: int, seed: int) -> dict[str, Tensor]:
    """Weights of an adaptor of kind v2."""
    shapes = {
        "fc1.weight": (16, inputs), "fc1.bias": (16,),
        "blocks.0.0.weight": (16,), "blocks.0.0.bias": (16,), "blocks.0.2.weight": (16, 16), "blocks.0.2.bias": (16,),
        "final.0.weight": (16,), "final.0.bias": (16,), "final.2.weight": (outputs, 16), "final.2.bias": (outputs,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.5 for key, shape in shapes.items()}


def save_radio(path: Path) -> None:
    """A RADIO training checkpoint under its published key names, with adaptors siglip2 and sam."""
    shapes = {
        "patch_generator.embedder.weight": (32, 768), "patch_generator.pos_embed": (1, 16, 32),
        "patch_generator.cls_token.token": (4, 32),
    }  # fmt: skip
    for i in range(2):
        shapes |= {f"blocks.{i}.{name}.{end}": (32,) for name in ("norm1", "norm2") for end in ("weight", "bias")}
        for name, (rows, columns) in {
            "attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(6)
    state = {f"base_model.{key}": torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
    state |= {"input_conditioner.norm_mean": torch.full((3, 1, 1), 0.5)}
    state |= {"input_conditioner.norm_std": torch.full((3, 1, 1), 0.25)}
    for name, width in (("siglip2", 24), ("sam", 40)):
        state |= {f"_heads.{name}.{key}": value for key, value in mlp(32, width, 1).items()}
        state |= {f"_feature_projections.{name}.{key}": value for key, value in mlp(32, width, 2).items()}
    teachers = [
        {"name": "siglip2", "type": "siglip2", "model": "siglip2-so400m"},
        {"name": "sam", "type": "sam", "model": "vit-h", "use_summary": False},
    ]
    args = argparse.Namespace(
        model="vit_tiny_patch16_224", model_kwargs={"num_heads": 4}, cpe_max_size=64, cls_token_per_teacher=True,
        register_multiple=4, mlp_version="v2", teachers=teachers,
    )  # fmt: skip
    torch.save({"arch": "vit_tiny_patch16_224", "epoch": 1, "args": args, "state_dict": state}, path)


def radio(*names: str, text: str = "hf:org/words", upsample: int = 1) -> RadioBackbone:
    """A seeded tiny RADIO with these adaptors; those that are called siglip… know words."""
    torch.manual_seed(4)
    config = transformers.RadioConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, patch_size=16,
        max_img_size=64, num_cls_tokens=2, num_registers=2, summary_idxs=[0],
    )  # fmt: skip
    model = transformers.RadioModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    adaptors: dict[str, nn.Module] = {}
    for index, name in enumerate(names):
        u = upsample if name == "sam" else 1
        adaptors[name] = Adaptor.from_state_dict(
            mlp(32, 24, index), mlp(32, 40 * u * u, 9), text=text if name.startswith("siglip") else "", upsample=u
        )
    card = ModelCard(
        "tiny-radio", "backbone", "radio", dim=32, patch_size=16, image_size=64, adaptors=tuple(adaptors),
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip
    return RadioBackbone(model, card, adaptors=adaptors)  # type: ignore[arg-type]
