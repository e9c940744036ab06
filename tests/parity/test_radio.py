"""RADIO and its adaptors against numbers of the published code."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from opsin.backbones.radio import RadioBackbone
from tests.conftest import golden_path
from tests.parity.adapters_radio import radio_backbone, radseg_align
from tests.parity.filler import radseg_keys, radseg_weights

ARGS = {
    "num_heads": 4,
    "patch_size": 16,
    "teachers": ["clip", "siglip2", "dino_v2", "sam"],
    "summary": ["clip", "siglip2", "dino_v2"],
    "mlp_version": "v2",
}
SIZES = {"sq": (96, 96), "land": (80, 144), "port": (160, 64), "one": (16, 16), "full": (512, 512), "over": (576, 640)}
DTYPES = [np.float32, np.float64]
# five times what the published code differs from itself in float64
FEATURES, HEADS = {"rtol": 1e-4, "atol": 5 * 4.3e-4}, {"rtol": 1e-4, "atol": 5e-4}


@cache
def weights(dtype: type) -> dict[str, np.ndarray]:
    return {key: value.astype(dtype) for key, value in radseg_weights(radseg_keys("tiny")).items()}


@cache
def backbone(dtype: type) -> RadioBackbone:
    return radio_backbone(weights(dtype), ARGS)


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(golden_path("tiny_radio_plain.npz", "radseg")) as file:
        return dict(file)


def image(case: str, dtype: type) -> torch.Tensor:
    height, width = SIZES[case]
    file = "images_large.npz" if height > 500 else "images.npz"
    with np.load(golden_path(file, "radseg")) as images:
        pixels = images[f"u8_{height}x{width}_s3"]
    return torch.from_numpy(pixels[None].astype(dtype) / dtype(255))


def close(found: torch.Tensor, expected: np.ndarray, dtype: type, **tolerance: float) -> None:
    assert found.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    np.testing.assert_allclose(found.numpy(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SIZES)
@torch.no_grad()
def test_features_summary_and_adaptors(case: str, dtype: type) -> None:
    model, numbers = backbone(dtype), golden()
    output = model(image(case, dtype))
    grid = (output.features.shape[2], output.features.shape[3])
    tokens = output.features.flatten(2).transpose(1, 2)
    every = 8 if case in ("full", "over") else 1
    name = f"{case}_backbone_features" + ("_every8th" if every == 8 else "")
    close(tokens[:, ::every], numbers[name], dtype, **FEATURES)
    summary = model.prefix(output)[:, model.model.config.summary_idxs].flatten(1)
    close(summary, numbers[f"{case}_backbone_summary"], dtype, **FEATURES)
    close(model.positions(grid)[..., :4], numbers[f"{case}_pos_embed_0_8ch"], dtype, rtol=1e-5, atol=1e-5)
    if every == 8:  # the adaptors of these two were not recorded
        return
    close(model.summary(output, "siglip2"), numbers[f"{case}_siglip2_summary"], dtype, **HEADS)
    for adaptor in ("siglip2", "sam"):
        found = model.adaptor(adaptor).feat_mlp(tokens, grid)
        close(found, numbers[f"{case}_{adaptor}_features"], dtype, **HEADS)


@torch.no_grad()
def test_same_bits_as_the_model_of_transformers() -> None:
    model = backbone(np.float32)
    for case in ("sq", "land", "port", "over"):
        pixels = image(case, np.float32)
        ours, theirs = model(pixels), model.model(pixels)
        assert torch.equal(ours.features.flatten(2).transpose(1, 2), theirs.features)
        assert torch.equal(model.prefix(ours), theirs.last_hidden_state[:, : model.model.config.num_summary_tokens])


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_is_the_summary_head_on_every_patch(dtype: type) -> None:
    features = np.random.default_rng(0).normal(size=(2, 96, 3, 5)).astype(dtype)
    found = radseg_align(weights(dtype), ARGS, features)
    assert found.shape == (2, 72, 3, 5)
    assert found.dtype == dtype
    # by the definition of MLP v2, spelled out in numpy
    state = {k.removeprefix("_heads.siglip2."): v for k, v in weights(dtype).items() if k.startswith("_heads.siglip2.")}

    def step(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = torch.nn.functional.gelu(torch.from_numpy(x * state[f"{name}.0.weight"] + state[f"{name}.0.bias"])).numpy()
        return x @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]

    tokens = features.transpose(0, 2, 3, 1) @ state["fc1.weight"].T + state["fc1.bias"]
    for block in ("blocks.0", "blocks.1"):
        tokens = tokens + step(tokens, block)
    np.testing.assert_allclose(found, step(tokens, "final").transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
