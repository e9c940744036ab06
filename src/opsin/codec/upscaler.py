"""Pictures four times as large: a network that comes with btnk_mae, and that none of its code calls."""

from __future__ import annotations

from torch import Tensor, nn

from opsin.errors import InvalidImage
from opsin.geometry import Size


class ConvUpscaler(nn.Module):
    """Convolutions and two pixel shuffles under the published keys ``encoder.{0,2}``, ``up1.0``, ``up2.{0,3}``.

    Codecs do not need it; a checkpoint that holds its weights can be used with it. No trained ones were published.
    ``limit``: the result is cut to this ``(H, W)``, as published.
    """

    def __init__(self, limit: Size = (512, 512)) -> None:
        super().__init__()
        self.limit = limit

        def layer(inner: int, outer: int) -> nn.Conv2d:
            return nn.Conv2d(inner, outer, 3, padding=1)

        self.encoder = nn.Sequential(layer(3, 64), nn.ReLU(), layer(64, 128), nn.ReLU())
        self.up1 = nn.Sequential(layer(128, 512), nn.PixelShuffle(2), nn.ReLU())
        self.up2 = nn.Sequential(layer(128, 256), nn.PixelShuffle(2), nn.ReLU(), layer(64, 3))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, 3, 4·H, 4·W)``, at most ``limit``: what lies beyond it is cut off."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InvalidImage("Images to enlarge have shape (B, 3, H, W)", got=tuple(images.shape))
        return self.up2(self.up1(self.encoder(images)))[..., : self.limit[0], : self.limit[1]]
