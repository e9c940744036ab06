"""The command line: finding verbs, errors as messages, and ``opsin locate`` on a small film."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from opsin.cli.main import VERBS, main
from opsin.localization.render import to_picture
from opsin.video import open_video
from opsin.vql.store import TokenStore
from tests.conformance import aligned_tiny
from tests.conformance.test_text import save_tokenizer
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
        (["FOLDER"], "none"),
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


def test_every_format_says_the_same(folder, model, tmp_path, capsys):  # noqa: F811
    files = {"--out": "a/t.json", "--mot": "a/t.txt", "--coco": "b/t.json", "--plot": "b/t.png"}
    words = [w for name, path in files.items() for w in (name, tmp_path / path)]
    assert locate(folder, "--image", tmp_path / "crop.png", "--rate", 15, *words, model=model) == 0
    rows = json.loads((tmp_path / files["--out"]).read_text())["track"]
    mot = [line.split(",") for line in (tmp_path / files["--mot"]).read_text().splitlines()]
    assert [int(line[0]) for line in mot] == [row["frame"] + 1 for row in rows]
    coco = json.loads((tmp_path / files["--coco"]).read_text())
    assert [image["frame_index"] for image in coco["images"]] == [row["frame"] for row in rows]
    for line, note, row in zip(mot, coco["annotations"], rows, strict=True):
        x1, y1, x2, y2 = row["box"]
        assert [float(v) for v in line[2:6]] == pytest.approx([x1 + 1, y1 + 1, x2 - x1, y2 - y1], abs=0.02)
        assert note["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.02)
    assert Image.open(tmp_path / files["--plot"]).size == (960, 320)
    told = capsys.readouterr().err
    assert all(f"wrote {tmp_path / path}" in told for path in files.values())


def test_several_pictures_and_a_bound(folder, model, tmp_path, capsys):  # noqa: F811
    to_picture(thing()[:, :, :20]).save(tmp_path / "left.png")
    pictures = ("--image", tmp_path / "crop.png", tmp_path / "left.png")
    assert locate(folder, *pictures, "--rate", 15, "--before", 18, "--threshold", 0, model=model) == 0
    assert json.loads(capsys.readouterr().out)["last"]["frame"] < 18
    assert locate(folder, *pictures, "--box", 1, 1, 9, 9, model=model) == 2
    assert "a box or a point each" in capsys.readouterr().err
    assert locate(folder, *pictures, "--before", 0, model=model) == 2
    assert "before is at least 1" in capsys.readouterr().err


def test_the_way_of_searching(folder, model, tmp_path, capsys):  # noqa: F811
    asked = (folder, "--image", tmp_path / "crop.png", "--tracker", "template")
    assert locate(*asked, "--preset", "ren-vql", "--rate", 5, model=model) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["tracker"]) == ("ren-vql", "template")
    assert locate(*asked, "--preset", "ren-vq", model=model) == 2
    assert '"ren-vql"' in capsys.readouterr().err
    assert locate(*asked[:-1], "sam9", model=model) == 2
    assert "sam9" in capsys.readouterr().err


def test_what_was_encoded_is_kept(folder, model, tmp_path, capsys, monkeypatch):  # noqa: F811
    asked = (folder, "--image", tmp_path / "crop.png", "--rate", 10, "--cache", tmp_path / "tokens")
    assert locate(*asked, model=model) == 0
    first = json.loads(capsys.readouterr().out)
    (store,) = (tmp_path / "tokens").iterdir()
    assert list(store.glob("*.safetensors"))
    encoded = []
    shots = TokenStore._shots
    monkeypatch.setattr(TokenStore, "_shots", lambda self, part: encoded.append(part) or shots(self, part))
    assert locate(*asked, model=model) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert not encoded
    assert locate("camera:9", *asked[1:], "--duration", 1, model=model) == 2
    assert "a file, a folder" in capsys.readouterr().err, "before a camera is opened"


@pytest.fixture(scope="module")
def words_model(tmp_path_factory):
    """A tiny CLIP as it lies on the hub, its tokeniser with it."""
    folder = tmp_path_factory.mktemp("clip")
    aligned_tiny.save("clip", folder)
    save_tokenizer(folder)
    return SimpleNamespace(folder=folder)


def test_words(folder, words_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    files = ("--sheet", tmp_path / "sheet.png", "--coco", tmp_path / "coco.json")
    asked = (folder, "--words", "red thing", "a red square", "--rate", 5, "--tracker", "template")
    assert locate(*asked, "--threshold", 0, *files, model=words_model) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["found"]) == ("words", True)
    assert 0 <= found["score"] <= 1
    assert Image.open(files[1]).size[0] > 900
    assert json.loads(files[3].read_text())["categories"][0]["name"] == "red thing, a red square"


def test_words_need_a_model_that_knows_them(folder, model, tmp_path, capsys):  # noqa: F811
    told = []
    for name in ("opsin-tiny", f"dir:{model.folder}", f"dir:{model.folder / 'backbone'}"):
        assert main(["locate", str(folder), "--words", "red thing", "--model", name, "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        told.append(err)
    assert all("words" in err and "radseg-b" in err for err in told), told
    assert main(["locate", str(folder), "--words", "red thing", "--image", str(tmp_path / "crop.png")]) == 2
    assert "image and words" in capsys.readouterr().err


def test_interruption(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("opsin.cli.locate.run", interrupted)
    assert main(["locate", "video.mp4"]) == 130
    assert "interrupted" in capsys.readouterr().err
