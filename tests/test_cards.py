"""Cards and the catalogue."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from opsin import cards
from opsin.cards import ModelCard, catalogue, find
from opsin.errors import InvalidCheckpoint, MissingFile, UnknownModel


def test_round_trip(tmp_path: Path) -> None:
    card = ModelCard("mine", "regions", "ren", dim=8, mean=(0.1, 0.2, 0.3), measured={"vql": {"success": 0.5}})
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    card.save(tmp_path / "deep/card.json")
    assert ModelCard.load(tmp_path / "deep/card.json") == card
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["card.json"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.dim = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON"),
        ("[1]", "object"),
        ('{"kind": "backbone", "family": "vit"}', '"name"'),
        ('{"name": "a", "kind": "poem", "family": "vit"}', "poem"),
        ('{"name": "a", "kind": "backbone", "family": "vit", "patchsize": 8}', "patch_size"),
    ],
)
def test_bad_cards(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(InvalidCheckpoint, match=message):
        ModelCard.load(path)


def test_absent_card(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        ModelCard.load(tmp_path / "card.json")


def test_find_tells_the_near_misses() -> None:
    assert find("dino-b8").repo == "facebook/dino-vitb8"
    with pytest.raises(UnknownModel, match='"ren-dinov2-l14"'):
        find("ren-dinov2-l")
    with pytest.raises(UnknownModel, match="opsin models"):
        find("zzz")


@pytest.mark.parametrize("card", catalogue().values(), ids=lambda card: card.name)
def test_every_entry_is_complete(card: ModelCard) -> None:
    assert card.name == find(card.name).name
    assert card.licence
    assert card.dim > 0
    assert card.patch_size > 0
    assert card.image_size % card.patch_size == 0
    if not card.embedded:
        assert card.citation
        assert card.licence_url.startswith("https://")
    if card.kind == "backbone":
        assert card.repo
        assert card.parameters > 1e6
        assert all(0 <= value < 1 for value in card.mean)
        assert all(0 < value <= 1 for value in card.std)
    elif card.kind == "codec":
        assert len(card.sizes) in (5, 7)
    elif card.kind == "tracker":
        assert card.repo.startswith("facebook/sam2")
        assert card.parameters > 1e7
    elif card.kind == "segmentation":
        assert find(card.backbone).kind == "backbone"
        assert 0 <= card.denoise < 1
    else:
        assert card.grid_size > 0
        assert 0 < card.threshold < 1
    if card.gated:
        assert card.gate_url == f"https://huggingface.co/{card.repo}"
        assert not find(card.substitute).gated
        assert find(card.substitute).dim >= 384
    for name in (card.backbone, card.regions, card.tokens):
        assert name in ("", "backbone") or find(name)


@pytest.mark.parametrize(
    ("name", "backbone", "dim", "image", "grid", "threshold"),
    [
        ("ren-dino-b8", "dino-b8", 768, 384, 48, 0.975),
        ("ren-dinov2-l14", "dinov2-l14", 1024, 518, 37, 0.975),
        ("ren-openclip-g14", "openclip-g14", 1408, 224, 16, 0.875),
    ],
)
def test_published_region_models(
    name: str, backbone: str, dim: int, image: int, grid: int, threshold: float
) -> None:
    card = find(name)
    assert (card.backbone, card.dim, card.image_size, card.grid_size) == (backbone, dim, image, grid)
    assert card.threshold == threshold
    assert (card.heads, card.layers, card.seed) == (8, 4, 42)
    assert card.files == ("checkpoint.pth",)
    assert card.patch_size * card.grid_size == card.image_size
    assert find(backbone).dim == dim
    assert find(backbone).patch_size == card.patch_size
    # encoder parameters: prompt and output projections, four blocks, two LayerNorms (counted from the published shapes)
    head = dim // 8
    block = 4 * (dim * dim + dim) + 4 * head + 6 * dim + (4 * dim * dim + 3 * dim)
    assert card.parameters == 2 * (dim * dim + dim) + 2 * dim + 4 * block


def test_embedded_cards_are_read_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "WEIGHTS", tmp_path)
    ModelCard("small", "regions", "ren", source="hf:somewhere/else", dim=4).save(tmp_path / "small/card.json")
    cards._read_catalogue.cache_clear()
    try:
        assert find("small").embedded
        assert "dino-b8" in catalogue()
    finally:
        monkeypatch.undo()
        cards._read_catalogue.cache_clear()
    assert "small" not in catalogue()


def test_cards_and_hub_import_no_torch() -> None:
    code = "import sys, opsin.cards, opsin.hub; opsin.cards.catalogue(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
