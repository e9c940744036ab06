"""Any source to RGB, onto a canvas and back; every kind of bad image is a typed error."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import images
from opsin.errors import InputError, InvalidConfig, InvalidImage, MissingFile, UnsupportedSize
from opsin.geometry import ImageTransform

RED = (200, 30, 10)


def encoded(mode="RGB", size=(6, 4), fmt="PNG", colour=None, **options):
    buffer = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else {"RGB": RED}.get(mode, 0)).save(buffer, fmt, **options)
    return buffer.getvalue()


def test_sources_agree(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    wanted = torch.from_numpy(picture).permute(2, 0, 1) / 255
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for source in (path, str(path), path.read_bytes(), Image.open(path), picture, picture / 255, tensor, tensor / 255):
        torch.testing.assert_close(images.read_image(source), wanted)
    assert len(images.read_images([path, picture])) == 2
    assert len(images.read_images(tmp_path)) == 1
    assert len(images.read_images(torch.rand(3, 3, 4, 5))) == 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    picture = Image.new("RGB", (6, 4), RED)
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    image = images.read_image(picture.convert(mode) if mode != "I;16" else picture)
    assert image.shape == (3, 4, 6)
    if mode == "I;16":
        assert image.min() == 1.0
    if mode in ("RGBA", "P", "CMYK"):
        tolerance = 0.1 if mode == "P" else 0.02  # a palette of 216 colours
        torch.testing.assert_close(image[:, 0, 0], torch.tensor(RED) / 255, atol=tolerance, rtol=0)


def test_sixteen_bit_file_keeps_its_range(tmp_path):
    Image.fromarray(np.full((3, 3), 32768, np.uint16)).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png").mean().item() == pytest.approx(0.5, abs=1e-4)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (6, 4))
    picture.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise to show
    picture.save(tmp_path / "a.png", exif=exif)
    image = images.read_image(tmp_path / "a.png")
    assert image.shape == (3, 6, 4)
    assert image[0, 0, -1] > 0.7


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert images.read_image(tmp_path / "a.gif")[0].min() == 1


def test_one_pixel():
    assert images.read_image(np.zeros((1, 1, 3), np.uint8)).shape == (3, 1, 1)


def truncated():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[:500]


@pytest.mark.parametrize(
    "source",
    [
        b"", b"not an image", truncated(), b"<html>moved</html>",
        np.zeros((0, 3, 3)), np.zeros((4, 4, 7)), np.full((4, 4), 300.0), np.array([["a"]]), np.full((2, 2, 3), np.nan),
        torch.zeros(5, 4, 4), torch.zeros(3, 0, 4), 7, None,
    ],
)  # fmt: skip
def test_bad_sources_are_typed_errors(source):
    with pytest.raises(InvalidImage) as caught:
        images.read_image(source)
    assert caught.value.rule


def test_bad_files_are_typed_errors(tmp_path):
    with pytest.raises(MissingFile):
        images.read_image(tmp_path / "none.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InvalidImage, match="empty"):
        images.read_image(tmp_path / "empty.jpg")
    with pytest.raises(InvalidImage):
        images.read_image(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidImage):
        images.read_images(tmp_path / "folder")
    with pytest.raises(MissingFile):
        images.list_images(tmp_path / "absent")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = encoded("1", (30_000, 30_000))
    assert len(bomb) < 200_000
    with pytest.raises(InvalidImage, match="pixels"):
        images.read_image(bomb)
    with pytest.raises(InvalidImage, match="pixels"):
        images.read_image(encoded(size=(20, 20)), max_pixels=100)


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(20, 30), (30, 20), (7, 7), (1, 1), (1, 50)])
def test_fit_leads_back(mode, size):
    canvas, transform = images.fit(torch.rand(3, *size), (16, 16), mode)
    assert canvas.shape == (3, 16, 16)
    points = torch.rand(10, 2) * torch.tensor((size[1], size[0]))
    torch.testing.assert_close(transform.to_original(transform.to_canvas(points)), points)
    torch.testing.assert_close(transform.denormalise(transform.normalise(points)), points)
    assert images.unfit(canvas, transform).shape == (3, *size)
    x1, y1, x2, y2 = transform.content
    assert 0 <= x1 < x2 <= 16.001
    assert 0 <= y1 < y2 <= 16.001


def test_unfit_undoes_fit():
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 60), indexing="ij")
    image = torch.stack([x, y, x * y])
    for mode in ("stretch", "pad"):
        canvas, transform = images.fit(image, (64, 64), mode)
        torch.testing.assert_close(
            images.unfit(canvas, transform)[:, 2:-2, 2:-2], image[:, 2:-2, 2:-2], atol=0.02, rtol=0
        )
    padded, transform = images.pad_to_multiple(image, 14)
    assert padded.shape == (3, 42, 70)
    torch.testing.assert_close(images.unfit(padded, transform), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_stitch_undoes_tile(overlap):
    image = torch.rand(3, 37, 53)
    windows, starts = images.tile(image, (16, 16), overlap)
    assert all(y + 16 <= 37 and x + 16 <= 53 for y, x in starts)
    torch.testing.assert_close(images.stitch(windows, starts, (37, 53)), image)


def test_options_are_checked(tmp_path):
    with pytest.raises(UnsupportedSize):
        images.tile(torch.rand(3, 8, 8), (16, 16))
    with pytest.raises(InvalidConfig):
        images.window_starts(10, 4, 1.0)
    with pytest.raises(InvalidConfig):
        images.fit(torch.rand(3, 8, 8), (4, 4), "squash")
    with pytest.raises(InputError):
        images.save_image(torch.rand(3, 4, 4), tmp_path / "picture.nope")


def test_saved_images_read_back(tmp_path):
    image = torch.rand(3, 5, 6)
    path = images.save_image(image, tmp_path / "new" / "a.png")
    torch.testing.assert_close(images.read_image(path), image, atol=1 / 255, rtol=0)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_identity_transform():
    points = torch.tensor([[1.5, 2.0]])
    assert torch.equal(ImageTransform((4, 5), (4, 5)).to_canvas(points), points)
