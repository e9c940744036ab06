"""``Track`` leaves the library: every format is read back and says the same as the track; pictures show it."""

from __future__ import annotations

import csv
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import InputError, InvalidConfig, MissingExtra
from opsin.localization import render
from opsin.types import Track
from opsin.video import open_video
from tests.test_localization import COUNT, SIZE, box_at, encoded, film

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


def followed(**more) -> Track:
    """The square of ``film`` in frames 22 to 30, as it was searched at two moments."""
    frames = torch.arange(22, 31)
    moments = [{"frame": 8, "time": 0.8, "score": 0.4}, {"frame": 24, "time": 2.4, "score": 0.9}]
    given = {
        "times": frames / 10.0, "timeline": torch.tensor([[0.0, 0.1], [0.8, 0.4], [2.4, 0.9], [3.9, -0.2]]),
        "details": {"preset": "template", "tracker": "template", "candidates": moments}, "score": 0.9, **more,
    }  # fmt: skip
    boxes = torch.tensor([box_at(i) for i in frames.tolist()], dtype=torch.float32)
    return Track(True, frames=frames, boxes=boxes, scores=torch.ones(9), video="v", model="m", size=SIZE, **given)


def counted(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a colour is: columns, in order."""
    return np.nonzero((np.asarray(picture.convert("RGB")) == colour).all(-1))[1]


def test_the_plot_marks_candidates_the_peak_and_the_track(tmp_path):
    picture = Image.open(render.timeline_plot(followed(), tmp_path / "new" / "plot.png"))
    assert picture.size == (960, 320)
    below = picture.crop((0, 30, 960, 320))  # without the legend
    left, right = 46, 948  # 0 s and 3.9 s
    at = [left + time / 3.9 * (right - left) for time in (2.2, 2.4, 3.0)]
    span = counted(below, render.SPAN)
    assert (span.min(), span.max()) == pytest.approx((at[0], at[2]), abs=2)
    peak = counted(below, render.PEAK)
    assert peak.mean() == pytest.approx(at[1], abs=1.5)
    assert len(counted(picture, render.PEAK)) > len(peak), "the legend says what it is"
    bare = Image.open(render.timeline_plot(followed(details={}), tmp_path / "bare.png"))
    assert len(counted(picture, render.CURVE)) > len(counted(bare, render.CURVE)) + 20, "rings"


@pytest.mark.parametrize(
    ("track", "peak"),
    [
        (followed(), (2.4, 0.9)),
        (followed(details={}), (2.4, 0.9)),
        (followed(details={"candidates": [{"frame": 8, "time": 0.8, "score": 0.4}]}, score=0.7), (2.4, 0.7)),
        (followed(timeline=torch.zeros(0, 2), details={}), (2.2, 0.9)),
        (made(0), None),
    ],
)
def test_the_peak_that_was_chosen(track, peak):
    moments = [(m["time"], m["score"]) for m in track.details.get("candidates", ())]
    found = render.chosen_peak(track, track.timeline.tolist(), moments)
    assert found == (None if peak is None else pytest.approx(peak))


@pytest.mark.parametrize(
    "track",
    [
        made(0),
        made(0, math.nan),
        followed(timeline=torch.zeros(0, 2)),
        followed(timeline=torch.tensor([[0.0, math.nan], [3.0, math.nan]]), score=math.nan),
        followed(timeline=torch.tensor([[0.0, 0.5]]), details={}),
        followed(timeline=torch.stack([torch.arange(90_000) / 25, torch.rand(90_000)], 1)),
    ],
)
def test_a_plot_of_little_and_of_much(track, tmp_path):
    assert Image.open(render.timeline_plot(track, tmp_path / "plot.png", size=(400, 160))).size == (400, 160)


def test_a_plot_needs_room(tmp_path):
    with pytest.raises(InvalidConfig, match="240×120"):
        render.timeline_plot(made(), tmp_path / "plot.png", size=(10, 10))
    assert not list(tmp_path.iterdir())


def test_round_numbers():
    assert render.round_numbers(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert render.round_numbers(-0.42, 1.0, 5) == [0, 0.5, 1]
    assert render.round_numbers(0, 3599, 8) == [0, 500, 1000, 1500, 2000, 2500, 3000, 3500]
    assert render.round_numbers(0, 0.003, 3) == [0, 0.001, 0.002, 0.003]


def yellow(frame: torch.Tensor) -> int:
    """Pixels of the colour that boxes are drawn in, which the film does not have."""
    red, green, blue = frame.int()
    return int(((red > 200) & (green > 150) & (blue < 90)).sum())


@pytest.mark.parametrize("around", [None, 0.5])
def test_a_clip_keeps_the_times_of_a_variable_frame_rate(tmp_path, around):
    times = np.cumsum([0.0, *np.random.default_rng(0).uniform(0.02, 0.4, COUNT - 1)]).round(3).tolist()
    source = encoded(tmp_path / "phone.mp4", film(present=()), times)
    track = followed(times=torch.tensor(times[22:31], dtype=torch.float64))
    clip = render.annotated_clip(source, track, tmp_path / "clip.mp4", around=around)
    shown = list(open_video(clip).frames())
    low, high = (0, math.inf) if around is None else (times[22] - around, times[30] + around)
    expected = [i for i, time in enumerate(times) if low <= time <= high]
    assert len(shown) == len(expected)
    assert [f.time for f in shown] == pytest.approx([times[i] - times[expected[0]] for i in expected], abs=2e-3)
    drawn = [i for i, frame in zip(expected, shown, strict=True) if yellow(frame.image) > 40]
    assert drawn == list(range(22, 31))


def test_small_boxes_are_seen_on_a_contact_sheet(tmp_path):
    """A box of 12 pixels on a frame that is shown a sixth as large."""
    frames = [np.full((1080, 1440, 3), 90, np.uint8)] * 3
    track = Track(
        True, 1.0, torch.arange(3), torch.arange(3) / 30.0, torch.tensor([[700.0, 500, 712, 512]] * 3), torch.ones(3),
        torch.tensor([[0.0, 1.0]]), "v", "m", size=(1080, 1440),
    )  # fmt: skip
    sheet = Image.open(render.contact_sheet(frames, track, tmp_path / "sheet.png"))
    assert len(counted(sheet, render.BOX)) > 3 * 20
