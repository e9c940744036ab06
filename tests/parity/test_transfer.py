"""XREN's pooling and the linear probe against the published code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import filler, golden_input, golden_path
from tests.parity import adapters
from tests.parity.test_encoder import shapes


def siglip():
    meta = json.loads(str(np.load(golden_path("xren_pooling.npz"), allow_pickle=True)["meta"]))
    keys = json.loads(golden_path("xren_siglip_keys.json").read_text())
    return filler(keys), meta["siglip_config"]


def unpack(z, image):
    shape = z[f"masks{image}_shape"]
    return np.unpackbits(z[f"masks{image}"])[: np.prod(shape)].reshape(shape)


@pytest.mark.parametrize("image", [0, 1])
def test_pooling(image):
    z = np.load(golden_path("xren_pooling.npz"), allow_pickle=True)
    weights, config = siglip()
    masks = unpack(z, image)
    found = adapters.xren_pool(weights, config, z["last_hidden_state"][image], masks)
    np.testing.assert_allclose(found, z[f"tokens{image}"], atol=2e-5)
    double = {k: v.astype(np.float64) for k, v in weights.items()}
    found = adapters.xren_pool(double, config, z["last_hidden_state"][image].astype(np.float64), masks)
    np.testing.assert_allclose(found, z[f"tokens{image}_f64"], atol=2e-5)  # the features themselves are float32


def test_published_masks_take_the_top_left_pixel():
    import torch

    from opsin.geometry import ImageTransform
    from opsin.regions.extent import mask_weights

    z = np.load(golden_path("xren_pooling.npz"), allow_pickle=True)
    for image in (0, 1):
        masks = torch.from_numpy(unpack(z, image))
        size = tuple(masks.shape[1:])
        weights = mask_weights(masks, ImageTransform(size, size), (6, 6), compat="published")
        np.testing.assert_array_equal(weights.reshape(-1, 6, 6).numpy(), z[f"masks{image}_nearest"])


def test_regions_of_one_and_tokens_of_the_other():
    z = np.load(golden_path("xren_forward.npz"), allow_pickle=True)
    pooling = np.load(golden_path("xren_pooling.npz"), allow_pickle=True)
    weights, config = siglip()
    features = golden_input("xren/feat", (2, 64, 6, 6))
    prompts = np.stack([z["centres"]] * 2)
    options = {"heads": 8, "resolution": 96, "patch": 16}
    tokens = adapters.ren_encoder(filler(shapes(64)), features=features, prompts=prompts, **options)
    for case in json.loads(str(z["meta"]))["cases"]:
        for image in range(2):
            pred = tokens["pred_tokens"][image]
            found = adapters.ren_aggregate(pred, pred, prompts[image], threshold=case["threshold"], min_size=3)
            assert found["groups"] == case["groups"][image]
            squares = np.zeros((len(found["groups"]), 64), np.uint8)
            for region, members in enumerate(found["groups"]):
                squares[region, members] = 1  # prompt i stands for superpixel i
            squares = squares.reshape(-1, 8, 8)
            np.testing.assert_array_equal(squares, z[f"t{case['threshold']}_masks{image}_8x8"])
            masks = squares.repeat(12, 1).repeat(12, 2)
            pooled = adapters.xren_pool(weights, config, pooling["last_hidden_state"][image], masks)
            np.testing.assert_allclose(pooled, z[f"t{case['threshold']}_tokens{image}"], atol=2e-5)


@pytest.mark.parametrize(("name", "shape"), [("voc", (2, 64, 5, 7)), ("ade", (1, 32, 6, 6))])
def test_linear_probe(name, shape):
    z = np.load(golden_path("linear_probe.npz"), allow_pickle=True)
    classes = z[f"{name}_logits"].shape[1]
    dim = shape[1]
    vectors = dict.fromkeys(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), (dim,))
    weights = filler(vectors | {"conv.weight": (classes, dim, 1, 1), "conv.bias": (classes,)})
    weights["bn.running_var"] = np.abs(weights["bn.running_var"]) + np.float32(0.5)
    weights["bn.num_batches_tracked"] = np.array(0)
    features = golden_input(f"probe/{name}", shape)
    np.testing.assert_allclose(adapters.probe_decode(weights, features), z[f"{name}_logits"], atol=1e-5)
    double = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in weights.items()}
    found = adapters.probe_decode(double, features.astype(np.float64))
    np.testing.assert_allclose(found, z[f"{name}_logits_f64"], atol=1e-9)
