"""Words to pixels, ViT-B with random weights: seconds per stage, memory, a second question; against the published way.

``python benchmarks/segmentation.py --child WAY HEIGHT WIDTH LABELS PLUS FOLDER`` measures the memory of one way in a
process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from common import SEED, in_child, ratio, resident_mib, say, spread
from reference_radseg import ReferenceRadseg, reference_refine
from torch import Tensor
from torch.nn import functional as F

from opsin.backbones import radio_checkpoint
from opsin.backbones.adaptors import Adaptor
from opsin.runtime import fast_matmul
from opsin.segmentation import Segmenter, prediction
from opsin.segmentation.aggregation import aggregate
from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.labels import Labels, as_labels
from opsin.segmentation.model import default_card
from opsin.segmentation.refine import frame, refine
from opsin.segmentation.sam import SamDecoder
from opsin.segmentation.vocabulary import Vocabulary
from opsin.segmentation.windows import sliding_features

STAGES = ("windows", "aggregation", "alignment", "cosine and softmax", "enlarging and decision")
IMAGES = ((512, 512), (512, 1024))
LABELS = (20, 150)
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


class Way:
    """One way of doing it: its ``stages`` lead from an image to labels, those of ``plus`` do what RADSeg+ adds."""

    def __init__(self, name: str, network: Network, folder: Path, *, plus: bool = False) -> None:
        self.name = name
        self.decoder = sam_decoder(network) if plus else None
        self.vocabulary = vocabulary(network, folder)
        self.matmul: Callable[[], Any] = nullcontext
        self.batch = 2
        if name == "reference":
            self.published = reference(network)
            return
        half = name == "opsin bf16"
        self.segmenter = segmenter(network, torch.bfloat16 if half else torch.float32, plus=plus)
        self.segmenter.aligned.__dict__["vocabulary"] = self.vocabulary
        self.matmul = fast_matmul
        if name.startswith("openvino"):
            from opsin.backbones.openvino import compile_features

            dtype = "bfloat16" if name.endswith("bf16") else "float32"
            sizes = [self.segmenter.card.crop, 1024] if plus else [self.segmenter.card.crop]
            compiled = {s: compile_features(self.segmenter.aligned.backbone, s, dtype=dtype) for s in sizes}
            self.batch = 16
            aligned: Any = self.segmenter.aligned
            aligned.features = lambda pixels: compiled.get(pixels.shape[-1], compiled[sizes[0]])(pixels)

    def stages(self, labels: Labels, size: tuple[int, int]) -> list[tuple[str, Callable[[Any], Any]]]:
        """Name and function of every stage, each of what the last one gave."""
        text = self.vocabulary.embed(labels)
        if self.name == "reference":
            p = self.published
            functions = [
                p.windows,
                p.aggregate,
                p.align,
                lambda w: p.probabilities(w, text),
                lambda g: p.decide(g, size)[0],
            ]
            return list(zip(STAGES, functions, strict=True))
        model, card = self.segmenter, self.segmenter.card
        scale, index, count = model.aligned.logit_scale, labels.index, len(labels)

        def windows(image: Tensor) -> Tensor:
            found = sliding_features(
                [image], model._features, crop=card.crop, stride=card.stride, patch=16, batch_size=self.batch
            )
            return found[0]

        functions = [
            windows,
            lambda features: aggregate(features[None], card.scga)[0],
            model._words,
            lambda words: prediction.class_probabilities(words, text, index, count, scale),
            lambda grid: prediction.decide(grid, size, denoise=card.denoise).labels,
        ]
        return list(zip(STAGES, functions, strict=True))

    def plus(self, image: Tensor) -> list[tuple[str, Callable[[Any], Any]]]:
        """What RADSeg+ adds: one pass at 1024 pixels with the ``sam`` head, SAM's neck, the masks of ten regions."""
        decoder: Any = self.decoder
        labels, full = rectangles((image.shape[1], image.shape[2]))
        if self.name == "reference":
            return [
                ("pass at 1024", lambda x: self.published.sam_features(x)[0]),
                ("neck", decoder.embed),
                ("refinement", lambda e: reference_refine(labels, full, e, decoder, gate=-math.inf)),
            ]
        aligned = self.segmenter.aligned
        dtype = next(aligned.parameters()).dtype
        fed = frame((image.shape[1], image.shape[2]))
        return [
            (
                "pass at 1024",
                lambda x: aligned.sam_features(
                    aligned.features(F.interpolate(x[None], fed, mode="bilinear").to(dtype)).to(dtype)
                ),
            ),
            ("neck", decoder.embed),
            ("refinement", lambda e: refine(labels, full, e, decoder, fed=fed, iou=-math.inf).labels),
        ]

    def run(self, steps: list[tuple[str, Callable[[Any], Any]]], value: Any) -> tuple[Any, dict[str, float]]:
        """The last value, and the seconds of every stage and of all."""
        taken: dict[str, float] = {}
        with torch.inference_mode(), self.matmul():
            for name, function in steps:
                gc.collect()
                started = time.perf_counter()
                value = function(value)
                taken[name] = time.perf_counter() - started
        return value, taken | {"total": sum(taken.values())}


