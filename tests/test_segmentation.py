"""Words to pixels on tiny random models: questions, sizes, batches, bad input, files."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import opsin
from opsin.cli.main import main
from opsin.errors import IncompatibleModel, InvalidConfig, InvalidImage, InvalidPrompt, MissingFile, UnsupportedSize
from opsin.segmentation import Segmentation, Segmenter, as_labels, prediction
from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.attention import correlate
from opsin.segmentation.model import OTHER, default_card
from opsin.segmentation.radseg import RADSegEncoder, radseg_encoder
from opsin.segmentation.windows import plan, sliding_features
from tests.conformance.test_aligned import radio
from tests.conformance.test_radio import checkpoint, memory  # a tiny backbone in the published layout


@pytest.fixture(scope="module")
def model():
    return make()


def make():
    torch.manual_seed(0)
    aligned = AlignedBackbone(memory(), "siglip2")
    aligned.scra = 10.0
    segmenter = Segmenter(aligned, default_card(aligned))
    width = aligned.text_dim

    def embed(labels):
        rows = [torch.randn(width, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in labels.texts]
        return torch.stack(rows)

    segmenter.embed = embed  # words without a text tower
    return segmenter


def noise(h, w, seed=0):
    return torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))


def naive(unit, values, scaling, offset):
    weights = (unit @ unit.transpose(1, 2) - offset) * scaling
    return weights.masked_fill(weights < 0, -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (5, 37), (2, 700), (1, 1500)])
def test_blocks_of_a_correlation_make_the_whole(groups, count, monkeypatch):
    from opsin.segmentation import attention

    unit = F.normalize(torch.randn(groups, count, 6, dtype=torch.float64), dim=2)
    values = torch.randn(groups, count, 4, dtype=torch.float64)
    for block in (1 << 10, 4 << 20):
        monkeypatch.setattr(attention, "_BLOCK_BYTES", block)
        for offset in (0.0, 0.2):
            torch.testing.assert_close(correlate(unit, values, 10.0, offset), naive(unit, values, 10.0, offset))


def test_tokens_that_are_all_alike_keep_their_mean():
    unit = F.normalize(torch.ones(1, 9, 7), dim=2)
    values = torch.randn(1, 9, 7)
    torch.testing.assert_close(correlate(unit, values, 10.0, 1.0), values.mean(1, keepdim=True).expand_as(values))


def test_bands_are_the_interpolation_of_the_whole(monkeypatch):
    grid = torch.rand(5, 7, 11)
    for size in ((1, 1), (3, 50), (64, 90), (7, 11), (5, 3)):
        whole = F.interpolate(grid[None], size, mode="bilinear")[0]
        for block in (1, 4096, 1 << 24):
            monkeypatch.setattr(prediction, "_BAND_BYTES", block)
            torch.testing.assert_close(prediction.enlarge(grid, size), whole)
            torch.testing.assert_close(prediction.maxima(grid, size), whole.flatten(1).amax(1))


def test_a_decision_is_the_argmax_of_what_denoising_left():
    grid = (torch.randn(6, 5, 8) * 3).softmax(0)
    whole = F.interpolate(grid[None], (40, 64), mode="bilinear")[0]
    for denoise in (0.0, 0.5, 0.7, 0.9):
        kept = whole.flatten(1).amax(1) >= denoise
        left = whole * kept[:, None, None]
        found = prediction.decide(grid, (40, 64), denoise=denoise, threshold=0.3)
        best, labels = left.max(0)
        assert torch.equal(found.kept, kept)
        torch.testing.assert_close(found.scores, best)
        assert torch.equal(found.labels, torch.where(best < 0.3, -1, labels))


def test_no_class_left_is_unknown_and_the_published_answer_is_the_first():
    grid = torch.full((3, 2, 2), 1 / 3)
    assert (prediction.decide(grid, (4, 4), denoise=0.5).labels == -1).all()
    assert (prediction.decide(grid, (4, 4), denoise=0.5, compat="published").labels == 0).all()
    with pytest.raises(InvalidConfig, match="compat"):
        prediction.decide(grid, (4, 4), compat="publised")


def test_windows_of_a_batch_of_mixed_sizes_are_those_of_each_image():
    def encode(pixels):
        return F.avg_pool2d(pixels, 16) + pixels.mean((2, 3), keepdim=True)

    images = [noise(300, 500), noise(64, 64, 1), noise(336, 336, 2), noise(300, 500, 3)]
    options = {"crop": 336, "stride": 224, "patch": 16}
    together = sliding_features(images, encode, batch_size=5, **options)
    for image, found in zip(images, together, strict=True):
        torch.testing.assert_close(found, sliding_features([image], encode, batch_size=1, **options)[0])


@pytest.mark.parametrize(("crop", "stride"), [(330, 224), (336, 0), (336, 352), (-16, 16), (336, 100)])
def test_bad_windows(crop, stride):
    with pytest.raises(InvalidConfig, match="multiples of 16"):
        plan((500, 500), crop, stride)


def test_a_batch_of_three_equals_three_singles(model):
    images = [noise(250, 400), noise(64, 48, 1), noise(250, 400, 2)]
    together = model.encode(images, batch_size=3)
    for image, found in zip(images, together, strict=True):
        alone = model.encode([image], batch_size=1)[0]
        torch.testing.assert_close(found.features, alone.features, rtol=1e-4, atol=1e-4)
        a, b = (x.query("cat, dog, sky", denoise=0) for x in (found, alone))
        assert (a.labels != b.labels).float().mean() < 1e-3
        assert a.size == image.shape[1:]


@pytest.mark.parametrize("size", [(5, 400), (1, 1), (400, 7), (33, 17)])
def test_any_size(model, size):
    found = model.segment(noise(*size), ["cat", "dog"], denoise=0)
    assert found.size == size
    assert found.labels.min() >= 0


def test_a_large_image_can_be_shrunk_and_keeps_every_pixel(model):
    found = model.segment(noise(1500, 2000), ["cat", "dog"], longest=336, denoise=0)
    assert found.size == (1500, 2000)


def test_many_labels_and_unicode(model):
    encoded = model.encode([noise(64, 64)])[0]
    many = encoded.query([f"thing {i}" for i in range(1000)], denoise=0)
    assert len(many.classes) == 1000
    assert encoded.query(["猫", "naïve café", "собака"], denoise=0).classes == ("猫", "naïve café", "собака")


@pytest.mark.parametrize("labels", [[], "", ["cat", "Cat"], ["cat", "  "], "cat,,dog", {"cat": ["x", "X"]}, [3]])
def test_bad_labels_are_told_before_the_image_is_encoded(model, labels):
    with pytest.raises(InvalidPrompt):
        model.segment("no such image is read.jpg" if labels else noise(32, 32), labels)


def test_one_label_competes_with_other_things(model):
    encoded = model.encode([noise(96, 96)])[0]
    found = encoded.query("cat", denoise=0)
    assert found.background == OTHER
    assert found.classes == ("cat",)
    assert set(found.labels.unique().tolist()) <= {-1, 0}
    with pytest.raises(InvalidConfig, match="softmax"):
        encoded.query("cat", background=())
    named = encoded.query(["cat", "dog"], background=["wall"], denoise=0)
    grid = prediction.class_probabilities(
        encoded.words, model.embed(as_labels(["cat", "dog", "wall"])), torch.arange(3), 3, 100.0
    )
    wall = prediction.decide(grid, (96, 96)).labels == 2
    assert torch.equal(named.labels < 0, wall)


def test_synonyms_count_by_the_nearest(model):
    encoded = model.encode([noise(96, 128)])[0]
    apart = encoded.query(["man", "woman", "dog"], denoise=0)
    person = encoded.query({"person": ["man", "woman"], "dog": []}, denoise=0)
    assert person.classes == ("person", "dog")
    both = (apart.labels == 0) | (apart.labels == 1)
    # the same winner wherever one phrase was above the dog; elsewhere the dog still wins at the grid's locations
    assert (person.labels[both] == 0).float().mean() > 0.98


def test_heat_map_is_the_cosine(model):
    encoded = model.encode([noise(96, 96)])[0]
    heat = encoded.heat_map("cat", size=encoded.grid)
    text = F.normalize(model.embed(as_labels("cat")), dim=1)[0]
    torch.testing.assert_close(heat, torch.einsum("ehw,e->hw", encoded.words, text))


def test_bad_options(model, monkeypatch):
    encoded = model.encode([noise(32, 32)])[0]
    with pytest.raises(InvalidConfig, match="probability"):
        encoded.query("a, b", denoise=2)
    with pytest.raises(InvalidConfig, match="probability"):
        encoded.query("a, b", threshold=-1)
    with pytest.raises(UnsupportedSize):
        encoded.query("a, b", size=(0, 5))
    with pytest.raises(InvalidConfig, match="longest"):
        model.encode([noise(32, 32)], longest=2)
    monkeypatch.setattr(model, "embed", lambda labels: pytest.fail("labels were embedded"))
    with pytest.raises(InvalidConfig, match="encode"):
        encoded.query("a, b", refine=True)


@pytest.mark.parametrize(
    "options",
    [
        {"compat": "publised"},
        {"denoise": 2},
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"coarse_threshold": 1.5},
        {"min_area": -1},
        {"iou_threshold": 90},
        {"size": (0, 5)},
        {"size": (5,)},
        {"templates": "imagenette"},
        {"templates": ["a photo"]},
        {"labels": "cat", "background": ()},
        {"background": "a, sofa"},
        {"longest": 2},
        {"crop": 20, "stride": 16},
        {"crop": -16},
        {"treshold": 0.5},
    ],
)
def test_wrong_options_are_told_before_the_image_is_encoded(model, monkeypatch, options):
    def never(*given):
        pytest.fail("the image was encoded")

    monkeypatch.setattr(model.aligned, "features", never)
    labels = options.get("labels", "a, b")
    rest = {key: value for key, value in options.items() if key != "labels"}
    with pytest.raises(TypeError if "treshold" in options else (InvalidConfig, InvalidPrompt, UnsupportedSize)):
        model.segment(noise(32, 32), labels, **rest)


@pytest.mark.parametrize("options", [{"scga": -1.0}, {"batch_size": 0}, {"compat": "x"}])
def test_wrong_options_of_encoding(model, monkeypatch, options):
    monkeypatch.setattr(model.aligned, "features", lambda *given: pytest.fail("the image was encoded"))
    with pytest.raises(InvalidConfig):
        model.encode(noise(32, 32), **options)


def test_a_missing_sam_head_is_told_before_the_image_is_encoded(monkeypatch):
    aligned = AlignedBackbone(radio("siglip2"))
    monkeypatch.setattr(aligned, "features", lambda *given: pytest.fail("the image was encoded"))
    with pytest.raises(IncompatibleModel, match='adaptor "sam"'):
        Segmenter(aligned, default_card(aligned)).encode(noise(32, 32), refine=True)


def test_background_is_written_as_labels_are(model):
    encoded = model.encode([noise(64, 64)])[0]
    found = encoded.query("cat, dog", background="wall, floor", denoise=0)
    assert found.background == ("wall", "floor")
    assert torch.equal(found.labels, encoded.query("cat, dog", background=["wall", "floor"], denoise=0).labels)


def test_features_of_another_model_are_refused(model):
    other = make()
    other.card = default_card(other.aligned).__class__(name="another", kind="segmentation", family="radio")
    with pytest.raises(IncompatibleModel, match="another"):
        other.query(model.encode([noise(32, 32)])[0], "a, b")


def test_saved_labels_come_back(tmp_path):
    labels = torch.tensor([[-1, 0, 1], [1, 1, 0]])
    found = Segmentation(labels, torch.rand(2, 3), ("cat", "chien é"), torch.ones(2), "m")
    with Image.open(found.save(tmp_path / "deep/seg.png")) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), labels.numpy() + 1)
        assert json.loads(picture.text["classes"]) == ["cat", "chien é"]
    large = torch.where(labels > 0, 400, labels)
    many = Segmentation(large, torch.rand(2, 3), tuple(map(str, range(401))), torch.ones(401), "m")
    with Image.open(many.save(tmp_path / "many.png")) as picture:
        assert np.array_equal(np.array(picture).astype(int), large.numpy() + 1)
    with pytest.raises(InvalidConfig, match="png"):
        found.save(tmp_path / "seg.jpg")
    assert found.mask("cat").sum() == 2
    with pytest.raises(InvalidConfig, match='"cat"'):
        found.mask("cad")
    assert list(found.areas()) == ["chien é", "cat"]
    assert found.plot(torch.rand(3, 2, 3)).width >= 3


def test_supervision_is_an_extra(monkeypatch):
    found = Segmentation(torch.tensor([[0, 1], [1, -1]]), torch.rand(2, 2), ("a", "b"), torch.ones(2), "m")
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(opsin.OpsinError, match="supervision"):
        found.to_supervision()


def test_what_supervision_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **given: given))
    labels = torch.tensor([[2, 0, 0], [-1, 0, -1]])
    scores = torch.tensor([[0.5, 0.2, 0.4], [0.9, 0.6, 0.9]])
    given = Segmentation(labels, scores, ("a", "b", "c"), torch.ones(3), "m").to_supervision()
    assert given["class_id"].tolist() == [0, 2]
    assert given["data"]["class_name"].tolist() == ["a", "c"]
    assert given["xyxy"].tolist() == [[1, 0, 3, 2], [0, 0, 1, 1]]
    assert np.array_equal(given["mask"], np.stack([labels.numpy() == 0, labels.numpy() == 2]))
    np.testing.assert_allclose(given["confidence"], [0.4, 0.5])
    empty = Segmentation(torch.full((2, 3), -1), scores, ("a",), torch.ones(1), "m").to_supervision()
    assert empty["xyxy"].shape == (0, 4)
    assert empty["mask"].shape == (0, 2, 3)


def test_the_snippets_of_radseg_run(model):
    """The two ways in which its README is used: attributes set afterwards, and arguments."""
    labels = ["sky", "grass", "cat", "tree"]
    encoder = RADSegEncoder(model_version=model)
    encoder.to("cpu").eval()
    batch = torch.stack([noise(60, 80), noise(60, 80, 1)])
    encoder.predict = True
    encoder.prompts = labels
    encoder.text_embeds = encoder.encode_labels(labels)
    with torch.no_grad():
        probabilities = encoder.encode_image_to_feat_map(batch)
    assert probabilities.shape == (2, len(labels) + 1, 60, 80)
    assert not probabilities[:, 0].any()
    for image, found in zip(batch, probabilities, strict=True):
        wanted = model.probabilities(model.encode([image])[0], labels)
        torch.testing.assert_close(found[1:], wanted, rtol=1e-3, atol=1e-4)
    again = RADSegEncoder(model_version=model, predict=True, classes=["", *labels])
    torch.testing.assert_close(again.encode_image_to_feat_map(batch), probabilities)
    assert torch.equal(again.encode_labels(["cat"]), F.one_hot(torch.tensor([3]), 5).float())
    assert again.cat_index_to_name[3] == "cat"
    assert torch.equal(encoder.encode_prompts(["a grey cat"]), model.embed(as_labels(["a grey cat"], templates=None)))
    plain = RADSegEncoder(model_version=model)
    features = plain.encode_image_to_feat_map(batch)
    aligned = plain.align_spatial_features_with_language(features)
    assert aligned.shape == (2, model.aligned.text_dim, *features.shape[2:])
    with pytest.raises(InvalidConfig, match="classes"):
        RADSegEncoder(model_version=model, predict=True).encode_image_to_feat_map(batch)


def test_the_hub_entry_refuses_an_adaptor_that_the_weights_lack():
    with pytest.raises(InvalidConfig, match="siglip2"):
        radseg_encoder("c-radio_v3-b", "siglip3")


def test_command_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Segmenter, "from_pretrained", classmethod(lambda cls, *a, **k: model))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, size in enumerate([(40, 60), (33, 20)]):
        Image.fromarray((noise(*size, i).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(photos / f"{i}.png")
    out = tmp_path / "seg.png"
    overlay = tmp_path / "seen.jpg"
    arguments = ["--out", str(out), "--overlay", str(overlay), "--json", "--denoise", "0"]
    assert main(["segment", str(photos / "0.png"), "cat, sofa, window", *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["classes"]) == {"cat", "sofa", "window"}
    with Image.open(out) as picture:
        assert picture.size == (60, 40)
    assert overlay.exists()
    (photos / "bad.png").write_bytes(b"not an image")
    assert main(["segment", str(photos), "cat, sofa", "--out", str(tmp_path / "all")]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert len(list((tmp_path / "all").glob("*.png"))) == 2
    (tmp_path / "more").mkdir()
    (photos / "0.png").rename(tmp_path / "more" / "0.png")
    (photos / "1.png").rename(photos / "0.png")
    twins = [str(photos / "0.png"), str(tmp_path / "more" / "0.png")]
    assert main(["segment", *twins, "cat, sofa", "--out", str(tmp_path / "twins"), "--overlay", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "twins/0.labels.png").size == (20, 33)
    assert Image.open(tmp_path / "twins/0-2.labels.png").size == (60, 40)
    assert (tmp_path / "0.jpg").exists()
    assert (tmp_path / "0-2.jpg").exists()
    assert main(["segment", str(tmp_path / "none.png"), "cat"]) == 2
    assert main(["segment", str(photos / "0.png"), "cat, cat"]) == 2
    labels = tmp_path / "labels.json"
    labels.write_text('{"person": ["man", "woman"], "sky": []}')
    assert main(["segment", str(photos / "0.png"), str(labels), "--out", str(out)]) == 0
    labels.write_text("{")
    assert main(["segment", str(photos / "0.png"), str(labels), "--out", str(out)]) == 2


def test_bad_images(model, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InvalidImage):
        model.segment(tmp_path / "x.png", "a, b")
    with pytest.raises(MissingFile):
        model.segment(tmp_path / "y.png", "a, b")


def test_a_checkpoint_of_another_family_is_refused():
    with pytest.raises(IncompatibleModel, match="words"):
        Segmenter.from_pretrained("opsin-tiny", device="cpu")


def test_the_hub_entry_loads_a_checkpoint(tmp_path):
    """``torch.hub.load`` from a checkout, with a file in the published layout."""
    from tests.conftest import ROOT

    path = checkpoint(tmp_path / "c-radio_tiny_half.pth.tar")
    encoder = torch.hub.load(
        str(ROOT), "radseg_encoder", source="local", model_version=str(path), lang_model="siglip2", device="cpu"
    )
    assert encoder.encode_image_to_feat_map(noise(48, 48)[None]).shape[:2] == (1, encoder.segmenter.aligned.dim)
    assert isinstance(opsin.load(path, device="cpu"), Segmenter)
    with pytest.raises(IncompatibleModel, match="sam"):
        Segmenter.from_pretrained(path, language="siglip2-g", device="cpu").aligned._adaptor("sam9")


PEAK = """
import resource, sys, torch
from opsin.segmentation import prediction
grid = torch.rand(150, 70, 140)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = prediction.decide(grid, (1024, 2048))
assert found.labels.shape == (1024, 2048)
sys.stdout.write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))
"""


def test_memory_of_many_labels_on_a_large_image():
    """All probabilities of 150 labels at 2048×1024 would be 1,200 MB; a decision needs bands of them."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250


