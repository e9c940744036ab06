"""The film of the demo, and with the embedded model the whole demo."""

from __future__ import annotations

import importlib.resources
import itertools
import json

import pytest
import torch

from opsin.cli import demo
from opsin.cli.main import main
from opsin.video import open_video

pytest.importorskip("skimage")


def test_the_film_shows_the_photographs_smoothly_and_the_same_every_time(tmp_path):
    path, spans = demo.make_film(tmp_path / "film.mp4")
    frames = list(open_video(path).frames())
    per_shot = round(demo.SHOT_SECONDS * demo.FPS)
    assert len(frames) == per_shot * len(demo.FILM)
    assert frames[0].size == demo.FRAME
    assert len(spans) == 2
    assert spans[1][0] > spans[0][1] + 1, "the object comes twice"
    assert spans[1][1] < frames[-1].time - 1, "and is gone in the end"
    jumps = [(a.image.float() - b.image.float()).abs().mean().item() for a, b in itertools.pairwise(frames)]
    cuts = [per_shot * k - 1 for k in range(1, len(demo.FILM))]
    largest = sorted(range(len(jumps)), key=jumps.__getitem__)[-len(cuts) :]
    assert sorted(largest) == cuts, "nothing moves as much as a cut"
    again, _ = demo.make_film(tmp_path / "again.mp4")
    assert torch.equal(open_video(again).read_frame(77).image, frames[77].image)


def test_the_query_is_a_piece_of_the_photograph():
    x1, y1, x2, y2 = demo.QUERY_BOX
    assert demo.query_crop().shape == (3, y2 - y1, x2 - x1)
    assert torch.equal(demo.query_crop(), demo.photograph("coffee")[:, y1:y2, x1:x2])


@pytest.mark.slow
def test_the_demo_finds_the_cup(tmp_path, capsys):
    if not (importlib.resources.files("opsin") / "weights" / "opsin-tiny" / "card.json").is_file():
        pytest.skip("this checkout has no embedded model")
    assert main(["demo", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "result.json").read_text())
    first, last = json.loads((tmp_path / "truth.json").read_text())["cup_visible_seconds"][-1]
    assert data["found"]
    times = [row["time"] for row in data["track"]]
    overlap = min(times[-1], last) - max(times[0], first)
    assert overlap / (max(times[-1], last) - min(times[0], first)) > 0.7
    assert {"film.mp4", "found.mp4", "sheet.png", "query.png", "result.json"} <= {p.name for p in tmp_path.iterdir()}
    assert "sheet.png" in capsys.readouterr().err
