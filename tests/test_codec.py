"""The codec as a user meets it: any image in, codes kept and read, images and videos out, mistakes told."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opsin import cards
from opsin.cli import codes as verbs
from opsin.cli.main import parser_of
from opsin.codec import Codec, CodecConfig, ImageCode, layers, patchify, unpatchify, weights
from opsin.codec.canvas import lay, layout, restore
from opsin.codec.download import download
from opsin.errors import (
    IncompatibleModel,
    InputError,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidImage,
    MissingFile,
    ModelUnavailable,
    OpsinError,
    UnsupportedSize,
)
from opsin.video import open_video

CONFIG = CodecConfig(32, 2, 4, 16, 1, 4, 8, (32, 32))


@pytest.fixture
def codec():
    return Codec.create(CONFIG, seed=3, name="little")


def photo(height, width, seed=0):
    noise = torch.rand((1, 3, 4, 6), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0]


# the model


def test_one_seed_one_model():
    first, again, other = (Codec.create(CONFIG, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["encoder.cls_token"], other["encoder.cls_token"])
    assert all(value.isfinite().all() and value.abs().max() <= 4 for value in first.values())  # nothing left undrawn


def test_create_leaves_the_global_draw_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Codec.create(CONFIG)
    assert torch.equal(torch.rand(3), expected)


def test_start_is_that_of_the_published_training():
    model = Codec.create(CodecConfig(768, 1, 12, 512, 1, 16))
    decoder = model.decoder
    assert model.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert decoder.learned_embed.std().item() == pytest.approx(0.02, rel=0.02)
    attention = decoder.patch_recon.attn.in_proj_weight
    assert attention.abs().max().item() == pytest.approx((6 / (4 * 768)) ** 0.5, rel=0.01)  # all three thirds as one
    patch = model.encoder.mae_encoder.patch_embed.proj
    assert patch.weight.abs().max().item() == pytest.approx((6 / (768 + 768)) ** 0.5, rel=0.01)
    assert patch.bias.abs().max().item() == pytest.approx(768**-0.5, rel=0.02)


def test_dropout_is_for_training_alone(codec):
    vectors = torch.randn(2, 32)
    assert not codec.training
    assert torch.equal(codec.decode(vectors), codec.decode(vectors))
    codec.train()
    assert not torch.equal(codec.decoder(vectors), codec.decoder(vectors))


def test_code_is_the_first_token(codec):
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(codec.encoder.bottleneck(pixels), codec.encoder(pixels)[:, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_short_cuts_without_a_gradient_change_nothing(dtype, count, monkeypatch):
    """Fused kernels where there are some, and a first layer that is computed for places and images apart."""
    model = Codec.create(CONFIG, seed=3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * p.requires_grad
    model.to(dtype)
    pixels, room = torch.randn(count, 3, 32, 32).to(dtype), {torch.bfloat16: 0.06}.get(dtype, 1e-5)
    tokens = model.encoder(pixels).detach()  # with a gradient: the long way
    expected = tokens, tokens[:, 0], model.decoder(tokens[:, 0]), model.decoder.full(tokens)
    for fused in (layers._fused_dtypes, tuple):
        monkeypatch.setattr(layers, "_fused_dtypes", fused)
        with torch.no_grad():
            found = model.encoder(pixels), model.encoder.bottleneck(pixels), model.decoder(tokens[:, 0])
            for one, other in zip((*found, model.decoder.full(tokens)), expected, strict=True):
                assert one.dtype == dtype
                assert (one - other).norm() <= room * other.norm()


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_losses(codec, coefficients):
    pixels = torch.randn(2, 3, 32, 32)
    found = codec.losses(pixels, coefficients)
    parts = {"bottleneck": coefficients[0], "full": coefficients[1]}
    assert set(found) == {"loss", *(name for name, weight in parts.items() if weight)}
    assert found["loss"].item() == pytest.approx(sum(w * found[n].item() for n, w in parts.items() if w))
    assert {key: value.item() for key, value in codec(pixels, coefficients).items()} == pytest.approx(
        {key: value.item() for key, value in found.items()}
    )
    with pytest.raises(InvalidConfig):
        codec.losses(pixels, (0.0, 0.0))


def test_every_trained_parameter_but_the_mask_token_gets_a_gradient(codec):
    codec.losses(torch.randn(2, 3, 32, 32))["loss"].backward()
    without = {name for name, p in codec.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"decoder.mae_decoder.mask_token"}
    attention = codec.decoder.patch_recon.attn.in_proj_weight.grad
    assert not attention[:64].any()
    assert attention[64:].any()


def test_it_learns_one_batch():
    model = Codec.create(CONFIG, seed=1)
    pixels = model.normalise(torch.stack([photo(32, 32, seed=i) for i in range(2)]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = model.losses(pixels)["loss"].item()
    for _ in range(100):
        optimiser.zero_grad()
        loss = model.losses(pixels)["loss"]
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2 * before


# sizes


def test_resize_trains_on_from_what_was_learned(codec):
    before = {name: id(p) for name, p in codec.named_parameters()}
    learned = codec.decoder.learned_embed.detach().clone()
    optimiser = torch.optim.AdamW(codec.parameters(), lr=1e-2)
    codec.resize(64)
    assert {name: id(p) for name, p in codec.named_parameters()} == before
    assert (codec.size, codec.card.image_size) == ((64, 64), 64)
    assert codec.decoder.learned_embed.std() < 2 * learned.std()
    resized = codec.decoder.learned_embed.detach().clone()
    codec.losses(torch.randn(2, 3, 64, 64))["loss"].backward()
    optimiser.step()
    assert not torch.equal(codec.decoder.learned_embed, resized)


def test_resize_keeps_the_picture():
    """A trained codec says the same at twice the size: the resampled grid has the same queries in the same places."""
    model = Codec.create(CONFIG, seed=1)
    pictures = torch.stack([photo(32, 32, seed=i) for i in range(2)])
    pixels = model.normalise(pictures)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model.losses(pixels, (1.0, 0.0))["loss"].backward()
        optimiser.step()
    vectors = model.encode(pictures).vectors
    small = model.decode(vectors)
    large = torch.nn.functional.avg_pool2d(model.resize(64).decode(vectors), 2)
    drawn = torch.nn.functional.avg_pool2d(Codec.decode(model.resize(32).resize(64, compat="published"), vectors), 2)
    assert (large - small).abs().mean() < 0.5 * (drawn - small).abs().mean()


def test_resize_to_the_same_size_is_nothing(codec):
    before = {key: value.clone() for key, value in codec.state_dict().items()}
    codec.resize(32, compat="published")
    assert all(torch.equal(value, before[key]) for key, value in codec.state_dict().items())


def test_panoramas_have_a_grid_of_their_own(codec, tmp_path):
    codec.resize((32, 64))
    assert codec.encoder.grid == codec.decoder.grid == (4, 8)
    wide = photo(40, 80)
    assert codec.reconstruct(wide).shape == (1, 3, 32, 64)
    assert codec.decode_tokens(codec.encode_tokens(wide)).shape == (1, 3, 32, 64)
    again = Codec.from_pretrained(codec.save_pretrained(tmp_path / "wide"))
    assert again.size == (32, 64)
    assert torch.allclose(again.reconstruct(wide), codec.reconstruct(wide), atol=1e-5)


@pytest.mark.parametrize("size", [33, (32, 20), 0, -8, (32, 32, 32), 32.0, "32", True])
def test_sizes_that_cannot_be(codec, size):
    with pytest.raises((UnsupportedSize, InvalidConfig)):
        codec.resize(size)
    with pytest.raises(InvalidConfig, match="compat"):
        codec.resize(64, compat="publised")
    assert codec.size == codec.decoder.size == (32, 32)


def test_patches_of_a_wide_picture():
    images = torch.rand(2, 3, 16, 32)
    assert torch.equal(unpatchify(patchify(images, 8), 8, (2, 4)), images)
    with pytest.raises(UnsupportedSize):
        unpatchify(torch.rand(1, 7, 192), 8)
    with pytest.raises(UnsupportedSize):
        patchify(torch.rand(1, 3, 20, 32), 8)
    with pytest.raises(InvalidImage):
        patchify(torch.rand(3, 16, 16), 8)


@pytest.mark.parametrize(
    "changes", [{"dim": 30}, {"heads": 5}, {"depth": 0}, {"size": (30, 32)}, {"activation": "mish"}, {"dropout": 1.0}]
)
def test_configurations_that_cannot_be(changes):
    with pytest.raises(InputError):
        replace(CONFIG, **changes)


def test_unknown_size_by_name():
    with pytest.raises(InvalidConfig, match="large"):
        Codec.create("larg")


# images in, images out


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("size", [(40, 80), (80, 40), (1, 500), (32, 32), (7, 5)])
def test_what_was_laid_comes_back(size, fit):
    picture = photo(*size)
    canvas = lay(picture, (64, 64), fit)
    assert canvas.shape == (3, 64, 64)
    assert 0 <= canvas.min() <= canvas.max() <= 1
    again = restore(canvas, size, fit)
    if fit == "crop":
        ratio = layout(size, (64, 64), fit).scale[0]
        seen = [min(side, max(1, round(64 / ratio))) for side in size]
        assert again.shape[1:] == tuple(seen)
        top, left = ((side - part) // 2 for side, part in zip(size, seen, strict=True))
        picture = picture[:, top : top + seen[0], left : left + seen[1]]
    assert again.shape == picture.shape
    if min(size) >= 32:
        assert (again - picture).abs().mean() < 0.02


def test_pad_has_bars_and_crop_has_none():
    white = torch.ones(3, 40, 80)
    padded = lay(white, (64, 64), "pad")
    assert padded[:, :16].max() == 0
    assert padded[:, 16:48].min() > 0.999
    assert lay(white, (64, 64), "crop").min() > 0.999


def test_any_image_any_order(codec, tmp_path):
    pictures = [photo(20 + i, 40, seed=i) for i in range(5)]
    one_by_one = torch.cat([codec.encode(p).vectors for p in pictures])
    together = codec.encode(pictures, batch_size=2)
    assert together.vectors.shape == (5, 32)
    assert together.sizes == tuple((20 + i, 40) for i in range(5))
    assert torch.allclose(together.vectors, one_by_one, atol=1e-5)
    array = (pictures[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    same = [array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path), (tmp_path / "a.png").read_bytes()]
    codes = [codec.encode(s).vectors for s in same]
    assert all(torch.equal(code, codes[0]) for code in codes)
    assert codec.encode(str(tmp_path)).names == (str(tmp_path / "a.png"),)
    assert codec.encode(torch.rand(3, 3, 32, 32)).vectors.shape == (3, 32)
    assert len(codec.encode([])) == 0
    assert codec.decode(codec.encode([])).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (3000, 2)])
def test_tiny_and_long_images(codec, shape):
    code = codec.encode(np.zeros((*shape, 3), np.uint8))
    assert next(codec.restore(code)).shape == (3, *shape)


def test_images_that_cannot_be(codec, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("bad.png", "empty.jpg"):
        with pytest.raises(InvalidImage):
            codec.encode(tmp_path / name)
    with pytest.raises(InvalidImage):
        codec.encode(tmp_path)
    with pytest.raises(MissingFile):
        codec.encode(tmp_path / "nothing.png")
    with pytest.raises(InvalidImage):
        codec.encode(torch.full((3, 8, 8), torch.nan))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(InvalidImage, match="pixels"):
        codec.encode(tmp_path / "huge.png")
    with pytest.raises(InvalidConfig):
        codec.encode(photo(8, 8), fit="squash")
    with pytest.raises(InvalidConfig):
        codec.encode(photo(8, 8), batch_size=0)
    with pytest.raises(UnsupportedSize):
        codec.encoder(torch.rand(1, 3, 32, 40))


def test_restore_gives_original_sizes(codec):
    pictures = [photo(20, 60), photo(50, 30)]
    code = codec.encode(pictures, fit="pad")
    assert [tuple(p.shape) for p in codec.restore(code, batch_size=1)] == [(3, 20, 60), (3, 50, 30)]


def test_reconstruct_is_encode_then_decode(codec):
    pictures = [photo(32, 32, seed=i) for i in range(3)]
    again = codec.reconstruct(pictures)
    assert torch.allclose(again, codec.decode(codec.encode(pictures)))
    assert 0 <= again.min() <= again.max() <= 1
    assert again.dtype == torch.float32


def test_half_precision_follows_the_weights(codec):
    exact = codec.reconstruct(photo(32, 32))
    found = codec.to(torch.bfloat16).reconstruct(photo(32, 32))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.05
    assert torch.equal(codec.normalise(torch.full((3, 1, 1), 0.485))[0], torch.zeros(1, 1))


def test_walks_of_vectors_are_videos(codec, tmp_path):
    walk = torch.randn(2, 5, 32)
    found = codec.decode(walk, batch_size=3)
    assert found.shape == (2, 5, 3, 32, 32)
    assert torch.allclose(found[1], codec.decode(walk[1]), atol=1e-6)
    assert torch.allclose(torch.stack(list(codec.frames(walk[0], batch_size=2))), found[0], atol=1e-6)
    path = codec.save_video(walk[0], tmp_path / "walk.mp4", fps=5)
    video = open_video(path)
    frames = list(video.frames())
    assert len(frames) == 5
    assert frames[0].size == (32, 32)
    assert video.fps == pytest.approx(5)


def test_long_walks_are_decoded_in_chunks(codec):
    seen = []
    codec.decoder.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    frames = codec.frames(torch.randn(1000, 32), batch_size=8)
    for _ in range(20):
        next(frames)
    assert seen == [8, 8, 8]


@pytest.mark.parametrize("call", ["decode", "frames", "save_video"])
def test_vectors_that_cannot_be(codec, tmp_path, call):
    def run(vectors):
        arguments = (tmp_path / "x.mp4",) if call == "save_video" else ()
        result = getattr(codec, call)(vectors, *arguments)
        return list(result) if call == "frames" else result

    for vectors, error in [
        (torch.randn(2, 31), IncompatibleModel),
        (torch.randn(32), IncompatibleModel),
        (torch.full((2, 32), torch.nan), InputError),
        (torch.full((2, 32), torch.inf), InputError),
        (torch.zeros((2, 32), dtype=torch.long), InputError),
        (replace(codec.encode(photo(9, 9)), model="other"), IncompatibleModel),
    ]:
        with pytest.raises(error):
            run(vectors)
    assert not list(tmp_path.iterdir())


def test_nothing_gives_nothing(codec):
    assert len(codec.encode([])) == 0
    assert codec.decode(codec.encode([])).shape == (0, 3, 32, 32)
    assert codec.encode_tokens([]).shape == (0, 17, 32)
    assert codec.decode_tokens(codec.encode_tokens([])).shape == (0, 3, 32, 32)


def test_wrong_tokens(codec):
    with pytest.raises(UnsupportedSize):
        codec.decode_tokens(torch.randn(1, 16, 32))
    with pytest.raises(IncompatibleModel):
        codec.decode_tokens(torch.randn(1, 17, 31))
    with pytest.raises(InputError):
        codec.decode_tokens(torch.full((1, 17, 32), torch.nan))


# codes


def some_code(count=4, dim=32, **facts):
    return ImageCode(torch.randn(count, dim), "little", ((8, 9),) * count, **facts)


@pytest.mark.parametrize("kind", ["float", "half", "int8"])
def test_codes_are_kept(tmp_path, kind):
    code = some_code(names=tuple(f"photo {i} é.jpg" for i in range(4)), fit="pad")
    code = code if kind == "float" else getattr(code, kind)()
    again = ImageCode.load(code.save(tmp_path / "codes.safetensors"))
    assert torch.equal(again.vectors, code.vectors)
    assert torch.equal(again.floats(), code.floats())
    assert (again.model, again.sizes, again.fit, again.names) == (code.model, code.sizes, code.fit, code.names)
    assert again.loss == code.loss
    assert again.bytes_per_image == {"float": 128, "half": 64, "int8": 36}[kind]


def test_stated_loss_is_the_real_one():
    code = some_code(50, 768)
    for rounded, room in ((code.half(), 3e-4), (code.int8(), 0.02)):
        real = (rounded.floats() - code.vectors).norm() / code.vectors.norm()
        assert rounded.loss == pytest.approx(real.item(), rel=1e-4)
        assert 0 < rounded.loss < room
    assert code.loss == 0
    assert code.half().int8().loss > code.half().loss
    assert ImageCode(torch.zeros(2, 8), "m", ((1, 1),) * 2).int8().loss == 0


def test_codes_in_parts():
    code = some_code(names=("a", "b", "c", "d")).int8()
    parts = [code.select(slice(0, 1)), code.select([1, 2, 3])]
    joined = ImageCode.join(parts)
    assert torch.equal(joined.floats(), code.floats())
    assert joined.names == code.names
    with pytest.raises(IncompatibleModel):
        ImageCode.join([code, some_code()])
    with pytest.raises(IncompatibleModel, match="names"):
        ImageCode.join([some_code(), some_code(names=("a", "b", "c", "d"))])
    with pytest.raises(IncompatibleModel):
        ImageCode.join([])


@pytest.mark.parametrize(
    "changes",
    [
        {"vectors": torch.full((4, 32), torch.nan)},
        {"vectors": torch.randn(4, 2, 32)},
        {"vectors": torch.zeros(4, 32, dtype=torch.int8)},
        {"vectors": torch.zeros(4, 32, dtype=torch.long)},
        {"scales": torch.ones(4)},
        {"sizes": ((1, 1),)},
        {"sizes": ((1, 1),) * 3 + ((0, 5),)},
        {"sizes": ((1, 1),) * 3 + ((5,),)},
        {"names": ("a",)},
        {"fit": "squash"},
    ],
)
def test_codes_that_cannot_be(changes):
    with pytest.raises(InputError):
        replace(some_code(), **changes)


def test_files_that_are_no_codes(tmp_path, codec):
    from safetensors.torch import save_file

    facts = {"format": "opsin.image_code", "model": "m", "fit": "stretch", "loss": "0.0", "names": "3"}
    save_file({"vectors": torch.zeros(1, 4), "sizes": torch.ones(1, 2)}, tmp_path / "names", metadata=facts)
    with pytest.raises(InvalidCheckpoint):
        ImageCode.load(tmp_path / "names")
    path = some_code().save(tmp_path / "codes.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InvalidCheckpoint):
        ImageCode.load(path)
    with pytest.raises(MissingFile):
        ImageCode.load(tmp_path / "none")
    folder = codec.save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidCheckpoint):
        ImageCode.load(folder / "codec.safetensors")
    (tmp_path / "page").write_text("<!doctype html>")
    with pytest.raises(InvalidCheckpoint):
        ImageCode.load(tmp_path / "page")


def test_rounded_codes_still_decode(codec):
    code = codec.encode([photo(32, 32, seed=i) for i in range(3)])
    exact = codec.decode(code)
    assert (codec.decode(code.half()) - exact).abs().max() < 1e-2
    assert (codec.decode(code.int8()) - exact).abs().mean() < 2e-2


# weights


def test_saved_and_loaded(codec, tmp_path):
    folder = codec.save_pretrained(tmp_path / "model", card=replace(codec.card, licence="MIT", dim=7))
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "codec.safetensors"]
    for ref in (folder, str(folder), f"dir:{folder}"):
        again = Codec.from_pretrained(ref)
        state = again.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in codec.state_dict().items())
        assert not again.training
    assert (again.card.licence, again.card.dim, again.name) == ("MIT", 32, "little")
    assert Codec.from_pretrained(folder, dtype="bfloat16").encoder.cls_token.dtype == torch.bfloat16
    trained = {key: p.requires_grad for key, p in codec.named_parameters()}
    assert {key: p.requires_grad for key, p in again.named_parameters()} == trained


def test_the_activation_is_in_the_card(tmp_path):
    model = Codec.create(replace(CONFIG, activation="relu"))
    again = Codec.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.card.activation == "relu"
    assert again.encode(photo(32, 32)).vectors.min() == 0


def test_folders_that_are_no_codec(codec, tmp_path):
    with pytest.raises(MissingFile):
        Codec.from_pretrained(tmp_path)
    folder = codec.save_pretrained(tmp_path / "model")
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "sizes": [1, 4, 16, 1, 4]}))
    with pytest.raises(InvalidCheckpoint):
        Codec.from_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({**card, "sizes": []}))
    with pytest.raises(OpsinError):
        Codec.from_pretrained(folder)
    with pytest.raises(IncompatibleModel):
        Codec.from_pretrained("radseg-b")


def published(codec, path, act="missing"):
    """A file as the published training writes them."""
    content = {"enc_model": codec.encoder.state_dict(), "dec_model": codec.decoder.state_dict(), "epoch": 3}
    optimiser = torch.optim.AdamW(codec.parameters())
    codec.losses(torch.randn(1, 3, *codec.size))["loss"].backward()
    optimiser.step()
    content |= {"optimizer": optimiser.state_dict(), "scaler": {"scale": 65536.0, "growth_factor": 2.0}}
    if act != "missing":
        omegaconf = pytest.importorskip("omegaconf")
        model = {"type": "btnk_mae", "model_size": "base", "act_fn": act, "img_size": 32}
        content["cfg"] = omegaconf.OmegaConf.create({"model": model, "epochs": 10, "twice": "${epochs}", "l": [1, 2.5]})
    torch.save(content, path)
    return path


@pytest.fixture
def wide_codec():
    """64 channels a head and 16 heads: what a published file of unknown width is taken for."""
    return Codec.create(CodecConfig(64, 1, 1, 64, 1, 16, 8, (32, 32)), seed=2)


@pytest.mark.parametrize(
    ("name", "inside", "found"),
    [
        ("btnk_mae_vit_base_32.pth", "missing", ""),
        ("btnk_mae_vit_large_relu_32.pth", "missing", "relu"),
        ("checkpoint-latest.pth", "swish", "silu"),
        ("btnk_mae_vit_base_relu_32.pth", None, ""),
    ],
)
def test_published_files(wide_codec, tmp_path, name, inside, found):
    path = published(wide_codec, tmp_path / name, inside)
    model = Codec.from_pretrained(path)
    assert model.card.activation == found
    assert model.name == path.stem
    state = model.encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in weights.load_checkpoint(path)["enc_model"].items())
    assert Codec.from_pretrained(path, activation="tanh").encode(photo(32, 32)).vectors.abs().max() <= 1
    again = Codec.from_pretrained(model.save_pretrained(tmp_path / "again"))
    assert torch.equal(again.reconstruct(photo(32, 32)), model.reconstruct(photo(32, 32)))


def test_a_configuration_is_read_without_its_library(wide_codec, tmp_path, monkeypatch):
    path = published(wide_codec, tmp_path / "checkpoint-latest.pth", "gelu")
    import builtins

    usual = builtins.__import__

    def refuse(name, *rest, **options):
        if name.split(".")[0] == "omegaconf":
            raise ImportError(name)
        return usual(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    content = weights.load_checkpoint(path)
    assert content["cfg"]["model"] == {"type": "btnk_mae", "model_size": "base", "act_fn": "gelu", "img_size": 32}
    assert content["cfg"]["l"] == [1, 2.5]
    assert content["epoch"] == 3


class _Trap:
    def __reduce__(self):
        return (print, ("run",))


def test_files_that_run_code_are_refused(tmp_path, capsys):
    torch.save({"enc_model": {}, "dec_model": {}, "cfg": _Trap()}, tmp_path / "evil.pth")
    with pytest.raises(InvalidCheckpoint):
        Codec.from_pretrained(tmp_path / "evil.pth")
    assert "run" not in capsys.readouterr().out


def test_files_that_are_no_checkpoint(codec, tmp_path):
    cases = {
        "page.pth": b"<!DOCTYPE html><html>", "empty.pth": b"", "noise.pth": bytes(range(256)) * 9,
    }  # fmt: skip
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    torch.save({"enc_model": {}, "dec_model": {}}, tmp_path / "hollow.pth")
    whole = published(codec, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.pth").unlink()
    for path in tmp_path.iterdir():
        with pytest.raises(InvalidCheckpoint):
            Codec.from_pretrained(path)


def test_missing_and_superfluous_keys(wide_codec, tmp_path):
    for change in ({"mae_encoder.norm.bias": None}, {"more": torch.zeros(1)}):
        state = {**wide_codec.encoder.state_dict(), **change}
        state = {key: value for key, value in state.items() if value is not None}
        torch.save({"enc_model": state, "dec_model": wide_codec.decoder.state_dict()}, tmp_path / "x.pth")
        with pytest.raises(InvalidCheckpoint, match=r"norm\.bias|more"):
            Codec.from_pretrained(tmp_path / "x.pth")


def mae_state(config=CONFIG):
    """MAE's own keys, of a random model."""
    model = Codec.create(config, seed=9)
    encoder = {key.removeprefix("mae_encoder."): value for key, value in model.encoder.state_dict().items()}
    decoder = model.decoder.state_dict()
    prefix = "mae_decoder."
    return encoder | {key.removeprefix(prefix): value for key, value in decoder.items() if key.startswith(prefix)}


