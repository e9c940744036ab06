"""RADSeg against the published code: windows, both correlations, predictions, RADSeg+."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opsin.segmentation.windows import plan
from tests.conftest import golden_path
from tests.parity import adapters
from tests.parity.filler import radseg_keys, radseg_weights

ARGS = {
    "num_heads": 4, "patch_size": 16, "teachers": ["clip", "siglip2", "dino_v2", "sam"],
    "summary": ["clip", "siglip2", "dino_v2"], "mlp_version": "v2",
}  # fmt: skip
VITB = ARGS | {"num_heads": 12}


def golden(name):
    return np.load(golden_path(f"{name}.npz", "radseg"))


def image(h, w, seed, archive="images"):
    return (golden(archive)[f"u8_{h}x{w}_s{seed}"].astype(np.float32) / np.float32(255))[None]


@pytest.fixture(scope="module")
def tiny():
    return radseg_weights(radseg_keys("tiny"))


@pytest.fixture(scope="module")
def vitb():
    return radseg_weights(radseg_keys("vitb"), "fan2")


def double(weights):
    return {key: value.astype(np.float64) for key, value in weights.items()}


def close(found, wanted, atol):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=atol)


def test_windows():
    for case in json.loads(golden_path("sliding_geometry.json", "radseg").read_text()):
        found = plan((case["h"], case["w"]), case["crop"], case["stride"])
        h, w = found.window
        places = [[y // 16, x // 16, (y + h) // 16, (x + w) // 16] for y, x in found.starts]
        assert (list(found.size), list(found.window), places) == (case["pre"], case["win"], case["locs"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", ["a_out_s10", "a_out_s3", "b_out_s10", "b_out_s3", "zero_row_out_s10"])
def test_scra(tiny, case, dtype):
    name, scaling = case.split("_out_s")
    weights = tiny if dtype == np.float32 else double(tiny)
    data = golden("tiny_scra_attention")
    found = adapters.radseg_scra(weights, ARGS, data[f"{name}_x"].astype(dtype), scaling=float(scaling))
    close(found, data[case], 5e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scga(dtype):
    data = golden("tiny_scga")

    def run(name, scaling=10.0, compat=None):
        return adapters.radseg_scga(data[name].astype(dtype), scaling=scaling, compat=compat)

    close(run("a_feat"), data["a_out_s10"], 5e-5)
    close(run("a_feat", 3.0), data["a_out_s3"], 5e-5)
    close(run("c_feat"), data["c_out"], 1e-6)
    close(run("b_feat", compat="published"), data["b_out"], 5e-5)
    alone = run("b_feat")  # by default the images of a batch do not touch one another
    close(alone[:1], data["b0_alone"], 5e-5)
    close(alone[1:], data["b1_alone"], 5e-5)
    assert np.abs(alone - data["b_out"]).max() > 1e-3


SINGLE = {"sq": (96, 96), "land": (80, 144), "win": (336, 336)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", SINGLE)
def test_one_pass(tiny, case, dtype):
    weights = tiny if dtype == np.float32 else double(tiny)
    found = adapters.radseg_features(weights, ARGS, image(*SINGLE[case], 4), crop=0, stride=0, scra=10.0)
    close(found, golden("tiny_single_inference_scra")[f"{case}_feat"], 2.2e-3)


SLIDING = {"land": (250, 400), "port": (500, 300), "tiny": (40, 64), "mult": (224, 448)}


@pytest.mark.parametrize("case", SLIDING)
def test_sliding(tiny, case):
    found = adapters.radseg_features(tiny, ARGS, image(*SLIDING[case], 7), crop=336, stride=224, scra=10.0)
    close(found, golden("tiny_sliding_336_224")[f"{case}_feat"], 1.25e-2)


@pytest.mark.parametrize("case", ["land_c336_s112", "tiny_c336_s112", "land_c224_s112", "tiny_c224_s112"])
def test_sliding_with_other_windows(tiny, case):
    name, crop, stride = case.split("_")
    picture, steps = image(*SLIDING[name], 7), {"crop": int(crop[1:]), "stride": int(stride[1:])}
    found = adapters.radseg_features(tiny, ARGS, picture, **steps, scra=10.0)
    close(found, golden("tiny_sliding_other")[case], 1.25e-2)


def test_a_batch_is_its_images(tiny):
    data = golden("tiny_sliding_batch2_BROKEN")
    both = np.concatenate([image(250, 400, 7), image(250, 400, 8)])
    found = adapters.radseg_features(tiny, ARGS, both, crop=336, stride=224, scra=10.0)[:, :4]
    close(found[:1], data["single0_4ch"], 1.25e-2)
    close(found[1:], data["single1_4ch"], 1.25e-2)
    assert np.abs(found - data["batch_out_4ch"]).max() > 10  # the published code gives every image the same mixture


PREDICT = {
    "base": {}, "noignore": {"ignore": False}, "thr": {"threshold": 0.6}, "deno": {"denoise": 0.999},
    "size": {"size": (125, 203)}, "mix_off": {"denoise": 0.0}, "mix_on": {},
}  # fmt: skip


@pytest.mark.parametrize("case", PREDICT)
def test_prediction(tiny, case):
    data = golden("tiny_predict_slide")
    check_prediction(tiny, data, case, image(250, 400, 7), crop=336, options=PREDICT[case])


@pytest.mark.parametrize("case", ["base", "alldenoised", "alldenoised_thr"])
def test_prediction_in_one_pass(tiny, case):
    options = {"threshold": 0.1} if case.endswith("thr") else {}
    check_prediction(tiny, golden("tiny_predict_single"), case, image(176, 272, 9), crop=0, options=options)


def check_prediction(weights, data, case, picture, *, crop, options):
    words = "text_mix" if "mix" in case else "text_flat" if "alldenoised" in case else "text"
    found = adapters.radseg_predict(
        weights, ARGS, picture, data[words], crop=crop, stride=224, scra=10.0, scga=10.0,
        **{"denoise": 0.5, "threshold": 0.0, **options},
    )  # fmt: skip
    close(found["probs"][:, :, ::2, ::2], data[f"{case}_probs_half"], 1.7e-2)
    other = (found["labels"] != data[f"{case}_pred"][:, 0]).sum()
    assert other <= (85 * 5 if case == "mix_off" else 5)  # three labels there are almost the same


def test_refinement(tiny):
    data = golden("tiny_radsegplus")
    meta = json.loads(str(data["meta"]))
    sam = radseg_weights(radseg_keys("sam_tiny"))
    options = {
        "coarse_thresh": meta["coarse_thresh"], "minimal_area": meta["minimal_area"],
        "sam_mask_coff": meta["sam_mask_coff"], "sam_iou_thresh": meta["sam_iou_thresh"],
    }  # fmt: skip
    for ignore, name in ((False, "pred_after"), (True, "pred_after_ignore")):
        found = adapters.radseg_refine(
            tiny, ARGS, sam, image(300, 437, 7), data["text"], options=options | {"ignore_label": ignore}
        )
        other = (found["labels"] != data[name][:, 0]).mean()
        assert other < 2e-3
    probabilities = found["probs"][:, 1:, ::3, ::3]
    assert np.quantile(np.abs(probabilities - data["probs_after_third"]), 0.99) < 1e-2


@pytest.mark.slow
def test_window_of_vit_b(vitb):
    found = adapters.radseg_features(vitb, VITB, image(336, 336, 12), crop=0, stride=0, scra=10.0)
    wanted = golden("vitb_window_scra")
    close(found, wanted[next(key for key in wanted.files if key != "meta")], 1.5e-4)


@pytest.mark.slow
def test_flat_weights_of_vit_b():
    weights = radseg_weights(radseg_keys("vitb"), "flat")
    found = adapters.radseg_features(weights, VITB, image(224, 336, 13), crop=0, stride=0, scra=10.0)
    wanted = golden("vitb_flat_filler")
    close(found[:, ::2], wanted[next(key for key in wanted.files if key != "meta")], 1.5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["land", "tiny"])
def test_whole_path_of_vit_b(vitb, case):
    data = golden("vitb_slide_scga_align")
    slide = adapters.radseg_features(vitb, VITB, image(*SLIDING[case], 7), crop=336, stride=224, scra=10.0)
    close(slide[:, ::6], data[f"{case}_slide_every6ch"], 2.4e-3)
    again = adapters.radseg_scga(slide, scaling=10.0)
    close(again[:, ::8], data[f"{case}_scga_every8ch"], 8.5e-4)
    aligned = adapters.radseg_align(vitb, VITB, again)
    close(aligned[:, ::16], data[f"{case}_aligned_every16ch"], 1.1e-4)


@pytest.mark.slow
def test_prediction_of_vit_b(vitb):
    data = golden("vitb_predict")
    meta = json.loads(str(data["meta"]))
    assert meta
    name = next(key for key in data.files if key.endswith("_pred") or key == "pred")
    found = adapters.radseg_predict(
        vitb, VITB, image(250, 400, 7), data["text"], crop=336, stride=224, scra=10.0, scga=10.0, denoise=0.5,
        threshold=0.0,
    )  # fmt: skip
    assert (found["labels"] != data[name].reshape(found["labels"].shape)).sum() <= 5
