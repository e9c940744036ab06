"""Training losses and targets against the published code, values and gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import golden_input, golden_path
from tests.parity import adapters

CASES = ("l1", "l2", "l3", "l4")


def load(case):
    z = np.load(golden_path("losses.npz"), allow_pickle=True)
    facts = next(c for c in json.loads(str(z["meta"]))["cases"] if c["id"] == case)
    return facts, {k.removeprefix(f"{case}_"): z[k] for k in z.files if k.startswith(f"{case}_")}


def run(facts, z, dtype):
    pred, proj, target = ([z[f"{name}{view}"].astype(dtype) for view in (1, 2)] for name in ("pred", "proj", "tgt"))
    mask = [z[f"mask{view}"].astype(dtype) for view in (1, 2)]
    contrastive = adapters.ren_contrastive_loss(*pred, z["ids1"], z["ids2"], temperature=facts["temp"])
    return contrastive, adapters.ren_feature_loss(*proj, *target, *mask)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "suffix", "rtol"), [(np.float32, "f32", 1e-5), (np.float64, "f64", 1e-10)])
def test_values_and_gradient_norms(case, dtype, suffix, rtol):
    facts, z = load(case)
    contrastive, feature = run(facts, z, dtype)
    np.testing.assert_allclose([contrastive["loss"], feature["loss"]], z[f"loss_{suffix}"], rtol=rtol)
    norms = [np.linalg.norm(loss[f"grad_{view}"]) for loss in (contrastive, feature) for view in (1, 2)]
    np.testing.assert_allclose(norms, z[f"gradnorm_{suffix}"], rtol=rtol)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    facts, z = load(case)
    contrastive, feature = run(facts, z, np.float64)
    for name, loss in (("pred", contrastive), ("proj", feature)):
        for view in (1, 2):
            np.testing.assert_allclose(loss[f"grad_{view}"], z[f"grad_{name}{view}_f64"], atol=1e-12)


def test_null_prompts_are_no_region_by_default():
    facts, z = load("l4")  # 19 and 17 null prompts
    published, _ = run(facts, z, np.float64)
    tokens = [z[f"pred{view}"].astype(np.float64) for view in (1, 2)]
    ours = adapters.ren_contrastive_loss(*tokens, z["ids1"], z["ids2"], temperature=facts["temp"], compat=None)
    assert abs(ours["loss"] - published["loss"]) > 1e-3


def test_region_targets():
    z = np.load(golden_path("region_tokens_targets.npz"))
    features = golden_input("rtg/feat", (2, 16, 7, 7))
    for image in range(2):
        found = adapters.ren_region_targets(features[image], z["regions"][image])
        np.testing.assert_allclose(found, z["tokens_average"][image], atol=1e-6)
