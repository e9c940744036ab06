"""Measures of reconstruction, files of equal bytes, retrieval, and the report of ``opsin eval reconstruction``."""

from __future__ import annotations

import argparse
import io
import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.cli import eval_reconstruction, train
from opsin.codec import Codec, CodecConfig
from opsin.codec import measures as m
from opsin.errors import InvalidConfig, InvalidDataset, InvalidImage


def picture(seed: int, side: int = 48) -> torch.Tensor:
    """A smooth image with an edge."""
    rng = torch.Generator().manual_seed(seed)
    low = torch.rand((1, 3, 4, 4), generator=rng)
    image = torch.nn.functional.interpolate(low, size=(side, side), mode="bicubic").clamp(0, 1)[0]
    image[:, :, side // 3 : side // 2] *= 0.5
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny codec as a folder, and photographs in two class folders with one file that is none."""
    root = tmp_path_factory.mktemp("codec")
    Codec.create(CodecConfig(32, 1, 4, 32, 1, 4, 8, (32, 32)), name="toy").save_pretrained(root / "toy")
    for number in range(6):
        place = root / "photos" / ("cats" if number % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        pixels = (picture(number).permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(place / f"{number}.png")
    (root / "photos/broken.jpg").write_bytes(b"nothing")
    return root


def arguments(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    eval_reconstruction.add_reconstruction_arguments(parser)
    return parser.parse_args([str(w) for w in words])


def test_psnr():
    image = torch.full((2, 3, 16, 16), 0.5)
    other = image.clone()
    other[0] += 0.1
    assert m.psnr(image, other)[0].item() == pytest.approx(20, abs=1e-5)
    assert m.psnr(image, other)[1] == float("inf")
    with pytest.raises(InvalidImage):
        m.psnr(image, other[:1])


def test_ssim_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a = torch.stack([picture(0), picture(1)])
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    expected = [
        metrics.structural_similarity(
            x.double().numpy(), y.double().numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    assert m.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    assert m.ssim(a, a).tolist() == pytest.approx([1, 1])
    with pytest.raises(InvalidImage, match="11 pixels"):
        m.ssim(a[..., :8, :8], b[..., :8, :8])


@pytest.mark.parametrize("kind", m.FORMATS)
def test_files_of_equal_bytes(kind):
    if not m.available(kind):
        pytest.skip(f"this Pillow writes no {kind}")
    image = picture(3, 96)
    previous = -1.0
    for budget in (500, 900, 3000):
        found = m.compress(image, budget, kind)
        if found.image is None:
            continue
        assert found.size <= budget
        assert found.image.shape == image.shape
        reached = float(m.psnr(image[None], found.image[None]))
        assert reached >= previous
        previous = reached
    assert previous > 25
    assert m.compress(image, 20, kind).image is None


def test_a_file_holds_what_is_said():
    image = picture(4)
    found = m.compress(image, 900, "jpeg")
    small = m.to_pil(image)
    if found.scale != 1:
        small = small.resize((round(48 * found.scale),) * 2, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "jpeg", quality=found.quality, optimize=True, progressive=True, subsampling="4:2:0")
    assert len(file.getvalue()) == found.size
    with pytest.raises(InvalidConfig, match="file kind"):
        m.compress(image, 900, "bmp")


def test_retrieval_measures():
    gallery = torch.eye(5) + 3
    assert m.finds_itself(gallery + 0.01, gallery).all()
    assert not m.finds_itself(gallery.roll(1, 0), gallery).any()
    vectors = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9]])
    assert m.same_class(vectors, ["a", "a", "b", "b"]).all()
    assert not m.same_class(vectors, ["a", "b", "a", "b"]).any()
    images = torch.rand(2, 3, 16, 16)
    assert m.pixel_vectors(images).shape == (2, 768)
    assert m.pixel_vectors(images, 48).shape == (2, 48)


def test_perceptual_measures_say_why_they_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    found = m.perceptual(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    assert found["lpips"] is None
    assert found["rfid"] is None
    assert "torchmetrics" in found["lpips_reason"]


def test_perceptual_measures_take_all_images_in_the_range_they_expect(monkeypatch):
    """Stand-ins of torchmetrics' classes: what they are made with and given."""
    asked = {}

    def stand_in(name):
        class Measure:
            def __init__(self, **options):
                asked[name] = {"options": options, "given": []}

            def update(self, *images, **rest):
                asked[name]["given"].append((images, rest))

            def compute(self):
                return torch.tensor(0.25)

        return Measure

    lpip, fid = types.ModuleType("torchmetrics.image.lpip"), types.ModuleType("torchmetrics.image.fid")
    lpip.LearnedPerceptualImagePatchSimilarity = stand_in("lpips")
    fid.FrechetInceptionDistance = stand_in("rfid")
    for module in (types.ModuleType("torchmetrics"), types.ModuleType("torchmetrics.image"), lpip, fid):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    images, others = torch.rand(20, 3, 32, 32), torch.rand(20, 3, 32, 32)
    assert m.perceptual(images, others) == {"lpips": 0.25, "rfid": 0.25}
    assert asked["lpips"]["options"] == {"net_type": "alex", "normalize": True}  # normalize: images are in [0, 1]
    assert asked["rfid"]["options"] == {"normalize": True}
    pairs = [given for given, _ in asked["lpips"]["given"]]
    assert torch.equal(torch.cat([a for a, _ in pairs]), images)
    assert torch.equal(torch.cat([b for _, b in pairs]), others)
    for real, expected in ((True, images), (False, others)):
        parts = [given[0] for given, rest in asked["rfid"]["given"] if rest == {"real": real}]
        assert torch.equal(torch.cat(parts), expected)


def test_the_report(folder, tmp_path):
    out, drawing = tmp_path / "report.json", tmp_path / "report.png"
    words = ("--model", f"dir:{folder}/toy", "--data", folder / "photos", "--device", "cpu")
    assert eval_reconstruction.run_reconstruction(arguments(*words, "--out", out, "--picture", drawing)) == 1
    report = json.loads(out.read_text())
    assert list(report["skipped"]) == ["broken.jpg"]
    assert (report["images"], report["canvas"], report["model"]) == (6, [32, 32], "toy")
    methods = report["methods"]
    assert [methods[f"code {p}"]["budget"] for p in ("float32", "float16")] == [128, 64]
    assert methods["code float32"]["code_loss"] == 0 < methods["code float16"]["code_loss"]
    assert methods["code float16"]["code_loss"] < methods["code int8"]["code_loss"] < 0.02
    rows = report["per_image"]
    assert len(rows) == 6
    mean = np.mean([row["code float32"]["psnr"] for row in rows])
    assert methods["code float32"]["psnr"]["mean"] == pytest.approx(mean, rel=1e-5)
    codec = Codec.from_pretrained(f"dir:{folder}/toy", device="cpu")
    image = eval_reconstruction.read(str(folder / "photos"), None, codec.size, codec.card.fit)[0][:1]
    expected = float(m.psnr(image, codec.reconstruct(image)))
    assert rows[0]["code float32"]["psnr"] == pytest.approx(expected, rel=1e-4)
    for row in rows:
        for method, cell in row.items():
            assert method == "name" or cell is None or cell["bytes"] <= methods[method]["budget"]
    assert set(report["retrieval"]["code"]) == {"itself", "class"}
    assert report["retrieval"]["pixels"]["itself"] > 0
    with Image.open(drawing) as shown:
        assert shown.width == (128 + 2) * (1 + len(methods))


def test_fewer_images_and_no_files(folder, capsys):
    words = ("--model", f"dir:{folder}/toy", "--data", f"{folder}/photos@cats", "--limit", 2, "--no-files", "--json")
    assert eval_reconstruction.run_reconstruction(arguments(*words, "--device", "cpu")) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["methods"]) == {"code float32", "code float16", "code int8"}
    assert set(report["retrieval"]["code"]) == {"itself"}
    table = eval_reconstruction.table(report)
    assert "code int8" in table


