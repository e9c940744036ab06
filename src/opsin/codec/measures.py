"""How good a reconstruction is, and what files of the same size would have given."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, features
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig, InvalidImage
from opsin.images import read_image, to_pil

FORMATS = ("jpeg", "webp", "avif")
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)  # sides of the stored picture, as a share of the image's


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``(B,)``, of ``(B, C, H, W)`` in [0, 1]; equal images give infinity."""
    _alike(images, others)
    return -10 * torch.log10((images.double() - others.double()).square().flatten(1).mean(1))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), ``(B,)``, of ``(B, C, H, W)`` in [0, 1], at least 11 pixels a side.

    Gaussian window of 11 pixels and deviation 1.5, constants 0.01 and 0.03, inside the image only, mean over channels:
    what scikit-image gives with ``gaussian_weights=True, use_sample_covariance=False``.
    """
    _alike(images, others)
    if min(images.shape[-2:]) < 11:
        raise InvalidImage("SSIM looks at windows of 11 pixels", got=tuple(images.shape))
    places = torch.arange(11, dtype=torch.float64, device=images.device) - 5
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, line[None, None, :, None]), line[None, None, None, :])

    a, b = images.double(), others.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).unflatten(0, images.shape[:2]).mean((1, 2))


def _alike(images: Tensor, others: Tensor) -> None:
    if images.ndim != 4 or images.shape != others.shape:
        raise InvalidImage("Images to compare are (B, C, H, W), alike", got=f"{(*images.shape,)}, {(*others.shape,)}")


@dataclass(frozen=True, eq=False)
class Compressed:
    """An image as a file would give it back: ``image (3, H, W)`` in [0, 1], the whole file's ``size`` in bytes, the
    ``quality`` setting and the ``scale`` of the stored picture. ``image`` is None where no file is small enough."""

    image: Tensor | None
    size: int = 0
    quality: int = 0
    scale: float = 0.0


def compress(image: Tensor, budget: int, kind: str) -> Compressed:
    """The best picture (by PSNR) that a ``kind`` file of at most ``budget`` bytes, headers included, gives back.

    ``image (3, H, W)`` in [0, 1]. Tried: stored at ``SCALES`` of its sides (Lanczos down, bicubic up), each at the
    highest quality that fits. ``InvalidConfig`` for a kind that this Pillow cannot write.
    """
    if kind not in FORMATS or not available(kind):
        raise InvalidConfig(f"A file kind is one of {', '.join(f for f in FORMATS if available(f))} here", got=kind)
    picture, best = to_pil(image), Compressed(None)
    height, width = image.shape[-2:]
    highest = -math.inf
    for scale in SCALES:
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        stored = picture if scale == 1 else picture.resize(small, Image.Resampling.LANCZOS)
        found = _largest_that_fits(stored, budget, kind)
        if found is None:
            continue
        data, quality = found
        with Image.open(io.BytesIO(data)) as file:
            again = file.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels = read_image(again)
        reached = float(psnr(image[None].cpu(), pixels[None]))
        if reached > highest:
            highest, best = reached, Compressed(pixels, len(data), quality, scale)
    return best


def available(kind: str) -> bool:
    """Whether this Pillow reads and writes ``kind``."""
    return kind == "jpeg" or bool(features.check(kind))


def _largest_that_fits(picture: Image.Image, budget: int, kind: str) -> tuple[bytes, int] | None:
    """The file of the highest quality with at most ``budget`` bytes; its size grows with the quality, nearly."""
    low, high, best = 0, 96, None
    while low <= high:
        quality = (low + high) // 2
        data = _write(picture, kind, quality)
        if len(data) <= budget:
            best, low = (data, quality), quality + 1
        else:
            high = quality - 1
    return best


def _write(picture: Image.Image, kind: str, quality: int) -> bytes:
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"optimize": True, "progressive": True, "subsampling": "4:2:0"},
        "webp": {"method": 4},
        "avif": {"speed": 6, "subsampling": "4:2:0"},
    }
    file = io.BytesIO()
    picture.save(file, format=kind, quality=quality, **options[kind])
    return file.getvalue()


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """Row of ``gallery (N, D)`` with the highest cosine to each of ``queries (Q, D)``: ``(Q,)``."""
    return (F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T).argmax(1)


def finds_itself(queries: Tensor, gallery: Tensor) -> Tensor:
    """Retrieval of photographs by a changed view of them: whether row ``i`` of ``queries`` is nearest to row ``i`` of
    ``gallery``, both ``(N, D)``: ``(N,)`` bool. Both are centred on the gallery's mean first."""
    mean = gallery.double().mean(0)
    found = nearest(queries.double() - mean, gallery.double() - mean)
    return found == torch.arange(len(gallery), device=found.device)


def same_class(gallery: Tensor, classes: Sequence[str]) -> Tensor:
    """Retrieval of classes: whether the nearest other row of ``gallery (N, D)`` has the row's class: ``(N,)`` bool."""
    unit = F.normalize(gallery.double() - gallery.double().mean(0), dim=1)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(-math.inf)
    found = cosine.argmax(1).tolist()
    return torch.tensor([classes[i] == classes[j] for i, j in enumerate(found)])


def pixel_vectors(images: Tensor, width: int | None = None) -> Tensor:
    """Images ``(B, 3, H, W)`` as vectors of their pixels; of about ``width`` numbers when given, by shrinking them."""
    if width is not None:
        side = max(1, round(math.sqrt(width / 3)))
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images.flatten(1)


def perceptual(images: Tensor, others: Tensor) -> dict[str, Any]:
    """LPIPS (AlexNet, mean) and rFID of ``(B, 3, H, W)`` in [0, 1] through torchmetrics, where its weights are at hand.

    What cannot be measured is None, with the reason under its name and "_reason". Under 2048 images rFID is biased.
    """
    found: dict[str, Any] = {}
    for name, measure in (("lpips", _lpips), ("rfid", _rfid)):
        try:
            found[name] = measure(images, others)
        except Exception as error:  # whatever a missing package, a missing weight file or the network raises
            found[name] = None
            found[f"{name}_reason"] = (str(error) or type(error).__name__).splitlines()[0]
    return found


def _lpips(images: Tensor, others: Tensor) -> float:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    measure = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    for a, b in zip(images.split(16), others.split(16), strict=True):
        measure.update(a.float(), b.float())
    return float(measure.compute())


def _rfid(images: Tensor, others: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    measure = FrechetInceptionDistance(normalize=True)
    for real, batch in ((True, images), (False, others)):
        for part in batch.split(16):
            measure.update(part.float(), real=real)
    return float(measure.compute())
