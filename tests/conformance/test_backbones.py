"""Every family of backbone keeps the same promises, on a tiny random network."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import backbones
from opsin.cards import catalogue
from opsin.errors import InvalidConfig, UnsupportedSize
from tests.conformance.tiny import CLASS_TOKEN, CONFIGS, FIXED_SIZE, REGISTERS, make

KINDS = sorted(CONFIGS)
ANY_SIZE = [kind for kind in KINDS if kind not in FIXED_SIZE]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def canvas(backbone: backbones.Backbone) -> int:
    return backbone.image_size


def test_every_family_is_here_and_every_catalogue_entry_has_one() -> None:
    loaded = {make(kind).card.family for kind in KINDS}
    listed = {card.family for card in catalogue().values() if card.kind == "backbone"}
    assert listed <= loaded
    missing = {kind for kind in backbones.families() if kind not in KINDS} - {"clip", "siglip", "tipsv2"}
    assert not missing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_and_tokens(kind: str, batch: int) -> None:
    backbone = make(kind)
    side = canvas(backbone)
    out = backbone(noise(batch, 3, side, side))
    grid = side // backbone.patch_size
    assert out.features.shape == (batch, backbone.dim, grid, grid)
    assert bool(torch.isfinite(out.features).all())
    assert out.features.std() > 0
    if kind in CLASS_TOKEN:
        assert out.class_token is not None
        assert out.class_token.shape == (batch, backbone.dim)
    else:
        assert out.class_token is None
    if kind in REGISTERS:
        assert out.register_tokens is not None
        assert out.register_tokens.shape == (batch, REGISTERS[kind], backbone.dim)
    else:
        assert out.register_tokens is None


@pytest.mark.parametrize("kind", ANY_SIZE)
def test_other_grids_than_the_native_one(kind: str) -> None:
    backbone = make(kind)
    p = backbone.patch_size
    for h, w in ((3, 5), (5, 3), (1, 1), (7, 7)):
        out = backbone(noise(1, 3, h * p, w * p))
        assert out.features.shape == (1, backbone.dim, h, w)
        assert bool(torch.isfinite(out.features).all())


@pytest.mark.parametrize("kind", ANY_SIZE)
def test_cells_stay_where_their_pixels_are(kind: str) -> None:
    """A changed square moves the features under it more than those of the far corner, on a grid no stage divides."""
    backbone = make(kind)
    p = backbone.patch_size
    plain = noise(1, 3, 9 * p, 7 * p)
    marked = plain.clone()
    marked[..., 7 * p : 9 * p, 5 * p : 7 * p] = 1 - marked[..., 7 * p : 9 * p, 5 * p : 7 * p]
    change = (backbone(marked).features - backbone(plain).features).norm(dim=1)[0]
    assert change[7:, 5:].mean() > change[:3, :3].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_singles_for_mixed_sizes_and_kinds(kind: str) -> None:
    backbone = make(kind)
    images = [noise(3, 40, 90, seed=1), noise(3, 90, 33, seed=2), noise(3, 1, 1, seed=3), noise(1, 25, 31, seed=4)]
    for fit in ("stretch", "pad") if kind in FIXED_SIZE else ("stretch", "pad", "native", "tile"):
        together = backbone.encode(images, fit=fit, batch_size=2)
        for image, found in zip(images, together, strict=True):
            (alone,) = backbone.encode([image], fit=fit)
            assert alone.transform == found.transform
            assert alone.transform.size == tuple(image.shape[-2:])
            atol = 1e-5 * float(1 + found.features.abs().max())
            torch.testing.assert_close(alone.features, found.features, rtol=1e-4, atol=atol)
            if found.class_token is not None:
                assert alone.class_token is not None
                torch.testing.assert_close(alone.class_token, found.class_token, rtol=1e-4, atol=1e-5)
            assert tuple(found.features.shape[1:]) == tuple(s // backbone.patch_size for s in found.transform.canvas)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_and_always_in_evaluation_mode(kind: str) -> None:
    backbone = make(kind)
    pixels = noise(2, 3, canvas(backbone), canvas(backbone))
    first = backbone(pixels).features
    assert torch.equal(first, backbone.train()(pixels).features)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert torch.equal(first, copy.deepcopy(backbone)(pixels).features)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    single, other = make(kind), make(kind).to(dtype)
    pixels = noise(1, 3, canvas(single), canvas(single))
    expected, got = single(pixels).features, other(pixels).features
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.12  # bf16 keeps 8 bits, through two layers
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind: str) -> None:
    backbone = make(kind, device="meta")
    side = canvas(backbone)
    out = backbone(torch.empty(2, 3, side, side, device="meta"))
    assert out.features.device.type == "meta"
    assert out.features.shape == (2, backbone.dim, side // backbone.patch_size, side // backbone.patch_size)
    (found,) = backbone.encode(noise(3, 30, 20))
    assert found.features.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    backbone = make(kind, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), name=f"tiny-{kind}")
    backbone.save_pretrained(tmp_path / "model")
    backbone.save_pretrained(tmp_path / "model")  # over an existing one
    again = backbones.load(f"dir:{tmp_path / 'model'}", device="cpu")
    assert again.card == backbone.card
    pixels = noise(2, 3, canvas(backbone), canvas(backbone))
    for before, after in zip(backbone.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    # not the same bits: mapped weights start at other addresses, and kernels may take other paths
    atol = 1e-6 * float(1 + backbone(pixels).features.abs().max())
    torch.testing.assert_close(backbone(pixels).features, again(pixels).features, rtol=1e-5, atol=atol)
    (tmp_path / "model/card.json").unlink()  # config and preprocessing alone say enough
    plain = backbones.load(tmp_path / "model", device="cpu")
    assert plain.card.mean == (0.1, 0.2, 0.3)
    assert plain.name == f"dir:{(tmp_path / 'model').resolve()}"
    torch.testing.assert_close(backbone(pixels).features, plain(pixels).features, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_of_every_kind(kind: str, tmp_path: Path) -> None:
    backbone = make(kind)
    pixels = (np.random.default_rng(0).random((30, 20, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(pixels[:1, :1]).save(tmp_path / "one.png")
    folder = backbone.encode(tmp_path)
    assert [f.transform.size for f in folder] == [(30, 20), (30, 20), (1, 1)]
    (array,) = backbone.encode(pixels)
    (pil,) = backbone.encode(Image.fromarray(pixels))
    (path,) = backbone.encode(str(tmp_path / "colour.png"))
    assert torch.equal(array.features, pil.features)
    assert torch.equal(array.features, path.features)
    batch = backbone.encode(noise(2, 3, 16, 24))
    assert len(batch) == 2
    assert backbone.encode([]) == []


def test_normalisation_is_inside_and_padding_before_it() -> None:
    backbone = make("vit", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    seen = []
    backbone.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone.encode(torch.ones(3, 50, 50), fit="native")
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(seen[0][0, :, 0, 0], (0 - mean) / std)  # a padded zero
    torch.testing.assert_close(seen[0][0, :, 25, 25], (1 - mean) / std)
    assert seen[0].shape[-2:] == (56, 56)


def test_tiles_of_a_small_image_are_the_image_and_windows_are_cut_between_patches() -> None:
    backbone = make("vit")
    small, large = noise(3, 24, 32), noise(3, 100, 130)
    (tiled,), (native,) = backbone.encode(small, fit="tile"), backbone.encode(small, fit="native")
    assert torch.equal(tiled.features, native.features)
    assert tiled.class_token is None
    (tiled,) = backbone.encode(large, fit="tile", size=48)
    corner = backbone(torch.nn.functional.pad(large, (3, 3, 2, 2))[None, :, :48, :48]).features[0]
    torch.testing.assert_close(tiled.features[:, :2, :2], corner[:, :2, :2], rtol=1e-4, atol=1e-5)


def test_bad_sizes_name_the_nearest_good_one() -> None:
    backbone = make("dinov2")
    with pytest.raises(UnsupportedSize, match="504×336"):
        backbone(noise(1, 3, 500, 333))
    with pytest.raises(UnsupportedSize, match="multiples of 14"):
        backbone.encode(noise(3, 20, 20), size=50)
    with pytest.raises(UnsupportedSize, match=r"\(B, 3, H, W\)"):
        backbone(noise(1, 1, 14, 14))
    with pytest.raises(InvalidConfig, match="stretch, pad, native, tile"):
        backbone.encode(noise(3, 20, 20), fit="crop")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="native"):
        backbone.encode(noise(3, 20, 20), fit="native", size=28)
    with pytest.raises(UnsupportedSize, match="64×64 only"):
        make("hiera")(noise(1, 3, 32, 32))


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make("vit")
    images = [noise(3, 20, 20, seed=i) for i in range(5)]
    expected = [f.features for f in backbone.encode(images)]
    whole, sizes = backbone._features, []

    def scarce(pixels: torch.Tensor) -> backbones.BackboneOutput:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(pixels)

    monkeypatch.setattr(backbone, "_features", scarce)
    got = [f.features for f in backbone.encode(images, batch_size=5)]
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-4, atol=1e-5)