PANORAMA = """
import sys, torch
from opsin.segmentation import Segmenter
from pathlib import Path
def peak():
    Path("/proc/self/clear_refs").write_text("5")
    return lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) // 1024
model = Segmenter.from_pretrained(sys.argv[1], device="cpu")
model.embed = lambda labels: torch.randn(len(labels.texts), model.aligned.text_dim)
image = torch.rand(3, 400, 2560)
before = peak()()
highest = peak()
found = model.encode([image])[0].query(["a", "b", "c"], denoise=0)
assert found.labels.shape == (400, 2560)
sys.stdout.write(f"{highest() - before} ")
before = peak()()
highest = peak()
assert found.plot(image).size[0] == 2560
found.save(sys.argv[2])
sys.stdout.write(str(highest() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux")
def test_memory_of_a_panorama(tmp_path):
    """12 MiB of pixels, 12 of labels and scores; all pairs of 18,816 locations would be 1,350 MiB."""
    path = checkpoint(tmp_path / "c-radio_tiny_half.pth.tar")
    arguments = [sys.executable, "-c", PANORAMA, str(path), str(tmp_path / "seg.png")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    answer, picture = map(int, done.stdout.split())
    assert answer < 200
    assert picture < 150


def test_a_picture_is_painted_in_bands(monkeypatch):
    from opsin.segmentation import result

    labels = torch.randint(-1, 3, (37, 50), generator=torch.Generator().manual_seed(0))
    found = Segmentation(labels, torch.rand(37, 50), ("a", "b", "c"), torch.ones(3), "m")
    whole = np.array(found.plot(noise(20, 30)))
    monkeypatch.setattr(result, "_BAND", 1)
    assert np.array_equal(np.array(found.plot(noise(20, 30))), whole)
    alone = np.array(found.plot())[:37, :50]
    assert np.array_equal(alone[labels.numpy() == 1], np.tile(result.palette(3)[1], (int((labels == 1).sum()), 1)))