def rectangles(size: tuple[int, int], count: int = 20) -> tuple[Tensor, Tensor]:
    """A segmentation of ten regions, each of a class of its own: labels ``(H, W)`` and probabilities ``(C, H, W)``."""
    cells = torch.arange(REGIONS).view(2, 5).repeat_interleave(4, 0).repeat_interleave(4, 1)
    grid = F.one_hot(cells, count).permute(2, 0, 1).float() * 0.9 + 0.1 / count
    full = F.interpolate(grid[None], size, mode="bilinear")[0]
    return full.argmax(0), full


def ways() -> tuple[str, ...]:
    """Those that this machine has."""
    found = ("reference", "opsin", "opsin bf16")
    return (*found, "openvino", "openvino bf16") if util.find_spec("openvino") else found


def prepare(network: Network, folder: Path, questions: int = 8) -> None:
    """Cache the text vectors of all questions: labels near the features of another photograph."""
    model = segmenter(network)
    with torch.inference_mode():
        words = model.encode([picture((512, 512), ("chelsea",))])[0].words
        cache = vocabulary(network, folder, words)
        for count in LABELS:
            for asked in range(questions):
                cache.embed(names(count, asked))


def measure(
    network: Network, folder: Path, size: tuple[int, int], repeats: int, chosen: Sequence[str]
) -> dict[str, Any]:
    """Every way on one picture, in turns: seconds per stage and in all, agreement, a second question."""
    image, found = picture(size), {}
    everyone = {name: Way(name, network, folder) for name in chosen}
    for count in LABELS:
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        labels = {}
        for turn in range(1 + repeats):
            for name, way in everyone.items():
                labels[name], times = way.run(way.stages(names(count), size), image)
                if turn:
                    taken[name].append(times)
        seconds = {
            name: {key: spread([t[key] for t in times]) | {"warmup": 1} for key in times[0]}
            for name, times in taken.items()
        }
        totals = {name: s["total"] for name, s in seconds.items()}
        found[f"{count} labels"] = {
            "seconds": seconds,
            "faster": {name: ratio(totals, "reference", name) for name in chosen[1:]},
            "agreement": {name: agreement(labels[name], labels["opsin"]) for name in chosen},
            "labels_present": int(labels["opsin"].unique().numel()),
            "second_question": {
                name: second_question(way, image, count, totals)
                for name, way in everyone.items()
                if name != "reference"
            },
        }
    return found


def agreement(found: Tensor, expected: Tensor) -> float:
    """Share of pixels of the same label."""
    return float((found == expected).double().mean())


