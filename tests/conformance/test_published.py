"""The features are those that the published code takes, from checkpoints as they lie on the hub."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from opsin import backbones, runtime
from opsin.backbones import loading
from opsin.backbones.vit import interpolate_positions
from opsin.cards import ModelCard, catalogue
from opsin.errors import InvalidCheckpoint, InvalidConfig, MissingFile, ModelUnavailable, ResourceError
from tests.conformance.tiny import CONFIGS, make

PLAIN = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def grid(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)


def scatter(model: nn.Module) -> None:
    """Let no LayerNorm be the identity, and no position table small."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def save(model: Any, folder: Path, processing: dict[str, Any] = PLAIN, name: str = "preprocessor_config.json") -> Path:
    scatter(model)
    model.eval().save_pretrained(folder)
    (folder / name).write_text(json.dumps(processing))
    return folder


def test_dino_positions_carry_the_tenth_of_a_cell() -> None:
    """Against the formula of DINO's published code, computed point by point with the cubic kernel (a = -0.75)."""
    native, target = (4, 4), (6, 7)
    table = noise(1, 16, 3).double()
    cells = table.reshape(4, 4, 3)

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    expected = torch.zeros(*target, 3, dtype=torch.float64)
    for i in range(target[0]):
        for j in range(target[1]):
            y = (i + 0.5) * native[0] / (target[0] + 0.1) - 0.5
            x = (j + 0.5) * native[1] / (target[1] + 0.1) - 0.5
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    row, column = math.floor(y) + dy, math.floor(x) + dx
                    weight = kernel(y - row) * kernel(x - column)
                    expected[i, j] += weight * cells[min(max(row, 0), 3), min(max(column, 0), 3)]
    got = interpolate_positions(table, native, target).reshape(*target, 3)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    plain = F.interpolate(cells.permute(2, 0, 1)[None], size=target, mode="bicubic")[0].permute(1, 2, 0)
    assert (got - plain).abs().max() > 1e-3  # what transformers does is something else
    assert torch.equal(interpolate_positions(table, native, native), table)


def test_dino_is_after_its_final_norm_and_uses_its_positions(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**CONFIGS["vit"])
    model = transformers.ViTModel(config)  # with a pooler, as the files on the hub have
    backbone = backbones.load(save(model, tmp_path), device="cpu")
    pixels = noise(2, 3, 32, 32)
    hidden = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(backbone(pixels).features, grid(hidden.last_hidden_state[:, 1:], 4, 4))
    torch.testing.assert_close(backbone(pixels).class_token, hidden.last_hidden_state[:, 0])
    raw = grid(hidden.hidden_states[-1][:, 1:], 4, 4)
    assert (model.layernorm(hidden.hidden_states[-1]) - hidden.last_hidden_state).abs().max() < 1e-5
    assert (backbone(pixels).features - raw).abs().max() > 0.1

    wide = noise(1, 3, 48, 40)  # the published order of work, by hand
    table = model.embeddings.position_embeddings
    tokens = model.embeddings.patch_embeddings(wide)
    tokens = torch.cat([model.embeddings.cls_token + table[:, :1], tokens + _dino_table(table, 6, 5)], 1)
    for layer in model.layers:
        tokens = layer(tokens)
    expected = grid(model.layernorm(tokens)[:, 1:], 6, 5)
    torch.testing.assert_close(backbone(wide).features, expected, rtol=1e-4, atol=1e-5)


