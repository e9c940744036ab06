"""``Segmentation``: a label for every pixel of one image, and the ways it leaves the library."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opsin.errors import InputError, InvalidConfig, MissingExtra, near_misses
from opsin.hub import atomic_path
from opsin.images import ImageSource, read_image, resize

if TYPE_CHECKING:
    from PIL import Image

_BAND = 1 << 20  # pixels that are painted at a time


def palette(count: int) -> np.ndarray:
    """``(count, 3)`` uint8 colours that differ: hues a golden angle apart, on three levels of brightness."""
    hues = [(i * 0.618034) % 1 for i in range(count)]
    colours = [colorsys.hsv_to_rgb(h, (0.85, 0.6, 0.75)[i % 3], (0.95, 1.0, 0.7)[i % 3]) for i, h in enumerate(hues)]
    return (np.array(colours).reshape(-1, 3) * 255).round().astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What is where in one image.

    ``labels (H, W)`` int64, an index into ``classes``, -1 where unknown; ``scores (H, W)`` the probability of the
    label among the classes, 0 where nothing is left; ``class_scores (C,)`` the best probability of each class at any
    grid location, before denoising; ``background`` phrases that competed and whose pixels became unknown; ``model``.
    """

    labels: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    class_scores: Tensor
    model: str
    background: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.shape != self.scores.shape:
            shapes = tuple(self.labels.shape), tuple(self.scores.shape)
            raise InputError("Segmentation.labels and .scores have shape (H, W)", got=shapes)
        if len(self.class_scores) != len(self.classes):
            raise InputError(f"Segmentation.class_scores has {len(self.classes)} entries", got=len(self.class_scores))

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return int(self.labels.shape[0]), int(self.labels.shape[1])

    def mask(self, name: str) -> Tensor:
        """Boolean ``(H, W)``: where the class ``name`` is. ``InvalidConfig`` when it was not asked for."""
        if name not in self.classes:
            raise InvalidConfig("A mask is of a class that was asked for", got=f'"{name}"',
                                remedy=near_misses(name, self.classes))  # fmt: skip
        return self.labels == self.classes.index(name)

    def areas(self) -> dict[str, float]:
        """Share of the pixels of every class, those without any left out, the largest first."""
        counts = torch.bincount((self.labels + 1).flatten(), minlength=len(self.classes) + 1)[1:] / self.labels.numel()
        shares = zip(self.classes, counts.tolist(), strict=True)
        return dict(sorted(((n, s) for n, s in shares if s > 0), key=lambda item: -item[1]))

    def _unknown(self) -> float:
        return int((self.labels < 0).sum()) / self.labels.numel()

    def to_numpy(self) -> dict[str, np.ndarray]:
        """``labels`` and ``scores`` as arrays."""
        return {"labels": self.labels.cpu().numpy(), "scores": self.scores.detach().float().cpu().numpy()}

    def to_json(self) -> dict[str, Any]:
        """What can be said without the pixels."""
        shares = self.areas()
        best = dict(zip(self.classes, self.class_scores.tolist(), strict=True))
        return {
            "model": self.model,
            "size": list(self.size),
            "classes": {n: {"share": round(shares.get(n, 0.0), 6), "best": round(best[n], 6)} for n in self.classes},
            "unknown": round(self._unknown(), 6),
            "background": list(self.background),
            **self.details,
        }

    def index_image(self) -> Image.Image:
        """Palette picture: 0 is unknown, ``i + 1`` is class ``i``; from 256 classes on 16 bits without a palette."""
        from PIL import Image

        values = self.labels.to(torch.int32).add_(1).cpu().numpy()
        if len(self.classes) > 255:
            return Image.fromarray(values.astype(np.uint16))
        picture = Image.fromarray(values.astype(np.uint8))
        colours = np.concatenate([np.zeros((1, 3), np.uint8), palette(len(self.classes))])
        picture.putpalette(colours.reshape(-1).tolist())
        return picture

    def save(self, path: str | Path) -> Path:
        """Write :meth:`index_image` as PNG, with the class names as JSON in its text field ``classes``."""
        from PIL import PngImagePlugin

        path = Path(path)
        if path.suffix.lower() != ".png":
            raise InvalidConfig("Labels are saved as .png, which loses nothing", got=str(path))
        facts = PngImagePlugin.PngInfo()
        facts.add_itxt("classes", json.dumps(self.classes, ensure_ascii=False))
        facts.add_itxt("model", self.model)
        with atomic_path(path) as temporary:
            self.index_image().save(temporary, format="PNG", pnginfo=facts)
        return path

    def plot(self, image: ImageSource | None = None, *, opacity: float = 0.55) -> Image.Image:
        """The labels in colours over ``image`` (or alone), with a legend of the classes that occur."""
        from PIL import Image

        colours = torch.from_numpy(palette(len(self.classes))).float() / 255
        height, width = self.size
        under = None if image is None else read_image(image)
        if under is not None and under.shape[1:] != self.size:
            under = resize(under, self.size)
        painted = np.empty((height, width, 3), np.uint8)
        step = max(1, _BAND // width)
        for rows in (slice(top, top + step) for top in range(0, height, step)):
            labels = self.labels[rows].cpu()
            known = (labels >= 0)[..., None]
            flat = colours[labels.clamp(min=0)] * known
            if under is not None:
                below = under[:, rows].permute(1, 2, 0)
                flat = torch.where(known, below * (1 - opacity) + flat * opacity, below * 0.6)
            painted[rows] = (flat.clamp(0, 1) * 255).round().byte().numpy()
        picture, legend = Image.fromarray(painted), self._legend()
        sheet = Image.new("RGB", (max(picture.width, legend.width), picture.height + legend.height), "white")
        sheet.paste(picture, (0, 0))
        sheet.paste(legend, (0, picture.height))
        return sheet

    def _legend(self) -> Image.Image:
        from PIL import Image, ImageDraw, ImageFont

        font = ImageFont.load_default(14)
        shares, colours = self.areas(), palette(len(self.classes))
        entries = [(f"{n} {100 * s:.1f} %", tuple(colours[self.classes.index(n)].tolist())) for n, s in shares.items()]
        unknown = self._unknown()
        entries += [(f"unknown {100 * unknown:.1f} %", (90, 90, 90))] if unknown else []
        widths = [int(font.getlength(text)) + 34 for text, _ in entries]
        limit = max([self.size[1], *widths])
        places, x, y = [], 0, 0
        for width in widths:
            if x + width > limit:
                x, y = 0, y + 22
            places.append((x, y))
            x += width
        sheet = Image.new("RGB", (limit, y + 24 if entries else 1), "white")
        pen = ImageDraw.Draw(sheet)
        for (text, colour), (left, top) in zip(entries, places, strict=True):
            pen.rectangle((left + 4, top + 5, left + 18, top + 19), fill=colour, outline="black")
            pen.text((left + 23, top + 4), text, fill="black", font=font)
        return sheet

    def to_supervision(self) -> Any:
        """``supervision.Detections``: one entry per class that occurs, with its mask, box and mean score."""
        try:
            import supervision
        except ImportError as error:
            raise MissingExtra.of("supervision", "supervision", "convert to supervision") from error
        from opsin.geometry import mask_boxes

        ids: Sequence[int] = [i for i in self.labels.unique().tolist() if i >= 0]
        masks = torch.stack([self.labels == i for i in ids]) if ids else torch.zeros((0, *self.size), dtype=torch.bool)
        means = [float(self.scores[m].mean()) for m in masks]
        return supervision.Detections(
            xyxy=mask_boxes(masks.cpu()).float().numpy().reshape(-1, 4),
            mask=masks.cpu().numpy(),
            confidence=np.array(means, np.float32),
            class_id=np.array(ids, int),
            data={"class_name": np.array([self.classes[i] for i in ids], dtype=object)},
        )
