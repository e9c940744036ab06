"""Retrieval, grouping, descriptors, reports and the linear probe as pure functions."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opsin import report
from opsin.errors import InputError, InvalidCheckpoint, InvalidConfig, InvalidDataset
from opsin.evaluation import descriptors, grouping, retrieval
from opsin.evaluation.datasets import Segment
from opsin.evaluation.linear_probe import ConfusionMatrix, LinearProbe
from opsin.geometry import ImageTransform
from opsin.types import FeatureMap
from tests.conftest import draw, golden_input, golden_path
from tests.parity import adapters

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


# --- pairs of prompts -------------------------------------------------------------------------------------------------


def pairs_one_by_one(labels: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float]:
    """The definition, pair by pair."""
    counts = {"same": 0, "different": 0, "together": 0, "apart": 0}
    for i in range(len(labels)):
        for j in range(i):
            if truth[i] == 0 or truth[j] == 0:
                continue
            joined = bool(labels[i] == labels[j] and labels[i] >= 0)
            if truth[i] == truth[j]:
                counts["same"] += 1
                counts["together"] += joined
            else:
                counts["different"] += 1
                counts["apart"] += not joined
    agreed = counts["together"] + counts["apart"]
    total = counts["same"] + counts["different"]
    return counts["together"] / counts["same"], counts["apart"] / counts["different"], agreed / total


@pytest.mark.parametrize("seed", range(5))
def test_pair_shares_are_their_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 5, (40,), generator=generator)
    truth = torch.randint(0, 4, (40,), generator=generator)
    found = grouping.pair_shares(labels, truth)
    assert (found.together, found.apart, found.rand) == pytest.approx(pairs_one_by_one(labels, truth))
    assert found.balanced == pytest.approx((found.together + found.apart) / 2)


def test_pair_shares_at_the_extremes() -> None:
    truth = torch.tensor([1, 1, 2, 2])
    assert grouping.pair_shares(truth * 7, truth).balanced == 1.0
    assert grouping.pair_shares(torch.zeros(4), truth).balanced == 0.5
    assert grouping.pair_shares(torch.arange(4), truth).balanced == 0.5
    one_region = grouping.pair_shares(torch.zeros(4), torch.ones(4))
    assert math.isnan(one_region.apart)
    assert one_region.balanced == 1.0
    with pytest.raises(InputError, match="shape"):
        grouping.pair_shares(torch.zeros(3), truth)


def test_grouping_scores_average_annotators_then_images() -> None:
    scores = grouping.GroupingScores()
    truth = torch.tensor([1, 1, 2, 2])
    scores.update("m @ 0.5", truth, [truth, torch.tensor([1, 2, 1, 2])])
    scores.update("m @ 0.5", truth, [truth])
    scores.update("m @ 0.9", torch.arange(4), [truth])
    assert scores.values("m @ 0.5")[1] == 1.0
    assert scores.values("m @ 0.5")[0] == pytest.approx((1 + (0 + 0.5) / 2) / 2)
    assert grouping.best(scores, "m") == (0.5, pytest.approx(scores.values("m @ 0.5").mean()))
    assert scores.compute()["m @ 0.5"]["groups"] == 2


def test_labels_are_read_under_the_points() -> None:
    labels = torch.arange(12).reshape(3, 4)
    points = torch.tensor([[0.5, 0.5], [3.5, 2.5], [4.0, 3.0]])
    assert grouping.at_points(labels, points).tolist() == [0, 11, 11]


def test_lab_of_known_colours() -> None:
    red, white = torch.tensor([1.0, 0, 0]), torch.ones(3)
    found = grouping._lab(torch.stack([red, white], -1)[:, None])
    np.testing.assert_allclose(found[:, 0, 0], [53.24, 80.09, 67.20], atol=0.05)
    np.testing.assert_allclose(found[:, 0, 1], [100, 0, 0], atol=0.05)


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_nearest_is_by_cosine() -> None:
    gallery = torch.tensor([[1.0, 0], [0, 10], [1, 1]])
    assert retrieval.nearest(torch.tensor([[0.1, 0.0], [0.0, 3.0]]), gallery, 2).tolist() == [[0, 2], [1, 2]]
    assert retrieval.nearest(torch.zeros((0, 2)), gallery, 1).shape == (0, 1)
    with pytest.raises(InvalidConfig, match="gallery"):
        retrieval.nearest(torch.zeros((1, 2)), gallery, 4)


def segments(rows: list[tuple[list[float], int, bool]], name: str = retrieval.REGION) -> retrieval.Segments:
    found = retrieval.Segments()
    for i, (vector, category, thing) in enumerate(rows):
        table = {name: torch.tensor([vector]), "other": torch.tensor([vector[::-1]])}
        found.update(table, [Segment(i, category, thing)], i)
    return found


def test_retrieval_counts_right_answers() -> None:
    gallery = segments([([1.0, 0.0], 1, True), ([0.0, 1.0], 2, False)])
    queries = segments([([1.0, 0.1], 1, True), ([0.1, 1.0], 2, False), ([1.0, 0.2], 3, True)])
    found = retrieval.score(queries, gallery, names={1: "cat", 2: "sky", 3: "dog"})
    token = found["descriptors"][retrieval.REGION]
    assert (found["queries"], found["gallery"], found["answerable"]) == (3, 2, 2)
    assert token["top1"]["all"]["mean"] == pytest.approx(2 / 3)
    assert token["top1"]["things"]["mean"] == pytest.approx(1 / 2)
    assert token["top1"]["stuff"]["mean"] == 1.0
    assert token["class_mean_top1"] == pytest.approx(2 / 3)
    assert token["top1"]["all"]["interval"][0] <= 2 / 3 <= token["top1"]["all"]["interval"][1]
    assert found["top1_per_class"]["dog"] == {"queries": 1, "gallery": 0, retrieval.REGION: 0.0, "other": 0.0}
    # Both sides of "other" are mirrored alike, so it answers the same and the difference is exactly nothing.
    assert found["region_token_minus"]["other"]["top1"]["mean"] == 0.0
    with pytest.raises(InputError, match="rows"):
        queries.update({retrieval.REGION: torch.zeros((2, 2))}, [Segment(0, 1, True)], 0)


def test_colour_histograms_tell_colours_apart() -> None:
    image = torch.zeros((3, 4, 8))
    image[0, :, 4:] = 1.0
    left = torch.zeros((4, 8), dtype=torch.bool)
    left[:, :4] = True
    rows = descriptors.colour_histograms(image, torch.stack([left, ~left, torch.ones_like(left)]))
    assert rows.shape == (3, 512)
    assert float(rows[0] @ rows[1]) == 0.0
    assert float(rows[0] @ rows[2]) == pytest.approx(math.sqrt(0.5))
    assert descriptors.colour_histograms(image, torch.zeros((0, 4, 8)), bins=4).shape == (0, 64)


def test_patch_means_are_weighted_by_area() -> None:
    features = FeatureMap(torch.tensor([[[1.0, 3.0]]]), ImageTransform((4, 8), (4, 8)), "test")
    mask = torch.zeros((2, 4, 8), dtype=torch.bool)
    mask[0, :, :6] = True  # all of the left patch, half of the right
    rows = descriptors.patch_means(features, mask)
    assert rows[0].item() == pytest.approx((1 * 1 + 0.5 * 3) / 1.5)
    assert rows[1].item() == 0.0


# --- reports ----------------------------------------------------------------------------------------------------------


def test_intervals_follow_the_clusters() -> None:
    values = np.repeat([0.0, 1.0], 50)
    loose = report.clustered_mean(values, range(100), seed=1)
    tied = report.clustered_mean(values, np.repeat([0, 1], 50), seed=1)
    assert loose["mean"] == tied["mean"] == 0.5
    assert tied["interval"] == (0.0, 1.0)
    assert 0.3 < loose["interval"][0] < 0.5 < loose["interval"][1] < 0.7
    assert report.clustered_mean(values, range(100), seed=1) == loose
    assert report.clustered_mean([], [])["count"] == 0
    with pytest.raises(InputError, match="unit"):
        report.bootstrap(np.mean, 0)


def test_reports_are_plain_json(tmp_path: Path) -> None:
    path = report.write(tmp_path / "a/b.json", {"x": np.float32(1 / 3), "n": float("nan"), "t": (1, np.int64(2))})
    assert json.loads(path.read_text()) == {"x": 0.333333, "n": None, "t": [1, 2]}
    environment = report.environment(7)
    assert environment["seed"] == 7
    assert (
        environment["versions"]["torch"] == torch.__version__ or environment["versions"]["torch"] in torch.__version__
    )
    assert environment["machine"]["cores"] >= 1
    json.dumps(report.tidy(environment))


# --- linear probe -----------------------------------------------------------------------------------------------------


def probe_weights(dim: int, classes: int) -> dict[str, np.ndarray]:
    """Golden weights of the probe: the batch normalisation has no "norm" in its name, so its gain is the plain draw."""
    weights = {
        "bn.weight": 0.2 * draw("bn.weight", (dim,)),
        "bn.bias": 0.2 * draw("bn.bias", (dim,)),
        "bn.running_mean": 0.2 * draw("bn.running_mean", (dim,)),
        "bn.running_var": (0.2 * draw("bn.running_var", (dim,))).abs() + 0.5,
        "bn.num_batches_tracked": torch.tensor(0),
        "conv.weight": draw("conv.weight", (classes, dim, 1, 1)) * (1.0 / math.sqrt(dim)),
        "conv.bias": 0.2 * draw("conv.bias", (classes,)),
    }
    return {k: v.numpy() for k, v in weights.items()}


PROBES = {"voc": (64, 21, (2, 64, 5, 7)), "ade": (32, 150, (1, 32, 6, 6))}


@pytest.mark.parametrize("name", PROBES)
def test_the_probe_decodes_as_published(name: str) -> None:
    z = np.load(golden_path("linear_probe.npz"))
    dim, classes, shape = PROBES[name]
    weights = probe_weights(dim, classes)
    assert sorted(weights) == sorted(z[f"{name}_keys"].tolist())
    features = golden_input(f"probe/{name}", shape)
    np.testing.assert_allclose(adapters.probe_decode(weights, features), z[f"{name}_logits"], atol=1e-5)
    exact = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in weights.items()}
    logits = adapters.probe_decode(exact, features.astype(np.float64))
    np.testing.assert_allclose(logits, z[f"{name}_logits_f64"], atol=1e-9)
    probe = LinearProbe.from_state({k: torch.from_numpy(v) for k, v in weights.items()})
    labels = probe.predict(torch.from_numpy(features), (56, 56))
    assert (labels.numpy() == z[f"{name}_upsampled_argmax"]).mean() > 0.999
    probe.train()
    trained = probe(torch.from_numpy(features))
    np.testing.assert_allclose(trained.detach(), z[f"{name}_train_logits"], atol=1e-5)
    np.testing.assert_allclose(probe.bn.running_mean, z[f"{name}_train_running_mean"], atol=1e-6)
    np.testing.assert_allclose(probe.bn.running_var, z[f"{name}_train_running_var"], atol=1e-6)


def test_probe_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="conv"):
        LinearProbe.from_state({})
    broken = {k: torch.from_numpy(v) for k, v in probe_weights(8, 3).items()} | {"bn.weight": torch.zeros(9)}
    with pytest.raises(InvalidCheckpoint, match="one width"):
        LinearProbe.from_state(broken)
    with pytest.raises(InvalidConfig, match="at least 1"):
        LinearProbe(0, 3)
    assert torch.equal(LinearProbe(4, 2).conv.weight, LinearProbe(4, 2).conv.weight)


def test_iou_pools_the_data_set() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 255]))
    matrix.update(torch.tensor([1, 1]), torch.tensor([1, 1]))
    np.testing.assert_allclose(matrix.iou()[:2], [1 / 2, 2 / 3])
    assert math.isnan(matrix.iou()[2])
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(InvalidDataset, match="Labels lie"):
        matrix.update(torch.tensor([0]), torch.tensor([3]))


# --- the reference that benchmarks compare with -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference_ren", BENCHMARKS / "reference_ren.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_ren"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reference_ren"]


@pytest.mark.parametrize("name", ["tinyA_corners", "tinyA_grid", "tinyB_random"])
def test_the_reference_encoder_is_the_published_one(reference, name: str) -> None:
    from opsin.regions.encoder import RegionEncoder, fourier_matrix
    from tests.conftest import filler

    z = np.load(golden_path(f"{name}.npz"))
    resolution, patch, grid = (56, 14, 4) if "tinyA" in name else (64, 8, 8)
    encoder = reference.ReferenceEncoder(64, resolution, patch, fourier_matrix(64)).eval()
    shapes = {k: tuple(v.shape) for k, v in RegionEncoder(64).state_dict().items()}
    encoder.load_state_dict({k: torch.from_numpy(v) for k, v in filler(shapes).items()})
    features = golden_input(f"{name[:5]}/feat", (2, 64, grid, grid))
    with torch.no_grad():
        pred, proj, logits = encoder(torch.from_numpy(features), torch.from_numpy(z["points"]))
    np.testing.assert_allclose(pred, z["pred_tokens_f32"], atol=3e-5)
    np.testing.assert_allclose(proj, z["proj_tokens_f32"], atol=2e-5)
    np.testing.assert_allclose(logits[-1], z["attn3_f32"], atol=3e-5)


def test_the_reference_grouping_is_the_published_one(reference) -> None:
    z = np.load(golden_path("aggregation.npz"))
    checked = 0
    for case in json.loads(golden_path("aggregation.json").read_text()):
        name = case["id"]
        if name.startswith("a09"):  # cosines at the threshold to 1e-8: depends on float32 rounding
            continue
        for i, groups in enumerate(case.get("groups") or []):
            pred = torch.from_numpy(z[f"{name}_pred"][i])
            points = torch.from_numpy(z[f"{name}_points"][i])
            found = reference.reference_group(pred, pred, points, case["threshold"])
            assert found.members == groups
            if groups:
                np.testing.assert_allclose(found.pred, z[f"{name}_{i}_mean_pred"], atol=1e-6)
                np.testing.assert_array_equal(found.points, z[f"{name}_{i}_rep_points"])
            checked += 1
    assert checked >= 10


def test_tables_are_written_from_the_numbers(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_tables", BENCHMARKS / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    times = {"median": 0.5, "min": 0.4, "max": 0.7}
    case = {
        "groups": 3,
        "seconds": {"reference": times, "opsin": {k: v / 100 for k, v in times.items()}},
        "faster": 100.0,
    }
    results = {"grouping": {"environment": report.environment(0), "results": {"tiny": {"one group": case}}}}
    text = tables.write(results, tmp_path, tmp_path / "benchmarks.md").read_text()
    assert "| tiny, one group (3) | 500 ms (400–700) | 5 ms (4–7) | 100× |" in text
    assert "commit" in text
