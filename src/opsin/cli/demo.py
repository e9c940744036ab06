"""``opsin demo``: photographs filmed by a moving virtual camera, then an object of one of them found in that film."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HELP = "film photographs with a virtual camera, then find an object of one of them in the film; offline, on the CPU"
EXAMPLE = "opsin demo --out outputs/demo"
FPS = 15
FRAME = (240, 320)  # (H, W)
SHOT_SECONDS = 2.0


@dataclass(frozen=True)
class Shot:
    """One camera move over one photograph: the view's centre and height at both ends, in shares of the photo."""

    photo: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]


# The cup is filmed twice, so that "where was it last seen" has a wrong answer too, and the film goes on after it.
FILM = (
    Shot("rocket", (0.45, 0.55, 0.9), (0.55, 0.4, 0.6)),
    Shot("coffee", (0.40, 0.50, 0.9), (0.60, 0.45, 0.7)),
    Shot("chelsea", (0.45, 0.55, 0.8), (0.55, 0.45, 0.6)),
    Shot("motorcycle", (0.3, 0.5, 0.9), (0.7, 0.5, 0.7)),
    Shot("coffee", (0.58, 0.55, 0.7), (0.46, 0.45, 0.9)),
    Shot("astronaut", (0.5, 0.4, 0.9), (0.45, 0.3, 0.6)),
)
QUERY_PHOTO, QUERY_BOX = "coffee", (170, 60, 440, 310)  # the cup on its saucer, in pixels of the photograph
FILES = {"motorcycle": "motorcycle_left.png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder (default: outputs/demo)")
    parser.add_argument("--model", default="opsin-tiny", help="catalogue name, hf:org/repo@rev or dir:path")
    parser.add_argument("--json", action="store_true", help="print the whole result")


def run(args: argparse.Namespace) -> int:
    """Make the film, look for the cup, draw what was found, say where the pictures are."""
    from opsin.cli.locate import report
    from opsin.images import save_image
    from opsin.localization import locate, render, save_track

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    say = sys.stderr.write
    film, spans = make_film(out / "film.mp4")
    crop = query_crop()
    save_image(crop, out / "query.png")
    say(f"filmed {len(FILM)} photographs: {film}\nlooking for the cup of {out / 'query.png'} ...\n")
    started = time.perf_counter()
    track = locate(film, image=crop, model=args.model, device="cpu")
    seconds = time.perf_counter() - started
    save_track(track, out / "result.json")
    render.annotated_clip(film, track, out / "found.mp4", around=None)
    render.contact_sheet(film, track, out / "sheet.png", query=crop)
    report(track, full=args.json)
    first, last = spans[-1]
    say(
        f"the camera last showed the cup from {first:.2f} s to {last:.2f} s; searching took {seconds:.1f} s\n"
        f"  {out / 'sheet.png'}    the query, the score over time, and frames of the answer with the box\n"
        f"  {out / 'found.mp4'}    the film with the box drawn where the cup was last seen\n"
        f"  {out / 'result.json'}  times, frames, boxes and scores\n"
    )
    (out / "truth.json").write_text(json.dumps({"cup_visible_seconds": spans}) + "\n")
    return 0


def photograph(name: str) -> Tensor:
    """A photograph ``(3, H, W)`` in [0, 1] that comes inside scikit-image's package: nothing is downloaded."""
    from importlib.util import find_spec

    from opsin.errors import MissingExtra
    from opsin.images import read_image

    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise MissingExtra.of("scikit-image", "regions", "bring the photographs of the demo")
    folder = Path(found.origin).parent / "data"
    known = [folder / FILES.get(name, f"{name}{ending}") for ending in (".png", ".jpg")]
    return read_image(next((p for p in known if p.exists()), known[0]))


def query_crop() -> Tensor:
    """The cup ``(3, h, w)``, cut out of the photograph itself and not out of the film."""
    x1, y1, x2, y2 = QUERY_BOX
    return photograph(QUERY_PHOTO)[:, y1:y2, x1:x2]


def make_film(path: Path) -> tuple[Path, list[tuple[float, float]]]:
    """Write the film; returns its path and when the query's photograph is on screen, in seconds."""
    from opsin.video import ClipWriter

    spans, count = [], 0
    with ClipWriter(path, FPS, FRAME) as clip:
        for shot in FILM:
            first = count / FPS
            for view in filmed(photograph(shot.photo), shot):
                clip.write(view)
                count += 1
            if shot.photo == QUERY_PHOTO:
                spans.append((first, (count - 1) / FPS))
    return path, spans


def filmed(photo: Tensor, shot: Shot) -> Iterator[Tensor]:
    """The views ``(3, *FRAME)`` of a camera that eases from one end of the move to the other."""
    import torch
    from torch.nn import functional as F

    height, width = photo.shape[1:]
    aspect = FRAME[1] / FRAME[0]
    for step in torch.linspace(0, 1, round(SHOT_SECONDS * FPS)).tolist():
        ease = step * step * (3 - 2 * step)
        x, y, share = (a + ease * (b - a) for a, b in zip(shot.start, shot.end, strict=True))
        h = min(share * height, width / aspect)
        w = h * aspect
        left, top = min(max(x * width - w / 2, 0), width - w), min(max(y * height - h / 2, 0), height - h)
        ys = (top + (torch.arange(FRAME[0]) + 0.5) * h / FRAME[0]) / height * 2 - 1
        xs = (left + (torch.arange(FRAME[1]) + 0.5) * w / FRAME[1]) / width * 2 - 1
        grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)[None]
        yield F.grid_sample(photo[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0].clamp(
            0, 1
        )
