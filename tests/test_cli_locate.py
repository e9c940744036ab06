"""The command line: finding verbs, errors as messages, and ``opsin locate`` on a small film."""

from __future__ import annotations

import json

import pytest

from opsin.cli.main import VERBS, main
from opsin.localization.render import to_picture
from opsin.video import open_video
from tests.test_localization import SIZE, encoded, film, frames, model, thing  # noqa: F401 - fixtures
from tests.test_video import stream  # noqa: F401 - fixture


@pytest.fixture
def folder(frames, tmp_path):  # noqa: F811
    to_picture(thing()).save(tmp_path / "crop.png")
    to_picture(film()[24]).save(tmp_path / "scene.png")
    return frames[0].parent


def locate(*words, model):  # noqa: F811
    return main(["locate", *(str(w) for w in words), "--model", f"dir:{model.folder}", "--device", "cpu"])


def test_overview_and_version(capsys):
    assert main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("opsin ")
    assert main([]) == 2


@pytest.mark.parametrize(("wrong", "meant"), [("locat", "locate"), ("model", "models"), ("region", "regions")])
def test_an_unknown_verb_gets_the_near_misses(capsys, wrong, meant):
    assert main([wrong]) == 2
    assert f'"{meant}"' in capsys.readouterr().err


def test_help_of_a_verb_ends_with_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["locate", "-h"])
    assert stop.value.code == 0
    assert "opsin locate kitchen.mp4 --image mug.jpg" in capsys.readouterr().out


def test_it_writes_what_it_is_asked_for(folder, model, tmp_path, capsys):  # noqa: F811
    files = {"--out": tmp_path / "track.json", "--clip": tmp_path / "clip.mp4", "--sheet": tmp_path / "sheet.png"}
    words = [w for pair in files.items() for w in pair]
    assert locate(folder, "--image", tmp_path / "crop.png", "--rate", 15, "--json", *words, model=model) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["found"]
    assert data["track"][-1]["frame"] == pytest.approx(30, abs=1)
    assert err.startswith("found: last seen")
    assert json.loads(files["--out"].read_text())["track"] == data["track"]
    assert open_video(files["--clip"]).size == SIZE
    assert files["--sheet"].stat().st_size > 1000


def test_a_short_answer_without_json(folder, model, tmp_path, capsys):  # noqa: F811
    assert locate(folder, "--image", tmp_path / "scene.png", "--box", 58, 44, 88, 68, "--rate", 15, model=model) == 0
    data = json.loads(capsys.readouterr().out)
    assert "track" not in data
    assert data["last"]["frame"] == pytest.approx(30, abs=1)


def test_not_found_is_an_answer(folder, model, tmp_path, capsys):  # noqa: F811
    assert locate(folder, "--image", tmp_path / "crop.png", "--threshold", 5, model=model) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["found"] is False
    assert "not found: the best score is" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.mp4", "--image", "x.png"], "MissingFile"),
        (["FOLDER"], "neither"),
        (["FOLDER", "--frame", "999", "--box", "1", "1", "9", "9"], "frame 999"),
        (["FOLDER", "--frame", "9", "--box", "9", "9", "1", "1"], "InvalidPrompt"),
        (["FOLDER", "--image", "nowhere.png"], "MissingFile"),
        (["FOLDER", "--frame", "9", "--point", "900", "9"], "InvalidPrompt"),
    ],
)
def test_errors_are_messages(folder, model, words, told, capsys):  # noqa: F811
    assert locate(*(folder if w == "FOLDER" else w for w in words), model=model) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "Traceback" not in err


def test_a_live_stream_is_recorded_and_drawn_from_the_recording(stream, model, tmp_path, capsys):  # noqa: F811
    to_picture(thing()).save(tmp_path / "crop.png")
    url = stream(encoded(tmp_path / "film.ts", film()).read_bytes())
    assert locate(url, "--image", tmp_path / "crop.png", model=model) == 2
    assert "--duration" in capsys.readouterr().err
    files = {"--clip": tmp_path / "clip.mp4", "--sheet": tmp_path / "sheet.png"}
    words = [w for pair in files.items() for w in pair]
    asked = ("--image", tmp_path / "crop.png", "--rate", 10, "--threshold", 0, "--duration", 1.8)
    assert locate(url, *asked, "--json", *words, model=model) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["video"] == url
    assert data["track"][-1]["frame"] == pytest.approx(13, abs=1)
    assert len(list(open_video(files["--clip"]).frames())) == 18
    assert files["--sheet"].stat().st_size > 1000


def test_interruption(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("opsin.cli.locate.run", interrupted)
    assert main(["locate", "video.mp4"]) == 130
    assert "interrupted" in capsys.readouterr().err
