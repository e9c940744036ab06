"""SAM's decoder and the refinement of RADSeg+ against the published code on deterministic weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from opsin.segmentation import refine
from tests.conftest import golden_path
from tests.parity import adapters_sam as adapters
from tests.parity.filler import radseg_keys, radseg_weights

FED = (688, 1024)  # of a 300×437 image, as published
CASES = ("mix", "allvalid", "nonevalid", "ct0", "ct45")


def golden(name):
    return np.load(golden_path(f"{name}.npz", "radseg"))


def seeded(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.fixture(scope="module")
def weights():
    return {key.removeprefix("sam."): value for key, value in radseg_weights(radseg_keys("sam_tiny")).items()}


@pytest.fixture(scope="module")
def features():
    return seeded((1, 80, 64, 64), 41)


def double(tree):
    return {key: double(value) for key, value in tree.items()} if isinstance(tree, dict) else tree.astype(np.float64)


def test_neck(weights, features):
    wanted = golden("tiny_sam_decoder")["neck_8ch"]
    np.testing.assert_allclose(adapters.sam_embed(weights, features)[:, :8], wanted, atol=2e-5, rtol=1e-5)
    exact = adapters.sam_embed(double(weights), double(features))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact[:, :8], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_decoder(weights, features, precise, batch_size):
    data, mask = golden("tiny_sam_decoder"), seeded((1, 256, 256), 42) * np.float32(0.01)
    if precise:
        weights, features, mask = double(weights), double(features), double(mask)
    # the golden prompts are numbers of pixels, whose centres are half a pixel further
    found = adapters.sam_decode(
        weights, features, points=data["points"][:, 0] + 0.5, boxes=data["boxes"] + 0.5, mask=mask,
        batch_size=batch_size,
    )  # fmt: skip
    assert found["iou"].dtype == features.dtype
    np.testing.assert_allclose(found["iou"], data["scores"][:, 0], atol=1e-5)
    np.testing.assert_allclose(found["logits"], data["lowres"][:, 0].astype(np.float32), atol=2e-3)  # stored in half
    shape = tuple(data["masks_shape"])
    wanted = np.unpackbits(data["masks"])[: np.prod(shape)].reshape(shape)[:, 0]
    logits = torch.from_numpy(found["logits"])
    masks = torch.stack([refine._at_size(one, FED, (300, 437)) > 0 for one in logits]).numpy()
    assert (masks != wanted).sum() <= 20  # of 393,300: logits that are 0 but for rounding


def test_positions_of_the_image(weights):
    data = golden("tiny_sam_decoder")
    found = adapters.sam_decoder(weights)._image_positions()
    np.testing.assert_allclose(found[:, :8].numpy(), data["pe_8ch"], atol=1e-6)


def test_points_and_boxes(weights):
    data = golden("tiny_sam_decoder")
    encoder = adapters.sam_decoder(weights).prompt_encoder
    points, boxes = torch.from_numpy(data["points"]), torch.from_numpy(data["boxes"])
    sparse, _ = encoder(points[:, None], torch.ones(3, 1, 1), boxes[:, None], None)
    np.testing.assert_allclose(sparse[:, 0].numpy(), data["sparse"], atol=1e-5)


def test_mask_prompt_is_normalised_over_rows_as_published_only_when_asked(weights):
    wanted = golden("tiny_sam_decoder")["dense_8ch"].astype(np.float32)
    decoder = adapters.sam_decoder(weights)
    mask = torch.from_numpy(seeded((1, 256, 256), 42) * np.float32(0.01))[None]
    published = decoder._published_mask_embedding(mask)[0, :, :8].numpy()
    np.testing.assert_allclose(published, wanted, atol=3e-3)
    assert np.abs(decoder.prompt_encoder.mask_embed(mask)[0, :, :8].numpy() - wanted).max() > 1


@pytest.mark.parametrize(("case", "precise"), [*((case, False) for case in CASES), ("mix", True)])
def test_refinement(weights, features, case, precise):
    data = golden("tiny_sam_refinement")
    options = next(c for c in json.loads(str(data["meta"]))["cases"] if c["tag"] == case)
    probabilities = data["probs_fp16"].astype(np.float32)
    if precise:
        weights, features, probabilities = double(weights), double(features), double(probabilities)
    found = adapters.sam_refine(
        weights, features, data["seg"][0], probabilities, fed=FED, coarse_threshold=options["coarse_thresh"],
        min_area=options["minimal_area"], mask_coefficient=0.005, iou=options["sam_iou_thresh"] - 1e-6,
    )  # fmt: skip
    assert (found["labels"] != data[f"{case}_masks"][0]).sum() <= 5
    np.testing.assert_allclose(found["probs"][:, ::4, ::4], data[f"{case}_logits_4th"], atol=2e-5)
    assert len(found["iou"]) == options["n_valid"]
    if options["n_valid"]:
        np.testing.assert_allclose(found["iou"], data[f"{case}_scores"][:, 0], atol=5e-5)
    changed = (found["labels"] != data["seg"][0]).sum()
    assert abs(int(changed) - options["changed"]) <= 5


def test_regions():
    data = golden("tiny_sam_refinement")
    found = adapters.sam_regions(
        data["seg"][0], data["probs_fp16"].astype(np.float32), coarse_threshold=0.1, min_area=225
    )
    assert np.bincount(found.classes.numpy()).tolist() == data["split_count"].tolist()
    np.testing.assert_array_equal(found.areas.numpy(), data["split_area"])
    tops_and_lefts = [(c.start, r.start, c.stop - 1, r.stop - 1) for r, c in found.places]
    np.testing.assert_array_equal(tops_and_lefts, data["split_boxes"])
    # SAM makes 705×1024 of the half resolution, 150×218
    scale = np.array([1024 / 218, 705 / 150])
    np.testing.assert_allclose(found.points.numpy(), data["split_points"] * scale + 0.5)
    np.testing.assert_allclose(found.boxes.numpy(), data["split_boxes"] * np.tile(scale, 2) + 0.5)


def test_sizes_in_the_frame():
    for fact in json.loads(golden_path("sam_preprocess_sizes.json", "radseg").read_text()):
        size = fact["h"], fact["w"]
        assert refine.frame(size, compat="published") == tuple(fact["radseg"])
        exact = tuple(side * 1024 / max(size) for side in size)
        found = refine.frame(size)
        assert all(side % 16 == 0 and abs(side - wanted) <= 8 for side, wanted in zip(found, exact, strict=True))
