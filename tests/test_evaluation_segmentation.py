"""Measuring segmentation: readers of every layout, protocols, counting, journals, shards, the report, the command.

Small trees are drawn in each data set's layout; models are stand-ins that read the answer off the picture's colours.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.cards import ModelCard
from opsin.cli import eval as verb
from opsin.errors import IncompatibleModel, InputError, InvalidConfig, InvalidDataset, MissingFile
from opsin.evaluation import segmentation, segmentation_data
from opsin.evaluation.protocols import PROTOCOLS, Protocol, protocol
from opsin.evaluation.segmentation_data import DATASETS, IGNORED, class_names, read
from opsin.segmentation import AlignedBackbone, Segmenter
from opsin.segmentation.model import default_card
from tests.conformance import aligned_tiny

STEP = 3  # red of a drawn picture is STEP × (class + 1)


class Features:
    def __init__(self, image, model):
        self.image, self.model = image, model

    def query(self, labels, *, size=None, denoise=None, refine=False, coarse_threshold=0.1, compat=None):
        asked = {"labels": labels, "size": size, "denoise": denoise, "refine": refine}
        self.model.asked.append({**asked, "coarse": coarse_threshold, "compat": compat})
        return SimpleNamespace(labels=self.model.answer(self.image, size))


class Oracle:
    """Reads the class of every pixel off the red channel; 0 is unknown."""

    name = "oracle"
    card = ModelCard("oracle", "segmentation", "none", crop=336, stride=224)

    def __init__(self, stop_after=None):
        self.asked, self.encoded, self.stop_after = [], [], stop_after

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, images, *, crop=None, stride=None, refine=False, compat=None):
        if len(self.encoded) == self.stop_after:
            raise KeyboardInterrupt
        self.encoded.append({"shape": tuple(images[0].shape), "crop": crop, "stride": stride, "refine": refine})
        return [Features(image, self) for image in images]

    def answer(self, image, size):
        rows = (torch.arange(size[0]) * image.shape[1]) // size[0]
        columns = (torch.arange(size[1]) * image.shape[2]) // size[1]
        return (image[0][rows][:, columns] * 255 / STEP).round().long() - 1


class Constant(Oracle):
    name = "constant"

    def answer(self, image, size):
        return torch.zeros(size, dtype=torch.long)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))


def draw(path: Path, classes: np.ndarray) -> None:
    """A picture whose colours say the class of every pixel."""
    grey = (STEP * (classes + 1)).astype(np.uint8)
    save(path, np.stack([grey] * 3, -1))


def palette(path: Path, values: np.ndarray) -> None:
    """A label picture with a palette, as VOC's are: the indices are the labels, not the colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8), "P")
    picture.putpalette([(37 * i) % 256 for i in range(768)])
    picture.save(path)


def block(*values: int) -> np.ndarray:
    """One column of 6×4 pixels per value."""
    return np.repeat(np.array(values, dtype=np.int64), 4)[None].repeat(6, 0)


