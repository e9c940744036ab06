"""Visual query localization against the published code: geometry and choices exact, tokens to rounding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opsin.errors import InvalidPrompt
from tests.conftest import filler, golden_input, golden_path
from tests.parity import adapters_vql as adapters
from tests.parity.test_encoder import shapes

SELECTOR = ("s1_smooth_waves", "s2_multi_token", "s3_topk_topp", "s4_query_suppression", "s5_ties_in_frame",
            "s6_all_below_top_p", "s7_16d_five_queries_mask_gaps", "s8_equal_peaks", "s9_empty_top",
            "s10_negative_only")  # fmt: skip


def load(name: str):
    z = np.load(golden_path(name))
    return z, json.loads(str(z["meta"]))


def same_crop(found, case):
    for key in ("crop_left", "crop_top", "scale_x", "scale_y"):
        assert found[key] == case[key], (case, key)
    np.testing.assert_allclose(found["new_bbox"], case["new_bbox"], rtol=1e-6, atol=1e-4)


def test_crop_geometry():
    cases = json.loads(golden_path("vq_crop_geometry.json").read_text())
    compared = 0
    for case in cases:
        image = np.zeros((*case["hw"], 3), np.uint8)
        if case["bbox"][2] == 0:  # published: a division by zero, or a crop that depends on the kind of number
            with pytest.raises(InvalidPrompt, match="at least one pixel"):
                adapters.vq_crop(image, case["bbox"], case["factor"])
        elif not case["bbox_is_tensor"]:  # float32 floors some quotients to a pixel less: the float64 path is the aim
            same_crop(adapters.vq_crop(image, case["bbox"], case["factor"]), case)
            compared += 1
    assert compared == 249


def test_crops_show_the_same_pixels():
    z, meta = load("vq_crops.npz")
    for case in meta["cases"]:
        found = adapters.vq_crop(z[case["image"]], case["bbox"], case["factor"])
        same_crop(found, case)
        # Lanczos there, bicubic here: noise differs more than a picture does, a shift by a pixel would be far worse.
        expected = z[case["crop"]].astype(int)
        ours = np.abs(found["crop"] - expected)
        shifted = np.abs(np.roll(found["crop"].astype(int), 1, 1) - expected)[:, 1:]
        assert ours.mean() < min(8, 0.5 * shifted.mean()), (ours.mean(), shifted.mean())


def test_sliding_windows():
    z, meta = load("vq_sliding.npz")
    for case in meta["cases"]:
        found = adapters.vq_sliding(np.zeros((*case["hw"], 3), np.uint8), case["factor"], case["overlap"])
        assert found["starts"] == case["starts"]
        assert found["sizes"] == [case["crop_size"]] * case["n"]
    found = adapters.vq_sliding(z["image"], 2.0, 0.0)["crops"].astype(int)
    assert np.abs(found - z["crops"]).mean() < 8


def test_cropping_factors_and_box_iou():
    meta = load("vq_masks.npz")[1]
    for case in meta["cropping_factors"]:
        found = adapters.vq_cropping_factor(case["bbox"], case["frame"], case["expansion"])
        assert found == pytest.approx(case["factor"], rel=1e-12)
    for case in meta["ious"]:
        assert adapters.vq_iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-12)


def test_blur():
    z, meta = load("vq_masks.npz")
    for case in meta["blur"]:
        found = adapters.vq_sharpness(z[case["image"]])
        assert found == pytest.approx(case["variance"], rel=1e-12)
        assert (found < 100) == case["is_blurry"]


def select(case, **options):
    return adapters.vq_select(
        np.array(case["tokens"], np.float32), np.array(case["query_tokens"], np.float32), np.array(case["mask"]),
        case["frame_ids"], case["query_frame_number"], top_k=case["top_k"], top_p=case["top_p"],
        nms_threshold=case["nms_threshold"], **options,
    )  # fmt: skip


def selector_case(name: str):
    cases = json.loads(golden_path("vq_selector.json").read_text())["cases"]
    return next(c for c in cases if c["id"] == name)


@pytest.mark.parametrize("name", SELECTOR)
def test_selector_after_every_stage(name):
    case = selector_case(name)
    if "error" in case:
        with pytest.raises(InvalidPrompt, match="at least one score above 0"):
            select(case)
        return
    found = select(case)
    for key in ("selected_idxs", "selected_frames", "query_match_idxs"):
        assert found[key] == case[key]
    for key in ("object_scores", "selected_scores"):
        np.testing.assert_allclose(
            np.array(found[key]) * (np.array(case["mask"]) if key == "object_scores" else 1), case[key], atol=1e-6
        )
    for key in ("after_frame_max", "after_inter_nms", "after_topk"):
        assert found[key]["idxs"] == case[key]["idxs"], key
        np.testing.assert_allclose(found[key]["scores"], case[key]["scores"], atol=1e-6)


@pytest.mark.parametrize("name", ["s1_smooth_waves", "s2_multi_token", "s3_topk_topp", "s4_query_suppression",
                                  "s6_all_below_top_p", "s10_negative_only"])  # fmt: skip
def test_where_the_published_selector_has_no_defect_the_default_agrees(name):
    case = selector_case(name)
    found = select(case, compat=None)
    assert found["selected_idxs"] == case["selected_idxs"]


def test_query_token_choices():
    z, meta = load("vq_query_token.npz")
    names = [k.removesuffix("_mask") for k in z.files if k.endswith("_mask")]
    features = golden_input("vq/qtok/feat", (9, 64, 5))
    rows, kept = adapters.vq_query_token([z[f"{n}_mask"] for n in names], z["points"], list(features))
    assert [names[i] for i in kept] == [c["mask"] for c in meta["chosen"]]
    np.testing.assert_array_equal(rows, z["tokens"])
    # By default a missing token is missing, and the middle of a mask without border is its middle.
    rows, kept = adapters.vq_query_token([z[f"{n}_mask"] for n in names], z["points"], list(features), compat=None)
    for row, i in zip(rows, kept, strict=True):
        case = next(c for c in meta["chosen"] if c["mask"] == names[i])
        same = np.array_equal(row, features[i][case["chosen_index"]])
        assert same != (names[i] == "full")
    assert {names[i] for i in range(9)} - {names[i] for i in kept} == {"empty_skipped", "no_grid_point"}


def unit(tokens: np.ndarray) -> np.ndarray:
    return tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def ren():
    features = golden_input("vq/wrap/feat", (5, 64, 4, 4))
    return lambda: adapters.GivenRen(filler(shapes(64)), features, heads=8, patch=14, grid=6)


def test_ren_wrapper(ren):
    z, meta = load("vq_ren_wrapper.npz")
    for case in meta["cases"]:
        wrapper = ren()
        queries = None if case["threshold"] is None else z["matching_tokens"]
        found = wrapper.tokens(z["images"], queries, case["threshold"])
        for i, (points, tokens) in enumerate(found):
            expected = f"{case['tag']}_frame-{i}"
            np.testing.assert_allclose(points, z[f"{expected}_points"], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(tokens, unit(z[f"{expected}_tokens"]), atol=3e-6)
        assert [len(p) for p, _ in found] == case["counts"]
        seen = np.stack([s.numpy() for s in wrapper.backbone.seen])
        np.testing.assert_allclose(seen[:, :, ::4, ::4], z["resized_every4"], atol=1e-5)


def test_attention_maps(ren):
    z, _ = load("vq_ren_wrapper.npz")
    points = z["all_frame-0_points"][::5].astype(np.float32)
    found = ren().attention(z["images"][0], points)[:, ::2, ::2]
    np.testing.assert_allclose(found, z["attn_maps_frame0_every5"], atol=2e-6)
