"""``opsin encode PHOTOS --out codes.safetensors``: one vector per image."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

HELP = "turn images into one vector each"
EXAMPLE = "opsin encode photos/ --model btnk-mae-b --out codes.safetensors"
PRECISIONS = ("float32", "float16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("image", nargs="+", help="image files, or folders of them")
    parser.add_argument("--model", default="codec-tiny",
                        help="catalogue name, hf:org/repo@rev, dir:path or a .pth (default: codec-tiny)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("codes.safetensors"),
                        help="file to write (default: codes.safetensors)")  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the codes (default: float32)")
    parser.add_argument("--fit", choices=("stretch", "pad", "crop"),
                        help="how images come to the model's shape (default: the model's, mostly stretch)")  # fmt: skip
    parser.add_argument("--size", help="work at this size: 512, or 512x1024 (height x width)")
    parser.add_argument("--batch-size", type=int, default=16, help="images that go together (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def size(text: str) -> tuple[int, int]:
    """``"512"`` or ``"512x1024"`` as ``(height, width)``."""
    from opsin.errors import InvalidConfig

    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InvalidConfig("A size is 512, or 512x1024 (height x width)", got=text)
    return int(sides[0]), int(sides[-1])


def run(args: argparse.Namespace) -> int:
    """Encode, write, report. A bad file among several is skipped and named; the exit status is then 1."""
    from opsin.codec import Codec, ImageCode
    from opsin.errors import InvalidConfig, InvalidImage, MissingFile
    from opsin.images import read_image
    from opsin.runtime import progress

    named = files(args.image)
    if args.batch_size < 1:
        raise InvalidConfig("--batch-size is at least 1", got=args.batch_size)
    if len(named) == 1 and not named[0][0].exists():  # before any weight is read
        raise MissingFile("The image file must exist", got=str(named[0][0]))
    model = Codec.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    if args.size:
        model.resize(size(args.size))
    parts, bad = [], 0
    starts = range(0, len(named), args.batch_size)
    for start in progress(starts, total=len(starts), description="encode", unit="batch"):
        pictures, names = [], []
        for path, name in named[start : start + args.batch_size]:
            try:
                pictures.append(read_image(path))
                names.append(name)
            except (InvalidImage, MissingFile) as error:
                if len(named) == 1:
                    raise
                bad += 1
                sys.stderr.write(f"skipped {path}: {error}\n")
        if pictures:
            code = model.encode(pictures, batch_size=args.batch_size, fit=args.fit)
            parts.append(replace(code, names=tuple(names), vectors=code.vectors.cpu()))
    if not parts:
        raise InvalidImage("There must be at least one readable image", got=f"{len(named)} that are not")
    codes = ImageCode.join(parts)
    codes = {"float32": lambda: codes, "float16": codes.half, "int8": codes.int8}[args.precision]()
    codes.save(args.out)
    if bad:
        sys.stderr.write(f"{bad} of {len(named)} images could not be read\n")
    facts = {
        "codes": str(args.out), "images": len(codes), "skipped": bad, "model": codes.model, "dim": codes.dim,
        "precision": args.precision, "bytes_per_image": codes.bytes_per_image, "loss": codes.loss,
    }  # fmt: skip
    if args.json:
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    lost = f", {100 * codes.loss:.2g} % lost to rounding" if codes.loss else ""
    sys.stderr.write(
        f"{len(codes)} images, {codes.dim} numbers and {codes.bytes_per_image} bytes each{lost}: {args.out}\n"
    )
    return 1 if bad else 0


def files(given: list[str]) -> list[tuple[Path, str]]:
    """Image files with the names that their codes get: below a folder, the path inside it."""
    from opsin.errors import InvalidImage
    from opsin.images import list_images

    found: list[tuple[Path, str]] = []
    for item in map(Path, given):
        if not item.is_dir():
            found.append((item, item.name))
            continue
        inside = list_images(item)
        if not inside:
            raise InvalidImage("The folder must hold at least one image", got=str(item))
        found += [(path, path.relative_to(item).as_posix()) for path in inside]
    return found
