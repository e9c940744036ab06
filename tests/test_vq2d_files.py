"""VQ2D files: annotations in both forms, clips made small, answers filed, checked, submitted and reported."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin.errors import InvalidConfig, InvalidDataset, MissingFile
from opsin.video import ClipWriter, open_video
from opsin.vq2d import summary
from opsin.vq2d.annotations import Annotations
from opsin.vq2d.clips import ClipRecord, bars, prepare, reduced
from opsin.vq2d.metrics import BoxTrack
from opsin.vq2d.prediction_file import Filed, format_answers, problems, submission, validate

SIZE = (48, 64)  # of the annotated pictures


def entry(frame: int, x: float = 10, y: float = 8, width: float = 16, height: float = 12) -> dict[str, Any]:
    picture = {"original_width": SIZE[1], "original_height": SIZE[0]}
    return {"frame_number": frame, "x": x, "y": y, "width": width, "height": height, **picture}


def query(frames: range = range(4, 9), **changed: Any) -> dict[str, Any]:
    known = {"is_valid": True, "query_frame": 14, "object_title": "mug", "visual_crop": entry(12)}
    return known | {"response_track": [entry(f) for f in frames]} | changed


def tree(**clip: Any) -> dict[str, Any]:
    """Two videos of one clip each; query set 2 of the first annotation is not valid, but that of the second is."""
    first = {"annotation_uid": "a0", "query_sets": {"1": query(), "2": {"is_valid": False}, "3": query(range(2, 4))}}
    second = {"annotation_uid": "a1", "query_sets": {"1": query(range(6, 9)), "2": query(range(1, 3))}}
    third = {"annotation_uid": "a2", "query_sets": {"1": query(range(3, 4))}}
    times = {"video_start_sec": 0.0, "video_end_sec": 3.0, "clip_fps": 5.0}
    one = {"clip_uid": "c0", **times, "annotations": [first, second]} | clip
    other = {"clip_uid": "c1", **times, "video_start_sec": 1.0, "video_end_sec": 4.0, "annotations": [third]}
    videos = [{"video_uid": "v0", "clips": [one]}, {"video_uid": "v1", "clips": [other]}]
    return {"version": "1.0.5", "videos": videos}


def answers(size: tuple[int, int] = SIZE) -> list[Filed]:
    """An answer to every valid query of ``tree``, of a score that tells it."""
    ids = [("v0", "c0", 0, "1"), ("v0", "c0", 0, "3"), ("v0", "c0", 1, "1"), ("v0", "c0", 1, "2"), ("v1", "c1", 0, "1")]
    track = dict.fromkeys(range(4, 9), (10.0, 8.0, 26.0, 20.0))
    return [
        Filed(video, clip, q, BoxTrack.of(track, 0.1 * (i + 1)), size, a) for i, (video, clip, a, q) in enumerate(ids)
    ]


def video(path: Path, *, size: tuple[int, int] = SIZE, fps: float = 10.0, seconds: float = 4.0, dark: int = 0) -> Path:
    """Frame ``i`` is of grey ``40 + 4 i``, with ``dark`` black lines above and twice as many columns on the left."""
    with ClipWriter(path, fps, size) as clip:
        for i in range(round(fps * seconds)):
            image = torch.full((3, *size), 40 + 4 * (i % 50), dtype=torch.uint8)
            image[:, :dark] = 0
            image[:, :, : 2 * dark] = 0
            clip.write(image, i / fps)
    return path


def test_annotations_hand_out_valid_queries(tmp_path: Path) -> None:
    path = tmp_path / "vq_val.json"
    path.write_text(json.dumps(tree()))
    read = Annotations.load(path)
    assert [clip.name for clip in read.clips] == ["c0", "c1"]
    assert [(index, q.id) for index, q in read.clips[0].queries()] == [(0, "1"), (0, "3"), (1, "1"), (1, "2")]
    first = read.clips[0].annotations[0].queries[0]
    assert first.crop.box == (10, 8, 26, 20)
    assert first.crop.size == SIZE
    assert first.truth().frames.tolist() == [4, 5, 6, 7, 8]
    assert read.require_tree() == tree()


def test_the_list_form_is_good_for_measuring_but_not_for_the_challenge(tmp_path: Path) -> None:
    times = {"video_start_sec": 0.0, "video_end_sec": 3.0, "clip_fps": 5.0}
    flat = [
        {"metadata": {"video_uid": "v0", **times}, "clip_uid": "c0", "query_set": q, "dataset_uid": f"val_{i}"}
        | query()
        for i, q in enumerate(("1", "3", "1"))
    ]
    path = tmp_path / "val_annot.json.gz"
    path.write_bytes(gzip.compress(json.dumps(flat).encode()))
    read = Annotations.load(path)
    assert [[a.uid for a in clip.annotations] for clip in read.clips] == [["val_0", "val_1", "val_2"]]
    scores = summary.measure(read, submission(read.tree, []))
    assert len(scores.rows) == 3
    with pytest.raises(InvalidDataset, match="flat list"):
        read.require_tree()


def test_the_test_split_has_no_truth() -> None:
    hidden = tree()
    for v in hidden["videos"]:
        for a in v["clips"][0]["annotations"]:
            for q in a["query_sets"].values():
                q.pop("response_track", None)
    read = Annotations.parse(hidden)
    assert all(q.truth() is None for clip in read.clips for _, q in clip.queries())
    with pytest.raises(InvalidDataset, match="response tracks"):
        summary.measure(read, submission(hidden, []))


def test_a_clip_without_uid_is_named_by_its_times() -> None:
    read = Annotations.parse(tree(clip_uid=None))
    assert read.clips[0].name == "v0-0-3"
    filed = [Filed("v0", "v0-0-3", "1", BoxTrack.of({4: (0, 0, 8, 8)}, 0.5), SIZE, 0)]
    made = submission(read.tree, [format_answers(filed)])
    assert made["results"]["videos"][0]["clips"][0]["clip_uid"] is None
    assert made["results"]["videos"][0]["clips"][0]["predictions"][0]["query_sets"]["1"]["score"] == 0.5
    validate(read.tree, made, strict=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("videos"), 'a list "videos"'),
        (lambda t: t["videos"][0]["clips"][0].update(clip_uid="../c"), "file names"),
        (lambda t: t["videos"][0]["clips"][0].update(clip_fps=0), "video 0, clip 0 ends after"),
        (lambda t: t["videos"][1]["clips"][0].update(clip_uid="c0"), "c0 again at video 1, clip 0"),
        (lambda t: t["videos"][1]["clips"][0]["annotations"][0]["query_sets"]["1"].pop("visual_crop"),
         'video 1, clip 0, annotation 0, query set "1" has a "visual_crop"'),
        (lambda t: t["videos"][0]["clips"][0]["annotations"][1]["query_sets"]["2"]["visual_crop"].update(x="left"),
         'annotation 1, query set "2", visual crop is a number'),
    ],
)  # fmt: skip
def test_broken_annotations_are_refused_by_place(change: Any, says: str) -> None:
    broken = tree()
    change(broken)
    with pytest.raises(InvalidDataset, match=says):
        Annotations.parse(broken)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        Annotations.load(tmp_path / "none.json")
    for name in ("cut.json", "cut.json.gz"):
        (tmp_path / name).write_bytes(b'{"videos": [')
        with pytest.raises(InvalidDataset, match="whole JSON"):
            Annotations.load(tmp_path / name)


def test_a_response_track_with_a_gap_names_its_place() -> None:
    broken = tree()
    broken["videos"][1]["clips"][0]["annotations"][0]["query_sets"]["1"]["response_track"] = [entry(2), entry(4)]
    found = Annotations.parse(broken).clips[1].annotations[0].queries[0]
    with pytest.raises(InvalidDataset, match='video 1, clip 0, annotation 0, query set "1" is contiguous'):
        found.truth()


def test_answers_stay_with_their_annotation() -> None:
    made = submission(tree(), [format_answers(answers())])
    sets = made["results"]["videos"][0]["clips"][0]["predictions"]
    assert [{q: s["score"] for q, s in p["query_sets"].items()} for p in sets] == [
        {"1": pytest.approx(0.1), "3": pytest.approx(0.2)},
        {"1": pytest.approx(0.3), "2": pytest.approx(0.4)},
    ]
    validate(tree(), made, strict=True)
    guessed = format_answers([a.__class__(**{**vars(a), "annotation": None}) for a in answers()], compat="published")
    wrong = guessed["results"]["videos"][0]["clips"][0]["predictions"][0]["query_sets"]
    assert wrong["2"]["score"] == pytest.approx(0.4)  # what the published guess does with an id that was left out


def test_boxes_are_scaled_and_what_is_missing_is_no_answer() -> None:
    made = submission(tree(), [format_answers([a for a in answers((24, 16)) if a.clip_uid == "c1"])])
    box = made["results"]["videos"][1]["clips"][0]["predictions"][0]["query_sets"]["1"]["bboxes"][0]
    assert box == {"fno": 4, "x1": 40, "y1": 16, "x2": 104, "y2": 40}
    first = made["results"]["videos"][0]["clips"][0]["predictions"][0]["query_sets"]
    assert first == {"1": {"bboxes": [], "score": 0.0}, "3": {"bboxes": [], "score": 0.0}}
    validate(tree(), made, strict=True)


def test_clips_that_do_not_belong_are_refused() -> None:
    file = format_answers(answers())
    with pytest.raises(InvalidDataset, match="c0 twice"):
        submission(tree(), [file, file])
    with pytest.raises(InvalidDataset, match="c0"):
        submission({"version": "1.0.5", "videos": tree()["videos"][1:]}, [file])
    with pytest.raises(InvalidConfig, match="compat"):
        submission(tree(), [], compat="old")


def box(frame: int, left: int = 0) -> dict[str, int]:
    return {"fno": frame, "x1": left, "y1": 0, "x2": 1, "y2": 1}


def change_answer(made: dict[str, Any], **changed: Any) -> None:
    made["results"]["videos"][1]["clips"][0]["predictions"][0]["query_sets"]["1"].update(changed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: change_answer(m, score=None), 'video 1, clip 0, annotation 0, query set "1": score is None'),
        (lambda m: change_answer(m, score=float("nan")), "score is nan"),
        (lambda m: change_answer(m, bboxes={}), "bboxes is a dict"),
        (lambda m: change_answer(m, bboxes=[{"fno": 1}]), "box 0 has not the numbers"),
        (lambda m: change_answer(m, bboxes=[box(1), box(3)]), "not contiguous"),
        (lambda m: change_answer(m, bboxes=[box(14)]), "not before the query frame 14"),
        (lambda m: change_answer(m, bboxes=[box(1, 4)]), "box 0 ends before it starts"),
        (lambda m: m["results"]["videos"][1]["clips"][0]["predictions"][0].update(annotation_uid="x"), 'not "a2"'),
    ],
)
def test_strict_checks(change: Any, says: str) -> None:
    made = submission(tree(), [format_answers(answers())])
    change(made)
    assert not problems(tree(), made)
    with pytest.raises(InvalidDataset, match=says):
        validate(tree(), made, strict=True)


def test_every_problem_is_named_at_its_place() -> None:
    made = submission(tree(), [])
    made["version"] = "2"
    made["results"]["videos"][0]["clips"][0]["clip_uid"] = "c9"
    made["results"]["videos"][1]["clips"][0]["predictions"][0]["query_sets"]["7"] = {}
    made["results"]["videos"][1]["clips"][0]["predictions"][0]["query_sets"].pop("1")
    found = problems(tree(), made)
    assert len(found) == 3
    assert 'video 0, clip 0: clip_uid is "c9", not "c0"' in found
    assert "video 1, clip 0, annotation 0, query_sets: no 1" in found
    assert problems(tree(), []) == ["the file: a list in place of an object"]
    with pytest.raises(InvalidDataset, match="video 0, clip 0"):
        validate(tree(), made)


@pytest.mark.parametrize(
    ("size", "small"),
    [((1080, 1920), (288, 512)), ((1440, 1920), (288, 384)), ((1080, 2560), (216, 512)), ((1920, 1080), (512, 288)),
     ((200, 900), (200, 900)), ((288, 700), (288, 700)), ((289, 300), (288, 298))],
)  # fmt: skip
def test_clips_are_reduced_as_published(size: tuple[int, int], small: tuple[int, int]) -> None:
    assert reduced(size) == small


def test_black_bars_are_at_most_a_fifth_a_side() -> None:
    rows, columns = np.full(100, 200, np.uint8), np.full(50, 200, np.uint8)
    rows[:7], rows[-30:], columns[:3] = 31, 0, 31
    assert bars(rows, columns) == (3, 7, 50, 80)
    assert bars(np.full(100, 32, np.uint8), columns * 0) == (10, 0, 40, 100)


def record() -> ClipRecord:
    return ClipRecord(
        name="c", video_uid="v", source="v.mp4", fps=5.0, expected=10, frames=10, repeated=0, source_size=(100, 200),
        offset=(20, 10), kept=(80, 160), size=(40, 80), trimmed=True,
    )  # fmt: skip


def test_boxes_go_both_ways_through_bars_and_scale() -> None:
    boxes = torch.tensor([[20.0, 10.0, 180.0, 90.0], [60.0, 50.0, 100.0, 70.0]])
    assert record().to_clip(boxes, (100, 200)).tolist() == [[0, 0, 80, 40], [20, 20, 40, 30]]
    twice = record().to_clip(boxes * 2, (200, 400))  # annotated at twice the size of the file
    assert twice.tolist() == [[0, 0, 80, 40], [20, 20, 40, 30]]
    torch.testing.assert_close(record().to_picture(twice, (200, 400)), boxes * 2)


def test_prepare_makes_small_clips_once(tmp_path: Path) -> None:
    folder, out = tmp_path / "full_scale", tmp_path / "clips"
    video(folder / "v0.mp4", dark=6)
    video(folder / "v1.mp4", size=(400, 600), seconds=2.5)
    clips = Annotations.parse(tree()).clips
    report = prepare(clips, out, videos=folder)
    assert (report.made, report.done, report.missing, report.failed) == (["c0", "c1"], [], [], {})
    first = ClipRecord.load(out / "c0.json")
    assert (first.offset, first.kept, first.source_size) == ((12, 6), (42, 52), SIZE)
    assert (first.frames, first.expected, first.repeated) == (15, 15, 0)
    with open_video(out / "c0.mp4") as reader:
        shown = [round(float(f.image[:, 20:30, 10:20].float().mean())) for f in reader.frames()]
        assert reader.size == (42, 52)
    assert shown == pytest.approx([40 + 8 * i for i in range(15)], abs=4)  # every second frame of the video
    second = ClipRecord.load(out / "c1.json")
    assert second.size == (288, 432)
    assert (second.frames, second.expected) == (8, 15)  # the video ends before the clip does
    with open_video(out / "c1.mp4") as reader:
        assert round(float(reader.read_frame(0).image.float().mean())) == pytest.approx(80, abs=4)  # starts at 1 s
    stamp = (out / "c0.mp4").stat().st_mtime_ns
    again = prepare(clips, out, videos=folder)
    assert (again.made, again.done) == ([], ["c0", "c1"])
    assert (out / "c0.mp4").stat().st_mtime_ns == stamp
    assert prepare(clips, out, videos=folder, trim=False).made == ["c0", "c1"]
    assert ClipRecord.load(out / "c0.json").kept == SIZE
    assert sorted(p.name for p in out.iterdir()) == ["c0.json", "c0.mp4", "c1.json", "c1.mp4"]


def test_frames_are_those_nearest_to_the_clips_own_ticks(tmp_path: Path) -> None:
    known = tree(video_start_sec=1.13, video_end_sec=3.13)  # the ticks of a video would lie 70 ms beside
    video(tmp_path / "v/v0.mp4", fps=25)
    prepare(Annotations.parse(known).clips[:1], tmp_path / "out", videos=tmp_path / "v")
    with open_video(tmp_path / "out/c0.mp4") as reader:
        grey = [float(f.image.float().mean()) for f in reader.frames()]
    nearest = [round((1.13 + n / 5) * 25) for n in range(10)]
    assert grey == pytest.approx([40 + 4 * (i % 50) for i in nearest], abs=2.5)


def test_what_cannot_be_prepared_is_reported(tmp_path: Path) -> None:
    folder, out = tmp_path / "canonical", tmp_path / "clips"
    folder.mkdir()
    (folder / "c0.mp4").write_bytes(b"not a video")
    report = prepare(Annotations.parse(tree()).clips, out, canonical=folder)
    assert list(report.failed) == ["c0"]
    assert report.missing == ["c1"]
    assert not list(out.glob("*")) if out.exists() else True
    with pytest.raises(MissingFile):
        prepare([], out, videos=tmp_path / "nowhere")
    with pytest.raises(InvalidConfig, match="neither"):
        prepare([], out)
    with pytest.raises(InvalidConfig, match="numbered from 1"):
        prepare([], out, canonical=folder, shard=(3, 2))


def test_frames_that_are_lost_are_held_so_that_numbers_stay(tmp_path: Path) -> None:
    path = tmp_path / "videos/v0.mp4"
    with ClipWriter(path, 10, SIZE) as clip:  # nothing is shown from 1 s to 2 s
        for i in [*range(10), *range(20, 40)]:
            clip.write(torch.full((3, *SIZE), 40 + 4 * i, dtype=torch.uint8), i / 10)
    report = prepare(Annotations.parse(tree()).clips[:1], tmp_path / "out", videos=path.parent)
    assert not report.failed
    known = ClipRecord.load(tmp_path / "out/c0.json")
    assert known.frames == 15
    assert 3 <= known.repeated <= 5
    with open_video(tmp_path / "out/c0.mp4") as reader:
        grey = [float(f.image.float().mean()) for f in reader.frames()]
    assert grey[12] == pytest.approx(40 + 4 * 24, abs=4)
    assert grey[7] == pytest.approx(40 + 4 * 9, abs=8)


def test_a_record_that_is_damaged_means_that_the_clip_is_made_again(tmp_path: Path) -> None:
    video(tmp_path / "v/v0.mp4")
    clips = Annotations.parse(tree()).clips[:1]
    prepare(clips, tmp_path / "out", videos=tmp_path / "v")
    (tmp_path / "out/c0.json").write_text('{"name": "c0"}')
    with pytest.raises(InvalidDataset, match="beside a clip"):
        ClipRecord.load(tmp_path / "out/c0.json")
    assert prepare(clips, tmp_path / "out", videos=tmp_path / "v").made == ["c0"]
    assert ClipRecord.load(tmp_path / "out/c0.json").frames == 15


def test_the_report_stands_beside_what_is_published(tmp_path: Path) -> None:
    made = submission(tree(), [format_answers(answers())])
    full = summary.summarise(Annotations.parse(tree()), made, intervals=10, draws=10)
    assert (full["queries"], full["answered"], full["videos"]) == (5, 5, 2)
    assert full["per_query"][0]["stiou"] == pytest.approx(1.0)
    assert full["measures"]["success"] == pytest.approx(2 / 5)
    assert set(full["intervals"]) == set(summary.COLUMNS)
    path = summary.write(full, tmp_path / "report.json")
    assert json.loads(path.read_text())["published_validation"]["SiamRCNN"]["stAP@0.25"] == 0.153
    text = path.with_suffix(".md").read_text()
    assert "Negative Frames Matter" in text
    assert "| medium-medium |" in text
    with pytest.raises(InvalidConfig, match="json"):
        summary.write(full, tmp_path / "report.txt")
    worse = copy.deepcopy(made)
    worse["results"]["videos"].pop()
    with pytest.raises(InvalidDataset, match="1 videos in place of 2"):
        summary.summarise(Annotations.parse(tree()), worse)
