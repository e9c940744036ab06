"""Peak memory of ``locate`` on a short and on a long generated video: it must not grow with the length.

``python benchmarks/memory.py --child MODEL VIDEO CROP RATE`` locates in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import SEED, in_child, resident_mib, say
from torch import Tensor
from torch.nn import functional as F

FPS = 5.0
SIZE = (240, 320)
RATE = 0.5  # frames searched per second
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


def child(ref: str, video: str, crop: str, rate: float) -> dict[str, Any]:
    """Peak memory and result of one search."""
    from opsin.localization import locate
    from opsin.regions import RegionModel

    model = RegionModel.from_pretrained(ref)
    ready = resident_mib()
    started = time.perf_counter()
    track = locate(video, image=crop, model=model, rate=rate)
    return {
        "seconds": time.perf_counter() - started,
        "ready_mib": ready,
        "peak_mib": resident_mib(peak=True),
        "frames_searched": len(track.timeline),
        "found": track.found,
        "span_seconds": [float(track.times[0]), float(track.times[-1])] if track.found else None,
    }


def run(ref: str, quick: bool) -> dict[str, Any]:
    """A 1-minute and a 30-minute video, each searched in a fresh process."""
    found: dict[str, Any] = {"fps": FPS, "size": list(SIZE), "rate": RATE}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (1, 3 if quick else 30):
            say(f"memory: {minutes} min")
            video = Path(folder) / f"{minutes}.mp4"
            crop = make(video, minutes * 60)
            found[f"{minutes} min"] = in_child("memory.py", "--child", ref, str(video), str(crop), str(RATE))
    short, long = (v for k, v in found.items() if k.endswith("min"))
    found["growth_mib"] = long["peak_mib"] - short["peak_mib"]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "VIDEO", "CROP", "RATE"), required=True)
    model, video, crop, rate = parser.parse_args().child
    print(json.dumps(child(model, video, crop, float(rate))))
