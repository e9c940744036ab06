"""A VQ2D run from prepared clips to the submission: answers, failures, shards, a kill in the middle, the commands."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import opsin.localization
from opsin.cli.eval_vq2d import add_vq2d_arguments, run_vq2d
from opsin.errors import IncompatibleModel, InvalidConfig, InvalidImage, MissingFile
from opsin.types import Track
from opsin.video import ClipWriter
from opsin.vq2d.annotations import Annotations
from opsin.vq2d.clips import prepare
from opsin.vq2d.metrics import BoxTrack
from opsin.vq2d.predict import ClipTask, load_folder, predict, searcher, task_of
from opsin.vq2d.prediction_file import validate
from opsin.vq2d.summary import measure
from tests.test_localization import COUNT, SIZE, box_at, film, model  # noqa: F401 - a fixture
from tests.test_vq2d_files import entry, query, tree, video


def many(count: int) -> dict[str, Any]:
    """``count`` clips of one query each, all of the video v0."""
    times = {"video_start_sec": 0.0, "video_end_sec": 2.0, "clip_fps": 5.0}
    clips = [
        {"clip_uid": f"c{i:02}", **times, "annotations": [{"annotation_uid": f"a{i}", "query_sets": {"1": query()}}]}
        for i in range(count)
    ]
    for clip in clips:
        clip["annotations"][0]["query_sets"]["1"]["visual_crop"]["frame_number"] = 9
    return {"version": "1.0.5", "videos": [{"video_uid": "v0", "clips": clips}]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared clips of ``tree``, cut out of black bars."""
    folder = tmp_path_factory.mktemp("vq2d")
    video(folder / "videos/v0.mp4", dark=4)
    video(folder / "videos/v1.mp4")
    report = prepare(Annotations.parse(tree()).clips, folder / "clips", videos=folder / "videos")
    assert not report.failed
    return folder / "clips"


def truthful(task: ClipTask) -> list[BoxTrack]:
    """Answers every query with the truth, moved into the prepared clip by hand: bars of 8 and 4 pixels were cut off."""
    bar = 8, 4
    shift = (bar[0], bar[1], bar[0], bar[1]) if task.record.trimmed and task.record.offset != (0, 0) else (0, 0, 0, 0)
    found = []
    for asked in task.queries:
        truth = next(q for a, q in task.clip.queries() if (a, q.id) == (asked.annotation, asked.id)).truth()
        found.append(BoxTrack(truth.frames, truth.boxes - torch.tensor(shift), 0.9))
    return found


def test_answers_are_moved_back_into_the_annotated_picture(small: Path, tmp_path: Path) -> None:
    known = Annotations.parse(tree())
    report = predict(known.clips, truthful, tmp_path, prepared=small)
    assert (report.made, report.failed) == (["c0", "c1"], {})
    made = load_folder(tmp_path, known)
    validate(tree(), made, strict=True)
    assert measure(known, made).compute() == dict.fromkeys(
        ("success", "recovery", "tAP@0.25", "tAP", "stAP@0.25", "stAP"), pytest.approx(1.0)
    )


def test_a_task_gives_the_crop_in_pixels_of_the_clip(small: Path) -> None:
    task = task_of(Annotations.parse(tree()).clips[0], small)
    assert task.record.offset == (8, 4)
    assert [(q.annotation, q.id) for q in task.queries] == [(0, "1"), (0, "3"), (1, "1"), (1, "2")]
    assert task.queries[0].box == (2, 4, 18, 16)
    assert (task.queries[0].frame, task.queries[0].query_frame) == (12, 14)


def test_answers_end_before_the_query_frame_and_inside_the_picture(small: Path, tmp_path: Path) -> None:
    def everywhere(task: ClipTask) -> list[BoxTrack]:
        return [BoxTrack.of(dict.fromkeys(range(10, 15), (-5.0, -5.0, 500.0, 500.0)), 0.5) for _ in task.queries]

    known = Annotations.parse(tree())
    predict(known.clips, everywhere, tmp_path, prepared=small)
    made = load_folder(tmp_path, known)
    validate(tree(), made, strict=True)
    boxes = made["results"]["videos"][0]["clips"][0]["predictions"][0]["query_sets"]["1"]["bboxes"]
    assert [b["fno"] for b in boxes] == [10, 11, 12, 13]
    assert boxes[0] == {"fno": 10, "x1": 8, "y1": 4, "x2": 64, "y2": 48}


