"""``opsin eval reconstruction``: what a codec keeps of images, beside picture files of as many bytes as its code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsin.cli.codes import PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

    from opsin.codec import Codec, ImageCode

RECONSTRUCTION_EXAMPLES = """examples:
  opsin eval reconstruction --model codec-tiny --data photos/ --out report.json --picture report.png
  opsin eval reconstruction --model btnk-mae-b --data imagenet-1k@validation --limit 500 --out report.json

--data is a folder, a ZIP[@part], or a data set as in opsin train codec. Images are laid on the model's canvas first;
all numbers compare with that. A file of equal bytes is the best of several scales, headers counted. Retrieval finds
each image among all by a mirrored view of its inner 80 %, by code and by pixels; and, in class folders, the class.
Exit code 1: images could not be read; they are listed in the report.
"""


def add_reconstruction_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``opsin eval reconstruction``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = RECONSTRUCTION_EXAMPLES
    parser.add_argument("--model", default="codec-tiny", help='catalogue name, "hf:org/repo@rev" or "dir:path"')
    parser.add_argument("--data", required=True, help="images to measure on")
    parser.add_argument("--limit", type=int, help="use at most so many images, evenly spaced")
    parser.add_argument("--fit", choices=("stretch", "pad", "crop"), help="onto the canvas (default: the model's)")
    parser.add_argument("--no-files", action="store_true", help="leave JPEG, WebP and AVIF out, which take longest")
    parser.add_argument("--perceptual", action="store_true", help="LPIPS and rFID too (torchmetrics and its weights)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="all methods side by side")
    parser.add_argument("--rows", type=int, default=8, help="images in the picture (default 8)")
    parser.add_argument("--out", type=Path, metavar="REPORT.json", help="write the whole report to this JSON file")
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals (default 0)")
    parser.add_argument("--device", help="where to run (default: the machine's accelerator, else the CPU)")
    parser.add_argument("--dtype", help='"auto", "float32" or "bfloat16" (default float32)')
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run_reconstruction(args: argparse.Namespace) -> int:
    """Measure, write and print. Returns 1 when images were skipped, else 0."""
    from opsin import report
    from opsin.codec import Codec
    from opsin.errors import InvalidConfig

    for name in ("limit", "rows", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InvalidConfig(f"--{name.replace('_', '-')} is at least 1", got=getattr(args, name))
    if args.out is not None and args.out.suffix != ".json":
        raise InvalidConfig("A report is a .json file", got=args.out.name)
    codec = Codec.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    fit = args.fit or codec.card.fit
    images, names, skipped = read(args.data, args.limit, codec.size, fit)
    measured, shown = measure(codec, images, names, files=not args.no_files, batch_size=args.batch_size, seed=args.seed)
    measured["retrieval"] = retrieval(codec, images, names, batch_size=args.batch_size)
    if args.perceptual:
        from opsin.codec.measures import perceptual

        measured["perceptual"] = perceptual(images, codec.reconstruct(images, batch_size=args.batch_size))
    full = {
        "measure": "reconstruction",
        "model": codec.name,
        "data": Path(args.data).name,
        "images": len(images),
        "canvas": list(codec.size),
        "fit": fit,
        "environment": report.environment(args.seed),
        **measured,
        "skipped": skipped,
    }
    if args.picture is not None:
        from opsin.images import save_image

        picture = side_by_side(images, shown, min(args.rows, len(images)))
        sys.stderr.write(f"Picture: {save_image(picture, args.picture)}\n")
    if args.out is not None:
        sys.stderr.write(f"Report: {report.write(args.out, full)}\n")
    if args.json:
        sys.stdout.write(json.dumps(report.tidy(full), ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(table(full))
    return 1 if skipped else 0


def read(spec: str, limit: int | None, size: tuple[int, int], fit: Any) -> tuple[Tensor, list[str], dict[str, str]]:
    """Images ``(B, 3, H, W)`` in [0, 1] on the canvas ``size``, their names, and those that could not be read."""
    import torch

    from opsin.codec.canvas import lay
    from opsin.errors import InvalidDataset, OpsinError
    from opsin.images import read_image
    from opsin.runtime import progress
    from opsin.training.codec_data import open_photographs

    source = open_photographs(spec)
    count = min(len(source), limit or len(source))
    chosen = [i * len(source) // count for i in range(count)]
    images, names, skipped = [], [], {}
    for index in progress(chosen, total=count, description="read", unit="image"):
        name = source.label(index)
        try:
            images.append(lay(read_image(source.read(index)), size, fit))
            names.append(name)
        except OpsinError as error:
            skipped[name] = str(error)
    if not images:
        raise InvalidDataset("There is a readable image", got=f"none of {count} in {spec}")
    return torch.stack(images), names, skipped


def measure(
    codec: Codec, images: Tensor, names: list[str], *, files: bool = True, batch_size: int = 16, seed: int = 0
) -> tuple[dict[str, Any], dict[str, list[Tensor | None]]]:
    """PSNR and SSIM of the codec at each precision and of files of as many bytes, overall and per image.

    Also the pictures by method, None where no file is small enough.
    """
    from opsin import report
    from opsin.codec.measures import FORMATS, available, compress
    from opsin.runtime import progress

    code = codec.encode(images, batch_size=batch_size)
    precisions: dict[str, ImageCode] = {"float32": code, "float16": code.half(), "int8": code.int8()}
    pictures: dict[str, list[Tensor | None]] = {}
    budgets = {name: variant.bytes_per_image for name, variant in precisions.items()}
    details: dict[str, list[dict[str, Any]]] = {}
    for name, variant in precisions.items():
        pictures[f"code {name}"] = list(codec.decode(variant, batch_size=batch_size).float().cpu())
        details[f"code {name}"] = [{"bytes": budgets[name]} for _ in images]
    for kind in (k for k in FORMATS if files and available(k)):
        for name, budget in budgets.items():
            counted = progress(images, total=len(images), description=f"{kind} {budget} B", unit="image")
            made = [compress(image, budget, kind) for image in counted]
            pictures[f"{kind} {name}"] = [m.image for m in made]
            details[f"{kind} {name}"] = [{"bytes": m.size, "quality": m.quality, "scale": m.scale} for m in made]
    rows: list[dict[str, Any]] = [{"name": name} for name in names]
    methods: dict[str, dict[str, Any]] = {}
    for method, made_of in pictures.items():
        kind, _, precision = method.partition(" ")
        scores = [_scores(image, again) for image, again in zip(images, made_of, strict=True)]
        for row, score, detail in zip(rows, scores, details[method], strict=True):
            row[method] = {**detail, **score} if score else None
        reached = [(i, s) for i, s in enumerate(scores) if s]
        methods[method] = {
            "budget": budgets[precision],
            "fitting": len(reached),
            **{
                key: report.clustered_mean([s[key] for _, s in reached], [i for i, _ in reached], seed=seed)
                for key in ("psnr", "ssim")
            },
        }
        if kind == "code":
            methods[method]["code_loss"] = precisions[precision].loss
    return {"methods": methods, "per_image": rows}, pictures


def _scores(image: Tensor, again: Tensor | None) -> dict[str, float]:
    from opsin.codec.measures import psnr, ssim

    if again is None:
        return {}
    return {"psnr": min(100.0, float(psnr(image[None], again[None]))), "ssim": float(ssim(image[None], again[None]))}


def retrieval(codec: Codec, images: Tensor, names: list[str], *, batch_size: int = 16) -> dict[str, Any]:
    """How often the nearest image by code is the right one, beside all pixels and as many numbers as the code."""
    import torch
    from torch.nn import functional as F

    from opsin.codec.measures import finds_itself, pixel_vectors, same_class

    if len(images) < 2:
        return {}
    (height, width), edge = codec.size, 0.1
    top, left = round(height * edge), round(width * edge)
    inner = images[:, :, top : height - top, left : width - left].flip(3)
    views = F.interpolate(inner, size=codec.size, mode="bicubic", antialias=True).clamp(0, 1)

    def vectors(kind: str, pictures: Tensor) -> Tensor:
        if kind == "code":
            return codec.encode(pictures, batch_size=batch_size).floats().cpu()
        return pixel_vectors(pictures, codec.dim if kind == "small pixels" else None)

    folders = [str(Path(name).parent) for name in names]
    classified = 1 < len(set(folders)) < len(folders)
    found: dict[str, Any] = {"gallery": len(images)}
    for kind in ("code", "pixels", "small pixels"):
        gallery = vectors(kind, images)
        found[kind] = {"itself": float(finds_itself(vectors(kind, views), gallery).float().mean())}
        if classified:
            found[kind]["class"] = float(same_class(gallery, folders).to(torch.float32).mean())
    return found


def side_by_side(images: Tensor, pictures: dict[str, list[Tensor | None]], rows: int) -> Any:
    """A PIL picture: a row per image, the image and each method in columns, in order of the number of bytes."""
    import torch
    from PIL import Image, ImageDraw

    from opsin.images import to_pil

    order = [m for p in PRECISIONS for m in pictures if m.endswith(f" {p}")]
    height, width = images.shape[-2:]
    enlarged = max(1, round(128 / width))  # small canvases are shown enlarged
    cell, head, gap = (width * enlarged, height * enlarged), 14, 2
    sheet = Image.new("RGB", ((cell[0] + gap) * (1 + len(order)), head + (cell[1] + gap) * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for column, method in enumerate(("image", *order)):
        draw.text((column * (cell[0] + gap) + 2, 1), method, fill="black")
        for row in range(rows):
            index = row * len(images) // rows
            tile = images[index] if method == "image" else pictures[method][index]
            shown = to_pil(torch.full_like(images[index], 0.8) if tile is None else tile)
            place = (column * (cell[0] + gap), head + row * (cell[1] + gap))
            sheet.paste(shown.resize(cell, Image.Resampling.NEAREST), place)
    return sheet


def table(full: dict[str, Any]) -> str:
    """The main numbers for people."""
    height, width = full["canvas"]
    lines = [
        f"{full['model']}: {full['images']} images at {width}×{height} (95 % intervals in brackets)",
        f"{'':<14}{'bytes ≤':>9}{'images':>8}{'PSNR dB':>24}{'SSIM':>24}",
    ]
    for precision in PRECISIONS:
        for method, found in full["methods"].items():
            if method.endswith(f" {precision}"):
                cells = "".join(f"{_cell(found[key]):>24}" for key in ("psnr", "ssim"))
                lines.append(f"{method:<14}{found['budget']:>9}{found['fitting']:>8}{cells}")
    if full["retrieval"]:
        lines.append("retrieval     " + "".join(f"{kind:>16}" for kind in ("code", "pixels", "small pixels")))
        for key in full["retrieval"]["code"]:
            values = (full["retrieval"][kind][key] for kind in ("code", "pixels", "small pixels"))
            lines.append(f"{key:<14}" + "".join(f"{value:>16.3f}" for value in values))
    for name, value in full.get("perceptual", {}).items():
        lines.append(f"{name}: {value}")
    if full["skipped"]:
        lines.append(f"{len(full['skipped'])} images were skipped")
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, Any]) -> str:
    interval = value.get("interval")
    if not value["count"]:
        return "–"
    return f"{value['mean']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