def layout(dataset: str, root: Path, raw: bool = False) -> dict[str, np.ndarray]:
    """Two images of ``dataset`` below ``root``; returns the class indices that a reader has to find."""
    if dataset[:3] in ("voc", "con"):
        year, lists, folder = (
            ("VOC2012", "Segmentation", "SegmentationClass")
            if dataset.startswith("voc")
            else ("VOC2010", "SegmentationContext", "SegmentationClassContext")
        )
        base, shift = root / "VOCdevkit" / year, 0 if dataset in ("voc21", "context60") else 1
        values = {"2007_000033": block(0, 1, 20, 255), "2007_000042": block(15, 0, 0, 1)}
        (base / "ImageSets" / lists).mkdir(parents=True)
        (base / "ImageSets" / lists / "val.txt").write_text("2007_000033\n2007_000042 \n\n")
        for name, value in values.items():
            save(base / "JPEGImages" / f"{name}.jpg", np.zeros((*value.shape, 3), dtype=np.uint8))
            palette(base / folder / f"{name}.png", value)
        return {n: np.where((v == 255) | ((v == 0) & (shift == 1)), IGNORED, v - shift) for n, v in values.items()}
    if dataset == "ade20k":
        values = {"ADE_val_00000001": block(0, 1, 150), "ADE_val_00000002": block(7, 7, 2)}
        for name, value in values.items():
            save(root / "ADEChallengeData2016/images/validation" / f"{name}.jpg", np.zeros((6, 12, 3), np.uint8))
            save(root / "ADEChallengeData2016/annotations/validation" / f"{name}.png", value.astype(np.uint8))
        return {name: value - 1 for name, value in values.items()}
    if dataset == "cityscapes":
        stems = {
            "a/a_000000_000019": ((7, 33, 0), (0, 18, IGNORED)),
            "b/b_000001_000019": ((26, 4, 24), (13, IGNORED, 11)),
        }
        for stem, (ids, found) in stems.items():
            save(root / "leftImg8bit/val" / f"{stem}_leftImg8bit.png", np.zeros((6, 12, 3), np.uint8))
            kind, numbers = ("labelIds", ids) if raw else ("labelTrainIds", [255 if v < 0 else v for v in found])
            save(root / "gtFine/val" / f"{stem}_gtFine_{kind}.png", block(*numbers).astype(np.uint8))
        return {stem.split("/")[1]: block(*found) for stem, (_, found) in stems.items()}
    # COCO ids minus one: person, toothbrush, banner, wood, traffic light, stop sign; 255 is not labelled
    things = {"000000000139": (0, 89, 91, 255), "000000000285": (181, 9, 12, 0)}
    stuff = {"000000000139": (0, 79, 80, IGNORED), "000000000285": (170, 9, 11, 0)}
    objects = {"000000000139": (1, 80, 0, 0), "000000000285": (0, 10, 12, 1)}
    found = stuff if dataset == "coco-stuff" else objects
    for name, ids in things.items():
        save(root / "images/val2017" / f"{name}.jpg", np.zeros((6, 16, 3), np.uint8))
        if raw:
            save(root / "stuffthingmaps/val2017" / f"{name}.png", block(*ids).astype(np.uint8))
        else:
            suffix = "labelTrainIds" if dataset == "coco-stuff" else "instanceTrainIds"
            numbers = [255 if v < 0 else v for v in found[name]]
            save(root / "annotations/val2017" / f"{name}.png", block(*ids).astype(np.uint8))
            save(root / "annotations/val2017" / f"{name}_{suffix}.png", block(*numbers).astype(np.uint8))
    return {name: block(*numbers) for name, numbers in found.items()}


KNOWN = tuple(d for d in DATASETS if d != "folder")
CASES = [(d, False) for d in KNOWN] + [(d, True) for d in ("cityscapes", "coco-stuff", "coco-object")]


@pytest.mark.parametrize(("dataset", "raw"), CASES)
def test_reader_of_each_layout(tmp_path, dataset, raw):
    wanted = layout(dataset, tmp_path, raw)
    data = read(dataset, tmp_path)
    assert {s.id for s in data.samples} == set(wanted)
    assert [s.id for s in data.samples] == sorted(wanted)
    for sample in data.samples:
        assert sample.image().shape[1:] == sample.labels().shape
        assert np.array_equal(sample.labels().numpy(), wanted[sample.id]), sample.id
        assert sample.labels().dtype == torch.int64


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_folder_above(tmp_path, inner):
    layout("voc20", tmp_path)
    assert len(read("voc20", tmp_path / inner).samples) == 2


@pytest.mark.parametrize("dataset", KNOWN)
def test_absent_layout_is_named(tmp_path, dataset):
    with pytest.raises(MissingFile, match="Looked for"):
        read(dataset, tmp_path)


def test_unknown_data_set_and_options(tmp_path):
    with pytest.raises(InvalidConfig, match="voc20"):
        read("voc2", tmp_path)
    with pytest.raises(InvalidConfig, match="folder"):
        read("voc20", tmp_path, ignore=0)
    with pytest.raises(InvalidConfig, match="english or published"):
        class_names("voc20", "latin")
    layout("voc20", tmp_path)
    with pytest.raises(MissingFile, match="list of images"):
        read("voc20", tmp_path, split="test")