def test_questions_that_cannot_be_asked_get_no_answer(small: Path, tmp_path: Path) -> None:
    odd = tree()
    sets = odd["videos"][0]["clips"][0]["annotations"][0]["query_sets"]
    sets["1"]["visual_crop"] = entry(12, x=500)  # outside the picture
    sets["3"]["query_frame"] = 0  # nothing lies before it
    odd["videos"][0]["clips"][0]["annotations"][1]["query_sets"]["1"]["visual_crop"] = entry(99)  # after the end
    known = Annotations.parse(odd)
    report = predict(known.clips, truthful, tmp_path, prepared=small)
    assert report.made == ["c0", "c1"]
    file = json.loads((tmp_path / "clips/c0.json").read_text())
    assert len(file["details"]["refused"]) == 3
    assert "cover at least one pixel" in file["details"]["refused"]['video 0, clip 0, annotation 0, query set "1"']
    sets = load_folder(tmp_path, known)["results"]["videos"][0]["clips"][0]["predictions"]
    assert sets[0]["query_sets"]["1"] == {"bboxes": [], "score": 0.0}
    assert sets[1]["query_sets"]["2"]["bboxes"]


def test_a_clip_that_fails_does_not_stop_the_run(small: Path, tmp_path: Path) -> None:
    asked: Counter[str] = Counter()

    def brittle(task: ClipTask) -> list[BoxTrack | None]:
        asked[task.clip.name] += 1
        if task.clip.name == "c0" and asked["c0"] == 1:
            raise InvalidImage("An image", got="nothing")
        return [None for _ in task.queries]

    clips = Annotations.parse(tree()).clips
    first = predict(clips, brittle, tmp_path, prepared=small)
    assert (first.made, list(first.failed)) == (["c1"], ["c0"])
    assert first.failed["c0"].startswith("InvalidImage: An image")
    second = predict(clips, brittle, tmp_path, prepared=small)
    assert (second.made, second.done, second.failed) == (["c0"], ["c1"], {})
    assert asked == {"c0": 2, "c1": 1}


def test_what_is_wrong_with_the_whole_run_stops_it(small: Path, tmp_path: Path) -> None:
    def wrong_model(task: ClipTask) -> list[BoxTrack]:
        raise IncompatibleModel("A video is searched with a region model", got="a codec")

    clips = Annotations.parse(tree()).clips
    with pytest.raises(IncompatibleModel):
        predict(clips, wrong_model, tmp_path, prepared=small)
    with pytest.raises(MissingFile, match="prepared clips"):
        predict(clips, truthful, tmp_path, prepared=tmp_path / "nowhere")
    with pytest.raises(MissingFile, match="answers of clips"):
        load_folder(tmp_path, Annotations.parse(tree()))
    predict(clips, truthful, tmp_path, prepared=small, details={})
    with pytest.raises(InvalidConfig, match="one way of answering"):
        predict(clips, truthful, tmp_path, prepared=small, details={"model": "other"})


def test_a_missing_clip_and_a_short_list_of_answers_are_reported(small: Path, tmp_path: Path) -> None:
    known = tree()
    known["videos"][1]["clips"][0]["clip_uid"] = "c7"
    report = predict(Annotations.parse(known).clips, lambda task: [], tmp_path, prepared=small)
    assert "4 queries have as many answers" in report.failed["c0"]
    assert "opsin eval vq2d prepare" in report.failed["c7"]


KILLED = """
import os, sys, time
from pathlib import Path
from opsin.vq2d.annotations import Annotations
from opsin.vq2d.metrics import BoxTrack
from opsin.vq2d.predict import predict

annotations, prepared, out, log, shard = sys.argv[1:]

def slow(task):
    def note(word):
        with open(log, "a") as file:
            file.write(f"{word} {task.clip.name}\\n")
    note("begun")
    time.sleep(0.15)
    note("found")
    return [BoxTrack.of({4: (1, 1, 9, 9)}, 0.5) for _ in task.queries]

shard = tuple(int(v) for v in shard.split("/"))
report = predict(Annotations.load(annotations).clips, slow, out, prepared=prepared, shard=shard)
print(len(report.made), len(report.done), len(report.failed))
"""


