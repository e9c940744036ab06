"""The benchmark of segmentation at tiny sizes: the published way and Opsin's agree, its numbers and table are whole."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsin import report
from opsin.segmentation import prediction
from opsin.segmentation.refine import refine

pytest.importorskip("skimage", reason="the benchmark's photographs come with scikit-image")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("common", "reference_radseg", "synthetic", "segmentation", "tables")
SIZE = (512, 512)


@pytest.fixture(scope="module")
def bench():
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in MODULES:
            if name not in before:
                sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(bench):
    return bench["synthetic"].Network(
        dim=32, depth=2, heads=2, positions=512, hidden=40, inner=2, words=24, sam=32, neck=32
    )


@pytest.fixture(scope="module")
def folder(bench, tiny, tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("text")
    bench["synthetic"].prepare(tiny, found, bench["segmentation"].LABELS, bench["segmentation"].QUESTIONS)
    return found


def test_every_stage_of_both_sides_gives_the_same(bench, tiny, folder: Path) -> None:
    s = bench["segmentation"]
    image, labels = s.picture(SIZE), s.names(20)
    ours, theirs = s.Way("opsin", tiny, folder), s.Way("reference", tiny, folder)
    mine = published = image
    for (stage, step), (_, reference) in zip(ours.stages(labels, SIZE), theirs.stages(labels, SIZE), strict=True):
        mine, published = ours.run([(stage, step)], mine)[0], theirs.run([(stage, reference)], published)[0]
        if stage == s.STAGES[-1]:
            assert (mine == published).float().mean() > 0.9999
            assert mine.unique().numel() > 4  # an answer with one label would show nothing
        else:
            same = torch.nn.functional.normalize(published[0], dim=0) if stage == "alignment" else published[0]
            torch.testing.assert_close(mine, same, atol=2e-4, rtol=1e-3)


def test_the_stages_are_what_the_product_does(bench, tiny, folder: Path) -> None:
    s = bench["segmentation"]
    image, labels = s.picture(SIZE), s.names(20)
    way = s.Way("opsin", tiny, folder)
    staged = way.run(way.stages(labels, SIZE), image)[0]
    torch.testing.assert_close(staged, way.segmenter.segment(image, labels).labels, atol=0, rtol=0)


def test_refinement_is_the_published_one(bench, tiny, folder: Path) -> None:
    s, sam = bench["segmentation"], bench["synthetic"].sam_decoder(tiny)
    labels, full = s.rectangles(SIZE)
    embedding = torch.randn((1, tiny.neck, 64, 64), generator=torch.Generator().manual_seed(1))
    expected = s.reference_refine(labels, full, embedding, sam, gate=-math.inf)
    found = refine(labels, full, embedding, sam, fed=(1024, 1024), iou=-math.inf, compat="published")
    assert len(found.regions) == bench["synthetic"].REGIONS
    assert (expected != labels).any()  # the masks say something else than the coarse labels
    assert (found.labels == expected).float().mean() > 0.9999


def test_a_measurement_is_whole_and_finite_and_makes_a_table(
    bench, tiny, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    s, small = bench["segmentation"], (224, 224)
    monkeypatch.setattr(s, "IMAGES", (small,))
    chosen = ("reference", "opsin", "opsin bf16")
    found = {"512×512": s.measure(tiny, folder, small, 1, chosen), "RADSeg+": s.measure_plus(tiny, folder, 1, chosen)}
    for case in (*found["512×512"].values(), found["RADSeg+"]):
        case["memory"] = {name: {"ready_mib": 50.0, "peak_mib": 100.0, "share": 1.0} for name in chosen}
    for count in ("20 labels", "150 labels"):
        case = found["512×512"][count]
        assert set(case["seconds"]["opsin"]) == {*s.STAGES, "total", "CPU time"}
        assert case["agreement"]["close text"]["reference"] > 0.999
        assert case["agreement"]["close text"]["opsin bf16"] > 0.9
        assert case["second_question"]["opsin"]["asked again"]["faster"] > 1
    written = report.write(tmp_path / "results.json", {"segmentation": found})
    numbers = json.loads(written.read_text())
    assert "null" not in written.read_text()  # report.write makes null of what is not finite
    text = bench["tables"].segmentation(numbers["segmentation"])
    assert "### 512×512, 150 labels" in text
    assert "| faster |" in text
    assert "### RADSeg+" in text


def test_memory_counts_a_whole_process(bench) -> None:
    """In a process of its own: in this one, freed memory of earlier tests would be used again."""
    code = (
        "import torch; from common import resident_mib; before = resident_mib(); block = torch.ones(64 << 18); "
        "peak = resident_mib(peak=True); raise SystemExit(0 if peak >= before + 60 and block.sum() > 0 else peak)"
    )
    folder = Path(bench["common"].__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_text_is_near_another_photograph(bench, tiny, folder: Path) -> None:
    """Labels of every question differ, and a cached row needs no tower."""
    synthetic = bench["synthetic"]
    vocabulary = synthetic.vocabulary(tiny, folder)
    first, second = (vocabulary.embed(synthetic.names(20, asked)) for asked in (0, 1))
    assert first.shape == (20, tiny.words)
    assert len(first.unique(dim=0)) == 20
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)  # the same places under other names
    grid = prediction.class_probabilities(
        torch.nn.functional.normalize(torch.randn(tiny.words, 3, 4), dim=0), first, synthetic.names(20).index, 20, 100.0
    )
    torch.testing.assert_close(grid.sum(0), torch.ones(3, 4))
