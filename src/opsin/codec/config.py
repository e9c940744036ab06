"""The shape of a codec: what its weights do not say, and the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.cards import ModelCard
from opsin.codec.patches import grid_of
from opsin.errors import InvalidConfig, near_misses
from opsin.geometry import Size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda tokens: tokens,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def activation_name(name: str | None) -> str:
    """The key of ``ACTIVATIONS`` for a name: None and "none" are "", "swish" is "silu"; else ``InvalidConfig``."""
    wanted = {"none": "", "null": "", "swish": "silu"}.get(str(name or "").lower(), str(name or "").lower())
    if wanted not in ACTIVATIONS:
        known = ["none", *list(ACTIVATIONS)[1:], "swish"]
        raise InvalidConfig(
            f"The activation of a code is one of {', '.join(known)}", got=name, remedy=near_misses(wanted, known)
        )
    return wanted


def as_size(size: int | tuple[int, int] | list[int]) -> Size:
    """``(H, W)`` from a side or from both."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise InvalidConfig("An image size is a whole number, or (height, width)", got=size)
    return sides[0], sides[1]


@dataclass(frozen=True)
class CodecConfig:
    """Widths, depths and heads of both networks, the ``patch``, the image ``size (H, W)``, the code's ``activation``.

    ``dim`` is the width of the encoder, so of a code; ``decoder_dim`` that of the MAE decoder.
    """

    dim: int
    depth: int
    heads: int
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    patch: int = 16
    size: Size = (224, 224)
    activation: str = ""
    dropout: float = 0.1  # while training, in the step from the code to patches

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", activation_name(self.activation))
        object.__setattr__(self, "size", as_size(self.size))
        decoder = (self.decoder_dim, self.decoder_depth, self.decoder_heads)
        counts = (self.dim, self.depth, self.heads, *decoder, self.patch)
        if min(counts) < 1:
            raise InvalidConfig("Widths, depths, heads and the patch of a codec are at least 1", got=counts)
        for width, heads in ((self.dim, self.heads), (self.decoder_dim, self.decoder_heads)):
            if width % heads or width % 4:
                raise InvalidConfig("A width is a multiple of its heads, and of 4", got=f"{width}, {heads} heads")
        if not 0 <= self.dropout < 1:
            raise InvalidConfig("dropout lies in [0, 1)", got=self.dropout)
        grid_of(self.size, self.patch)

    @property
    def grid(self) -> Size:
        """``(h, w)`` patches."""
        return grid_of(self.size, self.patch)

    @classmethod
    def from_card(cls, card: ModelCard) -> CodecConfig:
        """What a card of kind "codec" states."""
        if card.kind != "codec" or len(card.sizes) not in (5, 7):
            raise InvalidConfig(
                "The card of a codec states depth and heads of the encoder, width, depth and heads of the decoder, "
                "and its image size where that is not square", got=f"kind {card.kind}, sizes {card.sizes}",
            )  # fmt: skip
        depth, heads, decoder_dim, decoder_depth, decoder_heads = card.sizes[:5]
        size = (card.sizes[5], card.sizes[6]) if len(card.sizes) == 7 else (card.image_size, card.image_size)
        return cls(
            card.dim, depth, heads, decoder_dim, decoder_depth, decoder_heads, card.patch_size, size, card.activation
        )

    def to_card(self, name: str, **facts: Any) -> ModelCard:
        """A card of a codec of this shape; ``facts`` are further fields of it."""
        numbers = (self.depth, self.heads, self.decoder_dim, self.decoder_depth, self.decoder_heads)
        stated: dict[str, Any] = {"family": "btnk_mae", "mean": IMAGENET_MEAN, "std": IMAGENET_STD} | facts
        stated |= {
            "dim": self.dim, "patch_size": self.patch, "activation": self.activation, "image_size": min(self.size),
            "sizes": numbers if self.size[0] == self.size[1] else (*numbers, *self.size),
        }  # fmt: skip
        return ModelCard(name=name, kind="codec", **stated)


SIZES = {
    "base": CodecConfig(768, 12, 12),
    "large": CodecConfig(1024, 24, 16),
    "large_gan": CodecConfig(1024, 24, 16),
    "huge": CodecConfig(1280, 32, 16, patch=14),
}


def named_config(size: str | CodecConfig, **changes: Any) -> CodecConfig:
    """A published size by name, or a configuration, with ``changes`` to its fields."""
    if isinstance(size, str):
        if size not in SIZES:
            raise InvalidConfig(
                f"A codec's size is one of {', '.join(SIZES)}", got=size, remedy=near_misses(size, SIZES)
            )
        size = SIZES[size]
    return replace(size, **changes) if changes else size