def test_a_run_that_is_killed_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    known = many(16)
    (tmp_path / "vq.json").write_text(json.dumps(known))
    video(tmp_path / "videos/v0.mp4", seconds=2.2)
    clips = Annotations.parse(known).clips
    assert len(prepare(clips, tmp_path / "clips", videos=tmp_path / "videos").made) == 16
    log, out = tmp_path / "log", tmp_path / "answers"

    def start(shard: str) -> subprocess.Popen[str]:
        given = [str(tmp_path / "vq.json"), str(tmp_path / "clips"), str(out), str(log), shard]
        return subprocess.Popen([sys.executable, "-c", KILLED, *given], stdout=subprocess.PIPE, text=True)

    run = start("1/2")
    until = time.monotonic() + 120
    while len(list((out / "clips").glob("*.json"))) < 3:
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    finished = {p.stem for p in (out / "clips").glob("[!.]*.json")}
    assert 3 <= len(finished) < 8
    for shard in ("1/2", "2/2"):
        last = start(shard)
        assert last.communicate(timeout=120)[0].split() == (
            [str(8 - len(finished)), str(len(finished)), "0"] if shard == "1/2" else ["8", "0", "0"]
        )
    begun = Counter(line.split()[1] for line in log.read_text().splitlines() if line.startswith("begun"))
    assert set(begun) == {clip.name for clip in clips}
    twice = [name for name, times in begun.items() if times > 1]
    assert len(twice) <= 1  # the one under way
    assert not set(twice) & finished
    made = load_folder(out, Annotations.parse(known))
    validate(known, made, strict=True)
    answered = [c["predictions"][0]["query_sets"]["1"] for c in made["results"]["videos"][0]["clips"]]
    assert [len(a["bboxes"]) for a in answered] == [1] * 16


class FakeSearch:
    """Stands for ``VideoSearch``: says what it was asked, and finds a box at a frame before the end."""

    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, path: Path, **options: Any) -> None:
        self.tracker = None
        self.opened.append({"path": Path(path).name, **options})

    def __enter__(self) -> FakeSearch:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def locate_all(self, queries: Sequence[dict[str, Any]], *, threshold: float | None = None) -> list[Track]:
        self.opened[-1]["asked"] = list(queries)
        if len(queries) > 1:
            raise InvalidImage("One question is bad", got="of several")
        return [self.locate(**q) for q in queries]

    def locate(self, *, threshold: float | None = None, **asked: Any) -> Track:
        if asked["before"] == 13:
            raise InvalidImage("This one is bad", got=asked)
        frames = torch.arange(asked["before"] - 3, asked["before"])
        boxes = torch.tensor([asked["box"]] * 3)
        column = torch.zeros(3)
        return Track(True, 0.7, frames, column.double(), boxes, column, torch.zeros((0, 2)), "v", "m")


def test_the_queries_of_a_clip_are_asked_together_and_a_bad_one_costs_only_itself(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opsin.localization, "VideoSearch", FakeSearch, raising=False)
    FakeSearch.opened.clear()
    odd = tree()
    odd["videos"][0]["clips"][0]["annotations"][1]["query_sets"]["2"]["query_frame"] = 13
    known = Annotations.parse(odd)
    locate = searcher(model=object(), tracker="auto", cache=tmp_path / "tokens")
    report = predict(known.clips, locate, tmp_path, prepared=small)
    assert not report.failed
    assert [o["path"] for o in FakeSearch.opened] == ["c0.mp4", "c1.mp4"]
    assert [o["tracker"] for o in FakeSearch.opened] == ["auto", "template"]  # found out once
    assert FakeSearch.opened[0]["rate"] == 5.0
    assert FakeSearch.opened[0]["asked"][0] == {"frame": 12, "box": (2.0, 4.0, 18.0, 16.0), "before": 14}
    sets = load_folder(tmp_path, known)["results"]["videos"][0]["clips"][0]["predictions"]
    assert [b["fno"] for b in sets[0]["query_sets"]["1"]["bboxes"]] == [11, 12, 13]
    assert sets[0]["query_sets"]["1"]["bboxes"][0] == {"fno": 11, "x1": 10, "y1": 8, "x2": 26, "y2": 20}
    assert sets[1]["query_sets"]["2"]["bboxes"] == []


