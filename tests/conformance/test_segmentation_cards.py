"""What the catalogue says of segmentation models fits the backbones that it names, and networks of published size."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from opsin import backbones
from opsin.backbones.alignment import OWN_SPACE
from opsin.backbones.loading import families
from opsin.cards import ModelCard, catalogue, find
from opsin.segmentation.aligned import LIMIT, AlignedBackbone
from opsin.segmentation.attention import check_scaling
from opsin.segmentation.windows import plan

CARDS = [card for card in catalogue().values() if card.kind == "segmentation"]
NAMES = {card.name for card in CARDS}

# width, layers, heads, and what else a config says; width of the space of words
NETWORKS: dict[str, tuple[int, int, int, dict[str, Any], int]] = {
    "clip-b16": (768, 12, 12, {"intermediate_size": 3072}, 512),
    "clip-l14": (1024, 24, 16, {"intermediate_size": 4096}, 768),
    "siglip2-b16-512": (768, 12, 12, {"intermediate_size": 3072}, 768),
    "siglip2-l16-512": (1024, 24, 16, {"intermediate_size": 4096}, 1024),
    "siglip2-so16-512": (1152, 27, 16, {"intermediate_size": 4304}, 1152),
    "tipsv2-b14": (768, 12, 12, {}, 768),
    "tipsv2-l14": (1024, 24, 16, {}, 1024),
    "tipsv2-so14": (1152, 27, 16, {"mlp_ratio": 4304 / 1152}, 1152),
    "tipsv2-g14": (1536, 40, 24, {"use_swiglu_ffn": True}, 1536),
}


def test_the_models_that_were_promised_are_there() -> None:
    assert {"radseg-b", "radseg-l", "radseg-h", "radseg-g", "radseg-v4-so400m", "radseg-v4-h"} <= NAMES
    assert {"clip-b16-seg", "clip-l14-seg", "siglip2-b16-seg", "siglip2-so16-seg", "tipsv2-b14-seg"} <= NAMES


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_fits_its_backbone(card: ModelCard) -> None:
    backbone = find(card.backbone)
    assert backbone.kind == "backbone"
    assert backbone.family in ("radio", *OWN_SPACE)
    assert (card.dim, card.patch_size) == (backbone.dim, backbone.patch_size)
    if backbone.family == "radio":
        assert card.language in ("", *backbone.adaptors)  # empty: the file decides
    else:
        assert card.language == ""
        assert backbone.family == card.family
    assert bool(card.refiner) == ("sam" in backbone.adaptors)
    assert card.refiner in ("", "hf:facebook/sam-vit-huge")
    assert not card.source
    for fact in (card.licence, card.licence_url, card.citation, backbone.licence, backbone.citation):
        assert fact
    assert card.licence.startswith("no weights of its own")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_has_usable_options(card: ModelCard) -> None:
    p = card.patch_size
    assert card.crop % p == card.stride % p == 0
    assert 0 < card.stride <= card.crop == card.image_size
    assert 0 <= card.denoise < 1
    for scaling in (card.scra, card.scga):
        assert scaling == 0 or scaling >= LIMIT or check_scaling(scaling)
    assert card.scga < LIMIT
    assert json.dumps(card.to_dict(), allow_nan=False)
    for size in ((512, 512), (5, 700), (336, 224)):
        windows = plan(size, card.crop, card.stride, p)
        assert all(side % p == 0 for pair in (windows.size, windows.window, *windows.starts) for side in pair)


def test_radseg_has_the_published_options() -> None:
    cards = [card for card in CARDS if card.family == "radseg"]
    assert {(c.scra, c.scga, c.crop, c.stride, c.denoise) for c in cards} == {(10.0, 10.0, 336, 224, 0.5)}
    assert {find(card.backbone).family for card in cards} == {"radio"}
    assert {card.name: card.language for card in cards if card.language == "siglip2"} == {
        "radseg-b": "siglip2",
        "radseg-l": "siglip2",
    }


def test_every_network_is_known() -> None:
    assert set(NETWORKS) == {card.backbone for card in CARDS if card.family in OWN_SPACE}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_of_the_published_size(name: str) -> None:
    """On the meta device: nothing is downloaded and nothing allocated."""
    card = find(name)
    dim, layers, heads, more, words = NETWORKS[name]
    kind = f"{card.family}_vision_model"
    assert kind in families()
    config = {"model_type": kind, "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, **more}
    config |= {"patch_size": card.patch_size, "image_size": card.image_size}
    backbone = backbones.from_config(config, device="meta", mean=card.mean, std=card.std)
    found = backbone.card
    facts = [(c.family, c.dim, c.patch_size, c.image_size, c.parameters) for c in (card, found)]
    assert facts[0] == facts[1]
    projection = torch.empty(words, dim, device="meta") if card.family == "clip" else None
    aligned = AlignedBackbone(backbone, projection=projection)
    assert aligned.text_dim == words
    aligned.scra = math.inf
    features = aligned.features(torch.empty(1, 3, card.image_size, card.image_size, device="meta"))
    side = card.image_size // card.patch_size
    assert features.shape == (1, dim, side, side)
