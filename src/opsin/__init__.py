"""Opsin: objects, words and pixels from tokens. Encode once, ask anything.

>>> import opsin
>>> model = opsin.load("opsin-tiny")
>>> regions = model.encode("kitchen.jpg")                   # RegionTokens
>>> words = opsin.load("radseg-b").segment("kitchen.jpg", "mug, sink, window")    # Segmentation
>>> track = opsin.locate("kitchen.mp4", image="mug.jpg")    # Track

Names are imported when they are first used: ``import opsin`` itself loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Codec": "opsin.codec",
    "FeatureMap": "opsin.types",
    "ImageCode": "opsin.codec",
    "ModelCard": "opsin.cards",
    "OpsinError": "opsin.errors",
    "Query": "opsin.types",
    "RegionModel": "opsin.regions",
    "RegionTokens": "opsin.types",
    "Segmentation": "opsin.segmentation",
    "Segmenter": "opsin.segmentation",
    "Track": "opsin.types",
    "TransferModel": "opsin.regions",
    "VideoSearch": "opsin.localization",
    "load": "opsin.models",
    "load_backbone": "opsin.backbones",
    "locate": "opsin.localization",
    "open_video": "opsin.video",
    "read_image": "opsin.images",
}
_RENAMED = {"load_backbone": "load"}

__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from opsin.backbones import load as load_backbone
    from opsin.cards import ModelCard
    from opsin.codec import Codec, ImageCode
    from opsin.errors import OpsinError
    from opsin.images import read_image
    from opsin.localization import VideoSearch, locate
    from opsin.models import load
    from opsin.regions import RegionModel, TransferModel
    from opsin.segmentation import Segmentation, Segmenter
    from opsin.types import FeatureMap, Query, RegionTokens, Track
    from opsin.video import open_video


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