def test_a_real_search_finds_the_object_between_black_bars(model: Any, tmp_path: Path) -> None:  # noqa: F811
    bar = 12
    (height, width), picture = SIZE, (SIZE[0] + 2 * bar, SIZE[1])
    with ClipWriter(tmp_path / "videos/v0.mp4", 5, picture) as clip:
        for image in film(present=((6, 14), (22, 31), (COUNT - 1, COUNT))):
            framed = torch.zeros(3, *picture)
            framed[:, bar : bar + height] = image
            clip.write(framed)

    def shown(frame: int) -> dict[str, Any]:
        x1, y1, x2, y2 = box_at(frame)
        size = {"original_width": width, "original_height": picture[0]}
        return {"frame_number": frame, "x": x1, "y": y1 + bar, "width": x2 - x1, "height": y2 - y1} | size

    asked = {"is_valid": True, "query_frame": COUNT - 1, "object_title": "thing", "visual_crop": shown(COUNT - 1)}
    asked["response_track"] = [shown(f) for f in range(22, 31)]
    sets = {"1": asked, "2": asked | {"query_frame": 20, "response_track": [shown(f) for f in range(6, 14)]}}
    clip = {"clip_uid": "c0", "video_start_sec": 0.0, "video_end_sec": COUNT / 5, "clip_fps": 5.0}
    clip["annotations"] = [{"annotation_uid": "a0", "query_sets": sets}]
    known = Annotations.parse({"version": "1.0.5", "videos": [{"video_uid": "v0", "clips": [clip]}]})
    assert prepare(known.clips, tmp_path / "clips", videos=tmp_path / "videos").made == ["c0"]
    answers = tmp_path / "answers"
    locate = searcher(model=model, tracker="template", threshold=0.1)
    report = predict(known.clips, locate, answers, prepared=tmp_path / "clips")
    assert not report.failed
    scores = measure(known, load_folder(answers, known))
    assert all(row.answers[0].stiou > 0.3 for row in scores.rows), scores.rows


def command(*words: Any) -> int:
    parser = argparse.ArgumentParser()
    add_vq2d_arguments(parser)
    return run_vq2d(parser.parse_args([str(w) for w in words]))


def test_the_commands_from_videos_to_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opsin.localization, "VideoSearch", FakeSearch, raising=False)
    monkeypatch.setattr("opsin.models.load", lambda *args, **options: object())
    known = tmp_path / "vq_val.json"
    known.write_text(json.dumps(tree()))
    video(tmp_path / "videos/v0.mp4")
    given = ["--annotations", known]
    clips, out, file = tmp_path / "clips", tmp_path / "answers", tmp_path / "predictions.json"
    assert command("prepare", *given, "--videos", tmp_path / "videos", "--out", clips) == 1
    assert "c1: no video" in capsys.readouterr().err
    video(tmp_path / "videos/v1.mp4")
    assert command("prepare", *given, "--videos", tmp_path / "videos", "--out", clips, "--shard", "2/2") == 0
    for shard in ("1/2", "2/2"):
        assert command("predict", *given, "--clips", clips, "--out", out, "--shard", shard) == 0
    assert command("submit", *given, "--predictions", out, "--out", file) == 0
    assert command("validate", *given, "--predictions", file) == 0
    capsys.readouterr()
    assert command("metrics", *given, "--predictions", file, "--out", tmp_path / "report.json", "--json") == 0
    full = json.loads(capsys.readouterr().out)
    assert full["answered"] == 5
    assert command("metrics", *given, "--predictions", out) == 0
    assert "Improved Baselines" in capsys.readouterr().err
    assert (tmp_path / "report.md").is_file()
    with pytest.raises(SystemExit):
        command("predict", *given, "--clips", clips, "--out", out, "--shard", "3/2")