def second_question(way: Way, image: Tensor, count: int, totals: dict[str, Any]) -> dict[str, Any]:
    """Seconds of other labels for the same image, their text vectors on disk (first asked) or in memory (asked again).

    The published way starts from the image again, so it takes its total.
    """
    found: dict[str, Any] = {}
    with torch.inference_mode(), way.matmul():
        encoded = way.segmenter.encode([image], batch_size=way.batch)[0]
        for kind, asked in (("first asked", range(1, 8)), ("asked again", range(1, 8))):
            taken = []
            for number in asked:
                started = time.perf_counter()
                encoded.query(names(count, number))
                taken.append(time.perf_counter() - started)
            found[kind] = spread(taken)
            found[kind]["faster"] = totals["reference"]["median"] / found[kind]["median"]
    return found


def measure_plus(network: Network, folder: Path, repeats: int, chosen: Sequence[str]) -> dict[str, Any]:
    """RADSeg+ on one picture: what it takes beyond the coarse labels, in turns."""
    image = picture(IMAGES[0])
    everyone = {name: Way(name, network, folder, plus=True) for name in chosen}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    labels = {}
    for turn in range(1 + repeats):
        for name, way in everyone.items():
            _, before = way.run(way.stages(names(LABELS[0]), IMAGES[0]), image)
            labels[name], times = way.run(way.plus(image), image)
            if turn:
                taken[name].append(times | {"coarse": before["total"], "total": times["total"] + before["total"]})
    seconds = {
        name: {key: spread([t[key] for t in times]) | {"warmup": 1} for key in times[0]}
        for name, times in taken.items()
    }
    totals = {name: s["total"] for name, s in seconds.items()}
    return {
        "regions": REGIONS,
        "seconds": seconds,
        "faster": {name: ratio(totals, "reference", name) for name in chosen[1:]},
        "agreement": {name: agreement(labels[name], labels["opsin"]) for name in chosen},
    }


def child(name: str, size: tuple[int, int], count: int, plus: bool, folder: Path) -> dict[str, Any]:
    """Peak memory of one way on one picture, whole process, and what was there before the picture came."""
    way = Way(name, VIT_B, folder, plus=plus)
    image, steps = picture(size), way.stages(names(count), size)
    ready = resident_mib()
    way.run(steps, image)
    if plus:
        way.run(way.plus(image), image)
    return {"ready_mib": ready, "peak_mib": resident_mib(peak=True)}


def memory(folder: Path, size: tuple[int, int], count: int, plus: bool, chosen: Sequence[str]) -> dict[str, Any]:
    """Peak memory of every way, each in a process of its own, and the share of the published one."""
    place = [str(size[0]), str(size[1]), str(count), str(int(plus)), str(folder)]
    found: dict[str, Any] = {name: in_child("segmentation.py", "--child", name, *place) for name in chosen}
    for facts in found.values():
        facts["share"] = facts["peak_mib"] / found["reference"]["peak_mib"]
    return found


def run(quick: bool) -> dict[str, Any]:
    """Everything."""
    repeats, chosen, found = 1 if quick else 5, ways(), {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(VIT_B, folder)
        for size in IMAGES[: 1 if quick else None]:
            title = f"{size[0]}×{size[1]}"
            say(f"segmentation: {title}")
            found[title] = measure(VIT_B, folder, size, repeats, chosen)
            for count in LABELS:
                found[title][f"{count} labels"]["memory"] = memory(folder, size, count, False, chosen)
        say("segmentation: RADSeg+")
        found["RADSeg+"] = measure_plus(VIT_B, folder, 1 if quick else 3, chosen)
        found["RADSeg+"]["memory"] = memory(folder, IMAGES[0], LABELS[0], True, chosen)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--child", nargs=6, metavar=("WAY", "HEIGHT", "WIDTH", "LABELS", "PLUS", "FOLDER"), required=True
    )
    name, height, width, count, plus, folder = parser.parse_args().child
    print(json.dumps(child(name, (int(height), int(width)), int(count), plus == "1", Path(folder))))
