"""Training of region encoders on frozen backbones, after REN (arXiv 2505.18153), and of codecs, after btnk_mae.

Regions: ``automatic_masks`` makes masks where ``opsin.masks`` finds none, ``views`` and ``data`` turn photographs into
batches, ``losses`` and ``loop`` train on these, and ``regions`` joins it all under the options of ``config``.
Codecs: ``codec_data``, ``codec_loop`` and ``codec`` do the same under the options of ``codec_config``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opsin.training.codec_config import CodecTrainingConfig, load_codec_config
from opsin.training.config import RegionTrainingConfig, load_config

if TYPE_CHECKING:
    from opsin.training.codec import train_codec
    from opsin.training.regions import train_regions

__all__ = [
    "CodecTrainingConfig",
    "RegionTrainingConfig",
    "load_codec_config",
    "load_config",
    "train_codec",
    "train_regions",
]


def __getattr__(name: str) -> Any:
    if name in ("train_codec", "train_regions"):  # bring torch, which options and help do not need
        return getattr(import_module(f"opsin.training.{name.removeprefix('train_')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
