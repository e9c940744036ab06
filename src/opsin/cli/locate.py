"""``opsin locate VIDEO --image CROP.jpg``: where was it last seen?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsin.types import Track

HELP = "find where an object was last seen in a video, as a box on every frame"
EXAMPLE = """opsin locate kitchen.mp4 --image mug.jpg --sheet sheet.png --clip found.mp4
  opsin locate kitchen.mp4 --frame 900 --box 410 220 500 330 --out track.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("video", help="a video file, a folder of frames, a URL, or camera:0")
    parser.add_argument("--image", help="a picture of the object; with --box or --point, a picture that contains it")
    parser.add_argument(
        "--frame", type=int, help="number of a frame of the video that shows it; needs --box or --point"
    )
    parser.add_argument("--box", type=float, nargs=4, metavar=("X1", "Y1", "X2", "Y2"), help="where it is, in pixels")
    parser.add_argument("--point", type=float, nargs=2, metavar=("X", "Y"), help="a point on it, in pixels")
    parser.add_argument(
        "--search", choices=("before", "all"), default="before",
        help="with --frame: the frames before it, as in VQ2D, or all (default: before)",
    )  # fmt: skip
    parser.add_argument("--model", default="opsin-tiny", help="catalogue name, hf:org/repo@rev or dir:path")
    parser.add_argument("--rate", type=float, help="frames searched per second (default: 5); the track has every frame")
    parser.add_argument(
        "--duration", type=float, help="search only so many seconds; needed for a camera or a live stream"
    )
    parser.add_argument(
        "--threshold", type=float, help="least score of a confident occurrence (default: the library's)"
    )
    parser.add_argument("--size", type=int, help="side of the square model input (default: the library's)")
    parser.add_argument(
        "--tokens", choices=("features", "pred", "proj", "both"),
        help="what places are compared by: backbone features, region tokens, or both (default: the library's)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--clip", type=Path, help="write an annotated mp4")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet PNG")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument(
        "--json", action="store_true", help="print the whole track; without it, its first and last frame"
    )


def run(args: argparse.Namespace) -> int:
    """Locate, write what was asked for, print the result. Not finding the object is an answer, not a failure."""
    from opsin.localization import locate, query_picture, recorded, render, save_track

    given = {"rate": args.rate, "threshold": args.threshold, "size": args.size, "tokens": args.tokens}
    with recorded(args.video, args.duration) as video:  # a live source is recorded once and drawn from the recording
        track = locate(
            video, image=args.image, frame=args.frame, box=args.box, point=args.point, search=args.search,
            duration=args.duration, model=args.model, device=args.device, dtype=args.dtype,
            **{k: v for k, v in given.items() if v is not None},
        )  # fmt: skip
        if args.out:
            save_track(track, args.out)
        if args.clip:
            render.annotated_clip(video, track, args.clip)
        if args.sheet:
            picture = query_picture(video, image=args.image, frame=args.frame, box=args.box)
            render.contact_sheet(video, track, args.sheet, query=picture)
    report(track, full=args.json)
    for path in (args.out, args.clip, args.sheet):
        if path:
            sys.stderr.write(f"wrote {path}\n")
    return 0


def report(track: Track, *, full: bool) -> None:
    """Data on stdout, a sentence on stderr."""
    data = track.to_json()
    if not full:
        rows = data.pop("track")
        data |= {"frames": len(rows), "first": rows[0] if rows else None, "last": rows[-1] if rows else None}
    sys.stdout.write(json.dumps(data) + "\n")
    if track.found:
        first, last = float(track.times[0]), float(track.times[-1])
        where = (
            f"last seen from {first:.2f} s to {last:.2f} s, frames {int(track.frames[0])} to {int(track.frames[-1])}"
        )
        sys.stderr.write(f"found: {where} (score {track.score:.2f})\n")
    else:
        sys.stderr.write(f"not found: the best score is {track.score:.2f}\n")
    if track.skipped:
        sys.stderr.write(f"{track.skipped} damaged frames skipped\n")