def _dino_table(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    cells = table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    factors = ((h + 0.1) / 4, (w + 0.1) / 4)
    return F.interpolate(cells, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1).reshape(1, h * w, -1)


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_is_after_its_final_norm_and_native_positions_are_untouched(registers: bool, tmp_path: Path) -> None:
    kind = "dinov2_with_registers" if registers else "dinov2"
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(**CONFIGS[kind])
    model = getattr(transformers, f"{name}Model")(config)
    backbone = backbones.load(save(model, tmp_path), device="cpu")
    prefix = 5 if registers else 1
    for h, w in ((3, 3), (4, 2)):
        pixels = noise(2, 3, 14 * h, 14 * w)
        last = model(pixels).last_hidden_state
        out = backbone(pixels)
        torch.testing.assert_close(out.features, grid(last[:, prefix:], h, w))
        torch.testing.assert_close(out.class_token, last[:, 0])
        if registers:
            torch.testing.assert_close(out.register_tokens, last[:, 1:5])
    cells = torch.rand(1, 10, 32)
    assert model.embeddings.interpolate_pos_encoding(cells, 42, 42) is model.embeddings.position_embeddings


@pytest.mark.parametrize("processor", ["preprocessor_config.json", "processor_config.json"])
def test_clip_is_before_its_final_norm_and_only_the_vision_half_is_taken(processor: str, tmp_path: Path) -> None:
    vision = CONFIGS["clip_vision_model"]
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))
    stated = {"image_processor": PLAIN} if processor == "processor_config.json" else PLAIN
    backbone = backbones.load(save(model, tmp_path, stated, processor), device="cpu")
    assert backbone.card.family == "clip"
    assert not any("text" in name or "projection" in name for name, _ in backbone.model.named_parameters())
    pixels = noise(2, 3, 42, 42)
    hidden = model.vision_model(pixels, output_hidden_states=True)
    out = backbone(pixels)
    torch.testing.assert_close(out.features, grid(hidden.hidden_states[-1][:, 1:], 3, 3))
    normed = grid(model.vision_model.post_layernorm(hidden.hidden_states[-1])[:, 1:], 3, 3)
    assert (out.features - normed).abs().max() > 0.1
    wide = noise(1, 3, 28, 70)
    expected = model.vision_model(wide, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    torch.testing.assert_close(backbone(wide).features, grid(expected, 2, 5))


def test_siglip_is_after_its_final_norm_and_keeps_its_pooling_head(tmp_path: Path) -> None:
    vision = CONFIGS["siglip_vision_model"]
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=vision))
    backbone = backbones.load(save(model, tmp_path), device="cpu")
    pixels = noise(2, 3, 32, 32)
    hidden = model.vision_model(pixels, output_hidden_states=True)
    out = backbone(pixels)
    torch.testing.assert_close(out.features, grid(hidden.last_hidden_state, 4, 4))
    torch.testing.assert_close(hidden.last_hidden_state, model.vision_model.post_layernorm(hidden.hidden_states[-1]))
    assert (out.features - grid(hidden.hidden_states[-1], 4, 4)).abs().max() > 0.1
    pooled = backbone.model.head(hidden.last_hidden_state)
    torch.testing.assert_close(pooled, model.vision_model.head(hidden.last_hidden_state))