def test_a_value_outside_the_data_set_is_an_error(tmp_path):
    layout("ade20k", tmp_path)
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    save(path, block(0, 1, 151).astype(np.uint8))
    with pytest.raises(InvalidDataset, match="151"):
        read("ade20k", tmp_path).samples[0].labels()
    save(path, np.zeros((6, 12, 3), np.uint8))
    with pytest.raises(InvalidDataset, match="one number per pixel"):
        read("ade20k", tmp_path).samples[0].labels()


# ------------------------------------------------------------------------------------------------------- class names

COUNTS = {
    "voc20": 20, "voc21": 21, "context59": 59, "context60": 60, "coco-object": 81, "coco-stuff": 171, "ade20k": 150,
    "cityscapes": 19,
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["english", "published"])
@pytest.mark.parametrize("dataset", KNOWN)
def test_class_names(dataset, spelling):
    from opsin.segmentation.labels import as_labels

    own, phrases = class_names(dataset, spelling)
    assert len(own) == len(phrases) == COUNTS[dataset]
    assert len(set(own)) == len(own)
    labels = as_labels(dict(zip(own, phrases, strict=True)))  # refuses blanks and duplicates
    assert labels.phrases == phrases
    assert (own[0] == "background") == (dataset in ("voc21", "context60", "coco-object"))
    foreground = phrases[1:] if own[0] == "background" else phrases
    assert all(len(p) == 1 for p in foreground)
    if spelling == "published":
        assert not any(" " in p[0] for p in foreground)


def test_spellings_differ_where_they_should():
    names = {s: dict(zip(*class_names("coco-stuff", s), strict=True)) for s in ("english", "published")}
    assert names["english"]["traffic light"] == ("traffic light",)
    assert names["published"]["traffic light"] == ("trafficlight",)
    assert names["english"]["wall-brick"] == ("brick wall",)
    assert names["published"]["wall-brick"] == ("wall-brick",)
    voc = dict(zip(*class_names("voc20", "published"), strict=True))
    assert (voc["boat"], voc["diningtable"], voc["pottedplant"]) == (("ship",), ("table",), ("pottedplant",))
    assert dict(zip(*class_names("ade20k", "published"), strict=True))["chest of drawers"] == ("chestofdrawers",)


def test_corrections_name_classes_that_exist():
    for dataset, facts in segmentation_data._facts().items():
        for spelling in ("english", "published"):
            assert set(facts.get(spelling, {})) <= set(facts.get("names", ())), (dataset, spelling)


def test_coco_names_and_numbers_agree_with_real_lists(data_dir):
    folder = data_dir / "clip_text_embeddings"
    own, _ = class_names("coco-stuff")
    assert list(own) == json.loads((folder / "cocostuff171_names.json").read_text())
    table = json.loads((folder / "coco133_to_cocostuff171.json").read_text())
    for coco, (_, name, index) in table.items():
        assert own[index] == name
        if int(coco) < 184:  # ids above are merged classes of the panoptic labels
            assert segmentation_data._COCO_IDS[index] == int(coco)


# ------------------------------------------------------------------------------------------------------------ folder


def folder(root: Path, names: object = None, file: str = "names.txt") -> dict[str, np.ndarray]:
    """Three pictures with labels 0, 1, 2 (2 is drawn wrong in the last) and one without labels."""
    truth = {"a": block(0, 1, 255), "sub/b": block(2, 2, 0), "c": block(1, 1, 2)}
    for name, value in truth.items():
        draw(root / f"images/{name}.png", np.where(value == 255, 0, value) if name != "c" else block(1, 1, 1))
        save(root / f"labels/{name}.png", value.astype(np.uint8))
    draw(root / "images/unlabelled.png", block(0))
    text = "sky\nwater, sea\nhouse\n" if names is None else json.dumps(names)
    (root / file).write_text(text)
    return truth


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (None, "names.txt"),
        (["sky", ["water", "sea"], "house"], "classes.json"),
        ({"0": "sky", "1": ["water", "sea"], "2": "house"}, "names.json"),
        ([{"id": 2, "name": "house"}, {"id": 0, "name": "sky"}, {"id": 1, "name": ["water", "sea"]}], "names.json"),
    ],
)
def test_folder_and_its_file_of_names(tmp_path, names, file):
    truth = folder(tmp_path, names, file)
    data = read("folder", tmp_path)
    assert data.classes == ("sky", "water", "house")
    assert data.phrases == (("sky",), ("water", "sea"), ("house",))
    assert [s.id for s in data.samples] == ["a", "c", "sub/b"]
    for sample in data.samples:
        assert np.array_equal(sample.labels(), np.where(truth[sample.id] == 255, IGNORED, truth[sample.id]))


