"""Words to pixels, ViT-B with random weights: seconds per stage, memory, a second question; against the published way.

``python benchmarks/segmentation.py --child WAY HEIGHT WIDTH LABELS PLUS FOLDER`` measures the memory of one way in a
process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import util
from pathlib import Path
from typing import Any

import torch
from common import SEED, in_child, ratio, resident_mib, say, spread
from reference_radseg import reference_refine
from synthetic import (
    REGIONS,
    VIT_B,
    Network,
    names,
    picture,
    prepare,
    rectangles,
    reference,
    sam_decoder,
    segmenter,
    vocabulary,
)
from torch import Tensor
from torch.nn import functional as F

from opsin.backbones.half import tune
from opsin.runtime import fast_matmul
from opsin.segmentation import SegmentationFeatures, prediction
from opsin.segmentation.aggregation import aggregate
from opsin.segmentation.labels import Labels
from opsin.segmentation.refine import frame, refine
from opsin.segmentation.windows import sliding_features

STAGES = ("windows", "aggregation", "alignment", "cosine and softmax", "enlarging and decision")
IMAGES = ((512, 512), (512, 1024))
LABELS = (20, 150)
QUESTIONS = 8
DRAWS = 30  # of as many labels from all


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
        if half:
            tune(self.segmenter.aligned.backbone)
            self.segmenter.aligned.head.float()
        self.segmenter.aligned.__dict__["vocabulary"] = self.vocabulary
        self.matmul = fast_matmul
        if name.startswith("openvino"):
            dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
            self.segmenter.aligned.use_openvino(self.segmenter.card.crop, dtype)
            self.batch = 16  # one by one on as many threads

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

    def words(self, image: Tensor) -> Tensor:
        """Unit vectors ``(E, h, w)`` in the space of the words."""
        found = self.run(self.stages(names(LABELS[0]), (1, 1))[:3], image)[0]
        return F.normalize(found[0] if found.ndim == 4 else found, dim=0)

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
        """The last value, the seconds of every stage and of all, and those that processors worked."""
        taken: dict[str, float] = {}
        gc.collect()
        spent = time.process_time()
        with torch.inference_mode(), self.matmul():
            for name, function in steps:
                started = time.perf_counter()
                value = function(value)
                taken[name] = time.perf_counter() - started
        return value, taken | {"total": sum(taken.values()), "CPU time": time.process_time() - spent}


def ways() -> tuple[str, ...]:
    """Those that this machine has."""
    found = ("reference", "opsin", "opsin bf16")
    return (*found, "openvino", "openvino bf16") if util.find_spec("openvino") else found


def measure(
    network: Network, folder: Path, size: tuple[int, int], repeats: int, chosen: Sequence[str]
) -> dict[str, Any]:
    """Every way on one picture, in turns: seconds per stage and in all, agreement, a second question."""
    image, found = picture(size), {}
    everyone = {name: Way(name, network, folder) for name in chosen}
    words = {name: way.words(image) for name, way in everyone.items()}
    for count in LABELS:
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for _ in range(repeats):  # what every way has seen so far is its warm-up
            for name, way in everyone.items():
                taken[name].append(way.run(way.stages(names(count), size), image)[1])
        seconds = spreads(taken)
        totals = {name: s["total"] for name, s in seconds.items()}
        found[f"{count} labels"] = {
            "seconds": seconds,
            "faster": {name: ratio(totals, "reference", name) for name in chosen[1:]},
            "agreement": agreements(words, everyone["opsin"], names(count), size),
            "second_question": {
                name: second_question(way, words[name], size, count, totals["reference"]["median"])
                for name, way in everyone.items()
                if name != "reference"
            },
        }
    return found


def spreads(taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Of every way, of every stage."""
    return {
        name: {key: spread([t[key] for t in times]) | {"warmup": 1} for key in times[0]}
        for name, times in taken.items()
    }


def agreement(found: Tensor, expected: Tensor) -> float:
    """Share of pixels of the same label."""
    return float((found == expected).double().mean())


def agreements(words: dict[str, Tensor], way: Way, labels: Labels, size: tuple[int, int]) -> dict[str, Any]:
    """Agreement of every way with "opsin" and the number of labels in its answer, for several sets of text vectors.

    Two labels that compete within a hundredth over a large area decide one set, so the mean over ``DRAWS`` sets of the
    same close vectors is given too.
    """
    close = way.vocabulary.embed(labels)
    many = way.vocabulary.embed(names(max(LABELS)))
    draw = torch.Generator().manual_seed(SEED + 1)
    sets = {"close text": [close], "random text": [torch.randn(close.shape, generator=draw)]}
    if len(close) < len(many):
        drawn = (torch.randperm(len(many), generator=draw)[: len(close)] for _ in range(DRAWS))
        sets[f"{DRAWS} draws of close text"] = [many[rows] for rows in drawn]
    found: dict[str, Any] = {}
    for kind, texts in sets.items():
        shares: dict[str, list[float]] = {name: [] for name in words}
        for text in texts:
            answers = {name: answer(w, text, labels, size) for name, w in words.items()}
            for name, labelled in answers.items():
                shares[name].append(agreement(labelled, answers["opsin"]))
        found[kind] = {name: sum(values) / len(values) for name, values in shares.items()}
        found[kind]["labels present"] = int(answers["opsin"].unique().numel())  # of the last set
    return found


