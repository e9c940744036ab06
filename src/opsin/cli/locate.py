"""``opsin locate VIDEO --image CROP.jpg`` (or ``--words "red mug"``): where was it last seen?"""

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
  opsin locate kitchen.mp4 --frame 900 --box 410 220 500 330 --out track.json --plot score.png
  opsin locate kitchen.mp4 --words "red mug" --model radseg-b --cache tokens"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("video", help="a video file, a folder of frames, a URL, or camera:0")
    parser.add_argument(
        "--image", nargs="+",
        help="a picture of the object; with --box or --point, a picture that contains it. Several show the same object",
    )  # fmt: skip
    parser.add_argument(
        "--words", nargs="+", metavar="PHRASE",
        help='a phrase for the object, or several for the same thing; needs a --model that knows words, as "radseg-b"',
    )  # fmt: skip
    parser.add_argument(
        "--frame", type=int, help="number of a frame of the video that shows it; needs --box or --point"
    )
    parser.add_argument("--box", type=float, nargs=4, metavar=("X1", "Y1", "X2", "Y2"), help="where it is, in pixels")
    parser.add_argument("--point", type=float, nargs=2, metavar=("X", "Y"), help="a point on it, in pixels")
    parser.add_argument(
        "--search", choices=("before", "all"), default="before",
        help="with --frame: the frames before it, as in VQ2D, or all (default: before)",
    )  # fmt: skip
    parser.add_argument("--before", type=int, metavar="N", help="search only frames with a smaller number")
    parser.add_argument("--model", default="opsin-tiny", help="catalogue name, hf:org/repo@rev or dir:path")
    parser.add_argument("--preset", help='the way of searching: "template", "ren-vql", "words" (default: the model\'s)')
    parser.add_argument(
        "--tracker", default="auto",
        help='"auto" (SAM 2.1 when its weights are here, else template), "template", or a SAM 2 model (default: auto)',
    )  # fmt: skip
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
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep the encoded frames here, for the next question about this video"
    )
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--mot", type=Path, metavar="FILE", help="write the boxes as text in the MOTChallenge format")
    parser.add_argument("--coco", type=Path, metavar="FILE", help="write the boxes as COCO annotations (JSON)")
    parser.add_argument("--clip", type=Path, help="write an annotated mp4")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet PNG")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the score over time, with the chosen peak")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or auto (default: float32)")
    parser.add_argument(
        "--json", action="store_true", help="print the whole track; without it, its first and last frame"
    )


def run(args: argparse.Namespace) -> int:
    """Locate, write what was asked for, print the result. Not finding the object is an answer, not a failure."""
    from opsin.localization import locate, query_picture, recorded, render, save_track
    from opsin.vql.store import identity

    names = ("rate", "threshold", "size", "tokens", "preset", "before", "cache")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    image = args.image[0] if args.image and len(args.image) == 1 else args.image
    if args.cache:
        identity(args.video)  # what has none, as a camera, is refused before it is recorded
    with recorded(args.video, args.duration) as video:  # a live source is recorded once and drawn from the recording
        track = locate(
            args.video if args.cache else video, image=image, words=args.words, frame=args.frame, box=args.box,
            point=args.point, search=args.search, duration=args.duration, model=args.model, tracker=args.tracker,
            device=args.device, dtype=args.dtype, **given,
        )  # fmt: skip
        if args.out:
            save_track(track, args.out)
        if args.mot:
            write(args.mot, track.to_mot())
        if args.coco:
            write(args.coco, json.dumps(track.to_coco(", ".join(args.words or ["object"])), allow_nan=False) + "\n")
        if args.clip:
            render.annotated_clip(video, track, args.clip)
        if args.sheet:
            shown = args.image[0] if args.image else None
            picture = None if args.words else query_picture(video, image=shown, frame=args.frame, box=args.box)
            render.contact_sheet(video, track, args.sheet, query=picture)
        if args.plot:
            render.timeline_plot(track, args.plot)
    report(track, full=args.json)
    for path in (args.out, args.mot, args.coco, args.clip, args.sheet, args.plot):
        if path:
            sys.stderr.write(f"wrote {path}\n")
    return 0


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    from opsin.hub import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
