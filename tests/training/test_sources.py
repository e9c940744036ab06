"""Every kind of source on small files; broken and unlabelled photographs; the mask cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import InvalidDataset, MissingFile
from opsin.masks.coco import CocoInstances, CocoPanoptic, decode_counts, decode_segmentation
from opsin.masks.maps import RegionMaps
from opsin.masks.sources import LabelMaps, Mosaic, split_canvas
from opsin.masks.store import MaskStore
from opsin.training.data import Batches, loader
from opsin.training.views import Augmentation
from tests.training.conftest import SIZE, blocks, paint


def read(source, index=0, size=64, seed=0):
    return source.read(index, size, np.random.default_rng(seed), np.random.default_rng(99))


def batches(*sources, **options):
    common = {"size": 64, "grid": (8, 8), "batch_size": 4, "prompts": 16, "augmentation": Augmentation()}
    return Batches(sources, **{**common, **options})


def test_bsds_has_a_layer_per_person(bsds):
    source = LabelMaps("b", bsds / "images/train", bsds / "segments/train")
    sample = read(source, 2)
    assert len(source) == 6
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.uint8
    assert sample.regions.layers.shape == (2, 64, 64)
    assert len(sample.regions) == 8
    assert (sample.regions.categories == -1).all()


@pytest.mark.parametrize("layout", ["{}.png", "{}_0.png", "{}/a.png"])
def test_a_folder_of_masks_and_photographs_without_one(tmp_path, layout):
    (tmp_path / "images").mkdir()
    for stem in ("a_b", "c"):
        paint(blocks(1)).save(tmp_path / "images" / f"{stem}.jpg")
    mask = tmp_path / "masks" / layout.format("a_b")
    mask.parent.mkdir(parents=True)
    Image.fromarray((blocks(1) == 2).astype(np.uint8) * 255).save(mask)
    source = LabelMaps("m", tmp_path / "images", tmp_path / "masks")
    assert len(source) == 1
    assert [os.path.basename(p) for p in source.skipped] == ["c.jpg"]
    assert len(read(source).regions) == 1


def test_mosaic_tiles_are_regions_with_the_class_as_category(classes_zip):
    source = Mosaic("m", classes_zip, "train", tiles=(5, 9))
    assert source.classes == ("cat", "dog", "owl")
    assert len(source) == 12
    sample = read(source)
    assert 5 <= len(sample.regions) <= 9
    assert (sample.regions.layers >= 0).all()
    for region, category in enumerate(sample.regions.categories.tolist()):
        red = int(sample.image[0][sample.regions.layers[0] == region].float().mean().round())
        assert red == 60 * (category if category >= 0 else 3) or (category, red) == (-1, 180)
    listed = Mosaic("m", classes_zip, "list.txt")
    assert (len(listed), listed.classes) == (2, ("cat", "dog"))
    assert len(pickle.loads(pickle.dumps(source))) == 12


def test_canvas_splits_fill_the_square():
    boxes = split_canvas(np.random.default_rng(1), 50, 11)
    assert len(boxes) == 11
    assert sum(w * h for _, _, w, h in boxes) == 2500


def test_panoptic_leaves_crowds_and_unlabelled_photographs_out(panoptic):
    source = CocoPanoptic("p", panoptic / "annotations/panoptic_mini.json", panoptic / "images/mini")
    sample = read(source, 1)
    assert len(source) == 2
    assert len(source.skipped) == 1
    assert sample.regions.categories.tolist() == [0, 1]
    expected = torch.from_numpy(blocks(1, 3)).long() - 1
    assert torch.equal(sample.regions.resize(SIZE).masks().sum((1, 2)) > 0, torch.tensor([True, True]))
    exact = read(source, 1, size=192).regions.resize(SIZE).layers[0].long()
    assert (exact == torch.where(expected < 2, expected, -1)).float().mean() > 0.97


def encode_counts(runs):
    text = ""
    for i, run in enumerate(runs):
        value = run - (runs[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
    return text


def test_coco_segmentations():
    mask = np.zeros(SIZE, bool)
    mask[5:20, 10:30] = True
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [0]])
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff([0, *edges, mask.size]).tolist()
    text = encode_counts(runs)
    assert decode_counts(text) == runs
    for counts in (runs, text, text.encode()):
        assert (decode_segmentation({"size": SIZE, "counts": counts}, SIZE) == mask).all()
    square = decode_segmentation([[10, 5, 30, 5, 30, 20, 10, 20]], SIZE)
    assert np.logical_xor(square, mask).sum() <= 2 * (15 + 20) + 4  # at most the border
    assert (square & mask).sum() >= 0.9 * mask.sum()
    with pytest.raises(InvalidDataset):
        decode_segmentation({"size": SIZE}, SIZE)


def test_coco_instances_skip_crowds_and_bare_photographs(tmp_path):
    paint(blocks(0)).save(tmp_path / "1.jpg")
    paint(blocks(0)).save(tmp_path / "2.jpg")
    box = [[10, 5, 30, 5, 30, 20, 10, 20]]
    notes = [
        {"image_id": 1, "category_id": 3, "segmentation": box, "iscrowd": 0},
        {"image_id": 1, "category_id": 9, "segmentation": [[0, 0, 60, 0, 60, 40, 0, 40]], "iscrowd": 0},
        {"image_id": 2, "category_id": 3, "segmentation": {"size": SIZE, "counts": [1]}, "iscrowd": 1},
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)]
    categories = [{"id": 3, "name": "x"}, {"id": 9, "name": "y"}]
    file = tmp_path / "i.json"
    file.write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    source = CocoInstances("c", file, tmp_path)
    sample = read(source)
    assert len(source) == len(source.skipped) == 1
    assert sample.regions.layers.shape[0] == 2  # they overlap
    assert sample.regions.categories.tolist() == [0, 1]
    file.write_text("[]")
    with pytest.raises(InvalidDataset, match="COCO"):
        CocoInstances("c", file, tmp_path)
    with pytest.raises(MissingFile):
        CocoInstances("c", tmp_path / "none.json", tmp_path)


def test_a_broken_photograph_is_replaced_and_reported(bsds, tmp_path):
    root = shutil.copytree(bsds, tmp_path / "b")
    (root / "images/train/0.jpg").write_bytes(b"\xff\xd8 cut")
    source = LabelMaps("b", root / "images/train", root / "segments/train")
    batch = batches(source, batch_size=24)[0]
    assert {os.path.basename(name) for name, _ in batch.skipped} == {"0.jpg"}
    assert batch.images.flatten(2).amax(-1).min() > 0.3  # none is black
    for file in (root / "images/train").glob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(InvalidDataset, match="can be read"):
        batches(source)[0]


def test_batches_repeat_and_split_among_processes(bsds, classes_zip):
    sources = (LabelMaps("b", bsds / "images/train", bsds / "segments/train"), Mosaic("m", classes_zip, "train"))
    whole = batches(*sources)
    again = batches(*sources)
    again[3]  # what was read before does not matter
    for name in ("images", "points", "ids", "categories", "masks"):
        expected = getattr(whole[7], name)
        assert torch.equal(getattr(again[7], name), expected)
        parts = [getattr(batches(*sources, batch_size=2, rank=r, world=2)[7], name) for r in range(2)]
        assert torch.equal(torch.cat(parts), expected)
    assert not torch.equal(whole[7].images, whole[8].images)
    assert whole.classes == ("cat", "dog", "owl")
    pixel = (whole[7].points * 64 - 0.5).round().long()
    assert all(len({tuple(p) for p in view.tolist()}) == 16 for view in pixel.flatten(0, 1))


@pytest.mark.slow
def test_workers_make_the_same_batches(bsds):
    made = batches(LabelMaps("b", bsds / "images/train", bsds / "segments/train"))
    for alone, worker in zip(loader(made, 2, 4, 0), loader(made, 2, 4, 1), strict=True):
        assert torch.equal(alone.images, worker.images)


def maps(seed):
    return RegionMaps.from_labels([blocks(seed)])


def test_store_keeps_regions_across_openings(tmp_path):
    path = tmp_path / "a.masks"
    with MaskStore(path, {"model": "x"}) as store:
        store.put("one", maps(1))
        store.put("none", None)
    again = pickle.loads(pickle.dumps(MaskStore(path, {"model": "x"})))
    assert len(again) == 2
    assert torch.equal(again.get("one").layers, maps(1).layers)
    assert (again.count("one"), again.count("none")) == (4, 0)
    again.put("two", maps(2))
    assert torch.equal(again.get("two").layers, maps(2).layers)
    with pytest.raises(InvalidDataset, match="settings"):
        MaskStore(path, {"model": "y"})
    with pytest.raises(InvalidDataset, match="at least one region"):
        again.get("none")
    with pytest.raises(InvalidDataset):
        again.get("three")
    (tmp_path / "b.masks").write_bytes(b"<html>")
    with pytest.raises(InvalidDataset, match="mark"):
        MaskStore(tmp_path / "b.masks")


def test_store_survives_a_cut_anywhere(tmp_path):
    path = tmp_path / "a.masks"
    store = MaskStore(path, {})
    store.put("one", maps(1))
    size = path.stat().st_size
    store.put("two", maps(2))
    whole = path.read_bytes()
    for cut in (size + 1, size + 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        short = MaskStore(path, {})
        assert ("one" in short, "two" in short) == (True, False)
        short.put("two", maps(2))
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-3] + b"\0\0\0")  # full length, torn content
    assert "two" not in MaskStore(path, {})


@pytest.mark.slow
def test_store_survives_a_killed_writer(tmp_path):
    path = tmp_path / "a.masks"
    code = (
        "import sys, numpy as np\n"
        "from opsin.masks.maps import RegionMaps\n"
        "from opsin.masks.store import MaskStore\n"
        "store = MaskStore(sys.argv[1], {})\n"
        "for i in range(10**6):\n"
        "    store.put(str(i), RegionMaps.from_labels([np.full((64, 64), 1 + i)]))\n"
        "    print(i, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        last = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    store = MaskStore(path, {})
    assert all(len(store.get(str(i))) == 1 for i in range(last + 1))
    store.put("more", maps(3))
    assert torch.equal(MaskStore(path, {}).get("more").layers, maps(3).layers)