def answer(words: Tensor, text: Tensor, labels: Labels, size: tuple[int, int]) -> Tensor:
    """Labels ``(H, W)`` from vectors of locations and of labels."""
    grid = prediction.class_probabilities(words, text, labels.index, len(labels), 100.0)
    return prediction.decide(grid, size, denoise=0.5).labels


def second_question(way: Way, words: Tensor, size: tuple[int, int], count: int, from_scratch: float) -> dict[str, Any]:
    """Seconds of other labels for the same image, their text vectors on disk (first asked) or in memory (asked again).

    The published way starts from the image again, so it takes its total.
    """
    found: dict[str, Any] = {}
    encoded = SegmentationFeatures(words, words, size, way.segmenter)
    with torch.inference_mode(), way.matmul():
        for kind in ("first asked", "asked again"):
            taken = []
            for asked in range(1, QUESTIONS):
                started = time.perf_counter()
                encoded.query(names(count, asked))
                taken.append(time.perf_counter() - started)
            found[kind] = spread(taken)
            found[kind]["faster"] = from_scratch / found[kind]["median"]
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
                both = {key: times[key] + before[key] for key in ("total", "CPU time")}
                taken[name].append(times | {"coarse": before["total"]} | both)
    seconds = spreads(taken)
    totals = {name: s["total"] for name, s in seconds.items()}
    return {
        "regions": REGIONS,
        "seconds": seconds,
        "faster": {name: ratio(totals, "reference", name) for name in chosen[1:]},
        "agreement": {"ten regions": {name: agreement(labels[name], labels["opsin"]) for name in chosen[1:]}},
    }


def child(name: str, size: tuple[int, int], count: int, plus: bool, folder: Path) -> dict[str, Any]:
    """Peak memory of one way while it answers, whole process, and what was there before: weights, libraries."""
    way = Way(name, VIT_B, folder, plus=plus)
    image, steps = picture(size), way.stages(names(count), size)
    forget()
    ready = resident_mib()
    way.run(steps, image)
    if plus:
        way.run(way.plus(image), image)
    return {"ready_mib": ready, "peak_mib": resident_mib(peak=True)}


def forget() -> None:
    """Give back what making random weights left behind, and start the record of the peak anew (on Linux)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory(folder: Path, size: tuple[int, int], count: int, plus: bool, chosen: Sequence[str]) -> dict[str, Any]:
    """Peak memory of every way, each in a process of its own, and the share of the published one."""
    place = [str(size[0]), str(size[1]), str(count), str(int(plus)), str(folder)]
    found: dict[str, Any] = {name: in_child("segmentation.py", "--child", name, *place) for name in chosen}
    for facts in found.values():
        facts["share"] = facts["peak_mib"] / found["reference"]["peak_mib"]
    return found


def run(quick: bool) -> dict[str, Any]:
    """Everything."""
    repeats, chosen, found = 1 if quick else 3, ways(), {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(VIT_B, folder, LABELS, QUESTIONS)
        for size in IMAGES[: 1 if quick else None]:
            title = f"{size[0]}×{size[1]}"
            say(f"segmentation: {title}")
            found[title] = measure(VIT_B, folder, size, repeats, chosen)
            for count in LABELS:
                found[title][f"{count} labels"]["memory"] = memory(folder, size, count, False, chosen)
        say("segmentation: RADSeg+")
        chosen = chosen[:3]  # OpenVINO is for windows: at 1024 pixels its graph of SCRA would be of hundreds of blocks
        found["RADSeg+"] = measure_plus(VIT_B, folder, 1 if quick else 2, chosen)
        found["RADSeg+"]["memory"] = memory(folder, IMAGES[0], LABELS[0], True, chosen)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--child", nargs=6, metavar=("WAY", "HEIGHT", "WIDTH", "LABELS", "PLUS", "FOLDER"), required=True
    )
    name, height, width, count, plus, folder = parser.parse_args().child
    print(json.dumps(child(name, (int(height), int(width)), int(count), plus == "1", Path(folder))))
