"""A first and a second question about generated videos of 1, 5 and 30 minutes: time, peak memory, model calls.

``python benchmarks/localization.py --child MODEL VIDEO CROP RATE PRESET`` asks in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SEED, in_child, resident_mib, say
from torch import Tensor
from torch.nn import functional as F

FPS = 5.0
SIZE = (240, 320)
SPARSE, DENSE = 0.5, 5.0  # frames searched per second
SEEN = 8.0  # seconds during which the object is there, near the end
OBJECT = 72


def texture(size: tuple[int, int], draw: torch.Generator, cells: int) -> Tensor:
    """A smooth random colour picture ``(3, H, W)`` in [0, 1]."""
    coarse = torch.rand((1, 3, cells, cells), generator=draw)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)


def make(path: Path, seconds: float) -> Path:
    """Write a video of a sliding background, with an object during ``SEEN`` seconds near the end; returns the object's
    picture.
    """
    from opsin.images import save_image
    from opsin.video import ClipWriter

    draw = torch.Generator().manual_seed(SEED)
    wide = texture((SIZE[0], SIZE[1] * 3), draw, 12)
    thing = texture((OBJECT, OBJECT), draw, 4) * 0.3
    thing[0] += 0.65
    thing[:, ::12] = 1.0
    start = max(0.0, seconds * 0.8 - SEEN)
    with ClipWriter(path, FPS, SIZE) as clip:
        for i in range(round(seconds * FPS)):
            left = i * 2 % (SIZE[1] * 2)
            frame = wide[:, :, left : left + SIZE[1]].clone()
            if start <= i / FPS < start + SEEN:
                x = 40 + round((i / FPS - start) * 15)
                frame[:, 80 : 80 + OBJECT, x : x + OBJECT] = thing
            clip.write(frame.clamp(0, 1))
    crop = path.with_suffix(".png")
    save_image(thing.clamp(0, 1), crop)
    return crop


class Calls:
    """Pictures that go through each model, counted where they enter it."""

    def __init__(self, search: Any) -> None:
        self.counts = {"backbone": 0, "region encoder": 0, "masks": 0}
        model, masks = search.model, getattr(search.engine, "masks", None)
        self._count(model.backbone, "encode", "backbone", lambda pictures: len(pictures))
        self._count(model.encoder, "decode", "region encoder", lambda memory: len(memory.keys[0]))
        if masks is not None:
            for verb in ("from_boxes", "from_points"):
                self._count(masks, verb, "masks", lambda pictures: len(pictures))

    def _count(self, owner: Any, verb: str, name: str, pictures: Callable[[Any], int]) -> None:
        plain = getattr(owner, verb)

        def counted(first: Any, *rest: Any, **options: Any) -> Any:
            self.counts[name] += pictures(first)
            return plain(first, *rest, **options)

        setattr(owner, verb, counted)

    def taken(self) -> dict[str, int]:
        """The counts since the last time."""
        found = dict(self.counts)
        self.counts = dict.fromkeys(self.counts, 0)
        return found


def published(frames: int, candidates: int, tracked: int) -> dict[str, int]:
    """Pictures that the published code runs through its models for one query of one round, by reading it.

    Query: 8 crops; video: 5 views of a frame; a candidate: 8 crops, a mask in the frame and one in the best crop, three
    masks each pooled by a backbone pass of their own; the track: 8 crops of every frame, with a mask each. Masks and
    pooled features of the query are computed for eight identical boxes, in frames and in crops.
    """
    return {
        "backbone": 8 + 5 * frames + 16 + candidates * (8 + 6) + 8 * tracked,
        "region encoder": 8 + 5 * frames + 8 * candidates + 8 * tracked,
        "masks": 8 + 16 + 2 * candidates + 8 * tracked,
    }


def child(ref: str, video: str, crop: str, rate: float, preset: str) -> dict[str, Any]:
    """Two questions: the same object twice, so that only what is kept differs."""
    from opsin.localization import VideoSearch
    from opsin.regions import RegionModel
    from opsin.vql.preset import preset as preset_of

    model = RegionModel.from_pretrained(ref)
    ready = resident_mib()
    found: dict[str, Any] = {"preset": preset, "rate": rate, "ready_mib": ready, "asked": {}}
    way = preset_of(preset, rounds=1)
    with VideoSearch(video, model=model, preset=way, tracker="template", rate=rate) as search:
        calls = Calls(search)
        for name in ("first", "second"):
            started = time.perf_counter()
            track = search.locate(image=crop)
            found["asked"][name] = {"seconds": time.perf_counter() - started, "calls": calls.taken()}
        found["kept_mib"] = sum(f.stat().st_size for f in search.store.folder.glob("*")) / 2**20
    span = [float(track.times[0]), float(track.times[-1])] if track.found else None
    frames = len(track.timeline)
    return found | {
        "peak_mib": resident_mib(peak=True),
        "frames_searched": frames,
        "found": track.found,
        "span_seconds": span,
        "published_calls": published(frames, len(track.details["candidates"]), len(track)),
    }


def run(ref: str, quick: bool) -> dict[str, Any]:
    """Each video and way of searching in a fresh process."""
    cases = [(1, SPARSE, "template"), (5, SPARSE, "template"), (30, SPARSE, "template")]
    cases += [(5, DENSE, "template"), (1, SPARSE, "ren-vql"), (5, SPARSE, "ren-vql")]
    cases = [(0.5, SPARSE, "template"), (1, SPARSE, "template"), (0.5, SPARSE, "ren-vql")] if quick else cases
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes, rate, preset in cases:
            say(f"localization: {minutes} min, {rate} frames/s, {preset}")
            video = Path(folder) / f"{minutes}.mp4"
            crop = video.with_suffix(".png") if video.exists() else make(video, minutes * 60)
            words = ("--child", ref, str(video), str(crop), str(rate), preset)
            rows[f"{minutes:g} min, {rate:g}/s, {preset}"] = in_child("localization.py", *words, timeout=1800)
    sparse = [r["peak_mib"] for r in rows.values() if r["preset"] == "template" and r["rate"] == SPARSE]
    return {"fps": FPS, "size": list(SIZE), "rows": rows, "growth_mib": sparse[-1] - sparse[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("MODEL", "VIDEO", "CROP", "RATE", "PRESET")
    parser.add_argument("--child", nargs=5, metavar=names, required=True)
    model, video, crop, rate, preset = parser.parse_args().child
    print(json.dumps(child(model, video, crop, float(rate), preset)))
