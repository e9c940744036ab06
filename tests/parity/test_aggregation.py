"""Grouping, superpixel centres and the whole path against the published code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from opsin.errors import InvalidPrompt
from opsin.geometry import ImageTransform
from opsin.images import pad_to_multiple, unfit
from opsin.regions.prompts import superpixel_points
from tests.conftest import filler, golden_input, golden_path
from tests.parity import adapters
from tests.parity.test_encoder import shapes

CASES = json.loads(golden_path("aggregation.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_groups(case):
    z = np.load(golden_path("aggregation.npz"))
    pred, points = z[f"{case['id']}_pred"], z[f"{case['id']}_points"]
    pred = pred.reshape(-1, *case["shape"][1:])
    points = points.reshape(len(pred), -1, 2)
    for image in range(len(pred)):
        proj = np.roll(pred[image], 1, -1)
        if "aggregator_exception" in case:
            with pytest.raises(InvalidPrompt):
                adapters.ren_aggregate(pred[image], proj, points[image], threshold=case["threshold"], min_size=3)
            continue
        found = adapters.ren_aggregate(pred[image], proj, points[image], threshold=case["threshold"], min_size=3)
        assert found["groups"] == case["groups"][image]
        np.testing.assert_allclose(found["pred"], z[f"{case['id']}_{image}_mean_pred"], atol=1e-6)
        np.testing.assert_array_equal(found["points"], z[f"{case['id']}_{image}_rep_points"])
        np.testing.assert_allclose(found["proj"], np.roll(found["pred"], 1, -1), atol=1e-6)
    for key, size in (("groups_all_sizes", 1), ("groups_min2", 2)):
        if case.get(key):
            found = adapters.ren_aggregate(pred[0], pred[0], points[0], threshold=case["threshold"], min_size=size)
            assert found["groups"] == case[key][0]


def test_superpixel_centres():
    z = np.load(golden_path("slic_centres.npz"), allow_pickle=True)
    for case in json.loads(str(z["meta"]))["cases"]:
        name, count = case["labels"], case["num_segments"]
        found = superpixel_points(z[f"{name}_labels"].astype(np.int64), pad_to=count)
        np.testing.assert_array_equal(found[:count], z[f"{name}_n{count}_points"], err_msg=f"{name} {count}")


def test_whole_path_from_features_to_regions():
    z = np.load(golden_path("ren_forward_grid.npz"), allow_pickle=True)
    features = golden_input("e2e/feat", (2, 64, 4, 4))
    prompts = np.stack([z["grid_points"]] * 2)
    tokens = adapters.ren_encoder(
        filler(shapes(64)), heads=8, resolution=56, patch=14, features=features, prompts=prompts
    )
    np.testing.assert_allclose(tokens["pred_tokens"], z["noagg_ren"], atol=3e-5)
    np.testing.assert_allclose(tokens["proj_tokens"], z["noagg_aligned_ren"], atol=2e-5)
    for case in json.loads(str(z["meta"]))["cases"]:
        for image in range(2):
            pred, proj = tokens["pred_tokens"][image], tokens["proj_tokens"][image]
            found = adapters.ren_aggregate(pred, proj, prompts[image], threshold=case["threshold"], min_size=3)
            assert found["groups"] == case["groups"][image]
            np.testing.assert_allclose(found["pred"], z[f"t{case['threshold']}_ren_{image}"], atol=3e-5)
            np.testing.assert_allclose(found["proj"], z[f"t{case['threshold']}_aligned_ren_{image}"], atol=2e-5)


def test_padding_and_upsampling():
    z = np.load(golden_path("padding_upsample.npz"), allow_pickle=True)
    for case in json.loads(str(z["meta"]))["cases"]:
        shape = json.loads(case["input"].split("', ")[1].rstrip(")"))
        batch = torch.from_numpy(golden_input(case["input"].split("'")[1], shape))
        expected = z[f"{case['id']}_out"]
        if case["op"] == "CenterPadding":
            found = torch.stack([pad_to_multiple(image, case["multiple"])[0] for image in batch])
            np.testing.assert_array_equal(found.numpy(), expected)
            continue
        (height, width), (tall, wide) = case["new"], case["padded"]
        # Its centre crop rounds half to even while the padding rounds down: that crop is stated as the offset here.
        offset = (round((wide - width) / 2), round((tall - height) / 2))
        transform = ImageTransform((height, width), (tall, wide), offset=offset)
        found = torch.stack([unfit(maps, transform) for maps in batch])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
