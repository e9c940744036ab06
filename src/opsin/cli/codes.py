"""``opsin encode PHOTOS --out codes.safetensors`` and ``opsin decode codes.safetensors``: to vectors and back."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from opsin.codec import ImageCode

PRECISIONS = ("float32", "float16", "int8")


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``opsin encode``."""
    parser.add_argument("image", nargs="+", help="image files, or folders of them")
    parser.add_argument("--model", default="codec-tiny",
                        help="catalogue name, hf:org/repo@rev, dir:path or a .pth (default: codec-tiny)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("codes.safetensors"),
                        help="file to write (default: codes.safetensors)")  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the codes (default: float32)")
    parser.add_argument("--fit", choices=("stretch", "pad", "crop"),
                        help="how images come to the model's shape (default: the model's, mostly stretch)")  # fmt: skip
    common_arguments(parser)


def decode_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``opsin decode``."""
    parser.add_argument("codes", type=Path, help="what opsin encode wrote, or a .npy of vectors (N, D)")
    parser.add_argument("--out", type=Path, default=Path("again"),
                        help="folder of pictures, or a video to write: walk.mp4 (default: again/)")  # fmt: skip
    parser.add_argument("--model", help="the model that made the codes (default: the one they name)")
    parser.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="of pictures (default: png)")
    parser.add_argument("--square", action="store_true", help="leave pictures at the model's size and shape")
    parser.add_argument("--fps", type=float, default=24.0, help="frames per second of a video (default: 24)")
    common_arguments(parser)


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of both verbs."""
    parser.add_argument("--size", help="work at this size: 512, or 512x1024 (height x width)")
    parser.add_argument("--batch-size", type=int, default=16, help="images that go together (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def encode(args: argparse.Namespace) -> int:
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


def decode(args: argparse.Namespace) -> int:
    """Decode, write, report."""
    from opsin.codec import Codec, ImageCode
    from opsin.errors import IncompatibleModel, InvalidConfig, UnknownModel
    from opsin.images import save_image
    from opsin.runtime import progress

    if args.batch_size < 1:
        raise InvalidConfig("--batch-size is at least 1", got=args.batch_size)
    given = read_codes(args.codes)
    if args.model is None and not isinstance(given, ImageCode):
        raise InvalidConfig("Plain vectors need the model that made them", got="no --model")
    named: str = args.model or given.model  # type: ignore[union-attr]
    try:
        model = Codec.from_pretrained(named, device=args.device, dtype=args.dtype)
    except UnknownModel as error:
        if args.model:
            raise
        remedy = "Say where it is: --model dir:path, or hf:org/repo."
        raise IncompatibleModel("The model that made the codes must be had", got=named, remedy=remedy) from error
    if args.size:
        model.resize(size(args.size))
    if args.out.suffix.lower() in (".mp4", ".mov", ".m4v"):
        model.save_video(given, args.out, fps=args.fps, batch_size=args.batch_size)
        written = [args.out]
    else:
        pictures = (
            model.restore(given, batch_size=args.batch_size)
            if isinstance(given, ImageCode) and not args.square
            else model.frames(given, batch_size=args.batch_size)
        )
        names = [args.out / name for name in file_names(given, args.format)]
        shown = progress(pictures, total=len(names), description="decode", unit="img")
        written = [save_image(picture, path) for picture, path in zip(shown, names, strict=True)]
    if args.json:
        facts = {"model": model.name, "images": len(given), "files": [str(path) for path in written]}
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    sys.stderr.write(f"{len(given)} images: {args.out}\n")
    return 0


def read_codes(path: Path) -> ImageCode | Tensor:
    """A file of codes, or the vectors of a ``.npy``."""
    import numpy as np
    import torch

    from opsin.codec import ImageCode
    from opsin.errors import InputError
    from opsin.hub import check_file

    if path.suffix.lower() != ".npy":
        return ImageCode.load(path)
    check_file(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError("A .npy file holds an array of numbers", got=f"{path} ({error})") from error
    if array.dtype.kind != "f" or array.ndim != 2:
        raise InputError("Vectors are floating numbers (N, D)", got=f"{array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.float32))


def file_names(codes: ImageCode | Tensor, suffix: str) -> list[str]:
    """A file name for every picture: the name of its original where it has one, below the same folders."""
    from opsin.hub import check_inside

    originals = getattr(codes, "names", ()) or tuple(f"{i:06d}" for i in range(len(codes)))
    found: list[str] = []
    taken: set[str] = set()
    for i, original in enumerate(originals):
        path = PurePosixPath(original.replace("\\", "/"))
        if path.is_absolute():  # codes of single files may carry where these were
            path = PurePosixPath(path.name)
        check_inside(str(path))
        # photo.jpg beside photo.png, and files of one name from several folders
        numbered = (str(path.with_name(f"{path.stem}.{number}.{suffix}")) for number in count(i))
        candidates = chain([str(path.with_suffix(f".{suffix}")), f"{path}.{suffix}"], numbered)
        found.append(next(name for name in candidates if name not in taken))
        taken.add(found[-1])
    return found


def size(text: str) -> tuple[int, int]:
    """``"512"`` or ``"512x1024"`` as ``(height, width)``."""
    from opsin.errors import InvalidConfig

    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InvalidConfig("A size is 512, or 512x1024 (height x width)", got=text)
    return int(sides[0]), int(sides[-1])


# What opsin.cli.main asks of a verb.
ENCODE = SimpleNamespace(
    HELP="turn images into one vector each",
    EXAMPLE="opsin encode photos/ --model btnk-mae-b --out codes.safetensors",
    add_arguments=encode_arguments,
    run=encode,
)
DECODE = SimpleNamespace(
    HELP="turn vectors back into images, or a walk of them into a video",
    EXAMPLE="opsin decode codes.safetensors --out again/",
    add_arguments=decode_arguments,
    run=decode,
)