def test_classifier_checkpoints_of_stages_load(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(**CONFIGS["resnet"])
    model = transformers.ResNetForImageClassification(config)
    backbone = backbones.load(save(model, tmp_path / "resnet", PLAIN | {"size": {"shortest_edge": 64}}), device="cpu")
    assert (backbone.dim, backbone.patch_size, backbone.image_size) == (72, 8, 64)
    pixels = noise(1, 3, 64, 64)
    stages = model.resnet(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([stages[2], *(F.interpolate(s, size=(8, 8), mode="bilinear") for s in stages[3:])], 1)
    # An untrained ResNet has large activations, and channels-last convolutions sum in another order.
    atol = 1e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(backbone(pixels).features, expected, atol=atol, rtol=1e-5)

    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONFIGS["convnext"]))
    backbone = backbones.load(save(model, tmp_path / "convnext"), device="cpu")
    stages = model.convnext(pixels, output_hidden_states=True).hidden_states
    first = F.layer_norm(stages[2].permute(0, 2, 3, 1), (16,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(pixels).features[:, :16], first, rtol=1e-4, atol=1e-5)


def test_dinov3_stages_end_with_the_final_norm(tmp_path: Path) -> None:
    config = transformers.DINOv3ConvNextConfig(**CONFIGS["dinov3_convnext"] | {"out_features": ["stage4"]})
    model = transformers.DINOv3ConvNextModel(config)
    backbone = backbones.load(save(model, tmp_path, PLAIN | {"size": 64}), device="cpu")
    pixels = noise(2, 3, 64, 96)
    expected = model(pixels).last_hidden_state[:, 1:]  # the pooled token comes first
    torch.testing.assert_close(backbone(pixels).features, grid(expected, 2, 3), rtol=1e-4, atol=1e-5)


def test_files_have_the_key_names_of_the_hub(tmp_path: Path) -> None:
    """What these tests load is named as in the published repositories, so the renaming on load is exercised."""
    save(transformers.ViTModel(transformers.ViTConfig(**CONFIGS["vit"])), tmp_path / "vit")
    assert "encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "vit/model.safetensors")
    save(transformers.Dinov2Model(transformers.Dinov2Config(**CONFIGS["dinov2"], use_swiglu_ffn=True)), tmp_path / "g")
    assert "encoder.layer.0.mlp.weights_in.weight" in load_file(tmp_path / "g/model.safetensors")
    assert backbones.load(tmp_path / "g", device="cpu")(noise(1, 3, 42, 42)).features.shape == (1, 32, 3, 3)
    joint = transformers.SiglipConfig(text_config=TEXT, vision_config=CONFIGS["siglip_vision_model"])
    save(transformers.SiglipModel(joint), tmp_path / "siglip")
    assert "vision_model.post_layernorm.weight" in load_file(tmp_path / "siglip/model.safetensors")


def test_older_repositories_without_safetensors_load(tmp_path: Path) -> None:
    backbone = make("vit", name="old")
    backbone.save_pretrained(tmp_path / "m")
    torch.save(load_file(tmp_path / "m/model.safetensors"), tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    pixels = noise(1, 3, 56, 56)
    torch.testing.assert_close(backbones.load(tmp_path / "m", device="cpu")(pixels).features, backbone(pixels).features)


def test_the_backbone_inside_a_region_model(tmp_path: Path) -> None:
    backbone = make("resnet")
    backbone.save_pretrained(tmp_path / "mine/backbone")
    (tmp_path / "mine/backbone/card.json").unlink()
    ModelCard("mine", "regions", "ren", backbone="backbone", dim=72).save(tmp_path / "mine/card.json")
    loaded = backbones.load(f"dir:{tmp_path / 'mine'}", device="cpu")
    assert loaded.name == "mine/backbone"
    assert loaded.dim == 72


def test_repositories_that_carry_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make("resnet", mean=(0.1, 0.2, 0.3))
    backbone.save_pretrained(tmp_path / "plain")
    backbone.save_pretrained(tmp_path / "regions/backbone")
    ModelCard("mine", "regions", "ren", backbone="backbone", dim=72).save(tmp_path / "regions/card.json")
    (tmp_path / "regions/regions.safetensors").write_bytes(b"not read here")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tmp_path / repo.split("/")[1]))
    pixels = noise(1, 3, 32, 32)
    plain = backbones.load("hf:me/plain@v1", device="cpu")
    assert (plain.name, plain.card.mean) == ("hf:me/plain@v1", (0.1, 0.2, 0.3))
    expected = backbone(pixels).features
    torch.testing.assert_close(plain(pixels).features, expected)
    torch.testing.assert_close(backbones.load("hf:me/regions", device="cpu")(pixels).features, expected)


def test_a_region_model_of_the_catalogue_asks_for_its_backbone_only() -> None:
    with pytest.raises(ModelUnavailable, match="facebook/dino-vitb8"):
        backbones.load("ren-dino-b8")


