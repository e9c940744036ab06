"""What every backbone does: check, normalise, give patch features, and lay images of any size onto its canvas."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opsin import images as im
from opsin.cards import ModelCard
from opsin.errors import InvalidCheckpoint, InvalidConfig, MissingFile, UnsupportedSize
from opsin.geometry import ImageTransform, Size
from opsin.hub import atomic_path
from opsin.runtime import in_batches
from opsin.types import FeatureMap

Fit = Literal["stretch", "pad", "native", "tile"]


@contextmanager
def quiet() -> Iterator[None]:
    """No reports and bars of transformers inside: the text half of a checkpoint, say, is left out on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; ``MissingFile`` or ``InvalidCheckpoint`` when that cannot be."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(f"A model folder holds {path.name}", got=str(path.parent)) from error
    except (ValueError, OSError) as error:
        raise InvalidCheckpoint(f"{path.name} is a JSON file", got=f"{path} ({error})") from error
    if not isinstance(values, dict):
        raise InvalidCheckpoint(f"{path.name} is a JSON object", got=str(path))
    return values


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True, eq=False)
class BackboneOutput:
    """Patch ``features (B, D, h, w)``; ``class_token (B, D)``, ``register_tokens (B, K, D)`` or None without them."""

    features: Tensor
    class_token: Tensor | None = None
    register_tokens: Tensor | None = None

    def rows(self) -> list[BackboneOutput]:
        """One output per image, without the batch axis."""
        classes: Iterable[Any] = self.class_token if self.class_token is not None else [None] * len(self.features)
        registers: Iterable[Any] = (
            self.register_tokens if self.register_tokens is not None else [None] * len(self.features)
        )
        return [BackboneOutput(*row) for row in zip(self.features, classes, registers, strict=True)]