def test_folder_values_that_do_not_count(tmp_path):
    folder(tmp_path, {"1": "water", "2": "house"}, "names.json")  # 0 has no name
    data = read("folder", tmp_path)
    assert data.classes == ("water", "house")
    assert data.samples[2].labels().unique().tolist() == [IGNORED, 1]
    without = read("folder", tmp_path, ignore=2)
    assert without.classes == ("water",)
    assert without.samples[2].labels().unique().tolist() == [IGNORED]


def test_folder_mistakes(tmp_path):
    with pytest.raises(MissingFile, match="images"):
        read("folder", tmp_path)
    folder(tmp_path, ["sky", "Sky", "house"], "names.json")
    with pytest.raises(InvalidDataset, match="own name"):
        read("folder", tmp_path)
    (tmp_path / "names.json").write_text('{"one": "sky"}')
    with pytest.raises(InvalidDataset, match="file of class names"):
        read("folder", tmp_path)
    with pytest.raises(MissingFile, match=r"other\.txt"):
        read("folder", tmp_path, classes=tmp_path / "other.txt")
    with pytest.raises(MissingFile, match="test"):
        read("folder", tmp_path, split="test")


def test_folder_of_real_photographs(data_dir):
    root = data_dir / "coco128_panoptic"
    data = read("folder", root, split="val2017")
    assert len(data.samples) == 100
    assert len(data.classes) == 133
    phrases = dict(zip(data.classes, data.phrases, strict=True))
    assert (phrases["tree-merged"], phrases["wall-other-merged"]) == (("tree",), ("wall",))
    assert read("folder", root, split="val2017", names="published").phrases[0] == ("person",)
    for sample in data.samples[::25]:
        labels = sample.labels()
        assert labels.shape == sample.image().shape[1:]
        assert labels.max() < 133
    assert len(read("folder", root).samples) == 200


# --------------------------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize(
    ("name", "dataset", "size", "shown", "windows"),
    [
        ("radseg-low", "ade20k", (512, 683), (336, 448), (224, 112)),
        ("radseg-low", "cityscapes", (1024, 2048), (560, 1120), (224, 112)),
        ("radseg-mid", "voc20", (375, 500), (336, 448), (336, 112)),
        ("radseg-mid", "context59", (333, 500), (576, 865), (336, 224)),
        ("radseg-high", "cityscapes", (1024, 2048), (1344, 2688), (336, 224)),
        ("radseg-high", "coco-stuff", (640, 427), (1334, 890), (336, 224)),
        ("radseg-high", "voc21", (100, 1000), (202, 2016), (336, 224)),
        ("native", "ade20k", (512, 683), (512, 683), (None, None)),
    ],
)
def test_published_sizes_and_windows(name, dataset, size, shown, windows):
    way = protocol(name, dataset)
    assert way.size(size) == shown
    assert (way.crop, way.stride) == windows
    assert tuple(way.show(torch.zeros(3, *size)).shape[1:]) == shown


def test_protocols_of_all_data_sets():
    for name in PROTOCOLS:
        for dataset in DATASETS:
            way = protocol(name, dataset)
            assert way.refine == (name == "radseg-plus")
            assert (way.coarse_threshold is not None) == way.refine
            assert json.loads(json.dumps(way.to_dict()))["name"] == name
    assert protocol("radseg-plus", "voc21").coarse_threshold == 0.20
    assert "none published" in protocol("radseg-low", "folder").source
    assert "none published" not in protocol("radseg-low", "ade20k").source
    with pytest.raises(InvalidConfig, match="radseg-low"):
        protocol("radseg-lo", "ade20k")


