"""Readers of annotated data, and ``opsin eval`` end to end on small drawn collections and a small random model."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import backbones
from opsin.cards import ModelCard
from opsin.cli import eval as verb
from opsin.errors import InputError, InvalidDataset, MissingFile
from opsin.evaluation import datasets, grouping, localization, retrieval
from opsin.localization import VideoSearch
from opsin.regions import RegionEncoder, RegionModel
from opsin.vql.preset import PRESETS, Preset
from opsin.vql.store import TokenStore

DIM = 32
VIT = {
    "model_type": "vit", "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "image_size": 32, "patch_size": 8,
}  # fmt: skip
COLOURS = {1: (200, 40, 40), 2: (40, 200, 40), 3: (40, 40, 200)}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    backbone = backbones.from_config(VIT, device="cpu")
    card = ModelCard(
        name="drawn",
        kind="regions",
        family="ren",
        backbone="backbone",
        dim=DIM,
        image_size=32,
        grid_size=6,
        threshold=0.9,
    )
    folder = tmp_path_factory.mktemp("model")
    RegionModel(backbone, RegionEncoder(DIM).eval(), card).save_pretrained(folder, embed_backbone=True)
    return f"dir:{folder}"


def picture(seed: int, order: tuple[int, int], size: tuple[int, int] = (40, 60)) -> tuple[np.ndarray, np.ndarray]:
    """Two flat halves with noise, ``(H, W, 3)``, and the category of every pixel."""
    generator = np.random.default_rng(seed)
    categories = np.full(size, order[0])
    categories[:, size[1] // 2 :] = order[1]
    colours = np.array([COLOURS.get(i, (0, 0, 0)) for i in range(4)])
    pixels = colours[categories] + generator.integers(-20, 20, (*size, 3))
    return pixels.clip(0, 255).astype(np.uint8), categories


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO panoptic: two images a split, halves of different colour, one crowd segment that does not count."""
    root = tmp_path_factory.mktemp("data") / "coco128_panoptic"
    kinds = [{"id": i, "name": n, "isthing": int(i < 3)} for i, n in ((1, "red"), (2, "green"), (3, "blue"))]
    for split, seed in (("train2017", 0), ("val2017", 10)):
        annotations = root / "panoptic_segmentation/annotations"
        (annotations / f"panoptic_{split}").mkdir(parents=True)
        (root / "images" / split).mkdir(parents=True)
        notes = []
        for i, order in enumerate(((1, 2), (2, 3))):
            pixels, categories = picture(seed + i, order)
            ids = categories * 300  # needs the second byte
            ids[:3, :3] = 7
            name = f"{i:012d}"
            Image.fromarray(pixels).save(root / "images" / split / f"{name}.jpg", quality=95)
            coded = np.stack([ids % 256, ids // 256, ids * 0], -1).astype(np.uint8)
            Image.fromarray(coded).save(annotations / f"panoptic_{split}" / f"{name}.png")
            info = [{"id": c * 300, "category_id": c, "iscrowd": 0} for c in order]
            info.append({"id": 7, "category_id": 1, "iscrowd": 1})
            notes.append({"file_name": f"{name}.png", "image_id": i, "segments_info": info})
        content = {"categories": kinds, "annotations": notes[::-1], "images": []}
        (annotations / f"panoptic_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def bsds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "bsds500"
    for split in ("train", "val"):
        for kind in ("images", "segments"):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            pixels, categories = picture(i, (1, 3), (48, 64))
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.jpg", quality=95)
            for k in range(2):
                labels = categories.copy() if k == 0 else categories[::2, ::2]  # the second at half size
                Image.fromarray(labels.astype(np.uint8)).save(root / "segments" / split / f"{i}_{k}.png")
    return root


@pytest.fixture(scope="module")
def vql(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos in which a patterned square appears late, and a query picture of it."""
    root = tmp_path_factory.mktemp("data") / "vql"
    entries = []
    for name, seed in (("one", 1), ("two", 2)):
        generator = np.random.default_rng(seed)
        thing = generator.integers(60, 255, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
        (root / name / "frames").mkdir(parents=True)
        frames, response = [], {}
        for i in range(13):
            pixels = generator.integers(0, 50, (48, 64, 3))
            if i >= 7:
                pixels[12:28, 10 + i : 26 + i] = thing
            path = f"{name}/frames/{i:05d}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(root / path, quality=95)
            if i < 12:
                frames.append(path)
                if i >= 7:
                    response[str(i)] = [10 + i, 12, 16, 16]
        query = {"frame": f"{name}/frames/00012.jpg", "box_xywh": [22, 12, 16, 16], "object": "square"}
        entries.append({"id": f"{name}_0", "query": query, "frames": frames, "response": response})
    (root / "episodes.json").write_text(json.dumps(entries))
    return root


def evaluate(*words: str) -> tuple[int, dict]:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    args = parser.parse_args([*words, "--device", "cpu"])
    return verb.run(args), json.loads(Path(args.out).read_text())


def test_panoptic_segments_are_read(coco: Path) -> None:
    records = datasets.coco_panoptic(coco, "val2017")
    assert [r.image_path.stem for r in records] == ["000000000000", "000000000001"]
    assert [(s.id, s.category, s.is_thing) for s in records[1].segments] == [(600, 2, True), (900, 3, False)]
    masks = records[0].masks()
    assert masks.shape == (2, 40, 60)
    assert masks.sum((1, 2)).tolist() == [1200 - 9, 1200]
    assert datasets.category_names(coco, "val2017") == {1: "red", 2: "green", 3: "blue"}
    assert tuple(records[0].image().shape) == (3, 40, 60)


def test_human_segmentations_are_read(bsds: Path) -> None:
    records = datasets.human_segmentations(bsds, "val")
    assert [len(r.label_paths) for r in records] == [2, 2]
    full, half = records[0].labels()
    assert half.shape == (24, 32)
    assert torch.equal(datasets.fit_labels(half, (48, 64)), full)


def test_episodes_are_read(vql: Path) -> None:
    first = datasets.episodes(vql)[0]
    assert (first.id, first.group, len(first.frames)) == ("one_0", "one", 12)
    assert first.query_box == (22, 12, 38, 28)
    assert list(first.response) == [7, 8, 9, 10, 11]
    assert first.response[8] == (18, 12, 34, 28)
    assert tuple(localization.query_crop(first).shape) == (3, 16, 16)


def test_damaged_data_is_a_typed_error(tmp_path: Path, coco: Path) -> None:
    with pytest.raises(MissingFile, match="COCO panoptic folder"):
        datasets.coco_panoptic(tmp_path, "val2017")
    with pytest.raises(MissingFile, match="photographs"):
        datasets.human_segmentations(tmp_path, "val")
    with pytest.raises(MissingFile, match="annotation file"):
        datasets.episodes(tmp_path)
    (tmp_path / "episodes.json").write_text("[{]")
    with pytest.raises(InvalidDataset, match="is JSON"):
        datasets.episodes(tmp_path)
    (tmp_path / "episodes.json").write_text('[{"id": "a"}]')
    with pytest.raises(InvalidDataset, match="Every episode"):
        datasets.episodes(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations/panoptic_val2017.json").write_text('{"annotations": [{}]}')
    with pytest.raises(InvalidDataset, match="categories"):
        datasets.coco_panoptic(tmp_path, "val2017")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InvalidDataset, match="readable"):
        datasets.read_labels(broken)
    with pytest.raises(MissingFile, match="label picture"):
        datasets.read_labels(tmp_path / "absent.png")


def test_empty_measurements_are_refused(saved_model: str) -> None:
    model = RegionModel.from_pretrained(saved_model, device="cpu")
    for call in (retrieval.evaluate, grouping.evaluate):
        with pytest.raises(InputError):
            call(model, [], [])
    with pytest.raises(InputError, match="at least one episode"):
        localization.evaluate(model, [])


def test_eval_retrieval(saved_model: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "r.json")
    code, found = evaluate("retrieval", "--model", saved_model, "--data", str(coco.parent), "--out", out, "--json")
    assert code == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (found["measure"], found["model"], found["queries"], found["gallery"]) == ("retrieval", "drawn", 4, 4)
    assert found["descriptors"][retrieval.COLOUR]["top1"]["all"]["mean"] == 1.0  # the colours say it all
    assert set(found["region_token_minus"]) == set(found["descriptors"]) - {retrieval.REGION}
    assert set(found["top1_per_class"]) == {"red", "green", "blue"}
    assert found["environment"]["seed"] == 0


def test_eval_retrieval_leaves_small_segments_out(saved_model: str, coco: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "r.json")
    words = ("--model", saved_model, "--data", str(coco), "--out", out, "--min-area", "1200")
    assert evaluate("retrieval", *words)[1]["queries"] == 2  # the crowd covers a corner of the others


def test_eval_grouping(saved_model: str, bsds: Path, tmp_path: Path) -> None:
    code, found = evaluate("grouping", "--model", saved_model, "--data", str(bsds), "--out", str(tmp_path / "g.json"))
    rows = found["groupings"]
    assert code == 0
    assert (found["images"], found["images_chosen_on"]) == (2, 2)
    assert rows["colour of superpixels"]["balanced"]["mean"] > 0.9
    assert rows["SLIC superpixels"]["balanced"]["mean"] == 0.5
    assert rows["SLIC superpixels"]["apart"]["mean"] == 1.0
    assert rows["all together"]["together"]["mean"] == 1.0
    assert rows["people against each other"]["balanced"]["mean"] == 1.0
    assert f"regions: {found['best_method']}" in rows


@pytest.mark.parametrize("extra", [(), ("--context",)])
def test_eval_locate(saved_model: str, vql: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    words = ("--model", saved_model, "--data", str(vql), "--out", str(tmp_path / "l.json"), "--rate", "30", *extra)
    code, found = evaluate("locate", *words)
    assert code == 0
    assert (found["episodes"], found["videos"], found["frames"]) == (2, 2, 24)
    assert found["query"] == ("frame and box" if extra else "crop")
    assert found["methods"]["template matching"]["success"]["mean"] == 1.0
    assert set(found["methods"]["opsin locate"]) > {"success", "stAP@0.25", "tAP@0.25", "recovery", "answered"}
    assert found["per_episode"]["one_0"]["truth"] == [7, 11]


def test_the_folder_of_episodes_is_the_same_measure(saved_model: str, vql: Path, tmp_path: Path) -> None:
    options = ("--model", saved_model, "--rate", "30", "--tracker", "template")
    _, one = evaluate("locate", "--data", str(vql), *options, "--out", str(tmp_path / "a.json"))
    _, two = evaluate("vql-folder", str(vql.parent), *options, "--out", str(tmp_path / "b.json"))
    for report in (one, two):
        for name in ("environment", "seconds_locating", "seconds"):
            assert report.pop(name)
    assert one == two
    assert (one["measure"], one["preset"], one["tracker"]) == ("locate", "template", "template")


@pytest.mark.parametrize(
    ("preset", "rows", "given"),
    [
        ("template", 4, "+ further rounds"),
        ("ren-vql", 3, "+ further rounds"),
    ],
)
def test_an_ablation_has_a_row_per_stage_and_encodes_once(
    saved_model: str, vql: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, rows: int, given: str,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    encoded, opened, folders = [], [], set()
    shots, made = TokenStore._shots, VideoSearch.__init__
    monkeypatch.setattr(TokenStore, "_shots", lambda self, part: encoded.extend(part) or shots(self, part))

    def opens(self: VideoSearch, *args: object, **options: object) -> None:
        made(self, *args, **options)
        opened.append(self.preset)
        folders.add(self.store.folder)

    monkeypatch.setattr(VideoSearch, "__init__", opens)
    words = ("--model", saved_model, "--rate", "6", "--preset", preset, "--tracker", "template", "--ablation")
    code, found = evaluate("vql-folder", str(vql), *words, "--out", str(tmp_path / "s.json"))
    assert code == 0
    names = list(found["stages"])
    assert len(names) == rows
    assert names[0] == "selection alone"
    assert list(found["methods"])[:rows] == names
    assert list(found["seconds"]) == ["encoding", *names]
    assert found["as_given"] == given
    assert opened == [Preset(**found["stages"][name]) for _ in range(2) for name in names]
    assert len(encoded) == 2 * 3, "frames near every sixth of a second of two videos, once for all rows"
    assert not any(folder.exists() for folder in folders)
    assert names[0] in capsys.readouterr().err
    for episode in found["per_episode"].values():
        assert set(names) < set(episode)


def test_stages_build_a_preset_up() -> None:
    for name in PRESETS:
        rows = list(localization.stages(PRESETS[name]).values())
        whole = PRESETS[name]
        assert (rows[0].rounds, rows[0].refine) == (1, False)
        assert (rows[-1].rounds, rows[-1].refine) == (max(2, whole.rounds), True)
        assert {row.name for row in rows} == {name}
        assert whole in rows
        for before, after in itertools.pairwise(rows):
            assert sum(asdict(before)[key] != value for key, value in asdict(after).items()) == 1
    assert len(localization.stages(replace(PRESETS["ren-vql"], rounds=3))) == 3


def test_template_matching_needs_two_videos(saved_model: str, vql: Path) -> None:
    """It says so before anything is searched; without it one video is enough."""
    model = RegionModel.from_pretrained(saved_model, device="cpu")
    one = datasets.episodes(vql)[:1]
    with pytest.raises(InputError, match="other videos"):
        localization.evaluate(model, one, tracker="template")
    found = localization.evaluate(model, one, baseline=False, tracker="template")
    assert list(found["methods"]) == ["opsin locate"]


def test_vq2d_is_a_measure(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    args = parser.parse_args(["vq2d", "validate", "--annotations", "nowhere.json", "--predictions", "nowhere.json"])
    with pytest.raises(MissingFile, match=r"nowhere\.json"):
        verb.run(args)


@pytest.mark.slow
def test_real_data_has_the_stated_sizes(data_dir: Path) -> None:
    records = datasets.coco_panoptic(data_dir / "coco128_panoptic", "val2017")
    assert len(records) == 100
    assert all(r.masks().any((1, 2)).all() for r in records[:3])
    assert len(datasets.human_segmentations(data_dir / "bsds500", "val")) == 100
    episodes = datasets.episodes(data_dir / "vql")
    assert len(episodes) == 18
    for episode in episodes:
        assert all(p.is_file() for p in (*episode.frames, episode.query_frame))
        frames = list(episode.response)
        assert frames == list(range(frames[0], frames[-1] + 1))
        assert frames[-1] < len(episode.frames)
