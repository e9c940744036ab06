"""Training of region encoders on frozen backbones, after REN (arXiv 2505.18153).

``automatic_masks`` makes masks where ``opsin.masks`` finds none, ``views`` and ``data`` turn photographs into batches,
``losses`` and ``loop`` train on these, and
``regions`` joins it all under the options of ``config``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.training.config import RegionTrainingConfig, load_config

if TYPE_CHECKING:
    from opsin.training.regions import train_regions

__all__ = ["RegionTrainingConfig", "load_config", "train_regions"]


def __getattr__(name: str) -> Any:
    if name == "train_regions":  # brings torch, which options and help do not need
        from opsin.training.regions import train_regions

        return train_regions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