def test_resizing_is_bilinear_on_pixel_centres_and_eight_bits():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (7, 9)).astype(np.float64)
    way = Protocol("test", "folder", frame=(1000, 5))
    shown = way.show(torch.from_numpy(np.stack([image] * 3) / 255).float())
    height, width = way.size((7, 9))
    assert (height, width) == (5, 6)
    wanted = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = max((y + 0.5) * 7 / height - 0.5, 0), max((x + 0.5) * 9 / width - 0.5, 0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, 6), min(left + 1, 8)
            upper = image[top, left] * (1 - u + left) + image[top, right] * (u - left)
            lower = image[bottom, left] * (1 - u + left) + image[bottom, right] * (u - left)
            wanted[y, x] = upper * (1 - v + top) + lower * (v - top)
    assert np.abs(shown[0].numpy() * 255 - wanted).max() <= 0.5 + 1e-3
    assert torch.equal(shown * 255, (shown * 255).round())


# ---------------------------------------------------------------------------------------------------------- counting


def histogram(values: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.histc(values.float(), bins=classes, min=0, max=classes - 1)


def test_measures_against_an_independent_count():
    generator = torch.Generator().manual_seed(0)
    classes = 6
    pairs = [
        (torch.randint(-1, 5, (9, 7), generator=generator), torch.randint(-1, 4, (9, 7), generator=generator))
        for _ in range(4)
    ]
    matrix = sum(segmentation.confusion(p, t, classes) for p, t in pairs)
    found = segmentation.measures(matrix)
    hits = pred = true = torch.zeros(classes)
    for prediction, truth in pairs:
        p, t = prediction[truth >= 0], truth[truth >= 0]
        hits = hits + histogram(t[p == t], classes)
        pred = pred + histogram(p[p >= 0], classes)
        true = true + histogram(t, classes)
    iou = hits / (pred + true - hits)
    assert np.allclose(found["IoU"], iou.numpy(), equal_nan=True)
    assert iou[4] == 0  # predicted, never true: counts as 0
    assert torch.isnan(iou[5])  # neither: left out of the mean
    assert found["mIoU"] == pytest.approx(float(iou.nanmean()))
    assert found["mAcc"] == pytest.approx(float((hits / true).nanmean()))
    assert found["aAcc"] == pytest.approx(float(hits.sum() / true.sum()))
    assert found["fwIoU"] == pytest.approx(float((iou * true).nansum() / true.sum()))
    unknown = sum(int(((p < 0) & (t >= 0)).sum()) for p, t in pairs)
    assert found["unknown"] == pytest.approx(unknown / float(true.sum()))
    assert matrix.dtype == np.int64
    assert matrix.sum() == true.sum()


def test_unknown_counts_as_missed_and_never_as_a_class():
    truth = torch.tensor([[0, 0, 1, 1]])
    found = segmentation.measures(segmentation.confusion(torch.tensor([[0, -1, 1, -1]]), truth, 2))
    assert found["IoU"].tolist() == [0.5, 0.5]
    assert found["unknown"] == 0.5
    assert found["predicted"].tolist() == [1, 1]


def test_predictions_are_checked():
    with pytest.raises(InputError, match="one shape"):
        segmentation.confusion(torch.zeros(2, 3), torch.zeros(3, 2), 2)
    with pytest.raises(InputError, match="-1 … 1"):
        segmentation.confusion(torch.full((2, 2), 2), torch.zeros(2, 2), 2)
    with pytest.raises(InputError, match="True classes"):
        segmentation.confusion(torch.zeros(2, 2), torch.full((2, 2), 2), 2)


def test_nothing_to_count():
    found = segmentation.measures(np.zeros((3, 4), dtype=np.int64))
    assert np.isnan(found["mIoU"])
    assert found["aAcc"] == 0


# ------------------------------------------------------------------------------------- runs, journals, shards, report

NATIVE = protocol("native", "folder")


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    (root / "labels").mkdir(parents=True)
    generator = np.random.default_rng(1)
    for i in range(7):
        truth = generator.integers(0, 4, (8, 10))
        drawn = np.where(generator.random((8, 10)) < 0.3, generator.integers(-1, 4, (8, 10)), truth)
        draw(root / f"images/{i}.png", drawn)
        save(root / f"labels/{i}.png", np.where(generator.random((8, 10)) < 0.1, 255, truth).astype(np.uint8))
    (root / "names.txt").write_text("a\nb\nc\nd\n")
    return read("folder", root)


def run(model, data, journal=None, **options):
    header = segmentation.header_of(model.name, data, NATIVE)
    return header, segmentation.evaluate(model, data, NATIVE, header, journal=journal, **options)


def test_a_run_counts_every_image_once(data):
    header, entries = run(Oracle(), data)
    wanted = sum(
        segmentation.confusion(Oracle().answer(s.image(), s.labels().shape), s.labels(), 4) for s in data.samples
    )
    found = segmentation.summarize(header, entries)
    assert found["images"] == {"in_split": 7, "measured": 7, "skipped": 0, "in_published_split": None}
    assert found["mIoU"] == segmentation.measures(wanted)["mIoU"]
    assert 0.3 < found["mIoU"] < 0.9
    assert found["mIoU_interval"][0] <= found["mIoU"] <= found["mIoU_interval"][1]
    assert [row["class"] for row in found["classes"]] == list("abcd")
    assert sum(row["true_pixels"] for row in found["classes"]) == wanted.sum()
    constant = segmentation.summarize(*run(Constant(), data))
    assert constant["classes"][0]["accuracy"] == 1
    assert [row["IoU"] for row in constant["classes"][1:]] == [0, 0, 0]


def test_what_the_model_is_asked(data):
    model, way = Oracle(), protocol("radseg-plus", "folder")
    header = segmentation.header_of(model.name, data, way, compat="published")
    segmentation.evaluate(model, data, way, header, shard=(1, 7))
    assert model.encoded == [{"shape": (3, 448, 560), "crop": 336, "stride": 224, "refine": True}]
    asked = model.asked[0]
    assert asked["labels"] == {"a": ["a"], "b": ["b"], "c": ["c"], "d": ["d"]}
    assert (asked["size"], asked["denoise"], asked["compat"]) == ((8, 10), 0.5, "published")
    assert (asked["refine"], asked["coarse"]) == (True, 0.05)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_shards_add_up_to_one_run(tmp_path, data, count):
    whole = segmentation.summarize(*run(Oracle(), data))
    paths = [tmp_path / f"shard{i}.jsonl" for i in range(count)]
    parts = [run(Oracle(), data, path, shard=(i + 1, count))[1] for i, path in enumerate(paths)]
    assert sorted(name for part in parts for name in part) == [s.id for s in data.samples]
    merged = segmentation.summarize(*segmentation.merge(reversed(paths)))
    assert {**merged, "environment": None} == {**whole, "environment": None}
    assert merged["complete"]
    assert not segmentation.summarize(*segmentation.merge(paths[1:]))["complete"]


def test_a_stopped_run_goes_on(tmp_path, data):
    path = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Oracle(stop_after=3), data, path)
    again = Oracle()
    header, entries = run(again, data, path)
    assert len(again.encoded) == 4
    assert segmentation.summarize(header, entries)["mIoU"] == segmentation.summarize(*run(Oracle(), data))["mIoU"]
    rested = Oracle()
    run(rested, data, path)
    assert rested.encoded == []


