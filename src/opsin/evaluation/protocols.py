"""How an image is shown to a segmentation model when its quality is measured: size, windows, thresholds.

The published protocol of RADSeg (arXiv 2511.19704) resizes every image, keeping its ratio, so that it fits a (long,
short) frame; the frame, the windows and the threshold of the refinement belong to the data set. "native" shows the
image as it is, with the windows of the model's card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig, near_misses
from opsin.geometry import Size

PROTOCOLS = ("radseg-low", "radseg-mid", "radseg-high", "radseg-plus", "native")
PUBLISHED_DATASETS = ("ade20k", "coco-stuff", "voc20", "context59", "cityscapes")

# Published frames (long, short) and windows (crop, stride) per resolution and data set.
_FRAMES = {
    "low": dict.fromkeys(("ade20k", "coco-stuff", "voc20", "context59"), (2048, 336)) | {"cityscapes": (2048, 560)},
    "mid": {
        "ade20k": (2048, 576),
        "coco-stuff": (2048, 448),
        "voc20": (2048, 336),
        "context59": (4096, 576),
        "cityscapes": (2048, 688),
    },
    "high": dict.fromkeys(("ade20k", "context59", "voc20"), (2016, 672))
    | {"coco-stuff": (1334, 896), "cityscapes": (2688, 1344)},
}
_COARSE = {"ade20k": 0.05, "coco-stuff": 0.05, "cityscapes": 0.10, "context59": 0.15, "voc20": 0.20}
# A data set without a published setting is measured as the one that shares its images, a folder as COCO's photographs.
_AS = {"voc21": "voc20", "context60": "context59", "coco-object": "coco-stuff"}


@dataclass(frozen=True)
class Protocol:
    """One way to measure on one data set.

    ``frame`` (long, short) that the resized image fits, None: as it is; ``crop`` and ``stride`` of the windows in
    pixels, None: as the model's card says; ``refine`` masks with SAM's decoder (RADSeg+), for which probabilities below
    ``coarse_threshold`` are left out; ``denoise`` the probability a class has to reach somewhere in the image, None: as
    the card says. ``source`` says where the setting comes from.
    """

    name: str
    dataset: str
    frame: tuple[int, int] | None = None
    crop: int | None = None
    stride: int | None = None
    refine: bool = False
    coarse_threshold: float | None = None
    denoise: float | None = None
    source: str = ""

    def size(self, size: Size) -> Size:
        """``(H, W)`` of the image as it is shown, by mmcv's rule for a frame: the sides are cut off after + 0.5."""
        if self.frame is None:
            return size
        scale = min(max(self.frame) / max(size), min(self.frame) / min(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def show(self, image: Tensor) -> Tensor:
        """``(3, H, W)`` in [0, 1] at the protocol's size; bilinear, no antialiasing, rounded to 8 bits as by OpenCV."""
        size = self.size((image.shape[-2], image.shape[-1]))
        if size == tuple(image.shape[-2:]):
            return image
        resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]
        return torch.round(resized * 255) / 255

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def protocol(name: str, dataset: str) -> Protocol:
    """The protocol ``name`` (one of ``PROTOCOLS``) for ``dataset``. "radseg-plus" is "radseg-mid" with refined masks.

    Source: the configuration files of RADSeg's 2D evaluation. They do not fix the resolution of RADSeg+.
    """
    if name not in PROTOCOLS:
        remedy = f"{near_misses(name, PROTOCOLS)} They are {', '.join(PROTOCOLS)}."
        raise InvalidConfig("The protocol must be known", got=name, remedy=remedy.strip())
    if name == "native":
        return Protocol(name, dataset, source="the image as it is, windows of the model's card")
    like = dataset if dataset in PUBLISHED_DATASETS else _AS.get(dataset, "coco-stuff")
    refine = name == "radseg-plus"
    level = "mid" if refine else name.removeprefix("radseg-")
    small = level == "low"
    stride = 112 if small or (level, like) == ("mid", "voc20") else 224
    return Protocol(
        name,
        dataset,
        frame=_FRAMES[level][like],
        crop=224 if small else 336,
        stride=stride,
        refine=refine,
        coarse_threshold=_COARSE[like] if refine else None,
        denoise=0.5,
        source="RADSeg's 2D evaluation" + ("" if like == dataset else f", as for {like}: none published for this data"),
    )