WIDE = CodecConfig(64, 2, 1, 64, 1, 16, 8, (32, 32))


def test_start_from_the_authors_file(tmp_path):
    state = mae_state(WIDE)
    torch.save({"model": state}, tmp_path / "mae_visualize_vit_tiny.pth")
    model = Codec.from_mae(tmp_path / "mae_visualize_vit_tiny.pth", activation="relu")
    assert torch.equal(model.encoder.cls_token, state["cls_token"])  # the published code loses it
    assert torch.equal(model.decoder.mae_decoder.decoder_pred.weight, state["decoder_pred.weight"])
    assert model.card.activation == "relu"
    larger = Codec.from_mae(tmp_path / "mae_visualize_vit_tiny.pth", image_size=64)
    assert larger.size == (64, 64)
    short = {key: value for key, value in state.items() if key != "blocks.1.norm1.bias"}
    for wrong in (short, {**state, "head.weight": torch.zeros(2)}, {"cls_token": state["cls_token"]}, {}):
        torch.save({"model": wrong}, tmp_path / "other.pth")
        with pytest.raises(InvalidCheckpoint):
            Codec.from_mae(tmp_path / "other.pth")


def test_start_from_transformers(tmp_path):
    """The reconstruction from all tokens is that of transformers' own model without masks."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    half = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    other = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    shape = half | {f"decoder_{key}": value for key, value in other.items()}
    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(**shape, image_size=32, patch_size=8, mask_ratio=0.0, layer_norm_eps=1e-6)
    ).eval()
    with torch.no_grad():
        theirs.vit.embeddings.cls_token.normal_()
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn(p.shape) * p.requires_grad)
    theirs.save_pretrained(tmp_path)
    model = Codec.from_mae(tmp_path)
    pixels, order = torch.randn(2, 3, 32, 32), torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        expected = theirs(pixels, noise=order).logits
        assert torch.allclose(model.decoder.full(model.encoder(pixels)), expected, atol=1e-5)
    assert "mae" in {card.family for card in cards.catalogue().values()}


PUBLISHED_KEYS = (  # of facebook/vit-mae-*, whose files are older than today's transformers
    (r"^(cls_token)$", r"vit.embeddings.\1"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_(embed|pos_embed|norm|pred))", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_start_from_the_files_on_the_hub(tmp_path, file):
    """Keys as in ``facebook/vit-mae-base``, whichever of its two files is there: every weight finds its place."""
    state, found = mae_state(), {}
    for key, value in state.items():
        for pattern, replacement in PUBLISHED_KEYS:
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[key.replace(".attn.qkv.", f".attention.attention.{name}.")] = part.clone()
        else:
            found[key] = value
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in found
    assert all(key.startswith(("vit.", "decoder.")) for key in found)
    facts = {"num_attention_heads": 4, "decoder_num_attention_heads": 4, "model_type": "vit_mae"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    if file.endswith(".bin"):
        torch.save(found, tmp_path / file)
    else:
        save_file(found, tmp_path / file)
    model = Codec.from_mae(tmp_path)
    assert model.encoder.cls_token.abs().max() > 0
    encoder, decoder = weights.from_mae_state(state)
    halves = ((encoder, model.encoder.state_dict()), (decoder, model.decoder.state_dict()))
    assert all(torch.equal(value, known[key]) for half, known in halves for key, value in half.items())
    missing = {key: value for key, value in found.items() if key != "vit.embeddings.cls_token"}
    torch.save(missing, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(InvalidCheckpoint, match="cls_token"):
        Codec.from_mae(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        Codec.from_mae(tmp_path)


def test_start_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for ref in ("mae-b", "mae_visualize_vit_base", "btnk-mae-b"):
        with pytest.raises(ModelUnavailable):
            Codec.from_mae(ref) if ref.startswith("mae_") else Codec.from_pretrained(ref)


# downloads


@pytest.fixture
def server():
    """A web server of one file that may break off, with ranges."""
    content, broken, asked = bytes(range(256)) * 5000, [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/file.pth":
                self.send_error(404)
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            asked.append(start)
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : broken.pop() if broken else None])

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", content, broken, asked
        found.shutdown()


@pytest.fixture
def online(monkeypatch):
    for name in ("OPSIN_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_a_broken_download_is_continued(server, online, tmp_path):
    address, content, broken, asked = server
    broken.append(700_000)
    with pytest.raises(ModelUnavailable):
        download(f"{address}/file.pth", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".file.pth.partial"]  # nothing under its name before it is whole
    path = download(f"{address}/file.pth", tmp_path)
    assert path.read_bytes() == content
    assert asked == [0, 700_000]
    assert [p.name for p in tmp_path.iterdir()] == ["file.pth"]
    download(f"{address}/file.pth", tmp_path)
    assert len(asked) == 2


def test_downloads_that_fail(server, online, tmp_path, monkeypatch):
    address = server[0]
    with pytest.raises(ModelUnavailable):
        download(f"{address}/absent.pth", tmp_path)
    with pytest.raises(InvalidCheckpoint):
        download(f"{address}/file.pth", tmp_path, sha256="0" * 64)
    (tmp_path / ".file.pth.partial").write_bytes(bytes(2_000_000))  # longer than the file
    assert download(f"{address}/file.pth", tmp_path).stat().st_size == 1_280_000
    monkeypatch.setenv("OPSIN_OFFLINE", "1")
    with pytest.raises(ModelUnavailable):
        download(f"{address}/other.pth", tmp_path)


# the command line


@pytest.fixture
def folder(codec, tmp_path):
    for i, size in enumerate([(20, 40), (33, 17)]):
        path = tmp_path / "photos" / f"{'deep/' * i}p{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((photo(*size, seed=i).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(path)
    codec.save_pretrained(tmp_path / "model")
    return tmp_path


def command(verb, module, *words):
    return module.run(parser_of(verb, module).parse_args([str(word) for word in words]))


def encode(*words):
    return command("encode", verbs.ENCODE, *words)


def decode(*words):
    return command("decode", verbs.DECODE, *words)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_photos_to_codes_and_back(folder, precision, capsys):
    codes, model = folder / "codes.safetensors", folder / "model"
    assert encode(folder / "photos", "--model", model, "--out", codes, "--precision", precision, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["dim"], facts["precision"]) == (2, 32, precision)
    assert decode(codes, "--out", folder / "again", "--model", model) == 0
    found = {p.relative_to(folder / "again").as_posix(): p for p in (folder / "again").rglob("*.png")}
    assert set(found) == {"p0.png", "deep/p1.png"}
    assert Image.open(found["p0.png"]).size == (40, 20)
    assert decode(codes, "--out", folder / "square", "--model", model, "--square", "--format", "jpg") == 0
    assert Image.open(folder / "square" / "p0.jpg").size == (32, 32)


def test_a_bad_file_among_several_is_named(folder, capsys):
    (folder / "photos" / "bad.jpg").write_bytes(b"nothing")
    (folder / "photos" / "notes.txt").write_text("no picture")
    codes = folder / "codes.safetensors"
    assert encode(folder / "photos", "--model", folder / "model", "--out", codes, "--batch-size", 1) == 1
    assert "bad.jpg" in capsys.readouterr().err
    assert len(ImageCode.load(codes)) == 2


def test_a_walk_becomes_a_video(folder):
    np.save(folder / "walk.npy", np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32))
    assert decode(folder / "walk.npy", "--model", folder / "model", "--out", folder / "walk.mp4", "--fps", 3) == 0
    assert len(list(open_video(folder / "walk.mp4").frames())) == 6


def test_another_size(folder):
    codes, model = folder / "codes.safetensors", folder / "model"
    assert encode(folder / "photos", "--model", model, "--out", codes, "--size", "32x64", "--fit", "crop") == 0
    assert decode(codes, "--model", model, "--out", folder / "wide", "--size", "32x64", "--square") == 0
    assert Image.open(folder / "wide" / "p0.png").size == (64, 32)


def test_mistakes_on_the_command_line(folder):
    codes, model = folder / "codes.safetensors", folder / "model"
    (folder / "none").mkdir()
    (folder / "bad.jpg").write_bytes(b"nothing")
    np.save(folder / "whole.npy", np.zeros((2, 32), int))
    for words, error in [
        ((folder / "absent.jpg",), MissingFile),
        ((folder / "bad.jpg",), InvalidImage),
        ((folder / "none",), InvalidImage),
        ((folder / "photos", "--size", "32x"), InvalidConfig),
        ((folder / "photos", "--size", "33"), UnsupportedSize),
        ((folder / "photos", "--batch-size", "0"), InvalidConfig),
    ]:
        with pytest.raises(error):
            encode(*words, "--model", model, "--out", codes)
    assert not codes.exists()
    encode(folder / "photos", "--model", model, "--out", codes)
    for words, error in [
        ((codes,), IncompatibleModel),  # "little" is in no catalogue
        ((folder / "whole.npy", "--model", model), InputError),
        ((folder / "whole.npy",), InputError),
        ((folder / "absent.safetensors", "--model", model), MissingFile),
        ((folder / "bad.jpg", "--model", model), InvalidCheckpoint),
    ]:
        with pytest.raises(error):
            decode(*words, "--out", folder / "again")
    assert not (folder / "again").exists()


def test_pictures_stay_in_their_folder(codec):
    names = ("../../evil.jpg", "a.jpg", "a.png", "/root/b.jpg", "sub/c.jpg")
    with pytest.raises(InvalidConfig):
        verbs.file_names(some_code(5, names=names), "png")
    assert verbs.file_names(some_code(4, names=names[1:]), "png") == ["a.png", "a.png.png", "b.png", "sub/c.png"]
    twins = ("sub/a.2.jpg", "sub/a.jpg", "sub/a.jpg", "sub/a.jpg")
    found = verbs.file_names(some_code(4, names=twins), "png")
    assert len(set(found)) == 4
    assert all(name.startswith("sub/") for name in found)
    assert verbs.file_names(torch.zeros(2, 32), "jpg") == ["000000.jpg", "000001.jpg"]
