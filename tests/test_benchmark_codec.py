"""What the codec is timed against gives the same numbers, so that both do the same work."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from opsin import report
from opsin.codec import Codec, CodecConfig
from tests.conftest import ROOT

CONFIG = CodecConfig(32, 2, 4, 16, 1, 4, 8, (32, 32), dropout=0.0)


@pytest.fixture(scope="module")
def bench():
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("codec")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - before:
            sys.modules.pop(name, None)


def test_reference_agrees(bench):
    model = Codec.create(CONFIG, seed=1)
    published = bench.reference(model, CONFIG)
    pixels = bench.images(2, CONFIG)
    with torch.no_grad():
        tokens = published.encoder(pixels)
        assert torch.allclose(tokens, model.encoder(pixels), atol=1e-5)
        assert torch.allclose(published.decoder(tokens[:, 0]), model.decoder(tokens[:, 0]), atol=1e-5)
        assert torch.allclose(published.decoder.full(tokens), model.decoder.full(tokens), atol=1e-5)
    assert torch.allclose(published.loss(pixels), model.losses(pixels)["loss"], atol=1e-6)


def test_both_sides_take_the_same_steps(bench):
    pixels = bench.images(2, CONFIG)
    model = Codec.create(CONFIG, seed=1)
    published = bench.reference(model, CONFIG)
    ours = bench.step(model, "opsin", pixels)
    theirs = bench.step(published, "reference", pixels)
    for _ in range(3):
        assert ours() == pytest.approx(theirs(), rel=1e-4)


@pytest.mark.parametrize("job", ["encode", "decode", "step"])
def test_jobs_run(bench, job):
    for way in bench.WAYS:
        found = bench.child(way, job, 1, CONFIG)
        assert found["peak_mib"] > 0
        assert found["seconds"]["median"] > 0


def test_the_whole_report(bench, monkeypatch):
    """All parts at a tiny size, children run in this process; and the table of it."""
    tables = importlib.import_module("tables")

    def in_child(script, flag, way, job, repeats, timeout=0):
        return bench.child(way, job, int(repeats), CONFIG)

    monkeypatch.setattr(bench, "BASE", CONFIG)
    monkeypatch.setattr(bench, "in_child", in_child)
    found = bench.run(quick=True)
    assert set(found) == {
        *(f"{job}, batch {batch}" for job in ("encode", "decode") for batch in (1, 16)), "training step, batch 16",
    }  # fmt: skip
    for result in found.values():
        assert set(result["faster"]) == {"opsin", "opsin bf16"}
        assert result.get("relative_difference", {"opsin": 0})["opsin"] < 1e-5
        assert all(speed > 0 for speed in result["images_per_second"].values())
    for job in ("encode, batch 16", "training step, batch 16"):
        assert found[job]["memory"]["reference"]["share"] == 1
    measured = json.loads(json.dumps(report.tidy({"codec": {"environment": report.environment(0), "results": found}})))
    text = tables.document(measured, {})
    assert "## One vector per image, and back" in text
    for job, result in found.items():
        for way in result["seconds"]:
            line = next(line for line in text.splitlines() if line.startswith(f"| {job}, {way} |"))
            assert line.count("|") == 7
            assert (f"{result['faster'][way]:.2f}×" in line) if way != "reference" else ("×" not in line)


def test_it_is_a_section_of_the_benchmark(bench, monkeypatch, tmp_path):
    """``run.py --only codec`` measures it and writes its results."""
    run = importlib.import_module("run")
    monkeypatch.setattr(run.codec, "run", lambda quick: {"quick": quick})
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "codec", "--quick", "--out", str(tmp_path / "r.json")])
    assert run.main() == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert list(written) == ["codec"]
    assert written["codec"]["results"] == {"quick": True}