def test_a_journal_cut_anywhere_goes_on(tmp_path, data):
    path, whole = tmp_path / "journal.jsonl", segmentation.summarize(*run(Oracle(), data))
    run(Oracle(), data, path)
    content = path.read_bytes()
    starts = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in (0, 1, starts[0] - 1, starts[0], starts[0] + 1, starts[3] - 1, starts[3] + 7, len(content) - 1):
        path.write_bytes(content[:cut])
        model = Oracle()
        found = segmentation.summarize(*run(model, data, path))
        assert {**found, "environment": None} == {**whole, "environment": None}, cut
        assert len(model.encoded) == 7 - max(sum(s <= cut for s in starts) - 1, 0), cut
        assert path.read_bytes() == content, cut


def test_a_damaged_journal_is_refused(tmp_path, data):
    path = tmp_path / "journal.jsonl"
    run(Oracle(), data, path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0\0\0", *lines[2:]]))
    with pytest.raises(InvalidDataset, match="Delete it"):
        run(Oracle(), data, path)
    with pytest.raises(MissingFile):
        segmentation.merge([])
    with pytest.raises(MissingFile):
        segmentation.merge([tmp_path / "none.jsonl"])


def test_journals_of_other_measurements_are_refused(tmp_path, data):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    header, _ = run(Oracle(), data, first, shard=(1, 2))
    with pytest.raises(IncompatibleModel, match="model"):
        run(Constant(), data, first)
    for change in ("model", "protocol", "ids", "phrases", "compat", "details"):
        second.write_text(json.dumps({**header, change: "another"}) + "\n")
        with pytest.raises(IncompatibleModel, match=change):
            segmentation.merge([first, second])
    name, entry = next(iter(run(Oracle(), data)[1].items()))
    changed = {"id": name, **entry, "n": [n + 1 for n in entry["n"]]}
    second.write_text(json.dumps(header) + "\n" + json.dumps(changed) + "\n")
    with pytest.raises(IncompatibleModel, match="same image"):
        segmentation.merge([first, second])


def test_unreadable_files_are_skipped_listed_and_tried_again(tmp_path, data):
    image, label, absent, wrong = data.samples[:4]
    kept = image.image_path.read_bytes()
    image.image_path.write_bytes(kept[: len(kept) // 2])
    label.label_path.write_bytes(b"not a picture")
    absent.image_path.unlink()
    save(wrong.label_path, np.zeros((3, 3), np.uint8))
    path = tmp_path / "journal.jsonl"
    found = segmentation.summarize(*run(Oracle(), data, path))
    assert set(found["skipped"]) == {"0", "1", "2", "3"}
    assert found["images"]["measured"] == 3
    assert not found["complete"]
    assert "one size" in found["skipped"]["3"]
    text = segmentation.markdown(found)
    assert "PARTIAL: 3 of 7 images" in text
    assert "* 2: MissingFile" in text
    image.image_path.write_bytes(kept)
    model = Oracle()
    found = segmentation.summarize(*run(model, data, path))
    assert len(model.encoded) == 1
    assert set(found["skipped"]) == {"1", "2", "3"}


def test_a_measured_image_beats_a_skipped_one_in_any_order(tmp_path, data):
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    kept = data.samples[0].image_path.read_bytes()
    data.samples[0].image_path.write_bytes(b"")
    run(Oracle(), data, paths[0])
    data.samples[0].image_path.write_bytes(kept)
    run(Oracle(), data, paths[1], shard=(1, 7))
    for order in (paths, paths[::-1]):
        assert segmentation.summarize(*segmentation.merge(order))["complete"]


def test_a_real_segmenter_with_random_weights(data, monkeypatch):
    aligned = AlignedBackbone(aligned_tiny.radio("siglip2"), "siglip2", logit_scale=1e5).eval()
    model = Segmenter(aligned, default_card(aligned))
    way, sample = protocol("radseg-low", "folder"), data.samples[0]
    seen = model.encode([way.show(sample.image())], crop=224, stride=112)[0].words.flatten(1).T
    words = (seen - seen.mean(0))[:: len(seen) // 4][:4]  # four places of the image, so that each has its own word
    monkeypatch.setattr(Segmenter, "embed", lambda self, labels: words)
    header = segmentation.header_of(model.name, data, way)
    entries = segmentation.evaluate(model, data, way, header, shard=(1, 7))
    truth = sample.labels()
    direct = model.segment(
        way.show(sample.image()), list("abcd"), crop=224, stride=112, size=tuple(truth.shape), denoise=0.5
    )
    wanted = segmentation.confusion(direct.labels, truth, 4)
    assert len(direct.labels.unique()) > 1
    assert sum(entries["0"]["n"]) == (truth >= 0).sum()
    assert np.array_equal(segmentation._dense(entries["0"], 4), wanted)


def test_stand_ins_take_what_the_real_one_takes():
    for name, stand_in in (("encode", Oracle.encode), ("query", Features.query)):
        real = inspect.signature(getattr(Segmenter, name)).parameters
        ours = inspect.signature(stand_in).parameters
        assert set(ours) - {"self", "labels"} <= set(real), name


# ------------------------------------------------------------------------------------------------------- the command


def command(monkeypatch, *words: str, model=None) -> int:
    monkeypatch.setattr(verb, "load_segmenter", lambda args: model or Oracle())
    parser = argparse.ArgumentParser()
    verb.add_segmentation_arguments(parser)
    return verb.run_segmentation(parser.parse_args(words))


def test_help_names_what_there_is():
    assert verb.DATA == DATASETS
    assert verb.WAYS == PROTOCOLS


def test_command_shards_merges_and_reports(tmp_path, data, monkeypatch, capsys):
    root, out = str(tmp_path / "data"), tmp_path / "out/report.json"
    words = ("--dataset", "folder", "--root", root, "--out", str(out))
    assert command(monkeypatch, *words, "--shard", "1/2") == 0
    first = json.loads(out.read_text())
    assert not first["complete"]
    assert "PARTIAL: 4 of 7" in out.with_suffix(".md").read_text()
    assert command(monkeypatch, *words, "--shard", "2/2", "--json", "--published", "48.5") == 0
    second = json.loads(capsys.readouterr().out)
    assert second == json.loads(out.read_text())
    assert second["complete"]
    assert second["published_mIoU"] == 0.485
    assert second["environment"]["versions"]["torch"]
    assert second["mIoU"] == pytest.approx(segmentation.summarize(*run(Oracle(), data))["mIoU"], rel=1e-5)
    text = out.with_suffix(".md").read_text()
    assert "| mIoU |" in text
    assert "48.50 |" in text
    assert "| b | b |" in text
    journals = sorted(str(p) for p in out.parent.glob("*.jsonl"))
    assert [Path(j).name for j in journals] == ["report.shard-1-of-2.jsonl", "report.shard-2-of-2.jsonl"]
    merged = tmp_path / "merged.json"
    assert command(monkeypatch, "--merge", *journals, "--out", str(merged)) == 0
    assert json.loads(merged.read_text())["mIoU"] == second["mIoU"]
    assert "not recorded here" in merged.with_suffix(".md").read_text()
    with pytest.raises(IncompatibleModel):
        command(monkeypatch, *words, "--names", "published")


def test_command_limits_and_says_what_was_skipped(tmp_path, data, monkeypatch, capsys):
    data.samples[2].image_path.unlink()
    words = ("--dataset", "folder", "--root", str(tmp_path / "data"), "--json")
    assert command(monkeypatch, *words, "--limit", "3") == 1  # images 0, 2 and 4
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == {"in_split": 3, "measured": 2, "skipped": 1, "in_published_split": None}
    assert list(found["skipped"]) == ["2"]


def test_command_mistakes(tmp_path, data, monkeypatch, capsys):
    words = ("--dataset", "folder", "--root", str(tmp_path / "data"))
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            command(monkeypatch, *words, "--shard", wrong)
    assert "2/4" in capsys.readouterr().err
    for wrong in (("--limit", "0"), ("--out", "report.txt"), ("--protocol", "radseg")):
        with pytest.raises(InvalidConfig):
            command(monkeypatch, *words, *wrong)
    with pytest.raises(InvalidConfig, match="--dataset and --root"):
        command(monkeypatch, "--dataset", "voc20")


@pytest.mark.parametrize("dataset", KNOWN)
def test_command_on_every_layout(tmp_path, dataset, monkeypatch, capsys):
    wanted = layout(dataset, tmp_path)
    words = ("--dataset", dataset, "--root", str(tmp_path), "--protocol", "radseg-low", "--json")
    model = Constant()
    assert command(monkeypatch, *words, model=model) == 0
    if dataset in ("voc21", "coco-object"):
        assert {"sky", "wall"} < set(model.asked[0]["labels"]["background"])
    found = json.loads(capsys.readouterr().out)
    truth = np.concatenate([v.ravel() for v in wanted.values()])
    assert found["aAcc"] == pytest.approx((truth == 0).sum() / (truth >= 0).sum(), rel=1e-4)
    assert len(found["classes"]) == COUNTS[dataset]