def test_wrong_arguments(folder, tmp_path):
    words = ("--model", f"dir:{folder}/toy", "--data", folder / "photos")
    with pytest.raises(InvalidConfig, match="--limit"):
        eval_reconstruction.run_reconstruction(arguments(*words, "--limit", 0))
    with pytest.raises(InvalidConfig, match="json"):
        eval_reconstruction.run_reconstruction(arguments(*words, "--out", tmp_path / "a.txt"))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InvalidDataset, match="readable"):
        eval_reconstruction.run_reconstruction(arguments(*words[:2], "--data", tmp_path))


def test_the_training_verb(folder, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert train.run(parser.parse_args(["codec", "--check", f"out={tmp_path}", "train_cfg=published-train"])) == 0
    assert json.loads(capsys.readouterr().out)["compat"] == "published"
    assert train.run(parser.parse_args(["finetune", "--check", "out=x"])) == 0
    assert json.loads(capsys.readouterr().out)["image_size"] == [512]
    words = [f"out={tmp_path}/run", f"train={folder}/photos", f"init=dir:{folder}/toy", "image_size=32", "steps=1",
             "batch_size=7", "workers=0", "device=cpu", "holdout=0"]  # fmt: skip
    status = train.run(parser.parse_args(["finetune", *words, "--json"]))
    assert status == 1  # one of the files is no photograph
    assert list(json.loads(capsys.readouterr().out)["skipped"]) == ["broken.jpg"]
    assert Codec.from_pretrained(f"dir:{tmp_path}/run").dim == 32


def test_the_walk_example(folder, tmp_path, monkeypatch):
    from opsin.video import open_video

    script = Path(__file__).parents[1] / "examples/rollout.py"
    assert len(script.read_text().splitlines()) <= 40
    photographs = [str(folder / "photos" / name) for name in ("dogs/0.png", "cats/1.png", "dogs/2.png")]
    out = tmp_path / "walk.mp4"
    words = ["rollout.py", *photographs, "--out", str(out), "--model", f"dir:{folder}/toy", "--frames", "5"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    with open_video(out) as video:
        frames = list(video.frames())
    assert len(frames) == 11
    codec = Codec.from_pretrained(f"dir:{folder}/toy")
    ends = codec.reconstruct([photographs[0], photographs[2]])
    for frame, own, other in zip((frames[0], frames[-1]), ends, ends.flip(0), strict=True):
        shown = frame.image.float() / 255
        assert (shown - own).abs().mean() < (shown - other).abs().mean()
