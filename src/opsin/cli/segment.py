"""``opsin segment IMAGE "cat, sofa"``: words to pixels."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

HELP = "label every pixel of images by words"
EXAMPLE = 'opsin segment photo.jpg "cat, sofa, window" --out seg.png --overlay seen.jpg'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("image", nargs="+", help="image files, or folders of them; the last argument is the labels")
    parser.add_argument("labels", help='"cat, sofa, window", or a .json file: a list, or {"person": ["man", "woman"]}')
    parser.add_argument("--model", default="radseg-b", help="catalogue name, hf:org/repo@rev, dir:path or a .pth.tar")
    parser.add_argument("--out", type=Path, help="PNG of label numbers, 0 unknown (default: IMAGE.labels.png here); "
                        "for several images a folder")  # fmt: skip
    parser.add_argument("--overlay", type=Path, help="also draw labels over the image: a picture, or a folder")
    parser.add_argument("--background", help="phrases that compete and become unknown, separated by commas")
    parser.add_argument("--plain", action="store_true", help="take labels as whole sentences, without templates")
    parser.add_argument("--threshold", type=float, default=0.0, help="pixels less probable than this become unknown")
    parser.add_argument("--denoise", type=float, help="drop labels that reach this nowhere (default: the model's)")
    parser.add_argument("--refine", action="store_true", help="sharpen masks with SAM's decoder (RADSeg+)")
    parser.add_argument("--crop", type=int, help="side of the windows, 0 for one pass (default: the model's)")
    parser.add_argument("--stride", type=int, help="pixels between windows (default: the model's)")
    parser.add_argument("--longest", type=int, help="shrink larger images to this longest side first")
    parser.add_argument("--language", help="RADIO's adaptor that leads to words (default: the model's)")
    parser.add_argument("--compat", choices=("published",), help="do as the published code where it is wrong")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument("--runtime", choices=("torch", "openvino"), default="torch", help="openvino: windows compiled, "
                        "faster on CPUs for more than a few images (default: torch)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object per image to stdout")


def run(args: argparse.Namespace) -> int:
    """Segment, write, report. A bad file among several is skipped and named; the exit code is then 1."""
    from opsin.errors import InvalidImage, MissingFile
    from opsin.images import list_images
    from opsin.segmentation import Segmenter, as_labels

    labels = as_labels(read_labels(args.labels), templates=None if args.plain else "imagenet")
    paths = [p for name in args.image for p in (list_images(name) if Path(name).is_dir() else [Path(name)])]
    several = len(paths) > 1 or Path(args.image[0]).is_dir()
    if not several and not paths[0].exists():  # before any weight is read
        raise MissingFile("The image file must exist", got=str(paths[0]))
    model = Segmenter.from_pretrained(
        args.model, language=args.language, device=args.device, dtype=args.dtype, runtime=args.runtime
    )
    bad = 0
    for path, name in zip(paths, own_names(paths), strict=True):
        try:
            one(model, path, name, labels, args, several)
        except (InvalidImage, MissingFile) as error:
            if not several:
                raise
            bad += 1
            sys.stderr.write(f"skipped {path}: {error}\n")
    if bad:
        sys.stderr.write(f"{bad} of {len(paths)} images could not be read\n")
    return 1 if bad else 0


def own_names(paths: Sequence[Path]) -> list[str]:
    """The stem of every file, numbered where another file has it: photo, photo-2."""
    found: list[str] = []
    for path in paths:
        candidates = chain([path.stem], (f"{path.stem}-{number}" for number in count(2)))
        found.append(next(name for name in candidates if name not in found))
    return found


def read_labels(text: str) -> Any:
    """The argument itself, or what a ``.json`` or ``.txt`` (one label per line) file holds."""
    from opsin.errors import InvalidConfig, MissingFile

    path = Path(text)
    if path.suffix not in (".json", ".txt"):
        return text
    if not path.is_file():
        raise MissingFile("A file of labels must exist", got=text)
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [line for line in content.splitlines() if line.strip()]
    try:
        return json.loads(content)
    except ValueError as error:
        raise InvalidConfig("A file of labels is JSON", got=f"{text} ({error})") from error


def one(model: Any, path: Path, stem: str, labels: Any, args: argparse.Namespace, several: bool) -> None:
    """One image: read, segment, write under the name ``stem``, report."""
    from opsin.images import read_image, save_image

    picture = read_image(path)
    background = None if args.background is None else [b.strip() for b in args.background.split(",") if b.strip()]
    found = model.segment(
        picture, labels, background=background, threshold=args.threshold, denoise=args.denoise, refine=args.refine,
        crop=args.crop, stride=args.stride, longest=args.longest, compat=args.compat,
    )  # fmt: skip
    name = f"{stem}.labels.png"
    out = (args.out / name if several else args.out) if args.out else Path(name)
    found.save(out)
    overlay = args.overlay and (args.overlay / f"{stem}.jpg" if several else args.overlay)
    if overlay:
        save_image(found.plot(picture), overlay)
    if args.json:
        facts = {"image": str(path), **found.to_json(), "labels": str(out), "overlay": overlay and str(overlay)}
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    shares = ", ".join(f"{n} {100 * s:.1f} %" for n, s in found.areas().items()) or "nothing"
    against = f" (against {', '.join(found.background)})" if found.background else ""
    sys.stderr.write(f"{path}: {shares}{against}; labels: {out}" + (f"; picture: {overlay}" if overlay else "") + "\n")
