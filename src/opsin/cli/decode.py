"""``opsin decode codes.safetensors --out again/``: images, or a video, from vectors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from opsin.codec import ImageCode

HELP = "turn vectors back into images, or a walk of them into a video"
EXAMPLE = "opsin decode codes.safetensors --out again/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("codes", type=Path, help="what opsin encode wrote, or a .npy of vectors (N, D)")
    parser.add_argument("--out", type=Path, default=Path("again"),
                        help="folder of pictures, or a video to write: walk.mp4 (default: again/)")  # fmt: skip
    parser.add_argument("--model", help="the model that made the codes (default: the one they name)")
    parser.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="of pictures (default: png)")
    parser.add_argument("--square", action="store_true", help="leave pictures at the model's size and shape")
    parser.add_argument("--size", help="work at this size: 512, or 512x1024 (height x width)")
    parser.add_argument("--fps", type=float, default=24.0, help="frames per second of a video (default: 24)")
    parser.add_argument("--batch-size", type=int, default=16, help="images that go together (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def run(args: argparse.Namespace) -> int:
    """Decode, write, report."""
    from opsin.cli.encode import size
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
        name = str(path.with_suffix(f".{suffix}"))
        if name in taken:  # photo.jpg and photo.png
            name = f"{path}.{suffix}" if f"{path}.{suffix}" not in taken else f"{path.stem}.{i}.{suffix}"
        taken.add(name)
        found.append(name)
    return found
