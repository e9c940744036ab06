"""Where the weights of a region model are: embedded, saved by Opsin, or a published checkpoint, converted once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from opsin import hub
from opsin.cards import ModelCard, catalogue
from opsin.errors import InvalidCheckpoint, InvalidConfig
from opsin.regions.encoder import RegionEncoder

REGION_WEIGHTS = "regions.safetensors"
PUBLISHED_FILE = "checkpoint.pth"
PUBLISHED_STATE = "region_encoder_state"


@dataclass(frozen=True, eq=False)
class RegionWeights:
    """What a region model is built from: its card, the encoder's state dict, and a reference to the backbone."""

    card: ModelCard
    state: Mapping[str, Tensor]
    backbone: str


def locate_weights(ref: str) -> RegionWeights:
    """Weights by catalogue name, ``hf:`` or ``dir:`` reference, folder, or path of a published checkpoint.

    Raises ``UnknownModel``, ``InvalidConfig`` (a model that makes no regions), ``MissingFile``, ``InvalidCheckpoint``.
    """
    path = Path(ref.removeprefix("dir:")).expanduser()
    if path.suffix in (".pth", ".pt") and not ref.startswith("hf:"):
        return _read_folder(convert_published(path, _card_for(path)))
    card = hub.card_of(ref)
    if card is not None and card.kind != "regions":
        raise InvalidConfig(
            "A region model is wanted here",
            got=f'"{ref}", a {card.kind}',
            remedy='"opsin models" tells the kinds apart.',
        )
    if card is not None and card.regions:
        raise InvalidConfig(
            "Regions of one model with tokens of another are a TransferModel",
            got=f'"{ref}"',
            remedy="opsin.load builds it.",
        )
    if card is not None and card.files == (PUBLISHED_FILE,):
        return _read_folder(_converted(card))
    return _read_folder(hub.resolve(ref, files=None if ref.startswith("hf:") else ["card.json", REGION_WEIGHTS]))


def convert_published(path: str | Path, card: ModelCard, folder: Path | None = None) -> Path:
    """Turn a published ``checkpoint.pth`` into a folder with a card and safetensors; the optimiser's state is dropped.

    The file is read without executing anything in it and on any device. ``folder`` defaults to the cache.
    """
    state = _published_state(Path(path))
    expected = {
        key: tuple(value.shape)
        for key, value in RegionEncoder(card.dim, heads=card.heads, layers=card.layers).state_dict().items()
    }
    hub.check_keys(state, expected, f"{card.name} ({path})")
    folder = folder or hub.cache_dir() / "converted" / card.name
    folder.mkdir(parents=True, exist_ok=True)
    hub.save_safetensors({key: value.float() for key, value in state.items()}, folder / REGION_WEIGHTS)
    replace(card, source="", files=(), sha256="").save(folder / "card.json")
    return folder


def _converted(card: ModelCard) -> Path:
    folder = hub.cache_dir() / "converted" / card.name
    if (folder / "card.json").is_file() and (folder / REGION_WEIGHTS).is_file():  # the card is written last
        return folder
    return convert_published(hub.resolve(card.name) / PUBLISHED_FILE, card, folder)


def _published_state(path: Path) -> dict[str, Tensor]:
    content: Any = hub.load_pickle(path)
    state = content.get(PUBLISHED_STATE) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        keys = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise InvalidCheckpoint(
            f'A published REN checkpoint holds a state dict under "{PUBLISHED_STATE}"', got=f"{keys} in {path}"
        )
    return state


def _card_for(path: Path) -> ModelCard:
    """The published model that a local checkpoint must be, by its width."""
    state = _published_state(path)
    dim = state["prompt_proj.weight"].shape[0] if "prompt_proj.weight" in state else 0
    published = [c for c in catalogue().values() if c.files == (PUBLISHED_FILE,)]
    for card in published:
        if card.dim == dim:
            return replace(card, name=f"{card.name}@{path.stem}-{path.stat().st_size}")
    raise InvalidCheckpoint(
        f"A published checkpoint is as wide as one of {', '.join(str(c.dim) for c in published)}",
        got=f"{dim} in {path}",
        remedy="For another backbone: convert_published(path, card) with a card that names it.",
    )


def _read_folder(folder: Path) -> RegionWeights:
    card = ModelCard.load(folder / "card.json")
    if card.kind != "regions":
        raise InvalidConfig("A region model is wanted here", got=f"{folder}, a {card.kind}")
    backbone = f"dir:{folder / card.backbone}" if card.backbone == "backbone" else card.backbone
    if not backbone:
        raise InvalidCheckpoint("The card of a region model names its backbone", got=f"none in {folder}")
    return RegionWeights(card, hub.load_safetensors(folder / REGION_WEIGHTS), backbone)