class Backbone(nn.Module):
    """A frozen image encoder. ``model`` is the network of ``transformers`` inside, ``card`` what is known of it."""

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.card = card

    @property
    def name(self) -> str:
        """The name under which its tokens compare: catalogue name, ``hf:`` or ``dir:`` reference."""
        return self.card.name

    @property
    def dim(self) -> int:
        """Width ``D`` of a feature."""
        return self.card.dim

    @property
    def patch_size(self) -> int:
        """Pixels of one step of the feature grid."""
        return self.card.patch_size

    @property
    def image_size(self) -> int:
        """Side of the default square canvas, a multiple of :attr:`patch_size`."""
        return self.card.image_size

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: a frozen encoder has no dropout and keeps its statistics."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> BackboneOutput:
        """Features of a batch.

        Args:
            pixels: ``(B, 3, H, W)`` RGB in [0, 1], not yet normalised; H and W multiples of :attr:`patch_size`.

        Returns:
            features ``(B, D, H / patch_size, W / patch_size)`` in the dtype of the weights.

        Raises:
            UnsupportedSize: H or W is no multiple of the patch, or the shape is another.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UnsupportedSize("Pixels have shape (B, 3, H, W)", got=tuple(pixels.shape))
        self._check_size((pixels.shape[-2], pixels.shape[-1]))
        dtype = next(self.model.parameters()).dtype
        pixels = pixels.to(torch.float64 if dtype == torch.float64 else torch.float32)  # normalise before rounding
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.card.mean, self.card.std))
        return self._features(((pixels - mean) / std).to(dtype))

    @abstractmethod
    def _features(self, pixels: Tensor) -> BackboneOutput:
        """Output of the network for normalised pixels."""

    def _check_size(self, size: Size) -> None:
        patch = self.patch_size
        if any(side < patch or side % patch for side in size):
            nearest = [max(1, round(side / patch)) * patch for side in size]
            raise UnsupportedSize(
                f"Height and width are multiples of {patch} for {self.name}", got=f"{size[0]}×{size[1]}",
                remedy=f'The nearest is {nearest[0]}×{nearest[1]}; or let encode(fit="native") pad.',
            )

    @torch.no_grad()
    def encode(
        self, images: Any, *, size: int | Size | None = None, fit: Fit = "stretch", batch_size: int = 8
    ) -> list[FeatureMap]:
        """Feature maps of images of any size and number, in order.

        Args:
            images: one image (path, bytes, PIL, array, tensor), a list of them, a batch ``(B, 3, H, W)``, or a folder.
            size: side or ``(H, W)`` of the canvas, multiples of :attr:`patch_size`; by default :attr:`image_size`.
            fit: ``"stretch"`` onto the canvas, ignoring the aspect (as the published REN does); ``"pad"`` keeps the
                aspect and centres on zeros; ``"native"`` keeps the pixels and pads to whole patches; ``"tile"`` does
                the same, in overlapping windows of ``size`` whose features are averaged (and has no class token).
            batch_size: canvases of equal size that go together; halved when memory runs out.

        Raises:
            InvalidImage, MissingFile, UnsupportedSize, InvalidConfig, ResourceError.
        """
        if fit not in ("stretch", "pad", "native", "tile"):
            raise InvalidConfig("fit is one of stretch, pad, native, tile", got=fit)
        if fit == "native" and size is not None:
            raise InvalidConfig('fit="native" keeps the size of each image', got=f"size={size}")
        canvas = (size, size) if isinstance(size, int) else size or (self.image_size, self.image_size)
        self._check_size(canvas)
        pieces: list[Tensor] = []  # canvases or windows of all images
        plans: list[tuple[ImageTransform, list[Size], int]] = []  # transform, window starts on the grid, first piece
        for image in im.read_images(images):
            if fit in ("stretch", "pad"):
                laid, transform = im.fit(image, canvas, mode=fit)
                windows, starts = [laid], [(0, 0)]
            else:
                laid, transform = im.pad_to_multiple(image, self.patch_size)
                window = canvas if fit == "tile" else transform.canvas
                windows, starts = self._windows(laid, window)
            plans.append((transform, starts, len(pieces)))
            pieces.extend(windows)
        outputs = self._encode_pieces(pieces, batch_size)
        return [self._assemble(outputs[first : first + len(starts)], t, starts, fit) for t, starts, first in plans]

    def _encode_pieces(self, pieces: Sequence[Tensor], batch_size: int) -> list[BackboneOutput]:
        device = next(self.model.parameters()).device
        groups: dict[torch.Size, list[int]] = {}
        for index, piece in enumerate(pieces):
            groups.setdefault(piece.shape, []).append(index)

        def run(batch: Sequence[Tensor]) -> list[BackboneOutput]:
            return self(torch.stack(list(batch)).to(device)).rows()

        outputs: dict[int, BackboneOutput] = {}
        for members in groups.values():
            results = in_batches(run, [pieces[i] for i in members], batch_size)
            outputs.update(zip(members, results, strict=True))
        return [outputs[i] for i in range(len(pieces))]

    def _windows(self, image: Tensor, window: Size) -> tuple[list[Tensor], list[Size]]:
        """Windows of an image of whole patches, and their ``(top, left)`` on the grid: cut between patches only."""
        p = self.patch_size
        h, w = (min(side // p, limit // p) for side, limit in zip(image.shape[-2:], window, strict=True))
        rows, columns = im.window_starts(image.shape[-2] // p, h, 0.25), im.window_starts(image.shape[-1] // p, w, 0.25)
        starts = [(y, x) for y in rows for x in columns]
        return [image[:, y * p : (y + h) * p, x * p : (x + w) * p] for y, x in starts], starts

    def _assemble(
        self, parts: Sequence[BackboneOutput], transform: ImageTransform, starts: Sequence[Size], fit: Fit
    ) -> FeatureMap:
        if fit != "tile":
            part = parts[0]
            return FeatureMap(part.features, transform, self.name, part.class_token, part.register_tokens)
        grid = transform.canvas[0] // self.patch_size, transform.canvas[1] // self.patch_size
        features = im.stitch(torch.stack([part.features for part in parts]), starts, grid)
        return FeatureMap(features, transform, self.name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, safetensors, preprocessing and card to ``folder``; ``load("dir:…")`` reads it back."""
        size = {"height": self.image_size, "width": self.image_size}
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True, "size": size, "resample": 2,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(self.card.mean), "image_std": list(self.card.std),
        }  # fmt: skip
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            with quiet():
                self.model.save_pretrained(temporary)
            text = json.dumps(processor, indent=2) + "\n"
            (temporary / "preprocessor_config.json").write_text(text, encoding="utf-8")
            self.card.save(temporary / "card.json")

    def extra_repr(self) -> str:
        """Name and sizes."""
        return f"{self.name}, dim={self.dim}, patch_size={self.patch_size}, image_size={self.image_size}"
