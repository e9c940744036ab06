"""Stand-ins for what cannot be had when benchmarks run: weights, text vectors, a segmentation to refine. All seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import SEED
from reference_radseg import ReferenceRadseg
from torch import Tensor
from torch.nn import functional as F

from opsin.backbones import radio_checkpoint
from opsin.backbones.adaptors import Adaptor
from opsin.segmentation import Segmenter
from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.labels import Labels, as_labels
from opsin.segmentation.model import default_card
from opsin.segmentation.sam import SamDecoder
from opsin.segmentation.vocabulary import Vocabulary

REGIONS = 10  # of RADSeg+


@dataclass(frozen=True)
class Network:
    """Widths and depths of a RADIO, the heads of its adaptors, and SAM's decoder."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    positions: int = 2048
    hidden: int = 1520
    inner: int = 2
    words: int = 1152
    sam: int = 1280
    neck: int = 256


VIT_B = Network()


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random values for one tensor, the same in every process: unit variance through every layer."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + sum(map(ord, name)) * 7919 + len(name)))
    if name.endswith(("position_embedding", "cls_register_token")):
        return 0.5 * noise
    if len(shape) > 1:
        return noise / math.sqrt(math.prod(shape[1:]))
    gain = name.endswith(("norm1.weight", "norm2.weight", "lambda1", ".0.weight"))
    return 1 + 0.1 * noise if gain else 0.02 * noise


def backbone(network: Network, dtype: torch.dtype = torch.float32, adaptors: tuple[str, ...] = ("siglip2",)) -> Any:
    """A ``RadioBackbone`` with the adaptors named."""
    from transformers import RadioConfig, RadioModel

    config = RadioConfig(
        hidden_size=network.dim, num_hidden_layers=network.depth, num_attention_heads=network.heads, patch_size=16,
        max_img_size=network.positions, num_cls_tokens=4, num_registers=4, image_size=512, summary_idxs=[0, 1, 2],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in RadioModel(config).state_dict().items()}
    tensors = {key: _draw(key, shape).to(dtype) for key, shape in shapes.items()}
    heads = {name: _adaptor(network, name, dtype) for name in adaptors}
    known = radio_checkpoint.card(config, {}, f"random ViT {network.dim}")
    return radio_checkpoint.build(config, tensors, known, adaptors=heads)


def _adaptor(network: Network, name: str, dtype: torch.dtype) -> Adaptor:
    width, outputs = network.hidden, network.words if name == "siglip2" else network.sam
    shapes: dict[str, tuple[int, ...]] = {"fc1.weight": (width, network.dim), "fc1.bias": (width,)}
    for block in [f"blocks.{i}" for i in range(network.inner)] + ["final"]:
        out = outputs if block == "final" else width
        shapes |= {f"{block}.0.weight": (width,), f"{block}.0.bias": (width,)}
        shapes |= {f"{block}.2.weight": (out, width), f"{block}.2.bias": (out,)}
    head, features = (
        {key: _draw(f"{name}.{part}.{key}", shape).to(dtype) for key, shape in shapes.items()} for part in ("h", "f")
    )
    return Adaptor.from_state_dict(head, features, "v2", text="hf:none" if name == "siglip2" else "")


def sam_decoder(network: Network) -> SamDecoder:
    """The neck and decoder of a SAM, that of ViT-H for :data:`VIT_B`."""
    torch.manual_seed(SEED)
    decoder = SamDecoder(
        features=network.sam, dim=network.neck, mask_channels=16, mlp=8 * network.neck, layers=2, downsample=2, masks=4,
        iou_depth=3, iou_dim=network.neck,
    )  # fmt: skip
    return decoder.eval().requires_grad_(False)


def segmenter(network: Network, dtype: torch.dtype = torch.float32, *, plus: bool = False) -> Segmenter:
    """The product."""
    aligned = AlignedBackbone(backbone(network, dtype, ("siglip2", "sam") if plus else ("siglip2",)), "siglip2")
    card = default_card(aligned)
    aligned.scra = card.scra
    return Segmenter(aligned, card, sam_decoder(network) if plus else None)


def reference(network: Network) -> ReferenceRadseg:
    """The published way; it always loads both adaptors."""
    found = backbone(network, adaptors=("siglip2", "sam"))
    return ReferenceRadseg(found.model, found.adaptor("siglip2"), found.adaptor("sam"))


def picture(size: tuple[int, int], names: tuple[str, ...] = ("astronaut", "coffee")) -> Tensor:
    """Photographs that come with scikit-image, side by side, ``(3, H, W)``."""
    from skimage import data

    height, width = size
    parts = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255 for name in names]
    parts = [F.interpolate(part, (height, height), mode="bilinear", antialias=True) for part in parts]
    return torch.cat(parts, 3)[0, :, :, :width].contiguous()


def names(count: int, asked: int = 0) -> Labels:
    """Labels of one question; every question has others."""
    return as_labels([f"label {asked} {i}" for i in range(count)])


class Tower:
    """Stands for a text tower: every label is a place in the space of the words, near the features of a photograph.

    Rows are features of ``words (E, h, w)`` less their mean, with noise of the same length: labels then compete as
    those of trained weights do, and the map has regions. Random rows would give nearly one label everywhere.
    """

    def __init__(self, words: Tensor) -> None:
        tokens = words.flatten(1).T
        centred = F.normalize(tokens - tokens.mean(0), dim=1)
        draw = torch.Generator().manual_seed(SEED)
        chosen = centred[torch.randperm(len(centred), generator=draw)]
        self.rows = F.normalize(chosen + F.normalize(torch.randn(chosen.shape, generator=draw), dim=1), dim=1)

    def encode(self, texts: list[str]) -> Tensor:
        numbers = [next(int(part) for part in reversed(text.rstrip(" .").split()) if part.isdigit()) for text in texts]
        return self.rows[torch.tensor(numbers) % len(self.rows)]


def vocabulary(network: Network, folder: Path, words: Tensor | None = None) -> Vocabulary:
    """Text vectors cached in ``folder``; only the first to use it needs ``words`` to make them from."""
    make: Any = (lambda: Tower(words)) if words is not None else None
    return Vocabulary(make, "tower", network.words, folder, canonical=True)


def rectangles(size: tuple[int, int], count: int = 20) -> tuple[Tensor, Tensor]:
    """A segmentation of ten regions, each of a class of its own: labels ``(H, W)`` and probabilities ``(C, H, W)``."""
    cells = torch.arange(REGIONS).view(2, 5).repeat_interleave(4, 0).repeat_interleave(4, 1)
    grid = F.one_hot(cells, count).permute(2, 0, 1).float() * 0.9 + 0.1 / count
    full = F.interpolate(grid[None], size, mode="bilinear")[0]
    return full.argmax(0), full


def prepare(network: Network, folder: Path, counts: Sequence[int], questions: int) -> None:
    """Cache the text vectors of all questions: labels near the features of another photograph."""
    model = segmenter(network)
    with torch.inference_mode():
        words = model.encode([picture((512, 512), ("chelsea",))])[0].words
        cache = vocabulary(network, folder, words)
        for count in counts:
            for asked in range(questions):
                cache.embed(names(count, asked))
