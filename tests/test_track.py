"""``Track`` leaves the library: every format is read back and says the same as the track."""

from __future__ import annotations

import csv
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opsin.errors import InputError, MissingExtra
from opsin.types import Track

BOXES = [[3.0, 4.0, 13.5, 24.25], [4.0, 5.0, 14.5, 25.25], [0.0, 0.0, 64.0, 48.0]]


def made(count: int = 3, score: float = 0.8, scores: tuple[float, ...] = (0.9, math.nan, 0.5)) -> Track:
    """Frames 7, 8, 9 of a film with variable frame rate; the second box was not measured."""
    return Track(
        count > 0, score, torch.arange(7, 7 + count), torch.tensor([0.7, 0.85, 1.1], dtype=torch.float64)[:count],
        torch.tensor(BOXES)[:count], torch.tensor(scores)[:count], torch.tensor([[0.0, 0.1], [0.7, 0.9]]),
        "kitchen.mp4", "opsin-tiny", 2, (48, 64), {"preset": "template", "tracker": "template"},
    )  # fmt: skip


def test_arrays():
    arrays = made().to_numpy()
    assert set(arrays) == {"frames", "times", "boxes", "scores", "timeline"}
    assert arrays["frames"].tolist() == [7, 8, 9]
    assert arrays["boxes"].tolist() == BOXES
    assert np.isnan(arrays["scores"]).tolist() == [False, True, False]
    assert {name: a.shape for name, a in made(0).to_numpy().items()} == {
        "frames": (0,), "times": (0,), "boxes": (0, 4), "scores": (0,), "timeline": (2, 2),
    }  # fmt: skip


def test_mot_counts_from_one():
    rows = [[float(v) for v in row] for row in csv.reader(made().to_mot().splitlines())]
    assert {len(row) for row in rows} == {10}
    assert [row[0] for row in rows] == [8, 9, 10]
    assert [row[1] for row in rows] == [1, 1, 1]
    table = np.array(rows)
    corners = table[:, 2:4] - 1  # as readers of the format do
    assert np.concatenate([corners, corners + table[:, 4:6]], 1) == pytest.approx(np.array(BOXES), abs=0.01)
    assert table[:, 6].tolist() == pytest.approx([0.9, 0.8, 0.5]), "what was not measured has the score of the track"
    assert (table[:, 7:] == -1).all()
    assert made().to_mot(identity=5).startswith("8,5,4.00,5.00,10.50,20.25,0.9,-1,-1,-1\n")
    assert made(0).to_mot() == ""


def test_coco_refers_to_itself():
    data = json.loads(json.dumps(made().to_coco("cup"), allow_nan=False))
    images = {image["id"]: image for image in data["images"]}
    categories = {c["id"]: c["name"] for c in data["categories"]}
    tracks, videos = ({entry["id"]: entry for entry in data[name]} for name in ("tracks", "videos"))
    assert videos[1] == {"id": 1, "name": "kitchen.mp4", "width": 64, "height": 48}
    assert [images[a["image_id"]]["frame_index"] for a in data["annotations"]] == [7, 8, 9]
    assert [images[a["image_id"]]["time"] for a in data["annotations"]] == [0.7, 0.85, 1.1]
    assert images[1]["file_name"] == "kitchen/000007.jpg"
    for note, box, score in zip(data["annotations"], BOXES, (0.9, 0.8, 0.5), strict=True):
        x, y, width, height = note["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(box)
        assert note["area"] == pytest.approx(width * height)
        assert note["score"] == pytest.approx(score)
        assert categories[note["category_id"]] == "cup"
        assert tracks[note["track_id"]]["video_id"] == note["video_id"] == 1
    empty = made(0).to_coco()
    assert (empty["images"], empty["annotations"], empty["tracks"], len(empty["videos"])) == ([], [], [], 1)


def test_supervision_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtra, match="supervision"):
        made().to_supervision()


def test_supervision_has_the_boxes_of_every_frame(monkeypatch):
    """Against the library where it is installed, else against what its constructor takes."""
    try:
        import supervision
    except ImportError:
        supervision = SimpleNamespace(Detections=lambda **columns: SimpleNamespace(**columns))
        monkeypatch.setitem(sys.modules, "supervision", supervision)
    found = made().to_supervision()
    assert list(found) == [7, 8, 9]
    assert np.concatenate([d.xyxy for d in found.values()]).tolist() == BOXES
    assert [float(d.confidence[0]) for d in found.values()] == pytest.approx([0.9, 0.8, 0.5])
    assert [float(d.data["time"][0]) for d in found.values()] == [0.7, 0.85, 1.1]
    assert {(int(d.tracker_id[0]), int(d.class_id[0])) for d in found.values()} == {(1, 0)}
    assert made(0).to_supervision() == {}


def test_nothing_that_was_measured_at_all():
    track = made(3, math.nan, (math.nan,) * 3)
    assert [row.split(",")[6] for row in track.to_mot().splitlines()] == ["0", "0", "0"]
    assert {a["score"] for a in track.to_coco()["annotations"]} == {0}
    data = json.loads(json.dumps(track.to_json(), allow_nan=False))
    assert (data["score"], data["track"][0]["score"]) == (None, None)


@pytest.mark.parametrize(("found", "boxes", "told"), [(True, 3, "boxes"), (False, 2, "lost")])
def test_columns_belong_together(found, boxes, told):
    column, timeline = torch.zeros(2), torch.zeros(0, 2)
    with pytest.raises(InputError, match=told):
        Track(found, 1.0, torch.arange(2), column, torch.zeros(boxes, 4), column, timeline, "v", "m")
