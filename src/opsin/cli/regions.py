"""``opsin regions IMAGE``: find the regions of an image, draw them, save their tokens."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from opsin.types import RegionTokens

HELP = "find and draw the regions of images"
EXAMPLE = "opsin regions photo.jpg --out regions.png --tokens regions.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("image", help="an image file")
    parser.add_argument(
        "--model", default="opsin-tiny", help="catalogue name, hf:org/repo@rev or dir:path (default: opsin-tiny)"
    )
    parser.add_argument("--prompts", choices=("slic", "grid"), default="slic", help="where to ask (default: slic)")
    parser.add_argument("--grid-size", type=int, help="prompts per side (default: the model's)")
    parser.add_argument("--threshold", type=float, help="cosine at which prompts merge (default: the model's)")
    parser.add_argument(
        "--grouping", choices=("components", "average"), help="how prompts merge (default: the model's)"
    )
    parser.add_argument("--min-size", type=int, default=1, help="leave out regions of fewer prompts (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("regions.png"), help="picture to write (default: regions.png)")
    parser.add_argument("--tokens", type=Path, help="also write tokens, points and boxes to this .safetensors file")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def run(args: argparse.Namespace) -> int:
    """Encode, draw, report."""
    from opsin.hub import save_safetensors
    from opsin.images import read_image, save_image
    from opsin.regions import RegionModel

    picture = read_image(args.image)
    model = RegionModel.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    regions = model.encode(
        picture,
        prompts=args.prompts,
        grid_size=args.grid_size,
        threshold=args.threshold,
        grouping=args.grouping,
        min_size=args.min_size,
        with_masks=True,
    )
    save_image(draw(picture, regions), args.out)
    if args.tokens:
        columns = {"tokens": regions.tokens, "points": regions.points, "boxes": regions.boxes, "counts": regions.counts}
        save_safetensors(columns, args.tokens)
    print_summary(args, regions)
    return 0


def print_summary(args: argparse.Namespace, regions: RegionTokens) -> None:
    """People's text on stderr, data on stdout."""
    rows = zip(regions.boxes.tolist(), regions.points.tolist(), regions.counts.tolist(), strict=True)
    if args.json:
        table = [{"box": b, "point": p, "prompts": c} for b, p, c in rows]
        summary = {
            "image": args.image,
            "size": regions.sizes[0],
            "model": regions.model,
            "regions": table,
            "picture": str(args.out),
        }
        sys.stdout.write(json.dumps(summary) + "\n")
    sys.stderr.write(f"{len(regions)} regions in {args.image}; picture: {args.out}\n")


def draw(picture: Tensor, regions: RegionTokens) -> Image.Image:
    """The image with every region in a colour of its own, its border and its representative point."""
    import colorsys

    import numpy as np
    from PIL import Image, ImageDraw

    base = (picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    canvas = base.astype(np.float32) * 0.55
    order = regions.counts.argsort(descending=True).tolist()
    for rank, index in enumerate(order):
        mask = regions.masks[index].decode().numpy() if regions.masks else np.zeros(base.shape[:2], bool)
        colour = np.array(colorsys.hsv_to_rgb((rank * 0.618034) % 1, 0.65, 1.0), np.float32) * 255
        canvas[mask] += 0.45 * colour
        inner = mask.copy()
        inner[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        canvas[mask & ~inner] = colour
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    radius = max(2, min(base.shape[:2]) // 200)
    for x, y in regions.points.tolist():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
    return image