def test_device_and_dtype_on_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("clip_vision_model").save_pretrained(tmp_path / "m")
    pixels = noise(1, 3, 56, 56)
    assert backbones.load(tmp_path / "m", device="cpu", dtype="bf16")(pixels).features.dtype == torch.bfloat16
    assert backbones.load(tmp_path / "m", device="meta").encode(pixels)[0].features.device.type == "meta"
    monkeypatch.setattr(runtime, "has_fast_bfloat16", lambda device: True)
    assert backbones.load(tmp_path / "m", device="cpu", dtype="auto")(pixels).features.dtype == torch.bfloat16
    card = ModelCard.load(tmp_path / "m/card.json")
    dataclasses.replace(card, bfloat16=False).save(tmp_path / "m/card.json")
    assert backbones.load(tmp_path / "m", device="cpu", dtype="auto")(pixels).features.dtype == torch.float32
    with pytest.raises(ResourceError):
        backbones.load(tmp_path / "m", device="warp")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "empty"),
        (lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html><html>"), "web page"),
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "LFS"),
        (lambda folder: _cut(folder / "model.safetensors"), "whole"),
        (lambda folder: _edit(folder, drop="layernorm.weight"), "missing: layernorm.weight"),
        (lambda folder: _edit(folder, shrink="layernorm.weight"), "fit their config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "card.json").write_text('{"name": 1}'), "model card"),
    ],
    ids=["empty", "html", "lfs", "truncated", "missing key", "wrong shape", "config", "card"],
)
def test_damaged_models_are_typed_errors(damage: Any, message: str, tmp_path: Path) -> None:
    make("vit").save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(InvalidCheckpoint, match=message):
        backbones.load(tmp_path / "m", device="cpu")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _edit(folder: Path, drop: str = "", shrink: str = "") -> None:
    state = load_file(folder / "model.safetensors")
    state = {k: v[:-1].contiguous() if k == shrink else v for k, v in state.items() if k != drop}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_models_that_cannot_be_run_say_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(InvalidConfig, match=r"dinov2.*never run"):
        backbones.load(tmp_path)
    make("vit").save_pretrained(tmp_path / "m")
    (tmp_path / "m/card.json").unlink()
    (tmp_path / "m/preprocessor_config.json").unlink()
    with pytest.raises(InvalidConfig, match="image_mean"):
        backbones.load(tmp_path / "m")
    (tmp_path / "m/config.json").unlink()
    with pytest.raises(MissingFile, match=r"config\.json"):
        backbones.load(tmp_path / "m")
    make("vit").save_pretrained(tmp_path / "w")
    (tmp_path / "w/model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        backbones.load(tmp_path / "w")


def test_a_card_that_contradicts_its_weights_is_refused(tmp_path: Path) -> None:
    backbone = make("vit")
    backbone.save_pretrained(tmp_path / "m")
    values = backbone.card.to_dict() | {"dim": 64}
    ModelCard.from_dict(values).save(tmp_path / "m/card.json")
    with pytest.raises(InvalidCheckpoint, match="64"):
        backbones.load(tmp_path / "m")


# Sizes of the published networks: width, layers, heads, MLP width (from their config.json), and registers where used.
SIZES = {
    "dino-s": (384, 12, 6, 1536), "dino-b": (768, 12, 12, 3072),
    "dinov2-s": (384, 12, 6, 1536), "dinov2-b": (768, 12, 12, 3072), "dinov2-l": (1024, 24, 16, 4096),
    "dinov2-g": (1536, 40, 24, 6144),
    "dinov3-s": (384, 12, 6, 1536), "dinov3-b": (768, 12, 12, 3072), "dinov3-l": (1024, 24, 16, 4096),
    "openclip-g": (1408, 40, 16, 6144), "clip-b": (768, 12, 12, 3072), "clip-l": (1024, 24, 16, 4096),
    "siglip2-b": (768, 12, 12, 3072), "siglip2-l": (1024, 24, 16, 4096), "siglip2-so": (1152, 27, 16, 4304),
    "siglip2-g": (1536, 40, 16, 6144),
}  # fmt: skip
OWN_TESTS = ("radio", "tipsv2")
BACKBONES = [
    card for card in catalogue().values()
    if card.kind == "backbone" and not card.embedded and card.family not in OWN_TESTS
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("card", BACKBONES, ids=lambda card: card.name)
def test_catalogue_facts_fit_networks_of_the_published_size(card: ModelCard) -> None:
    """Width, patch, parameters and grid, on the meta device: nothing is downloaded and nothing allocated."""
    if card.family == "conv":
        config: dict[str, Any] = {"model_type": "dinov3_convnext"}
    else:
        prefix = next(key for key in SIZES if card.name.startswith(key))
        dim, layers, heads, mlp = SIZES[prefix]
        kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(card.family, card.family)
        config = {"model_type": kind, "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads}
        config |= {"patch_size": card.patch_size, "image_size": 384 if card.image_size == 378 else card.image_size}
        config |= {"mlp_ratio": 4, "use_swiglu_ffn": dim == 1536} if "dinov2" in kind else {"intermediate_size": mlp}
        config |= {"num_register_tokens": 4} if kind in ("dinov2_with_registers", "dinov3_vit") else {}
    backbone = backbones.from_config(config, device="meta")
    found = backbone.card
    facts = (card.family, card.dim, card.patch_size, card.image_size, card.parameters)
    assert facts == (found.family, found.dim, found.patch_size, found.image_size, found.parameters)
    loading._check_card(card, backbone.model.config)
    out = backbone(torch.empty(1, 3, card.image_size, card.image_size, device="meta"))
    assert out.features.shape == (1, card.dim, card.image_size // card.patch_size, card.image_size // card.patch_size)
