"""Every backbone with words keeps the same promises: raw tokens, patches in the space of words, SCRA on and off."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from opsin.backbones.adaptors import Adaptor
from opsin.cards import ModelCard, catalogue, find
from opsin.errors import IncompatibleModel, InvalidConfig, UnsupportedSize
from opsin.segmentation import Segmenter, aligned
from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.labels import as_labels
from tests.conformance import aligned_tiny
from tests.conformance.aligned_tiny import KINDS, PREFIX, mlp, noise, normalised, radio, raw_tokens, save, save_radio
from tests.conformance.tiny import make

ALL = (*KINDS, "radio")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("aligned")
    for kind in KINDS:
        save(kind, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def build(folders: dict[str, Path]) -> Any:
    def build(kind: str, **options: Any) -> AlignedBackbone:
        if kind == "radio":
            backbone = radio("siglip2", "sam")
            return AlignedBackbone(backbone.to(options.get("device", "cpu"), options.get("dtype")))
        return aligned.from_pretrained(folders[kind], **{"device": "cpu", **options})

    return build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 1), (1, 1)])
@torch.no_grad()
def test_features_are_the_raw_tokens_of_the_last_block(kind: str, grid: tuple[int, int], build: Any) -> None:
    model, (h, w) = aligned_tiny.joint(kind), grid
    pixels = noise(2, 3, h * 8, w * 8)
    tokens = raw_tokens(kind, model, pixels)[:, PREFIX[kind] :]
    features = build(kind).features(pixels)
    assert features.shape == (2, 32, h, w)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_patch_goes_the_way_that_the_model_itself_goes_with_an_image(kind: str, build: Any) -> None:
    """The model's own image embedding, with one patch put where it takes the image from."""
    model, pixels = aligned_tiny.joint(kind), noise(1, 3, 24, 24)
    backbone = build(kind)
    got = backbone.align(backbone.features(pixels).flatten(2).transpose(1, 2))[0]
    tokens = raw_tokens(kind, model, pixels)
    assert got.shape == (9, backbone.text_dim)
    for index in (0, 4, 8):
        patch = tokens[:, PREFIX[kind] + index][:, None]  # the only token, and the first

        def replace(module: nn.Module, inputs: Any, output: Any, patch: Tensor = patch) -> Any:
            output.last_hidden_state = patch
            return output

        handle = model.vision_model.encoder.register_forward_hook(replace)
        expected = model.get_image_features(normalised(kind, pixels)).pooler_output[0]
        handle.remove()
        torch.testing.assert_close(got[index], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_radio_goes_through_the_summary_head_of_its_language(build: Any) -> None:
    backbone = build("radio")
    assert backbone.language == "siglip2"
    assert backbone.text == "hf:org/words"
    tokens = backbone.features(noise(2, 3, 32, 48)).flatten(2).transpose(1, 2)
    assert torch.equal(backbone.align(tokens), backbone.backbone.adaptor("siglip2").head_mlp(tokens))
    assert backbone.text_dim == 24
    assert (backbone.name, backbone.dim, backbone.patch_size) == ("tiny-radio", 32, 16)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_align_takes_any_leading_shape(kind: str, build: Any) -> None:
    backbone = build(kind)
    tokens = noise(2, 3, 5, backbone.dim)
    out = backbone.align(tokens)
    assert out.shape == (2, 3, 5, backbone.text_dim)
    torch.testing.assert_close(backbone.align(tokens[1, 2, 3]), out[1, 2, 3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", [2.0, 10.0, math.inf])
@torch.no_grad()
def test_scra_changes_the_features_and_its_absence_restores_every_bit(kind: str, scaling: float, build: Any) -> None:
    backbone = build(kind)
    pixels = noise(2, 3, 3 * backbone.patch_size, 2 * backbone.patch_size)
    plain, keys = backbone.features(pixels), list(backbone.state_dict())
    assert backbone.scra is None
    backbone.scra = scaling
    assert backbone.scra == scaling
    changed = backbone.features(pixels)
    assert changed.shape == plain.shape
    assert (changed - plain).abs().max() > 1e-2
    backbone.scra = 3.0
    assert (backbone.features(pixels) - changed).abs().max() > 1e-4
    backbone.scra = scaling
    assert torch.equal(backbone.features(pixels), changed)
    for off in (None, 0.0):
        backbone.scra = off
        assert backbone.scra is None
        assert torch.equal(backbone.features(pixels), plain)
    assert list(backbone.state_dict()) == keys


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_the_limit_of_scra_is_every_token_by_itself(kind: str, build: Any) -> None:
    """The larger the scaling, the nearer; and a token on its own is not changed by the others at all."""
    backbone = build(kind)
    pixels = noise(1, 3, 2 * backbone.patch_size, 2 * backbone.patch_size)
    backbone.scra = math.inf
    limit = backbone.features(pixels)
    distances = []
    for scaling in (1.0, 10.0, 60.0):
        backbone.scra = scaling
        distances.append(float((backbone.features(pixels) - limit).norm()))
    assert distances == sorted(distances, reverse=True)
    parent, name, plain = backbone._last
    backbone.scra = 1e6
    attention, tokens = getattr(parent, name), noise(2, 7, 32)
    together, _ = attention(tokens)
    project = plain.o_proj if hasattr(plain, "o_proj") else plain.out_proj
    torch.testing.assert_close(together, project(plain.v_proj(tokens)))
    torch.testing.assert_close(attention(tokens[:, 3:4])[0], together[:, 3:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:, 3:4], plain(tokens[:, 3:4])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", [-1.0, 1e5, math.nan])
def test_scalings_that_cannot_be_computed(kind: str, scaling: float, build: Any) -> None:
    backbone = build(kind)
    with pytest.raises(InvalidConfig, match="scaling"):
        backbone.scra = scaling
    assert backbone.scra is None


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", [None, 10.0])
@torch.no_grad()
def test_a_batch_equals_its_images(kind: str, scaling: float | None, build: Any) -> None:
    backbone = build(kind)
    backbone.scra = scaling
    pixels = noise(3, 3, 2 * backbone.patch_size, 3 * backbone.patch_size)
    together = backbone.features(pixels)
    for image, found in zip(pixels, together, strict=True):
        torch.testing.assert_close(backbone.features(image[None])[0], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", [None, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_dtypes(kind: str, scaling: float | None, dtype: torch.dtype, build: Any) -> None:
    single, other = build(kind), build(kind, dtype=dtype)
    single.scra = other.scra = scaling
    pixels = noise(1, 3, 2 * single.patch_size, 2 * single.patch_size)
    expected, got = (backbone.align(backbone.features(pixels).flatten(2).mT) for backbone in (single, other))
    assert got.dtype == dtype
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-4 if dtype == torch.float64 else 0.2)  # three layers with 8 bits


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_meta_device(kind: str, build: Any) -> None:
    backbone = build(kind, device="meta")
    for scaling in (None, 10.0, math.inf):
        backbone.scra = scaling
        features = backbone.features(torch.empty(2, 3, 32, 48, device="meta"))
        assert features.device.type == "meta"
        out = backbone.align(features.flatten(2).mT)
        assert out.shape == (2, features.shape[2] * features.shape[3], backbone.text_dim)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_frozen_and_copied(kind: str, build: Any) -> None:
    backbone = build(kind).train()
    assert not backbone.training
    assert not backbone.head.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone.scra = 10.0
    pixels = noise(1, 3, backbone.patch_size, 2 * backbone.patch_size)
    twin = copy.deepcopy(backbone)
    expected = backbone.features(pixels)
    backbone.scra = None
    assert torch.equal(twin.features(pixels), expected)
    twin.scra = None
    assert torch.equal(twin.features(pixels), backbone.features(pixels))
    assert f"scra={twin.scra}" in repr(twin)


@pytest.mark.parametrize("kind", ALL)
def test_bad_sizes(kind: str, build: Any) -> None:
    with pytest.raises(UnsupportedSize, match="multiples of"):
        build(kind).features(noise(1, 3, 33, 48))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_of_a_joint_checkpoint_the_image_half_is_enough(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = aligned.from_pretrained(folders[kind], device="cpu")
    assert not any("text" in key for key in whole.state_dict())
    for path in folders[kind].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    rest = {key: value for key, value in state.items() if not key.startswith(("text_model.", "text_encoder."))}
    assert len(rest) < len(state)
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    half = aligned.from_pretrained(tmp_path, device="cpu")
    pixels = noise(1, 3, 24, 24)
    assert torch.equal(half.features(pixels), whole.features(pixels))
    assert half.logit_scale == whole.logit_scale
    assert half.text == str(tmp_path)


@torch.no_grad()
def test_shards_and_older_repositories(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = aligned.from_pretrained(folders["clip"], device="cpu")
    tokens = noise(4, 32)
    model = aligned_tiny.joint("clip")
    for name in ("preprocessor_config.json", "config.json"):
        for folder in ("shards", "old"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes((folders["clip"] / name).read_bytes())
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    torch.save(load_file(folders["clip"] / "model.safetensors"), tmp_path / "old/pytorch_model.bin")
    for folder in ("shards", "old"):
        got = aligned.from_pretrained(tmp_path / folder, device="cpu")
        assert torch.equal(got.align(tokens), expected.align(tokens))
        assert got.logit_scale == expected.logit_scale


@torch.no_grad()
def test_the_scale_of_the_logits_is_that_of_the_weights(build: Any) -> None:
    clip, siglip, tipsv2 = (aligned_tiny.joint(kind) for kind in KINDS)
    assert build("clip").logit_scale == pytest.approx(float(clip.logit_scale.exp()))
    assert build("siglip").logit_scale == pytest.approx(float(siglip.logit_scale.exp()))
    assert build("tipsv2").logit_scale == pytest.approx(1 / float(tipsv2.temperature))
    assert build("radio").logit_scale == 100


def test_tipsv2_temperature_of_the_config_when_the_file_has_none(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["tipsv2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["temperature"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = (tmp_path / "config.json").read_text()
    assert '"temperature_init_value": 0.005065968260169029' in config
    (tmp_path / "config.json").write_text(config.replace("0.005065968260169029", "0.004"))
    assert aligned.from_pretrained(tmp_path, device="cpu").logit_scale == pytest.approx(250)


def test_a_card_says_how(folders: dict[str, Path], tmp_path: Path) -> None:
    card = ModelCard("mine", "segmentation", "clip", backbone=f"dir:{folders['clip']}", scra=10.0, crop=24, stride=8)
    assert aligned.from_pretrained(card, device="cpu").scra == 10
    card.save(tmp_path / "card.json")
    backbone = aligned.from_pretrained(tmp_path, device="cpu", dtype="bf16")
    assert backbone.scra == 10
    assert backbone.features(noise(1, 3, 24, 24)).dtype == torch.bfloat16
    assert backbone.text == f"dir:{folders['clip']}"


@torch.no_grad()
def test_a_radio_checkpoint_as_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "c-radio_tiny_half.pth.tar"
    save_radio(path)
    card = ModelCard("mine", "segmentation", "radseg", backbone=f"dir:{path}", language="siglip2", scra=10.0)
    plain, chosen = aligned.from_pretrained(str(path), device="cpu"), aligned.from_pretrained(card, device="cpu")
    assert (plain.language, plain.scra, plain.text_dim, plain.logit_scale) == ("siglip2", None, 24, 100)
    assert (chosen.language, chosen.scra) == ("siglip2", 10)
    assert plain.text == "hf:google/siglip2-so400m-patch16-naflex"
    pixels = noise(1, 3, 32, 48)
    features = plain.features(pixels)
    assert (chosen.features(pixels) - features).abs().max() > 1e-2
    assert plain.sam_features(features).shape == (1, 40, 2, 3)
    expected = Adaptor.from_state_dict(mlp(32, 24, 1), {}).head_mlp(features.flatten(2).mT)
    torch.testing.assert_close(plain.align(features.flatten(2).mT), expected, rtol=1e-4, atol=1e-5)


def test_backbones_without_words(tmp_path: Path) -> None:
    make("dinov2").save_pretrained(tmp_path / "dinov2")
    with pytest.raises(IncompatibleModel, match=r"trained with words.*radseg-b.*clip-b16-seg.*tipsv2-b14-seg"):
        aligned.from_pretrained(tmp_path / "dinov2", device="cpu")
    make("clip_vision_model").save_pretrained(tmp_path / "clip")
    with pytest.raises(IncompatibleModel, match=r"visual_projection\.weight.*published repository"):
        aligned.from_pretrained(tmp_path / "clip", device="cpu")
    with pytest.raises(IncompatibleModel, match=r"text tower.*dino, sam.*radseg-b"):
        AlignedBackbone(radio("dino", "sam"))
    with pytest.raises(IncompatibleModel, match="no adaptors"):
        AlignedBackbone(radio())
    with pytest.raises(IncompatibleModel, match=r"ren-dino-b8.*radseg-b"):
        aligned.from_pretrained("ren-dino-b8")


def test_languages(folders: dict[str, Path]) -> None:
    assert AlignedBackbone(radio("dino", "siglip2-g", "siglip2")).language == "siglip2-g"
    assert AlignedBackbone(radio("siglip2-g", "siglip2"), "siglip2").language == "siglip2"
    with pytest.raises(IncompatibleModel, match='"clip"'):
        AlignedBackbone(radio("siglip2"), "clip")
    with pytest.raises(IncompatibleModel, match='language="siglip2"'):
        aligned.from_pretrained(folders["siglip"], language="siglip2", device="cpu")


@pytest.mark.parametrize("upsample", [1, 2])
@torch.no_grad()
def test_sam_features(upsample: int) -> None:
    backbone = AlignedBackbone(radio("siglip2", "sam", upsample=upsample))
    features = backbone.features(noise(2, 3, 32, 48))
    out = backbone.sam_features(features)
    assert out.shape == (2, 40, 2 * upsample, 3 * upsample)
    patch = backbone.sam_features(features[..., 1:2, 2:])  # one patch alone: a cell, or a square of them
    torch.testing.assert_close(out[..., -upsample:, -upsample:], patch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "radio"])
def test_without_a_sam_head_the_models_that_have_one_are_named(kind: str, build: Any) -> None:
    backbone = AlignedBackbone(radio("siglip2")) if kind == "radio" else build(kind)
    having = [c.name for c in catalogue().values() if c.kind == "segmentation" and "sam" in find(c.backbone).adaptors]
    assert having
    with pytest.raises(IncompatibleModel, match=r'adaptor "sam".*radseg-b') as caught:
        backbone.sam_features(noise(1, 32, 2, 2))
    assert all(name in str(caught.value) for name in having)
    assert "radseg-v4" not in str(caught.value)


def test_words_need_a_tower() -> None:
    backbone = AlignedBackbone(radio("siglip2", text=""), "siglip2")
    with pytest.raises(IncompatibleModel, match="text tower"):
        backbone.vocabulary  # noqa: B018


@pytest.mark.parametrize("kind", ALL)
def test_the_vocabulary_is_that_of_the_weights(kind: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(aligned, "of_text", lambda ref, dim, **options: asked.append((ref, dim, options)) or "words")
    backbone = build(kind)
    assert asked == []  # nothing is looked for before there is a question
    assert backbone.vocabulary == backbone.vocabulary == "words"
    ((ref, dim, options),) = asked
    assert ref == backbone.text
    assert dim == {"clip": 20, "radio": 24}.get(kind, 32)
    assert options == {"canonical": kind == "radio", "device": torch.device("cpu")}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_words_and_patches_meet_in_one_space(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and words of one folder, against the two halves of the original model."""
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    model = save(kind, tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "cat": 2, "sofa": 3, "<eos>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text('{"pad_token": "<pad>", "unk_token": "<unk>"}')
    backbone = aligned.from_pretrained(tmp_path / "model", device="cpu")
    rows = backbone.vocabulary.embed(as_labels(["cat", "sofa"], templates=None))
    length = model.config.text_config.max_position_embeddings if kind == "siglip" else 1
    ids = torch.zeros(2, length, dtype=torch.long)
    ids[:, 0] = torch.tensor([2, 3])
    expected = model.get_text_features(ids).pooler_output
    assert rows.shape == (2, backbone.text_dim)
    torch.testing.assert_close(rows, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    patches = backbone.align(backbone.features(noise(1, 3, 24, 24)).flatten(2).mT)
    assert (patches @ rows.T).shape == (1, 9, 2)
    model = Segmenter.from_pretrained(tmp_path / "model", device="cpu")  # the same door as for RADIO
    found = model.segment(noise(3, 50, 70), "cat, sofa", templates=None, denoise=0)
    assert found.size == (50, 70)
    assert found.labels.min() >= 0
    model.aligned.scra = 10.0
    windows = model.encode(noise(3, 50, 70), crop=24, stride=16, scga=10.0)[0]
    assert windows.grid == (8, 10)
    whole = windows.query("cat, sofa", templates=None, size=windows.grid, denoise=0)
    cosine = torch.einsum("ehw,qe->qhw", windows.words, torch.nn.functional.normalize(rows, dim=1))
    assert torch.equal(whole.labels, cosine.argmax(0))
